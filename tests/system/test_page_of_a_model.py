"""The explaining command's page in a real browser."""

import json

from s2s.explain import __main__ as explain
from tests.browser.conftest import browser, opened  # noqa: F401
from tests.browser.test_page import agrees


def test_the_page_of_a_trained_model(trained, tmp_path, request):
    file = tmp_path / "d.json"
    arguments = ["--workdir", str(trained), "--text", "c a b", "--beam", "2", "--data", str(file)]
    assert explain.main(arguments) == 0
    data = json.loads(file.read_text(encoding="utf-8"))
    page, walk = request.getfixturevalue("opened")(data), data["models"][0]["walks"][0]
    page.page.keyboard.press("End")
    assert page.written() == walk["tokens"]
    assert page.text(".sentence.target bdi") == walk["text"]
    probabilities = [one["prob"] for one in walk["steps"][-1]["top"]]
    assert all(map(agrees, page.texts(".scene [data-prob]"), probabilities))
