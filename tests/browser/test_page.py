"""The page in a real browser: the right words, the data's own numbers, and no word to anybody else."""

import json
import re

import numpy as np
import pytest

from s2s.explain.packing import unpack
from s2s.explain.page import as_text, render
from tests.browser.conftest import SOURCE, TARGET, explanation

BEATS_A_STEP = ["read", "state", "scores", "weights", "context", "concat", "attentional", "softmax", "choose"]
ENCODER = 3 * len(SOURCE) + 2  # embedding, forward and backward state of each word; memory; hand-over


def value(text):
    """A number as the page writes it."""
    return float(text.replace("−", "-").replace("\u202f", ""))


def agrees(text, number):
    """A shown number is the data's, rounded to the digits shown."""
    if text.startswith("<"):
        return 0 < number < 0.0005
    mantissa, _, power = text.partition("e")
    unit = 10.0 ** (int(value(power or "0")) - len(mantissa.partition(".")[2]))
    return abs(value(text) - number) <= 0.5000001 * unit


def test_the_walk_steps_through_to_the_right_words(opened):
    page = opened(explanation())
    assert page.beats() == ENCODER + len(TARGET) * len(BEATS_A_STEP)
    assert page.texts(".scene .word:not(.item)") == SOURCE
    assert page.written() == []
    for t, token in enumerate(TARGET):
        for kind in range(len(BEATS_A_STEP)):
            page.go(ENCODER + t * len(BEATS_A_STEP) + kind)
            assert page.text(".caption strong").startswith(f"Step {t + 1} of 3: ")
            assert len(page.written()) == t + (kind == len(BEATS_A_STEP) - 1)
        assert token in page.text(".caption")
    assert page.written() == TARGET
    assert page.text(".sentence.target bdi") == "red dog"


def test_numbers_are_those_of_the_data(opened):
    data = explanation()
    (model,) = data["models"]
    page, step = opened(data), model["walks"][0]["steps"][1]
    first = ENCODER + len(BEATS_A_STEP)
    page.go(first + BEATS_A_STEP.index("scores"))
    shown = page.texts(".scene [data-score]")
    assert len(shown) == len(SOURCE)
    assert all(map(agrees, shown, unpack(step["scores"])))
    assert all(map(agrees, page.texts(".positions .number"), unpack(step["scores"])))
    page.go(first + BEATS_A_STEP.index("weights"))
    assert all(map(agrees, page.texts(".scene text[data-weight]"), unpack(step["weights"])))
    page.go(first + BEATS_A_STEP.index("context"))
    lines = page.page.query_selector_all(".scene path.sum")
    widths = [float(line.get_attribute("stroke-width")) for line in lines]
    np.testing.assert_allclose(widths, np.maximum(0.35, 18 * unpack(step["weights"])), atol=0.006)
    cells = page.page.query_selector_all('.scene .cell[data-what="c₂"]')
    context = unpack(step["context"])
    assert len(cells) == context.size
    for cell in cells:
        assert agrees(cell.get_attribute("data-value"), context[int(cell.get_attribute("data-unit")) - 1])
    page.go(first + BEATS_A_STEP.index("choose"))
    assert all(map(agrees, page.texts(".scene [data-prob]"), [one["prob"] for one in step["top"]]))
    rows = [line.split("\n") for line in page.page.locator(".likeliest tbody tr").all_inner_texts()]
    assert len(rows) == len(step["top"])
    assert all(map(agrees, page.texts(".likeliest td:nth-child(4)"), [one["prob"] for one in step["top"]]))
    assert all(map(agrees, page.texts(".likeliest td:nth-child(5)"), [one["logit"] for one in step["top"]]))


def test_every_unit_of_a_vector_can_be_read_by_keyboard(opened):
    data = explanation()
    page = opened(data)
    page.go(0)
    embedding = unpack(data["models"][0]["encoder"]["embedding"])[0]
    slider = page.page.locator('.values[role="slider"]').first
    slider.focus()
    for unit, number in enumerate(embedding):
        said = slider.get_attribute("aria-valuetext")
        assert f"unit {unit + 1} of {embedding.size}" in said and agrees(said.rpartition(": ")[2], number)
        assert said in page.text(".walk .readout")
        page.page.keyboard.press("ArrowRight")
    assert page.text(".counter").startswith("1 of")  # the walk stays where it is


def test_half_precision_is_decoded(opened):
    data = explanation(half=True)
    page = opened(data)
    page.go(0)
    said = page.page.locator(".values").first.get_attribute("aria-valuetext").rpartition(": ")[2]
    number = unpack(data["models"][0]["encoder"]["embedding"])[0, 0]
    assert said.lstrip("−") == f"{abs(number):.3g}".ljust(5, "0")
    assert "three are kept" in page.text(".top")


def test_the_matrix_shows_weights_strongest_and_given_links(opened):
    data = explanation()
    page, walk = opened(data), data["models"][0]["walks"][0]
    weights = np.array([unpack(step["weights"]) for step in walk["steps"]])
    cells = page.page.query_selector_all(".matrix td[data-s]")
    assert len(cells) == weights.size
    for cell in cells:
        t, s = int(cell.get_attribute("data-t")), int(cell.get_attribute("data-s"))
        assert agrees(cell.get_attribute("aria-label").split(": ")[-1].split(" ")[0], weights[t, s])
        classes = cell.get_attribute("class").split()
        assert ("hard" in classes) == ([s, t] in walk["hard"])
        assert ("gold" in classes) == ([s, t] in data["models"][0]["gold"]["links"])
    page.page.locator(".matrix td[data-s]").first.focus()
    page.page.keyboard.press("ArrowDown")
    page.page.keyboard.press("End")
    read = page.text(".matrix .readout")
    assert TARGET[1] in read and SOURCE[-1] in read and "row 2" in read and "column 4" in read
    page.page.keyboard.press("Enter")
    assert page.text(".caption strong") == "Step 2 of 3: softmax"


def test_keys_alone_suffice(opened):
    page = opened(explanation())
    keys = page.page.keyboard
    keys.press("End")
    assert page.written() == TARGET
    keys.press("Home")
    assert page.text(".counter").startswith("1 of")
    keys.press("ArrowRight")
    keys.press("ArrowRight")
    keys.press("ArrowLeft")
    assert page.text(".counter").startswith("2 of")
    keys.press(" ")
    assert page.page.locator(".play").get_attribute("aria-label") == "Pause"
    keys.press(" ")
    assert page.page.locator(".play").get_attribute("aria-label") == "Play"
    # Every control is reached by the tab key, has a name, and shows that it has the focus.
    seen = set()
    for _ in range(90):
        keys.press("Tab")
        told = page.page.evaluate(
            """() => { const one = document.activeElement, box = one.getBoundingClientRect();
            const name = one.ariaLabel || one.textContent || one.closest('label').textContent;
            const style = getComputedStyle(one);
            return [one.tagName + '.' + (one.getAttribute('class') ?? ''), Boolean(name),
                    style.outlineStyle !== 'none' || one.namespaceURI.includes('svg'), box.width > 0]; }"""
        )
        if told[0] == "BODY.":
            break
        assert told[1:] == [True, True, True], told
        seen.add(told[0])
    wanted = {"INPUT.scrub", "BUTTON.play", "BUTTON.chapter", "BUTTON.chip", "DIV.stage", "CANVAS.values"}
    assert wanted <= seen
    assert any(one.startswith("g.node") for one in seen) and any(one.startswith("TD") for one in seen)


def test_playing_goes_on_by_itself_and_ends(opened):
    page = opened(explanation(source=["a", "</s>"], target=["b", "</s>"], bidirectional=False))
    page.page.select_option(".controls select", "4")
    page.go(page.beats() - 3)
    page.page.click(".play")
    page.page.wait_for_selector('.play[aria-label="Play"]')
    assert page.written() == ["b", "</s>"]


KINDS = {
    "dot": {},
    "general": {"attention": "general", "feeding": True},
    "concat GRU, one-way": {"attention": "concat", "cell": "gru", "bidirectional": False},
    "none": {"attention": "none"},
    "none, feeding, tanh": {"attention": "none", "feeding": True, "cell": "tanh", "bridge": "copy"},
    "fixed": {"attention": "fixed", "cell": "relu", "bridge": "zero"},
    "two layers": {"layers": 2, "feeding": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_has_its_walk(opened, kind):
    options = KINDS[kind]
    page = opened(explanation(**options))
    # All at once in the browser: asking for each beat from here takes seconds.
    told = page.page.evaluate(
        """() => { const slider = document.querySelector('.scrub'), told = [];
        for (let beat = 0; beat <= Number(slider.max); beat++) {
          slider.value = beat; slider.dispatchEvent(new Event('input'));
          const values = [...document.querySelectorAll('.values')].map(one => one.ariaValueText);
          const scene = document.querySelector('.scene').outerHTML;
          const all = document.querySelector('.panel').textContent + scene;
          told.push([document.querySelector('.caption strong').textContent,
                     document.querySelectorAll('.equation .symbol').length, values.join() + all]);
        } return told; }"""
    )
    names = [name for name, _, _ in told]
    assert len(names) == page.beats() == len(set(names))
    assert all(symbols > 0 for _, symbols, _ in told)
    assert not [name for name, _, text in told if re.search("NaN|undefined|null|Infinity", text)]
    attention, looks = options.get("attention", "dot"), "Step 1 of 3: scores" in names
    assert looks == (attention not in ("none", "fixed"))
    assert ("Step 1 of 3: context" in names) == (attention != "none")
    assert any("backward" in name for name in names) == options.get("bidirectional", True)
    assert any("layer 2" in name for name in names) == (options.get("layers", 1) == 2)
    assert page.page.locator(".scene .wire.feed").count() == (2 if options.get("feeding") else 0)
    assert page.written() == TARGET
    assert page.page.locator(".matrix table").count() == looks
    if not looks:
        assert "no attention" in page.text(".matrix .lead")


HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img/src=x/onerror=alert(2)>",
    "\"'&amp;</style>",
    "\u202egnp.exe\u2069",
    "{{script}}\u2028",
    "</s>",
]


def test_hostile_text_stays_text(opened):
    data = explanation(source=HOSTILE, target=[*HOSTILE[:3], "</s>"], name="<b>name</b>")
    data["text"] = " ".join(HOSTILE)
    page = opened(data)
    page.page.keyboard.press("End")
    assert page.text(".sentence.source bdi") == data["text"]
    assert page.page.locator(".top b, .scene img, #page img, #page script, #page b").count() == 0
    assert page.page.locator("script").count() == 2
    labels = page.texts(".heat thead th .piece")
    assert labels[:3] == HOSTILE[:3]
    assert labels[3] == "⟨202E⟩gnp.exe⟨2069⟩" and labels[4] == "{{script}}⟨2028⟩"


def test_other_words_lead_elsewhere(opened):
    page = opened(explanation())
    assert page.text(".whatif .becomes bdi") == "▁cat at 0"
    page.page.click('.whatif .chips >> nth=1 >> [aria-pressed="false"]')
    assert page.text(".whatif .becomes bdi") == "▁blue at 0"
    page.page.click('.whatif .chips >> nth=0 >> [aria-pressed="false"]')
    assert page.text(".whatif .becomes bdi") == "▁cat at 1"
    assert page.texts(".whatif .steps tbody th") == ["▁cat", "</s>"]
    assert page.text(".whatif .steps .forced .number:not(.faint)") == "0.125"


def test_the_search_is_a_tree_whose_winner_stands_out(opened):
    data = explanation()
    page, nodes = opened(data), data["models"][0]["beam"]["nodes"]
    assert page.page.locator(".tree .node").count() == len(nodes)
    assert page.texts(".tree .node.best text.piece") == ["<s>", *TARGET]
    page.page.locator(".tree .node").first.focus()
    for _ in TARGET:
        page.page.keyboard.press("ArrowRight")
    winner = nodes[data["models"][0]["beam"]["best"]]
    read = page.text(".search .readout")
    assert "the winner" in read and agrees(read.split("so far ")[1].split(" ")[0], winner["total"])
    page.page.uncheck(".search input")
    assert page.page.locator(".tree .node.dropped").count() == 0


def test_models_stand_side_by_side(opened):
    data = explanation(name="looks")
    data["models"] += explanation(attention="none", name="does not", target=["▁blue", "</s>"])["models"]
    page = opened(data)
    assert page.texts(".compare h3") == ["looks", "does not"]
    assert page.texts(".compare .output") == ["red dog", "blue"]
    assert page.texts(".compare .settings tbody th") == ["model.attention"]
    page.page.locator(".compare .choosers input").fill("1")
    assert page.texts(".compare .likeliest .mine th") == ["▁dog", "</s>"]
    page.page.select_option(".walk .choosers select", "1")
    page.page.keyboard.press("End")
    assert page.written() == ["▁blue", "</s>"]


def test_the_reference_can_be_walked(opened):
    page = opened(explanation(reference=["▁the", "▁dog", "</s>"]))
    page.page.select_option(".walk .choosers select", "1")
    page.page.locator("h1").click()
    page.page.keyboard.press("End")
    assert page.written() == ["▁the", "▁dog", "</s>"]


def test_languages_and_themes_are_switched(opened):
    page = opened(explanation(), language="zh", color_scheme="dark")
    assert page.text(".walk h2") == "逐步演示"
    assert page.page.evaluate("document.documentElement.lang") == "zh-Hans"
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = page.page.evaluate(paper)
    page.page.select_option(".switches label:nth-child(2) select", "light")
    assert page.page.evaluate(paper) != dark
    page.go(5)
    page.page.select_option(".switches select >> nth=0", "en")
    assert page.text(".walk h2") == "The walk"
    assert page.text(".counter").startswith("6 of")


def test_both_languages_say_everything(opened):
    page = opened(explanation())
    keys = re.findall(r"(?m)(?:^|[ ,{])(\w+|\"[^\"]+\"): \"", render(None).partition("const WORDS")[2])
    counts = {key: keys.count(key) for key in keys}
    texts = {key for key in counts if key.startswith(("b_", "n_", "lo_", "fig_"))}
    assert len(texts) > 60
    assert not [key for key in texts if counts[key] != 2]
    page.quiet()


def test_a_telephone_shows_it_without_scrolling_sideways(opened):
    page = opened(explanation(source=SOURCE * 4, reference=TARGET, layers=2), width=390)
    for beat in (0, 60, page.beats() - 1):
        page.go(beat)
        assert page.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_new_data_is_shown_at_run_time(opened):
    page = opened(None)
    assert page.text("main") == "Nothing to show yet."
    page.page.evaluate("data => window.s2s.show(data)", explanation(source=["neu", "</s>"]))
    assert page.texts(".scene .word:not(.item)") == ["neu", "</s>"]
    page.page.keyboard.press("End")
    assert page.written() == TARGET


def test_a_page_may_ask_nobody(opened):
    page = opened(explanation())
    code = "fetch('https://example.invalid/').then(() => 'asked', () => 'refused')"
    assert page.page.evaluate(code) == "refused"
    assert page.asked == []
    assert "Content Security Policy" in page.complaints[0]
    page.complaints.clear()


def test_data_ends_no_element():
    hostile = {"<!--": "</script>", "a": ["\u2028\u2029&<>", "\ud800"]}
    text = as_text(hostile)
    assert not re.search("[<>&\u2028\u2029\ud800]", text)
    assert json.loads(text) == hostile


def test_what_cannot_be_said_is_refused():
    with pytest.raises(ValueError, match="language 'fr'"):
        render({}, "fr")
    with pytest.raises(ValueError, match="connect="):
        render({}, connect="*; script-src *;")
    with pytest.raises(ValueError):
        render({"loss": float("nan")})


def test_a_server_page_may_ask_its_own_server():
    assert "connect-src 'self';" in render(None, connect="'self'")
    assert "connect-src 'none';" in render(explanation())
