"""A browser without a network, and explanations made by hand for it to show."""

import os
import shutil

import numpy as np
import pytest

from s2s.explain.packing import array

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
SOURCE = ["▁rot", "er", "▁Hund", "</s>"]
TARGET = ["▁red", "▁dog", "</s>"]
WORDS = [*TARGET, "▁cat", "▁blue", "▁the"]


def explanation(
    cell="lstm",
    attention="dot",
    feeding=False,
    bidirectional=True,
    layers=1,
    bridge="dense",
    source=SOURCE,
    target=TARGET,
    reference=None,
    name="small",
    half=False,
):
    """An explanation of a model that does not exist: drawn numbers in the shapes of a real one's."""
    rng = np.random.default_rng(0)
    S, T, E, H, Hd = len(source), len(target), 6, 8, 4 if bidirectional else 8
    M, tokens = Hd * (1 + bidirectional), [*target, *(word for word in WORDS if word not in target)]
    gate_names = {"lstm": ["input", "forget", "output", "candidate"], "gru": ["reset", "update", "candidate"]}
    gate_names = gate_names.get(cell, [])

    def drawn(*shape):
        return array(rng.uniform(-1, 1, shape), "f16" if half else "f32")

    def state(*shape):
        gates = {name: array(rng.uniform(0, 1, shape)) for name in gate_names}
        return {"gates": gates, **({"cell": drawn(*shape)} if cell == "lstm" else {}), "state": drawn(*shape)}

    def word(token, logits):
        number = tokens.index(token)
        total = float(np.log(np.exp(logits).sum()))
        return {
            "id": number,
            "token": token,
            "prob": float(np.exp(logits[number] - total)),
            "logit": float(logits[number]),
            "rank": int((logits > logits[number]).sum()),
        }

    def walk(kind, chosen):
        steps = []
        for t, token in enumerate(chosen):
            logits = rng.uniform(-2, 2, len(tokens))
            logits[tokens.index(token)] += 3 if kind == "best" else 0
            step = {
                "t": t,
                "read": {"id": t, "token": chosen[t - 1] if t else "<s>"},
                "embedding": drawn(E),
                "layers": [state(H) for _ in range(layers)],
                "attentional": drawn(H),
                "log_total": float(np.log(np.exp(logits).sum())),
                "top": sorted((word(one, logits) for one in tokens), key=lambda one: one["rank"]),
                "chosen": word(token, logits),
            }
            if attention not in ("none", "fixed"):
                scores = rng.uniform(-3, 3, S)
                scores[min(t, S - 1)] += 3
                weights = np.exp(scores) / np.exp(scores).sum()
                step |= {"scores": array(scores), "weights": array(weights)}
            if attention != "none":
                step["context"] = drawn(M)
            steps.append(step)
        log_prob = sum(float(np.log(step["chosen"]["prob"])) for step in steps)
        words = [*range(len(chosen) - 1), None]
        text = "".join(chosen[:-1]).replace("▁", " ").strip()
        hard = [[min(t, S - 1), t] for t in range(T - 1)] if attention not in ("none", "fixed") else []
        ids = [step["chosen"]["id"] for step in steps]
        return {
            "name": kind,
            "text": text,
            "log_prob": log_prob,
            "score": log_prob,
            "tokens": chosen,
            "ids": ids,
            "words": words,
            "hard": hard,
            "steps": steps,
        }

    walks = [walk("best", target)] + ([walk("reference", reference)] if reference else [])
    best = walks[0]
    nodes = [{"id": 0, "parent": None, "t": -1, "token": {"id": 1, "token": "<s>"}, "log_prob": 0.0}]
    nodes[0] |= {"total": 0.0, "kept": True, "finished": False, "rank": 0, "best": True}
    parent, total = 0, 0.0
    for t, step in enumerate(best["steps"]):
        here = parent
        for rank, one in enumerate([step["chosen"], {**step["top"][-1], "token": WORDS[3 + t % 3]}]):
            log_prob = float(np.log(one["prob"]))
            node = {
                "id": len(nodes),
                "parent": here,
                "t": t,
                "token": {"id": one["id"], "token": one["token"]},
            }
            node |= {
                "log_prob": log_prob,
                "total": total + log_prob,
                "kept": not rank or t == 0,
                "finished": t == T - 1,
            }
            node |= {"rank": rank, "best": not rank, **({"score": total + log_prob} if t == T - 1 else {})}
            nodes.append(node)
            parent = node["id"] if not rank else parent
        total += nodes[parent]["log_prob"]
    what_if = []
    for t in range(T - 1):
        for token in ("▁cat", "▁blue") if t == 0 else ("▁cat",):
            other = {"id": tokens.index(token), "token": token, "prob": 0.125, "logit": 0.5, "rank": 1}
            steps = [{"chosen": other}, *({"chosen": step["chosen"]} for step in best["steps"][t + 1 :])]
            text = f"{token} at {t}"
            what_if.append(
                {"walk": 0, "t": t, "token": other, "text": text, "log_prob": -2.5 - t, "steps": steps}
            )
    model = {
        "name": name,
        "workdir": name,
        "config": {"model.cell": cell, "model.attention": attention, "model.hidden": H},
        "parameters": 1234567,
        "sizes": {
            "S": S,
            "T": T,
            "E": E,
            "H": H,
            "M": M,
            "encoder_hidden": Hd,
            "layers": layers,
            "encoder_layers": layers,
            "source_vocab": 20,
            "target_vocab": len(tokens),
        },
        "cell": cell,
        "attention": attention,
        "window": "global",
        "input_feeding": feeding,
        "bridge": bridge,
        "bidirectional": bidirectional,
        "tie": "none",
        "dtype": "float32",
        "gate_names": gate_names,
        "source": {
            "kind": "tokens",
            "text": " ".join(source[:-1]),
            "tokens": source,
            "ids": list(range(S)),
            "words": [*range(S - 1), None],
            "unknown": [False] * S,
        },
        "encoder": {
            "embedding": drawn(S, E),
            "layers": [
                {"layer": layer, "direction": way, **state(S, Hd)}
                for layer in range(layers)
                for way in (("forward", "backward") if bidirectional else ("forward",))
            ],
            "memory": drawn(S, M),
            "summary": drawn(M),
        },
        "hand_over": {
            "kind": bridge,
            "from": [None if bridge == "zero" else layer for layer in range(layers)],
            "read": [
                {"state": drawn(M), **({"cell": drawn(M)} if cell == "lstm" else {})} for _ in range(layers)
            ],
            "states": [
                {"state": drawn(H), **({"cell": drawn(H)} if cell == "lstm" else {})} for _ in range(layers)
            ],
        },
        "walks": walks,
        "reference": len(walks) - 1 if reference else None,
        "gold": {"walk": 0, "links": [[0, 0], [2, 1]]} if attention not in ("none", "fixed") else None,
        "beam": {
            "width": 2,
            "length_penalty": 0.0,
            "coverage_penalty": 0.0,
            "best": parent,
            "nodes": nodes,
        },
        "what_if": what_if,
    }
    return {
        "format": 1,
        "version": "0",
        "text": " ".join(source[:-1]).replace("▁", ""),
        **({"reference": "".join(reference[:-1]).replace("▁", " ")} if reference else {}),
        "left_out": ["precision"] if half else [],
        "digits": 3 if half else 6,
        "units_shown": None,
        "models": [model],
    }


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium. Not for a whole session: while it is open, this thread has a running event loop."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not os.path.exists(CHROMIUM):
        pytest.skip(f"needs Chromium at {CHROMIUM}")
    with api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield chromium
        chromium.close()


class Opened:
    """A page of an explanation as its reader has it, with what it complained of and asked for."""

    def __init__(self, context, file):
        self.complaints, self.asked = [], []
        context.set_default_timeout(5000)
        context.route("**/*", self._route)
        self.page = context.new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append("dialog"), dialog.dismiss()))
        self.file = file.as_uri()
        self.page.goto(self.file)

    def _route(self, route):
        if route.request.url == self.file:
            return route.continue_()
        self.asked.append(route.request.url)
        return route.abort()

    def go(self, beat):
        """Moves the slider, as a hand would."""
        self.page.evaluate(
            "at => { const slider = document.querySelector('.scrub'); slider.value = at;"
            " slider.dispatchEvent(new Event('input')); }",
            beat,
        )

    def beats(self):
        return int(self.page.get_attribute(".scrub", "max")) + 1

    def text(self, selector):
        return self.page.locator(selector).first.text_content()

    def texts(self, selector):
        return self.page.locator(selector).all_text_contents()

    def written(self):
        """The words that stand in the picture's top row."""
        return [element.text_content() for element in self.page.query_selector_all(".scene .written.on")]

    def quiet(self):
        assert self.complaints == [] and self.asked == []


@pytest.fixture
def opened(browser, tmp_path):
    """Opens an explanation's page; its contexts are closed, and its complaints looked at, in the end."""
    from s2s.explain.page import render

    contexts = []

    def open_(data, language="en", width=1280, **keywords):
        file = tmp_path / f"{len(contexts)}.html"
        file.write_text(render(data, language), encoding="utf-8")
        keywords = {"viewport": {"width": width, "height": 900}, "reduced_motion": "reduce", **keywords}
        context = browser.new_context(**keywords)
        page = Opened(context, file)
        contexts.append((context, page))
        return page

    yield open_
    for context, page in contexts:
        context.close()
        page.quiet()
