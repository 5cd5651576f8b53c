"""The report on small work directories made by hand."""

import csv
import dataclasses
import io
import json
import random
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from s2s import config
from s2s.data import vocab
from s2s.learn import significance
from s2s.report import __main__ as report
from s2s.report import collect, rows
from s2s.workdir import Workdir
from tests.system.conftest import command

HOSTILE = "<script>alert(1)</script>|$x_{1}$ & 100% \\input{/etc/passwd} \x1b[31m\n\"'`=*~^#\ud800"
SENTENCES = 24


def make(folder, *, seed=1, wer=20.0, finished=True, shift=0.0, **fields):
    """A work directory; the outputs of a finished one are wrong for about ``wer`` % of the words."""
    cfg = config.default()
    cfg.name = "made"
    cfg.data.vocab.kind = "symbols"
    cfg.search.name = "beam"
    cfg.run.seed = seed
    cfg.run.metric = "word_error_rate"
    for name, value in fields.items():
        cfg.update_from_flattened_dict({name.replace("__", "."): value})
    work = Workdir(folder)
    work.write_config(config.freeze(cfg))
    symbols = vocab.SymbolVocabulary([*"abcdefgh"], "")
    phones = vocab.SymbolVocabulary([*"abcdefgh"], " ")
    vocab.save_vocabularies(vocab.Vocabularies(symbols, phones), work.vocab)
    if not finished:
        return work
    table = []
    for part, more in (("dev", 0.0), ("test", shift)):
        rng = np.random.default_rng([seed, round(10 * wer)])
        lines = []
        for number in range(SENTENCES):
            target = " ".join("abcdefgh"[(number + k) % 8] for k in range(2 + number % 6))
            wrong = rng.random() < (wer + more) / 100
            lines.append(
                {
                    "source": target.replace(" ", "").upper() + part,
                    "references": [target],
                    "output": target + " a" * wrong,
                    "length": 1 + number % 12,
                }
            )
        missed = 100 * sum(line["output"] != line["references"][0] for line in lines) / SENTENCES
        for search, worse in (("greedy", 5.0), ("beam 5", 0.0)):
            figures = {"loss": 0.1 + missed / 100, "word_error_rate": missed + worse}
            table.append({"part": part, "pairs": SENTENCES, "search": search, **figures})
        work.outputs.mkdir(exist_ok=True)
        (work.outputs / f"{part}.beam.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    history = [{"step": step, "epoch": step / 10, "loss": 5 / step + seed / 100} for step in (10, 20, 30)]
    work.results.write_text(json.dumps({"scores": table, "history": history}))
    return work


def ask(*arguments, capsys):
    """The report's exit code, output and complaints."""
    code = report.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def attentions(tmp_path):
    """Three attentions, three seeds each; "general" is best on dev, "dot" on test."""
    for name, wer, shift in (("dot", 40, -30), ("general", 12, 30), ("none", 75, 0)):
        for seed in (1, 2, 3):
            make(
                tmp_path / f"{name}_{seed}", seed=seed, wer=wer, shift=shift, model__attention=name,
                name=f"any{seed}", data__cache=str(tmp_path), run__log_every=seed,
            )  # fmt: skip
    return tmp_path


def raw(*arguments, capsys):
    code, out, err = ask(*arguments, "--format", "csv", capsys=capsys)
    assert code == 0, err
    return list(csv.DictReader(io.StringIO(out)))


def test_runs_that_differ_in_their_seed_are_one_row(attentions, capsys):
    found = raw(attentions, "--metric", "word_error_rate", capsys=capsys)
    assert [(one["row"], one["model.attention"], one["part"], one["seeds"]) for one in found] == [
        (str(row), name, part, "3")
        for row, name in enumerate(("dot", "general", "none"), 1)
        for part in ("dev", "test")
    ]
    for one in found:
        values = [
            json.loads((attentions / f"{one['model.attention']}_{seed}" / "results.json").read_text())[
                "scores"
            ]
            for seed in (1, 2, 3)
        ]
        wanted = [
            row["word_error_rate"]
            for table in values
            for row in table
            if (row["part"], row["search"]) == (one["part"], "beam 5")
        ]
        interval = significance.interval(wanted)
        assert [float(one[name]) for name in ("mean", "sd", "low", "high")] == list(interval[1:])
        assert one["scores"] == " ".join(f"{seed}:{value!r}" for seed, value in enumerate(wanted, 1))


def test_greedy_where_it_is_asked_for(attentions, capsys):
    beam, greedy = (raw(attentions, *flags, capsys=capsys) for flags in ([], ["--search", "greedy"]))
    assert {one["search"] for one in beam} == {"beam 5"} and {one["search"] for one in greedy} == {"greedy"}
    assert [float(g["mean"]) - float(b["mean"]) for b, g in zip(beam, greedy, strict=True)] == pytest.approx(
        [5.0] * 6
    )
    assert raw(attentions, "--search", "beam", capsys=capsys) == beam


def test_the_best_is_chosen_on_dev_though_another_is_better_on_test(attentions, capsys):
    found = raw(attentions, "--best", capsys=capsys)
    means = {(one["model.attention"], one["part"]): float(one["mean"]) for one in found}
    assert means["general", "dev"] < means["dot", "dev"] and means["dot", "test"] < means["general", "test"]
    assert {one["model.attention"] for one in found if one["chosen"] == "1"} == {"general"}
    code, out, _ = ask(attentions, "--best", capsys=capsys)
    assert code == 0 and "on dev alone; no figure on test had a say" in out


def test_the_best_of_groups(tmp_path, capsys):
    for hidden, wers in ((32, (30, 60)), (64, (70, 20))):
        for dropout, wer in zip((0.1, 0.3), wers, strict=True):
            make(tmp_path / f"{hidden}_{dropout}", wer=wer, model__hidden=hidden, model__dropout=dropout)
    found = raw(tmp_path, "--best", "hidden", "--part", "dev", capsys=capsys)
    chosen = [(one["model.hidden"], one["model.dropout"]) for one in found if one["chosen"] == "1"]
    assert chosen == [("32", "0.1"), ("64", "0.3")]


def test_without_dev_nothing_is_chosen(tmp_path, capsys):
    work = make(tmp_path / "a")
    results = json.loads(work.results.read_text())
    results["scores"] = [row for row in results["scores"] if row["part"] == "test"]
    work.results.write_text(json.dumps(results))
    code, out, _ = ask(tmp_path, "--best", capsys=capsys)
    assert code == 0 and "Nothing can be chosen" in out


def test_order_of_the_folders_changes_nothing(attentions, capsys):
    make(attentions / "twin", seed=1, wer=90, model__attention="dot")
    for name in ("begun", "begun_too"):
        make(attentions / name, finished=False)
    folders = sorted(attentions.iterdir())
    for form in ("text", "csv", "html", "latex"):
        flags = ["--baseline", "1", "--best", "--samples", 50, "--resamples", 50, "--format", form]
        told = ask(*folders, *flags, capsys=capsys)
        assert told[0] == 0
        shuffled = random.Random(3).sample(folders, len(folders))
        assert ask(*shuffled, folders[0], *flags, capsys=capsys) == told
        assert ask(*folders[::-1], *flags, capsys=capsys) == told
        assert ask(attentions, *flags, capsys=capsys) == told


def test_replicas_cells_and_an_ensemble(tmp_path, capsys):
    sweep, together = tmp_path / "sweep", tmp_path / "together"
    for hidden in (32, 64):
        make(sweep / "cells" / f"h{hidden}", model__hidden=hidden)
    plan = {"cells": [{"name": name} for name in ("h32", "h64", "h128")]}
    (sweep / "sweep.json").write_text(json.dumps(plan))
    for number in (1, 2):
        make(together / f"replica_{number:02}", seed=number, wer=10 * number, model__hidden=96)
    whole = make(together, model__hidden=96, wer=10, finished=False)
    ensemble = {"part": "test", "pairs": SENTENCES, "search": "ensemble 2, beam 5", "word_error_rate": 7.5}
    means = {"part": "test", "search": "beam 5", "word_error_rate": {"mean": 1.0, "sd": 2.0}}
    whole.results.write_text(json.dumps({"scores": [means, ensemble]}))
    found = raw(sweep, together, "--part", "test", capsys=capsys)
    assert [(one["model.hidden"], one["ensemble"], one["seeds"]) for one in found] == [
        ("32", "", "1"), ("64", "", "1"), ("96", "", "2"), ("96", "ensemble 2", "1"),
    ]  # fmt: skip
    assert float(found[-1]["mean"]) == 7.5
    code, out, _ = ask(tmp_path, capsys=capsys)
    assert code == 0 and "ensemble 2" in out
    assert f"unfinished: {sweep / 'cells' / 'h128'}: not begun" in out


def test_broken_runs_are_counted_and_told(attentions, capsys):
    make(attentions / "begun", finished=False)
    (attentions / "empty" / "h1").mkdir(parents=True)
    failed = make(attentions / "failed", finished=False)
    (failed.path / "failure.json").write_text(json.dumps({"reason": "the loss\nis not finite"}))
    (make(attentions / "failed2", finished=False).path / "failure.json").write_text("[")
    damaged = [make(attentions / f"damaged{n}") for n in range(5)]
    damaged[0].results.write_text('{"scores": [{"part"')
    damaged[1].results.write_text("[" * 100_000)
    damaged[2].results.write_bytes(b"\xff\xfe")
    damaged[3].results.write_text('{"scores": [{"part": 3}]}')
    damaged[4].config.write_text('{"data": {"invented": 1}}')
    code, out, _ = ask(attentions, attentions / "nothing", capsys=capsys)
    assert code == 0
    assert "Not in the table: 2 failed, 5 damaged, 1 unfinished, 1 missing." in out
    assert "the loss\N{REPLACEMENT CHARACTER}is not finite" in out and "no reason given" in out
    assert "9 runs" in out


def test_a_seed_that_is_there_twice_counts_once(attentions, capsys):
    make(attentions / "z", seed=1, wer=90, model__attention="dot")
    code, out, _ = ask(attentions, capsys=capsys)
    assert code == 0 and "1 repeated" in out and "9 runs" in out


def test_figures_that_are_none(attentions, capsys):
    path = attentions / "dot_1" / "results.json"
    results = json.loads(path.read_text())
    for row, value in zip(results["scores"], (float("nan"), None, "inf", float("inf")), strict=True):
        row["word_error_rate"] = value
    results["history"] = [3, {"step": "x"}, {"step": 4, "loss": None}, {"step": 5, "loss": float("nan")}]
    path.write_text(json.dumps(results))
    code, out, _ = ask(attentions, capsys=capsys)
    assert code == 0 and "(2 of 3)" in out
    assert ask(attentions, "--format", "html", "--baseline", "dot", "--samples", 9, capsys=capsys)[0] == 0


def test_comparison_is_the_paired_test_of_the_outputs(attentions, capsys):
    flags = ["--samples", 200, "--resamples", 200, "--part", "test"]
    found = raw(attentions, "--compare", "dot", "none", *flags, capsys=capsys)
    (one,) = (line for line in found if line["baseline"])
    assert (one["model.attention"], one["baseline"]) == ("none", "1")
    sides = []
    for name in ("dot", "none"):
        counted = []
        for seed in (1, 2, 3):
            text = (attentions / f"{name}_{seed}" / "outputs" / "test.beam.jsonl").read_text()
            wrong = [
                json.loads(line)["output"] != json.loads(line)["references"][0] for line in text.splitlines()
            ]
            counts = np.stack([np.array(wrong, float), np.ones(SENTENCES)], 1)
            counted.append(significance.Statistics(counts, lambda sums: 100 * sums[..., 0] / sums[..., 1]))
        sides.append(significance.over_seeds(counted))
    wanted = significance.paired(*sides, samples=200, resamples=200)
    assert float(one["difference"]) == pytest.approx(wanted.difference)
    assert float(one["p_randomisation"]) == wanted.randomisation < 0.05
    assert float(one["p_bootstrap"]) == wanted.bootstrap
    # The figure that is tested is the table's.
    means = {line["model.attention"]: float(line["mean"]) for line in found}
    assert means["none"] - means["dot"] == pytest.approx(wanted.difference)
    assert 0 < float(one["p_welch"]) < 0.05 and float(one["p_seeds"]) == pytest.approx(0.1)


def test_every_row_against_a_baseline(attentions, capsys):
    flags = ["--baseline", "2", "--samples", 200, "--resamples", 50]
    found = [line for line in raw(attentions, *flags, capsys=capsys) if line["baseline"]]
    assert [(line["row"], line["part"]) for line in found] == [("1", "test"), ("3", "test")]
    ps = [float(line["p_randomisation"]) for line in found]
    assert [float(line["p_holm"]) for line in found] == significance.holm(ps)
    code, out, _ = ask(attentions, *flags, capsys=capsys)
    assert code == 0 and "24 sentences with the outputs of seeds 1, 2, 3" in out and "Holm 1979" in out


@pytest.mark.parametrize("harm", ["gone", "cut", "text", "length", "other", "short", "loss"])
def test_without_outputs_seeds_alone_are_compared(attentions, harm, capsys):
    path = attentions / "dot_2" / "outputs" / "test.beam.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    if harm == "gone":
        path.unlink()
    elif harm == "cut":
        path.write_text("".join(lines)[:-20])
    elif harm == "text":
        path.write_text(json.dumps(json.loads(lines[0]) | {"references": "abc"}) + "\n" + "".join(lines[1:]))
    elif harm == "length":
        path.write_text(
            json.dumps(json.loads(lines[0]) | {"length": float("inf")}) + "\n" + "".join(lines[1:])
        )
    elif harm == "other":
        path.write_text("".join(lines[1:] + lines[:1]))
    elif harm == "short":
        path.write_text("".join(lines[1:]))
    metric = "loss" if harm == "loss" else "word_error_rate"
    flags = ["--compare", "1", "3", "--metric", metric]
    (one,) = (line for line in raw(attentions, *flags, capsys=capsys) if line["baseline"])
    assert one["p_randomisation"] == "" and float(one["p_welch"]) < 1 and float(one["p_seeds"]) <= 1
    reason = {
        "gone": "cannot be read",
        "cut": "damaged",
        "text": "no list of references",
        "length": "no length",
        "other": "were tested on other sentences",
        "short": "23 outputs",
    }
    code, out, _ = ask(attentions, *flags, capsys=capsys)
    assert code == 0 and reason.get(harm, "no metric of texts") in out
    assert ask(attentions, *flags, "--format", "html", capsys=capsys)[0] == 0


@pytest.mark.parametrize("seeds", [(1, 2, 3), (2, 3)])
def test_seeds_with_sentences_of_their_own_are_compared_with_all_of_them(attentions, seeds, capsys):
    """As generated tasks have; but where only some seeds share theirs, nobody knows what is independent."""
    for name in ("dot", "none"):
        for seed in seeds:
            path = attentions / f"{name}_{seed}" / "outputs" / "test.beam.jsonl"
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            other = {3: str(seed), 2: "more"}[len(seeds)]
            path.write_text(
                "".join(json.dumps(line | {"source": line["source"] + other}) + "\n" for line in lines)
            )
    code, out, _ = ask(attentions, "--compare", "1", "3", "--samples", 99, capsys=capsys)
    assert code == 0
    wanted = {3: f"{3 * SENTENCES} sentences with the outputs of seeds 1, 2, 3", 2: "and some on others"}
    assert wanted[len(seeds)] in out


def test_bleu_is_compared_by_sacrebleu(tmp_path, capsys):
    for name, wer in (("dot", 20), ("none", 70)):
        work = make(tmp_path / name, wer=wer, model__attention=name)
        results = json.loads(work.results.read_text())
        for row in results["scores"]:
            row["bleu"] = 30.0
        work.results.write_text(json.dumps(results))
    code, out, err = ask(tmp_path, "--metric", "bleu,chrf", capsys=capsys)
    assert code == 2 and "no run has --metric 'chrf'" in err and "bleu" in err
    flags = ["--metric", "bleu", "--compare", "1", "2", "--samples", 50, "--resamples", 50]
    code, out, _ = ask(tmp_path, *flags, capsys=capsys)
    assert code == 0 and "Maxwell 2005, by sacreBLEU" in out


class Page(HTMLParser):
    """Tags, their attributes and the text of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.said = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.said.append(data)


def test_the_page_stands_alone(attentions, capsys):
    path = attentions / "report.html"
    flags = ["--baseline", "1", "--best", "--samples", 50, "--output", path]
    code, out, _ = ask(attentions, *flags, capsys=capsys)
    assert code == 0 and out == ""
    text = path.read_text()
    page = Page()
    page.feed(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert links and all(value.startswith("#") for value in links)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)), "identifiers of two drawings must not meet"
    assert set(links) <= {"#" + one for one in ids}
    for used in re.findall(r"url\(#(.*?)\)", text):
        assert used in ids
    drawings = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(drawings) == 2, "learning curves and score by length; no number varies"
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert "currentColor" in drawing and "#010203" not in drawing
    said = "".join(page.said)
    for words in ("Learning curves", "by source length", "Best on dev", "Differences in test"):
        assert words in said


def test_numbers_that_vary_are_drawn(tmp_path, capsys):
    for rate in (0.0001, 0.001, 0.01):
        for hidden in (32, 64):
            make(tmp_path / f"{rate}_{hidden}", optim__learning_rate=rate, model__hidden=hidden, wer=hidden)
    path = tmp_path / "report.html"
    assert ask(tmp_path, "--output", path, capsys=capsys)[0] == 0
    fields = re.findall(r"<svg.*?</svg>", path.read_text(), re.S)[-1]
    assert "learning_rate" in fields and ">hidden<" in fields
    assert len(re.findall("<svg", path.read_text())) == 3


@pytest.mark.parametrize("form", report.FORMATS)
def test_hostile_text_stays_text(tmp_path, form, capsys):
    for wer, source in ((10, HOSTILE), (30, "plain"), (20, "=1+1")):
        work = make(tmp_path / f"run{wer}", wer=wer)
        cfg = dataclasses.asdict(work.read_config())
        cfg["name"] = cfg["data"]["train"] = source
        work.config.write_text(json.dumps(cfg))
    bad = tmp_path / "<img src=x>|\\input{b}\x1b[2J"
    make(bad, finished=False)
    (bad / "failure.json").write_text(json.dumps({"reason": HOSTILE}))
    path = tmp_path / "report"
    flags = ["--format", form, "--compare", "1", "3", "--samples", 20, "--output", path]
    code, _, err = ask(tmp_path, *flags, capsys=capsys)
    assert code == 0, err
    told = path.read_bytes().decode("utf-8")
    if form == "csv":
        values = {line["data.train"] for line in csv.DictReader(io.StringIO(told, newline=""))}
        assert values == {HOSTILE.replace("\ud800", "?"), "plain", "=1+1"}
        return
    assert "\x1b" not in told and "alert(1)" in told
    if form == "html":
        page = Page()
        page.feed(told)
        assert not {"script", "img"} & set(page.tags) and "<script>alert(1)</script>" in "".join(page.said)
        for drawing in re.findall(r"<svg.*?</svg>", told, re.S):
            ElementTree.fromstring(drawing)
    elif form == "latex":
        outside = "\n".join(line for line in told.splitlines() if not line.startswith("%"))
        assert r"\input" not in outside and r"\textbackslash{}input\{/etc/passwd\}" in outside
        assert r"\$x\_\{1\}\$ \& 100\%" in outside
        for line in outside.splitlines():
            if line.endswith(r"\\"):
                assert len(re.findall(r"(?<!\\)&", line)) == len(
                    re.findall(r"(?<!\\)&", header(outside, line))
                )
    elif form == "markdown":
        assert r"\<script\>" in told
        lines = [line for line in told.splitlines() if line.startswith("|")]
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in lines[:5]}
        assert len(bars) == 1, "every row has as many cells"


def header(latex, line):
    """The first line of the LaTeX table in which a line stands."""
    return latex[: latex.index(line) + len(line)].split(r"\toprule")[-1].strip().splitlines()[0]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--by", "hiden"], "did you mean model.hidden"),
        (["--by", "epochs,size"], None),
        (["--best", "nme"], "no one field 'nme'"),
        (["--compare", "1", "9"], "no row is '9'"),
        (["--compare", "o", "1"], "more than one row is 'o'"),
        (["--metric", "bleu"], "no run has --metric 'bleu': there are loss, word_error_rate"),
        (["--search", "sample"], "searches that there are: beam 5, greedy"),
        (["--samples", "0"], "--samples 0 must be at least 1"),
    ],
)
def test_mistaken_questions_are_answered_kindly(attentions, flags, complaint, capsys):
    code, out, err = ask(attentions, *flags, capsys=capsys)
    assert (code, out == "") == ((2, True) if complaint else (0, False))
    assert (complaint or "") in err and (err.startswith("s2s: ") or not complaint)


def test_nothing_to_report(tmp_path, capsys):
    code, _, err = ask(tmp_path, capsys=capsys)
    assert code == 2 and "no finished run to report on" in err and "no work directory lies there" in err


def test_rows_are_named_by_what_is_asked_for(attentions, capsys):
    found = raw(attentions, "--by", "hidden,model.attention", capsys=capsys)
    assert (
        list(found[0])[:3] == ["row", "model.hidden", "model.attention"] and found[0]["model.hidden"] == "256"
    )


def test_parts_of_a_corpus_are_named_once(tmp_path, capsys):
    for language in ("ice", "dut", "fre"):
        files = {f"data__{part}": f"a/words/{language}_{part}.tsv" for part in ("train", "dev", "test")}
        make(tmp_path / language, **files)
    found = raw(tmp_path, capsys=capsys)
    assert "data.train" in found[0] and "data.dev" not in found[0]
    assert found[0]["data.train"] == "a/words/dut_train.tsv"
    code, out, _ = ask(tmp_path, capsys=capsys)
    assert code == 0 and " dut_train.tsv" in out and "words" not in out


def test_rows_are_in_order_of_their_numbers(tmp_path):
    for hidden in (1000, 32, 256):
        make(tmp_path / str(hidden), model__hidden=hidden)
    table, _ = rows.rows(collect.collect([str(tmp_path)]).runs)
    assert [row.fields["model.hidden"] for row in table] == [32, 256, 1000]


def test_what_a_run_writes_is_what_the_report_reads(trained, capsys):
    """A real run keeps its outputs, from which its figures can be made again."""
    assert sorted(path.name for path in Workdir(trained).outputs.iterdir()) == [
        "dev.greedy.jsonl",
        "test.greedy.jsonl",
    ]
    (run,) = collect.collect([str(trained)]).runs
    for part in ("dev", "test"):
        found = run.outputs(part, None)
        assert min(found.lengths) > 0
        for metric in ("word_error_rate", "symbol_error_rate", "exact_match"):
            counted = significance.statistics(metric, found.outputs, found.references, run.units())
            assert float(counted.score(counted.counts.sum(0))) == run.score(part, None, metric)
    done = command("s2s.report", trained, "--metric", "exact_match")
    assert b"test exact match" in done.stdout
