"""The server's interface in OpenAPI 3.1, and the limits it tells of.

Decides how the interface is described. Must not know how a request is answered: a test holds the
description against the answers.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
      bytes: in a body.
      sentences: in a request.
      pieces: in a sentence, as the vocabulary cuts it, EOS included.
      waiting: sentences that may wait, of all requests together.
      seconds: that an answer may take.
      beam: the widest.
    """

    bytes: int = 1 << 20
    sentences: int = 256
    pieces: int = 200
    waiting: int = 1024
    seconds: float = 60.0
    beam: int = 10


def describe(limits: Limits) -> dict[str, Any]:
    """The interface in OpenAPI 3.1."""
    number = {"type": "integer", "minimum": 1, "maximum": limits.beam}
    numbers = {"type": "array", "items": {"type": "number"}}
    strings = {"type": "array", "items": {"type": "string"}}
    hypothesis = {
        "type": "object",
        "required": ["text", "tokens", "score", "log_prob", "token_log_probs"],
        "properties": {
            "text": {"type": "string"},
            "tokens": {**strings, "description": "target pieces, the end of the sentence last"},
            "score": {"type": "number", "description": "the penalised log-probability that ranked it"},
            "log_prob": {"type": "number", "description": "nats"},
            "token_log_probs": {**numbers, "description": "nats, one a token"},
            "alignment": {
                "type": "array",
                "items": numbers,
                "description": "[token][source piece], rows sum to 1",
            },
        },
    }
    translation = {
        "type": "object",
        "required": ["source", "source_tokens", "hypotheses"],
        "properties": {
            "source": {"type": "string"},
            "source_tokens": strings,
            "hypotheses": {
                "type": "array",
                "items": hypothesis,
                "description": "best first; none for a blank sentence",
            },
        },
    }
    sentence = {"type": "string", "description": f"at most {limits.pieces} pieces"}
    asked = {
        "type": "object",
        "required": ["text"],
        "additionalProperties": False,
        "properties": {
            "text": {"oneOf": [sentence, {"type": "array", "items": sentence, "maxItems": limits.sentences}]},
            "beam": {**number, "description": "hypotheses kept; 1 is greedy"},
            "nbest": {**number, "description": "hypotheses returned"},
            "alignments": {"type": "boolean", "default": False},
        },
    }
    refused = {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["reason", "message"],
                "properties": {"reason": {"type": "string"}, "message": {"type": "string"}},
            }
        },
    }

    def answer(description: str, schema: dict[str, Any]) -> dict[str, Any]:
        return {"description": description, "content": {"application/json": {"schema": schema}}}

    refusals = {
        "400": "no JSON",
        "413": f"more than {limits.bytes} bytes",
        "415": "another media type",
        "422": "a field is missing, wrong or too long",
        "503": "too many sentences wait, or the server stops: try again",
        "504": f"no answer within {limits.seconds:g} s",
    }
    failures = {status: answer(text, refused) for status, text in refusals.items()}

    def post(summary: str, found: dict[str, Any]) -> dict[str, Any]:
        body = {"required": True, "content": {"application/json": {"schema": asked}}}
        return {"post": {"summary": summary, "requestBody": body, "responses": {"200": found, **failures}}}

    def get(summary: str, *statuses: str) -> dict[str, Any]:
        return {
            "get": {"summary": summary, "responses": {code: {"description": summary} for code in statuses}}
        }

    found = {
        "type": "object",
        "required": ["model", "translations"],
        "properties": {"model": {"type": "string"}, "translations": {"type": "array", "items": translation}},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "s2s", "version": "1"},
        "paths": {
            "/v1/translate": post(
                "Translates sentences", answer("one translation a sentence, in order", found)
            ),
            "/v1/explain": post(
                "Takes the translation of one sentence apart", answer("what the explorer shows", {})
            ),
            "/v1/model": get("The model and the limits", "200"),
            "/healthz": get("The process lives", "200"),
            "/readyz": get("Requests are answered at once", "200", "503"),
            "/metrics": get("Prometheus metrics", "200"),
        },
    }
