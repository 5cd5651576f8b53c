"""translate, evaluate and score on a trained model, with input as it comes."""

import json

import numpy as np
import pytest

from s2s import evaluate, score, translate, translator
from s2s.translator import Translator
from s2s.workdir import Workdir
from tests.system.conftest import command


def run(main, *arguments, capsysbinary):
    """Runs a command in this process: its exit code, standard output and error."""
    code = main([str(argument) for argument in arguments])
    out, err = capsysbinary.readouterr()
    return code, out.decode(), err.decode()


@pytest.fixture
def lines(tmp_path):
    def write(content):
        path = tmp_path / "input.txt"
        path.write_bytes(content)
        return path

    return write


def test_one_line_out_per_line_in_whatever_the_input(trained, lines, tmp_path, capsysbinary):
    awkward = [
        b"a b c d", b"", b"   ", b"\xff\xfe broken", b"d c b a\r", "z ü 漢 字".encode(), b"a\0b", b"\t",
        ("a " * 300).encode(), "a\u2028b c".encode(), b"a b c d",
    ]  # fmt: skip
    output = tmp_path / "out.txt"
    code, _, err = run(
        translate.main, "--workdir", trained, "--input", lines(b"\n".join(awkward)), "--output", output,
        "--beam", 2, capsysbinary=capsysbinary,
    )  # fmt: skip
    assert code == 0, err
    out = output.read_bytes().split(b"\n")
    assert out.pop() == b"" and len(out) == len(awkward)
    assert out[1] == out[2] == out[7] == b"", "blank lines stay blank"
    assert out[0] == out[-1] != b"", "a line's output depends on the line alone"


def test_empty_input_gives_empty_output(trained, lines, capsysbinary):
    assert (
        run(translate.main, "--workdir", trained, "--input", lines(b""), capsysbinary=capsysbinary)[1] == ""
    )


def test_ctrl_c_leaves_what_is_translated_and_no_trace(trained, lines, capsysbinary, monkeypatch):
    def pressed(self, params, texts, progress=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(Translator, "__call__", pressed)
    done = run(translate.main, "--workdir", trained, "--input", lines(b"a b\n"), capsysbinary=capsysbinary)
    assert done == (130, "", "")


def test_nbest_scores_and_alignments(trained, lines, tmp_path, capsysbinary):
    pharaoh, soft = tmp_path / "links.txt", tmp_path / "soft.jsonl"
    arguments = ["--workdir", trained, "--input", lines(b"a b c d e\n\nf g h i\n"), "--beam", 3]
    _, out, _ = run(
        translate.main,
        *arguments,
        "--nbest",
        3,
        "--scores",
        "--alignments",
        pharaoh,
        capsysbinary=capsysbinary,
    )
    rows = [line.split("\t") for line in out.splitlines()]
    assert [row[:2] for row in rows] == [
        ["1", "1"], ["1", "2"], ["1", "3"], ["2", "1"], ["3", "1"], ["3", "2"], ["3", "3"],
    ]  # fmt: skip
    scores = [float(row[2]) for row in rows[:3]]
    assert scores == sorted(scores, reverse=True)
    assert len({row[4] for row in rows[:3]}) == 3
    linked = pharaoh.read_text().split("\n")
    assert linked[1] == "" and all("-" in link for link in linked[0].split())
    run(translate.main, *arguments, "--alignments", soft, capsysbinary=capsysbinary)
    first = json.loads(soft.read_text().splitlines()[0])
    weights = np.array(first["alignment"])
    assert weights.shape == (len(first["target"]), len(first["source"]))
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-2)


def test_batch_composition_changes_nothing(trained):
    _, vocabs, graphdef, params = Workdir(trained).load()
    cfg, *_ = Workdir(trained).load()
    texts = ["a b c", "d e f g h i j", "k l m n", "o p a b c d e f g h"]
    search = Translator(graphdef, vocabs, cfg.search)
    together = [translation.text for translation in search(params, texts)]
    assert together == [search(params, [text])[0].text for text in texts]
    assert together == [t.text for t in search(params, texts[::-1])][::-1]


def test_evaluate_reports_what_translate_gives(trained, tmp_path, capsysbinary):
    kept = tmp_path / "outputs.txt"
    code, out, err = run(
        evaluate.main, "--workdir", trained, "--part", "dev", "--json", "--by-length", "--output", kept,
        capsysbinary=capsysbinary,
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    final = json.loads((trained / "results.json").read_text())["scores"][0]
    assert result["scores"]["exact_match"] == pytest.approx(final["exact_match"])
    assert result["scores"]["loss"] == pytest.approx(final["loss"], rel=1e-5)
    assert (
        result["pairs"] == len(kept.read_text().splitlines()) == sum(r["pairs"] for r in result["by_length"])
    )
    weighted = sum(r["pairs"] * r["exact_match"] for r in result["by_length"]) / result["pairs"]
    assert weighted == pytest.approx(result["scores"]["exact_match"])


def test_evaluate_own_files_with_two_references(trained, tmp_path, capsysbinary):
    _, vocabs, graphdef, params = Workdir(trained).load()
    cfg, *_ = Workdir(trained).load()
    sources = ["a b c d", "e f g h"]
    outputs = [t.text for t in Translator(graphdef, vocabs, cfg.search)(params, sources)]
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("".join(f"{s}\twrong\t{o}\n" for s, o in zip(sources, outputs, strict=True)))
    arguments = ["--workdir", trained, "--input", pairs, "--source", "0", "--json"]
    both = json.loads(run(evaluate.main, *arguments, "--target", "1,2", capsysbinary=capsysbinary)[1])
    one = json.loads(run(evaluate.main, *arguments, "--target", "1", capsysbinary=capsysbinary)[1])
    assert both["scores"]["exact_match"] == 100 and one["scores"]["exact_match"] == 0
    assert both["scores"]["symbol_error_rate"] == 0


def test_score_agrees_with_search_and_with_evaluate(trained, tmp_path, capsysbinary):
    _, vocabs, graphdef, params = Workdir(trained).load()
    cfg, *_ = Workdir(trained).load()
    sources = ["a b c d", "e f g h i j", "k l"]
    found = Translator(graphdef, vocabs, cfg.search)(params, sources)
    pairs, links = tmp_path / "pairs.tsv", tmp_path / "links.txt"
    pairs.write_text("".join(f"{s}\t{t.text}\n" for s, t in zip(sources, found, strict=True)))
    arguments = ["--workdir", trained, "--input", pairs, "--source", "0", "--target", "1"]
    code, out, err = run(
        score.main, *arguments, "--attention", "--alignments", links, capsysbinary=capsysbinary
    )
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["line"] for row in rows] == [1, 2, 3]
    for row, translation in zip(rows, found, strict=True):
        best = translation.hypotheses[0]
        assert row["target"] == best.tokens and row["source"] == translation.source_tokens
        assert row["log_prob"] == pytest.approx(best.log_prob, abs=1e-3)
        np.testing.assert_allclose(row["token_log_probs"], best.token_log_probs, atol=1e-3)
        np.testing.assert_allclose(row["attention"], best.align_TS, atol=1e-3)
    assert links.read_text().splitlines()[0] == translator.links(
        found[0].source_ids, found[0].hypotheses[0].ids, found[0].hypotheses[0].align_TS, vocabs
    )
    evaluated = json.loads(run(evaluate.main, *arguments, "--json", capsysbinary=capsysbinary)[1])
    nats = -sum(row["log_prob"] for row in rows) / sum(len(row["target"]) for row in rows)
    assert evaluated["scores"]["loss"] == pytest.approx(nats, rel=1e-3)


@pytest.mark.parametrize(
    ("main", "arguments", "told"),
    [
        (translate.main, ["--workdir", "nowhere"], "no work directory"),
        (translate.main, ["--nbest", "3", "--beam", "2"], "--nbest 3 needs --beam 3"),
        (translate.main, ["--beam", "0"], "--beam 0 must be at least 1"),
        (translate.main, ["--input", "missing.txt"], "missing.txt"),
        (evaluate.main, ["--metrics", "blue"], "'blue' is none of bleu"),
        (evaluate.main, ["--input", "missing.tsv"], "missing.tsv"),
        (score.main, ["--input", "missing.tsv"], "missing.tsv"),
        (translate.main, ["--nbest", "0"], "--nbest 0 must be at least 1"),
        *(
            (main, ["--output", "missing/out"], "missing/out")
            for main in (translate.main, evaluate.main, score.main)
        ),
        *((main, ["--alignments", "missing/out"], "missing/out") for main in (translate.main, score.main)),
    ],
)
def test_mistakes_are_told_and_not_traced(trained, main, arguments, told, capsysbinary):
    if "--workdir" not in arguments:
        arguments = ["--workdir", trained, *arguments]
    code, out, err = run(main, *arguments, capsysbinary=capsysbinary)
    assert code == 2 and told in err and "Traceback" not in err and out == ""


@pytest.mark.parametrize("saved", ["{", '{"model": {"hiden": 3}}'])
def test_a_damaged_config_is_told_with_its_file(tmp_path, saved, capsysbinary):
    (tmp_path / "config.json").write_text(saved)
    code, _, err = run(translate.main, "--workdir", tmp_path, capsysbinary=capsysbinary)
    assert code == 2 and f"{tmp_path}/config.json cannot be used: " in err


@pytest.mark.slow
def test_translate_as_a_filter(trained):
    done = command("s2s.translate", "--workdir", trained, stdin="a b c d\n\nb c\n")
    assert len(done.stdout.split(b"\n")) == 4 and done.stdout.split(b"\n")[1] == b""
