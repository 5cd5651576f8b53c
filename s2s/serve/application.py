"""The server's application: HTTP in, translations out, as JSON.

Decides which requests are understood, which are refused and how that is said. Must not know how
sentences are batched (batcher), nor how a model is opened (serve) or translates (translator).

    POST /v1/translate   {"text": "..." or ["...", ...], "beam": 5, "nbest": 1, "alignments": false}
    GET  /v1/model       what the model is, and the limits
    GET  /healthz        200 while the process lives
    GET  /readyz         200 once requests are answered without a long wait, 503 before and at the end
    GET  /metrics        Prometheus
    GET  /openapi.json   this, for machines
    GET  /               a page to type into
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol

import prometheus_client as prometheus
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from s2s.explain.telling import ExplanationError
from s2s.serve.batcher import Batched, Batcher, Closed, Full
from s2s.serve.openapi import Limits, describe
from s2s.translator import Translation


class Served(Protocol):
    """The model behind a server.

    Attributes:
      about: what to tell of it; fit for JSON.
      beam: hypotheses kept where a request does not say.
      ready: whether the programs that most requests need are compiled.
      compiling: whether others are, at this moment.
    """

    about: dict[str, Any]
    beam: int
    ready: bool
    compiling: bool

    def pieces(self, texts: Sequence[str]) -> list[int]:
        """Source pieces of sentences, EOS included."""

    def translate(self, kind: tuple[int, int], texts: Sequence[str]) -> list[Translation]:
        """Translates with (beam, n best)."""

    def explain(self, text: str, beam: int) -> dict[str, Any]:
        """What the explorer shows of one sentence."""

    def page(self) -> str:
        """The page that is served at /."""


class Refused(Exception):
    """A request that cannot be answered.

    Attributes:
      status: of HTTP.
      reason: a word for machines.
    """

    def __init__(self, status: int, reason: str, message: str):
        super().__init__(message)
        self.status, self.reason = status, reason


class _Meters:
    """What /metrics shows."""

    def __init__(self, waiting: Callable[[], float]) -> None:
        self.registry = prometheus.CollectorRegistry()
        names: dict[str, Any] = {"registry": self.registry}
        self.requests = prometheus.Counter(
            "s2s_requests", "Requests answered, by path and status.", ["path", "status"], **names
        )
        self.refused = prometheus.Counter("s2s_refused", "Requests refused, by reason.", ["reason"], **names)
        self.seconds = prometheus.Histogram(
            "s2s_request_seconds", "From a request to its answer.", ["path"], **names
        )
        self.sentences = prometheus.Counter("s2s_sentences", "Sentences translated.", **names)
        self.batch = prometheus.Histogram(
            "s2s_batch_sentences", "Sentences in a batch.", buckets=[2**n for n in range(11)], **names
        )
        self.device = prometheus.Counter("s2s_device_seconds", "Time spent on batches.", **names)
        prometheus.Gauge("s2s_waiting_sentences", "Sentences that wait.", **names).set_function(waiting)

    def batched(self, batch: Batched) -> None:
        self.sentences.inc(batch.sentences)
        self.batch.observe(batch.sentences)
        self.device.inc(batch.seconds)


def create_app(model: Served, limits: Limits, *, most: int = 64) -> Starlette:
    """Makes the application.

    Args:
      model: what answers.
      limits: of a request.
      most: sentences in a batch.
    """
    batcher = Batcher(model.translate, most=most, waiting=limits.waiting, watch=lambda b: meters.batched(b))
    # One sentence taken apart is a batch of its own, and keeps the others waiting as little.
    explainer = Batcher(
        lambda beam, texts: [model.explain(text, beam) for text in texts],
        most=1,
        waiting=limits.waiting // 16,
    )
    meters = _Meters(lambda: float(batcher.waiting))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        batcher.start()
        explainer.start()
        yield
        await batcher.close()
        await explainer.close()

    async def translate(request: Request) -> Response:
        asked = await _asked(request, limits)
        texts, kind, nbest, alignments = _understood(asked, model, limits)
        found = await _while_connected(request, batcher.submit(kind, texts), limits.seconds)
        return JSONResponse(
            {
                "model": model.about["name"],
                "translations": [
                    _shown(text, one, nbest, alignments) for text, one in zip(texts, found, strict=True)
                ],
            }
        )

    async def explain(request: Request) -> Response:
        asked = await _asked(request, limits)
        if "text" in asked and not isinstance(asked["text"], str):
            raise Refused(422, "text", '"text" must be one string here')
        texts, (beam, _), _, _ = _understood(asked, model, limits)
        if not texts[0].strip():
            raise Refused(422, "text", "there is nothing to explain in a blank sentence")
        found = await _while_connected(request, explainer.submit(beam, texts), limits.seconds)
        return JSONResponse(found[0])

    async def about(request: Request) -> Response:
        return JSONResponse({**model.about, "limits": dataclasses.asdict(limits)})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(request: Request) -> Response:
        if not model.ready:
            raise Refused(503, "starting", "programs are being compiled; ask again in some seconds")
        return JSONResponse({"status": "ready", "compiling": model.compiling})

    async def metrics(request: Request) -> Response:
        text = prometheus.generate_latest(meters.registry)
        return Response(text, media_type=prometheus.CONTENT_TYPE_LATEST)

    async def openapi(request: Request) -> Response:
        return JSONResponse(describe(limits))

    async def page(request: Request) -> Response:
        return HTMLResponse(model.page())

    def measured(
        path: str, answer: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def measure(request: Request) -> Response:
            began = time.monotonic()
            try:
                response = await answer(request)
            except (
                Refused, Full, Closed, ClientDisconnect, TimeoutError, ExplanationError
            ) as error:  # fmt: skip
                refused = _refusal(error, limits)
                meters.refused.labels(refused.reason).inc()
                body = {"error": {"reason": refused.reason, "message": str(refused)}}
                headers = {"Retry-After": "1"} if refused.status == 503 else None
                response = JSONResponse(body, refused.status, headers)
            meters.requests.labels(path, str(response.status_code)).inc()
            meters.seconds.labels(path).observe(time.monotonic() - began)
            return response

        return measure

    routes = [
        ("/v1/translate", translate, "POST"),
        ("/v1/explain", explain, "POST"),
        ("/v1/model", about, "GET"),
        ("/healthz", health, "GET"),
        ("/readyz", ready, "GET"),
        ("/metrics", metrics, "GET"),
        ("/openapi.json", openapi, "GET"),
        ("/", page, "GET"),
    ]
    return Starlette(
        routes=[Route(path, measured(path, answer), methods=[method]) for path, answer, method in routes],
        lifespan=lifespan,
    )


def _refusal(error: Exception, limits: Limits) -> Refused:
    if isinstance(error, Refused):
        return error
    if isinstance(error, Full):
        return Refused(503, "busy", f"{limits.waiting} sentences wait already; try again in a moment")
    if isinstance(error, Closed):
        return Refused(503, "stopping", "the server is about to stop; ask another one")
    if isinstance(error, TimeoutError):
        return Refused(504, "late", f"there was no answer within {limits.seconds:g} s; send less at a time")
    if isinstance(error, ExplanationError):
        return Refused(422, "explain", str(error))
    # nginx's number for a client that has gone; nobody reads it but the metrics.
    return Refused(499, "gone", "the client has closed the connection")


async def _asked(request: Request, limits: Limits) -> dict[str, Any]:
    """The JSON object in the body, which is read no further than it may be long."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", ""):
        raise Refused(415, "media", f"the body must be application/json, not {kind[:80]}")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limits.bytes:
            raise Refused(413, "bytes", f"the body is longer than {limits.bytes} bytes; send it in parts")
    try:
        asked = json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise Refused(400, "json", f"the body must be JSON in UTF-8: {str(error)[:200]}") from None
    if not isinstance(asked, dict):
        raise Refused(422, "json", 'the body must be an object such as {"text": "..."}')
    return asked


_FIELDS = ("text", "beam", "nbest", "alignments")


def _understood(
    asked: dict[str, Any], model: Served, limits: Limits
) -> tuple[list[str], tuple[int, int], int, bool]:
    """Sentences, (beam, n best) of their search, hypotheses to return, and whether alignments are wanted."""
    for name in asked:
        if name not in _FIELDS:
            raise Refused(422, "field", f"there is no field {name[:80]!r}; there are {', '.join(_FIELDS)}")
    if "text" not in asked:
        raise Refused(422, "text", '"text" is missing: one string, or a list of them')
    texts = [asked["text"]] if isinstance(asked["text"], str) else asked["text"]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Refused(422, "text", '"text" must be a string or a list of strings')
    if len(texts) > limits.sentences:
        raise Refused(422, "sentences", f"{len(texts)} sentences are more than {limits.sentences}")
    numbers = {"beam": asked.get("beam", model.beam), "nbest": asked.get("nbest", 1)}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limits.beam:
            raise Refused(422, name, f'"{name}" must be a whole number from 1 to {limits.beam}')
    beam, nbest = max(numbers["beam"], numbers["nbest"]), numbers["nbest"]
    alignments = asked.get("alignments", False)
    if not isinstance(alignments, bool):
        raise Refused(422, "alignments", '"alignments" must be true or false')
    for number, text in enumerate(texts):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise Refused(422, "text", f"sentence {number} holds half a surrogate pair: no text") from None
    # A sentence is a line: what would end it, or a C string, is a blank.
    texts = [" ".join(text.replace("\0", " ").splitlines()) for text in texts]
    # No piece is shorter than nothing: cutting a book into pieces only to refuse it takes long.
    for number, (text, pieces) in enumerate(zip(texts, _counted(texts, model, limits), strict=True)):
        if pieces > limits.pieces:
            told = f"of {pieces} pieces" if len(text) <= 64 * limits.pieces else f"of {len(text)} characters"
            raise Refused(422, "pieces", f"sentence {number} {told} is longer than {limits.pieces} pieces")
    # Few programs: a search for some of its hypotheses is one for all of them.
    return texts, (beam, 1 if nbest == 1 else beam), nbest, alignments


def _counted(texts: list[str], model: Served, limits: Limits) -> list[int]:
    short = [text if len(text) <= 64 * limits.pieces else "" for text in texts]
    return [
        pieces if kept or not text else limits.pieces + 1
        for text, kept, pieces in zip(texts, short, model.pieces(short), strict=True)
    ]


async def _while_connected(request: Request, work: Awaitable[Any], seconds: float) -> Any:
    """Waits for an answer as long as there is somebody to give it to."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, left = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answer, left}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise ClientDisconnect if left.done() else TimeoutError
    finally:
        for task in (answer, left):
            task.cancel()


def _shown(text: str, translation: Translation, nbest: int, alignments: bool) -> dict[str, Any]:
    hypotheses = []
    for one in translation.hypotheses[:nbest]:
        shown: dict[str, Any] = {
            "text": one.text,
            "tokens": one.tokens,
            "score": round(one.score, 5),
            "log_prob": round(one.log_prob, 5),
            "token_log_probs": [round(float(value), 5) for value in one.token_log_probs],
        }
        if alignments:
            shown["alignment"] = [[round(float(weight), 4) for weight in row] for row in one.align_TS]
        hypotheses.append(shown)
    return {"source": text, "source_tokens": translation.source_tokens, "hypotheses": hypotheses}
