"""A real server on loopback under everything that clients do to servers."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from playwright import sync_api

from s2s.serve import __main__ as serve
from s2s.serve.openapi import Limits, describe
from s2s.translator import Translator
from s2s.workdir import Workdir
from tests.system.conftest import ROOT

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
LIMITS = ["--max-pieces", "30", "--max-sentences", "40", "--max-bytes", "20000", "--max-beam", "3"]


def start(folder, port, *arguments):
    """Starts a server and waits until it is ready."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    env.pop("XLA_FLAGS", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "s2s.serve", "--workdir", folder, "--port", str(port), *LIMITS, *arguments],
        cwd=ROOT, env=env, stderr=subprocess.PIPE,
    )  # fmt: skip
    for _ in range(1200):
        assert process.poll() is None, process.stderr.read().decode()
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                return process
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError("not ready after two minutes")


def stop(process):
    """Asks it to stop; its exit code and what it said."""
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=60)[1].decode()
    return process.returncode, told


def port_of():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(trained):
    port = port_of()
    process = start(trained, port)
    yield f"http://127.0.0.1:{port}"
    code, told = stop(process)
    assert code == 0 and "Traceback" not in told, told


@pytest.fixture(scope="module")
def expected(trained):
    """Outputs of greedy search by the command's own way."""
    cfg, vocabs, graphdef, params = Workdir(trained).load()
    translator = Translator(graphdef, vocabs, cfg.search)

    def translate(texts):
        return [translation.text for translation in translator(params, texts)]

    return translate


def ask(server, body, **options):
    return httpx.post(f"{server}/v1/translate", timeout=60, **({"json": body} | options))


@pytest.mark.slow
def test_it_translates_as_the_command_does_with_scores_and_alignments(server, expected):
    texts = ["a b c d", "", "  ", "j i h g f", "a\nb\0c"]
    answer = ask(server, {"text": texts, "nbest": 2, "beam": 3, "alignments": True}).json()
    rows = answer["translations"]
    assert [row["source"] for row in rows] == ["a b c d", "", "  ", "j i h g f", "a b c"]
    assert [len(row["hypotheses"]) for row in rows] == [2, 0, 0, 2, 2]
    best, second = rows[0]["hypotheses"]
    assert best["score"] >= second["score"] and best["tokens"][-1] == rows[0]["source_tokens"][-1] == "</s>"
    assert sum(best["token_log_probs"]) == pytest.approx(best["log_prob"], abs=1e-3)
    assert [sum(row) for row in best["alignment"]] == pytest.approx([1.0] * len(best["tokens"]), abs=1e-3)
    one = ask(server, {"text": "a b c d", "beam": 1}).json()["translations"][0]["hypotheses"]
    assert [hypothesis["text"] for hypothesis in one] == expected(["a b c d"])
    assert "alignment" not in one[0]


BAD = {
    "no JSON": (dict(content=b"{"), 400, "json"),
    "no UTF-8": (dict(content=b'{"text": "\xff"}'), 400, "json"),
    "deep": (dict(content=b"[" * 9000), 400, "json"),
    "empty": (dict(content=b""), 400, "json"),
    "a list": (dict(json=[1]), 422, "json"),
    "no text": (dict(json={"beam": 1}), 422, "text"),
    "a number": (dict(json={"text": 3}), 422, "text"),
    "a mixed list": (dict(json={"text": ["a", None]}), 422, "text"),
    "half a surrogate": (dict(content=b'{"text": "\\ud800"}'), 422, "text"),
    "another field": (dict(json={"text": "a", "beams": 2}), 422, "field"),
    "a wide beam": (dict(json={"text": "a", "beam": 4}), 422, "beam"),
    "a true beam": (dict(json={"text": "a", "beam": True}), 422, "beam"),
    "no hypothesis": (dict(json={"text": "a", "nbest": 0}), 422, "nbest"),
    "a long sentence": (dict(json={"text": "a " * 40}), 422, "pieces"),
    "a very long sentence": (dict(json={"text": "a" * 9000}), 422, "pieces"),
    "many sentences": (dict(json={"text": ["a"] * 41}), 422, "sentences"),
    "a large body": (dict(json={"text": "a" * 30000}), 413, "bytes"),
    "a form": (dict(data={"text": "a"}), 415, "media"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_told_what_is_wrong(server, case):
    options, status, reason = BAD[case]
    answer = httpx.post(f"{server}/v1/translate", timeout=60, **options)
    assert (answer.status_code, answer.json()["error"]["reason"]) == (status, reason), answer.text
    assert len(answer.json()["error"]["message"]) > 10


@pytest.mark.slow
def test_hundreds_at_once_mixed_with_garbage_and_clients_that_leave(server, expected):
    letters = "abcdefghij"
    texts = [" ".join(letters[(n * k) % 10] for k in range(1, 2 + n % 12)) for n in range(240)]
    outputs = expected(texts)

    async def one(client, number):
        text = texts[number]
        if number % 10 == 3:
            return await client.post("/v1/translate", content=b"\x00garbage")
        if number % 10 == 7:
            with pytest.raises(httpx.TimeoutException):
                await client.post("/v1/translate", json={"text": text}, timeout=0.001)
            return None
        return await client.post("/v1/translate", json={"text": text, "beam": 1})

    async def everybody():
        limits = httpx.Limits(max_connections=240)
        async with httpx.AsyncClient(base_url=server, timeout=120, limits=limits) as client:
            return await asyncio.gather(*(one(client, number) for number in range(len(texts))))

    for number, answer in enumerate(asyncio.run(everybody())):
        if number % 10 == 3:
            assert answer.status_code == 400
        elif number % 10 != 7:
            assert answer.status_code == 200, answer.text
            shown = answer.json()["translations"][0]
            assert (shown["source"], shown["hypotheses"][0]["text"]) == (texts[number], outputs[number])
    metrics = httpx.get(f"{server}/metrics").text
    assert 's2s_requests_total{path="/v1/translate",status="200"}' in metrics
    assert "s2s_waiting_sentences 0.0" in metrics
    assert httpx.get(f"{server}/healthz").json() == {"status": "alive"}


@pytest.mark.slow
def test_other_ways_are_closed_and_the_description_is_the_servers(server):
    assert httpx.get(f"{server}/v1/translate").status_code == 405
    assert httpx.get(f"{server}/etc/passwd").status_code == 404
    about = httpx.get(f"{server}/v1/model").json()
    assert about["limits"]["pieces"] == 30 and about["parameters"] > 0
    spec = httpx.get(f"{server}/openapi.json").json()
    assert spec == json.loads(json.dumps(describe(Limits(**about["limits"]))))
    for path, ways in spec["paths"].items():
        for way in ways:
            assert httpx.request(way, f"{server}{path}").status_code not in (404, 405), path


@pytest.mark.slow
def test_a_full_queue_says_so_and_a_stopping_server_finishes_what_it_took(trained):
    port = port_of()
    process = start(trained, port, "--max-waiting", "40", "--batch-sentences", "4")
    url = f"http://127.0.0.1:{port}/v1/translate"

    async def scenario():
        async with httpx.AsyncClient(timeout=120) as client:
            body = {"text": ["a b c d e f g h i j"] * 40}
            asked = [asyncio.create_task(client.post(url, json=body)) for _ in range(6)]
            await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*asked, return_exceptions=True)

    answers = asyncio.run(scenario())
    assert process.wait(60) == 0
    told = process.communicate()[1].decode()
    assert "Traceback" not in told, told
    answered = [answer for answer in answers if not isinstance(answer, Exception)]
    codes = sorted(answer.status_code for answer in answered)
    assert codes and set(codes) <= {200, 503} and 200 in codes and 503 in codes, (codes, told)
    for answer in answered:
        if answer.status_code == 200:
            assert len(answer.json()["translations"]) == 40
        else:
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["reason"] in ("busy", "stopping")


@pytest.mark.slow
def test_the_page_translates_while_one_types_and_explains_on_enter(server, expected):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here: the page is looked at by a real browser or not at all")
    complaints = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request", lambda request: complaints.append(request.url) if server not in request.url else None
        )
        page.goto(server)
        page.select_option("#ask-beam", "1")
        page.fill("#ask-text", "a b c d")
        told = page.locator(".ask [role=status]")
        sync_api.expect(told).to_have_text(expected(["a b c d"])[0], timeout=60_000)
        page.press("#ask-text", "Enter")
        sync_api.expect(page.locator(".sentence.source")).to_have_text("a b c d", timeout=60_000)
        assert (
            page.locator("header .sentence.target").inner_text().split("→")[1].strip()
            == expected(["a b c d"])[0]
        )
        page.fill("#ask-text", "<img src=x onerror=alert(1)> " * 20)
        sync_api.expect(told).to_contain_text("longer than 30 pieces", timeout=60_000)
        assert page.locator("img").count() == 0
        browser.close()
    # The refusal is a failed request to the browser, which says so.
    assert [text for text in complaints if "422" not in text] == []


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_a_port_that_there_is_not_is_told(port, capsys):
    """Else the system takes its last 16 bits."""
    with pytest.raises(SystemExit):
        serve.main(["--workdir", "anywhere", "--port", port])
    assert f"--port {port} must be from 0 to 65535" in capsys.readouterr().err
