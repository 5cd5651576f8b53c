"""The server under load: throughput and latency as more and more clients ask at once.

    python -m benchmarks.serving --workdir runs/mine --input source.txt --output benchmarks/results/serving.md

Starts `s2s.serve` on a free port of this machine and lets 1, 8, 64, ... clients send one sentence after
another, each its own connection and only its next sentence once the last is answered. One client is
decoding one by one. Every answer is compared with that of the single client. Prints Markdown; --json too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from s2s.infra.report import table


async def load(port: int, texts: list[str], clients: int) -> tuple[float, list[float], list[str]]:
    """Lets clients share the sentences: seconds in all, seconds of each sentence, and the outputs."""
    seconds, outputs = [0.0] * len(texts), [""] * len(texts)
    numbers = iter(range(len(texts)))

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number in numbers:
            began = time.perf_counter()
            found = await _ask(reader, writer, texts[number])
            seconds[number] = time.perf_counter() - began
            outputs[number] = found[0]["text"] if found else ""
        writer.close()
        await writer.wait_closed()

    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(clients)]
    began = time.perf_counter()
    await asyncio.gather(*(client(*connection) for connection in connections))
    return time.perf_counter() - began, seconds, outputs


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: str) -> list[dict[str, Any]]:
    """One request on a kept connection; a client library would take longer for it than the server."""
    body = json.dumps({"text": text}).encode()
    head = f"POST /v1/translate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    status, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().lower().splitlines()
    length = next(int(field.split(":")[1]) for field in fields if field.startswith("content-length:"))
    answer = json.loads(await reader.readexactly(length))
    if " 200 " not in status:
        raise RuntimeError(f"{status}: {answer}")
    found: list[dict[str, Any]] = answer["translations"][0]["hypotheses"]
    return found


def measure(port: int, texts: list[str], counts: list[int]) -> list[dict[str, Any]]:
    """A row for every number of clients.

    Raises:
      RuntimeError: a sentence was translated differently than for the single client.
    """
    rows: list[dict[str, Any]] = []
    alone: list[str] = []
    for clients in counts:
        asyncio.run(load(port, texts, clients))  # What is compiled for so many comes with the first time.
        total, seconds, outputs = asyncio.run(load(port, texts, clients))
        alone = alone or outputs
        wrong = sum(a != b for a, b in zip(alone, outputs, strict=True))
        if wrong:
            raise RuntimeError(f"{wrong} of {len(texts)} sentences changed with {clients} clients")
        cuts = statistics.quantiles(seconds, n=100, method="inclusive")
        rows.append(
            {
                "clients": clients,
                "sentences_per_second": len(texts) / total,
                "p50_ms": 1000 * cuts[49],
                "p95_ms": 1000 * cuts[94],
                "p99_ms": 1000 * cuts[98],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", required=True, help="the model's work directory")
    parser.add_argument("--input", required=True, help="source lines, the same for every number of clients")
    parser.add_argument("--lines", type=int, default=500, metavar="N", help="of them (500)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64, 256], metavar="N")
    parser.add_argument("--output", metavar="F", help="Markdown file to write")
    parser.add_argument("--json", metavar="F", help="JSON file to write")
    args = parser.parse_args()
    lines = Path(args.input).read_text(encoding="utf-8").splitlines()
    texts = [line for line in lines if line.strip()][: args.lines]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "s2s.serve", "--workdir", args.workdir, "--port", str(port)],
        stderr=subprocess.DEVNULL,
    )
    try:
        while server.poll() is None:
            try:
                if httpx.get(f"{url}/readyz").json() == {"status": "ready", "compiling": False}:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        rows = measure(port, texts, args.clients)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    one = rows[0]["sentences_per_second"]
    text = table(
        [
            [row["clients"], f"{row['sentences_per_second']:.0f}", f"{row['sentences_per_second'] / one:.1f}"]
            + [f"{row[name]:.0f}" for name in ("p50_ms", "p95_ms", "p99_ms")]
            for row in rows
        ],
        ["clients", "sentences/s", "times one client", "p50 (ms)", "p95 (ms)", "p99 (ms)"],
        markdown=True,
    )
    print(text)
    if args.output:
        Path(args.output).write_text(text + "\n", encoding="utf-8")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
