"""The explaining command: pages, pictures and films of trained models, whatever the text."""

import json
import re

import pytest

from s2s.explain import __main__ as explain
from s2s.explain.packing import BUDGET
from tests.system.conftest import command

HOSTILE = 'a </script><script>alert("1")</script> <!-- & \u2028 <img src=x onerror=alert(2)> {{data}}'
TEXTS = {
    "plain": "a b c",
    "hostile": HOSTILE,
    "chinese": "昨日 买 书",
    "arabic": "a كتاب \u202eabc",
    "undecodable": "a \udcff b \0",
    "emoji": "\U0001f600 a",
}


def data_of(page: str) -> dict:
    """The data that a page holds, read as a browser finds it: up to the first end of the element."""
    (text,) = re.findall(r'<script[^>]*type="application/json"[^>]*>(.*?)</script', page, re.DOTALL)
    return json.loads(text)


@pytest.mark.parametrize("name", TEXTS)
def test_a_page_holds_the_text_as_text(trained, tmp_path, name):
    page, file = tmp_path / "new" / "page.html", tmp_path / "data.json"
    arguments = ["--workdir", str(trained), "--text", TEXTS[name], "--beam", "2"]
    assert explain.main([*arguments, "--output", str(page), "--data", str(file)]) == 0
    html, data = page.read_text(encoding="utf-8"), json.loads(file.read_text(encoding="utf-8"))
    assert data_of(html) == data
    expected = TEXTS[name].replace("\udcff", "\ufffd").replace("\0", " ")
    (model,) = data["models"]
    assert data["text"] == model["source"]["text"] == expected
    unknown = [piece not in "abcdefghijklmnop" for piece in expected.split()]
    assert model["source"]["unknown"] == [*unknown, False] or name in ("arabic", "undecodable", "hostile")
    assert any(model["source"]["unknown"]) == (name != "plain")
    assert "<script>alert" not in html and "onerror=alert(2)>" not in html
    assert len(html) < BUDGET + 200_000


def test_models_are_compared_and_pictures_drawn(trained, tmp_path, capsys):
    files = {
        "--data": "d.json",
        "--heatmap": "h.svg",
        "--walk": "w.gif",
        "--curve": "c.pdf",
    }
    flags = [part for flag, name in files.items() for part in (flag, str(tmp_path / name))]
    arguments = ["--workdir", str(trained), str(trained), "--text", "a b", "--reference", "b a"]
    assert explain.main([*arguments, "--gold-alignment", "0-1 1-0", *flags]) == 0
    assert capsys.readouterr().err == ""
    data = json.loads((tmp_path / "d.json").read_text())
    one, other = data["models"]
    assert one == other and data["reference"] == "b a"
    assert one["gold"]["links"] == [[1, 0], [0, 1]]
    assert one["gold"]["walk"] == one["reference"]
    assert b"<svg" in (tmp_path / "h.svg").read_bytes()
    assert (tmp_path / "c.pdf").read_bytes().startswith(b"%PDF")
    from PIL import Image

    with Image.open(tmp_path / "w.gif") as film:
        assert film.n_frames == one["sizes"]["S"] + 2 * one["sizes"]["T"] + 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text", "a"], "nothing asked for"),
        (["--output", "p.html"], "--output needs a sentence"),
        (["--text", "", "--output", "p.html"], "the text is empty"),
        (["--text", "a", "--output", "p.txt"], "--output p.txt must end in .html or .htm"),
        (["--text", "a", "--walk", "w.avi"], "--walk w.avi must end in .gif or .mp4"),
        (["--text", "a", "--output", "p.html", "--gold-alignment", "0:1"], "'0:1' is no link"),
        (["--text", "a", "--output", "p.html", "--gold-alignment", "7-0"], "names word 7 of the source"),
        (["--text", "a", "--output", "p.html", "--beam", "0"], "--beam 0 must be at least 1"),
    ],
)
def test_mistakes_are_answered_kindly(trained, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert explain.main(["--workdir", str(trained), *flags]) == 2
    told = capsys.readouterr().err
    assert told.startswith("s2s: ") and message in told and "Traceback" not in told
    assert not list(tmp_path.iterdir())


def test_the_command_itself(tmp_path):
    done = command("s2s.explain", "--workdir", tmp_path, "--text", "a", "--output", "p.html", check=False)
    assert done.returncode == 2 and b"is no work directory" in done.stderr
