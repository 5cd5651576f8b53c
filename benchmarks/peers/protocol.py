"""How a worker talks to the programme that times it: one JSON object a line, in and out.

Decides the form of requests and answers, keeps standard output clean of whatever a toolkit
prints, and lets a toolkit's own training loop go a few steps at a time. Runs in every peer's
environment: nothing but the standard library, and must not know what is measured.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

Handler = Callable[..., dict[str, Any]]


def serve(handlers: Mapping[str, Handler]) -> None:
    """Answers requests until standard input ends.

    A request is {"do": NAME, ...}; the handler of that name gets the rest as keywords and
    its dict is the answer. What it raises is answered as {"error": ..., "traceback": ...}.
    Prints of the handlers go to standard error.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = handlers[request.pop("do")](**request)
        except Exception as error:  # the other side decides what a failure costs
            answer = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class Turnstile:
    """Stands in a toolkit's training loop, which has a thread of its own, and lets steps through.

    The loop calls `enter` before every step. A round's time ends where its last step's successor
    would begin: every step's share of the loop (fetching, optimizer, logging) is in some round.

    Args:
      loop: trains without end; gets this turnstile.
    """

    def __init__(self, loop: Callable[[Turnstile], Any]):
        self._left = 0
        self._tokens = 0
        self._asked, self._reached = threading.Event(), threading.Event()
        self._ended = False
        self._error: BaseException | None = None

        def run() -> None:
            try:
                loop(self)
            except BaseException as error:
                self._error = None if self._ended else error
            self._reached.set()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        self._wait()  # the toolkit gets ready

    def enter(self, tokens: int) -> None:
        """Called by the loop before a step on a batch of so many target tokens."""
        if self._left == 0:
            self._reached.set()
            self._asked.wait()
            self._asked.clear()
        if self._ended:
            raise SystemExit
        self._left -= 1
        self._tokens += tokens

    def train(self, steps: int) -> dict[str, Any]:
        """Lets so many steps through, and answers with their time and tokens.

        Raises:
          RuntimeError: the loop ended by itself.
        """
        self._left, self._tokens = steps, 0
        began = time.perf_counter()
        self._asked.set()
        self._wait()
        return {"seconds": time.perf_counter() - began, "tokens": self._tokens, "steps": steps}

    def end(self) -> None:
        """Ends the loop between two steps."""
        self._ended = True
        self._asked.set()
        self._thread.join()

    def _wait(self) -> None:
        self._reached.wait()
        self._reached.clear()
        if not self._thread.is_alive() or self._error is not None:
            raise RuntimeError(f"the training loop ended by itself: {self._error!r}") from self._error
