"""Requests of many clients as batches of one device.

Decides who waits, who is batched with whom, who is turned away, and what becomes of requests whose
client has gone. Must not know a protocol, a model or what is done with the sentences of a batch.

The device works on one batch at a time; meanwhile sentences wait, and whatever waits when it is free
again becomes the next batch. So nobody waits for a batch to fill, and the busier the device, the
larger its batches.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple


class Full(Exception):
    """There are so many sentences waiting that one more request would wait too long."""


class Closed(Exception):
    """No new request is taken: the server is about to stop."""


class Batched(NamedTuple):
    """What one batch was, for whoever measures.

    Attributes:
      kind: of all its requests.
      sentences: in it.
      waited: seconds the one that waited longest did.
      seconds: on the device.
    """

    kind: Hashable
    sentences: int
    waited: float
    seconds: float


class _Ticket(NamedTuple):
    kind: Hashable
    texts: list[str]
    answer: asyncio.Future[list[Any]]
    since: float


class Batcher:
    """Gives sentences of many callers to one function, a batch at a time, in the order of arrival.

    Args:
      work: (kind, sentences) -> one result a sentence, in order; called in a thread of its own, never twice
        at once.
      most: sentences in a batch.
      waiting: sentences that may wait; more are turned away.
      watch: is told of every batch.
    """

    def __init__(
        self,
        work: Callable[[Any, list[str]], Sequence[Any]],
        *,
        most: int,
        waiting: int,
        watch: Callable[[Batched], None] = lambda batch: None,
    ):
        self._work, self._most, self._limit, self._watch = work, most, waiting, watch
        self._queue: deque[_Ticket] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._more = asyncio.Event()
        self._closed = False
        self._loop: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Sentences that wait and whose callers still do."""
        return sum(len(ticket.texts) for ticket in self._queue if not ticket.answer.done())

    def start(self) -> None:
        """Begins to work; to be called where the event loop runs."""
        self._loop = asyncio.get_running_loop().create_task(self._run())

    async def submit(self, kind: Hashable, texts: Sequence[str]) -> list[Any]:
        """Waits for the results of some sentences, one each, in order.

        A caller that is cancelled gives its place up: what was not begun is not done.

        Args:
          kind: only sentences of one kind share a batch.
          texts: the sentences.

        Raises:
          Full: too many are waiting.
          Closed: `close` was called.
        """
        if self._closed:
            raise Closed
        if self.waiting + len(texts) > self._limit:
            raise Full
        loop, now = asyncio.get_running_loop(), time.monotonic()
        # Long requests go in parts, so that short ones come between.
        tickets = [
            _Ticket(kind, list(texts[first : first + self._most]), loop.create_future(), now)
            for first in range(0, len(texts), self._most)
        ]
        self._queue += tickets
        self._more.set()
        results = await asyncio.gather(*(ticket.answer for ticket in tickets))
        return [result for part in results for result in part]

    async def close(self) -> None:
        """Takes no more, and waits until everything taken is done."""
        self._closed = True
        self._more.set()
        if self._loop is not None:
            await self._loop
        self._thread.shutdown()

    async def _run(self) -> None:
        while True:
            tickets = self._next()
            if not tickets:
                if self._closed:
                    return
                self._more.clear()
                await self._more.wait()
                continue
            await self._answer(tickets)

    async def _answer(self, tickets: list[_Ticket]) -> None:
        """Works off one batch; where it fails, its requests are tried one by one: only the bad one fails."""
        texts = [text for ticket in tickets for text in ticket.texts]
        began = time.monotonic()
        work = asyncio.get_running_loop().run_in_executor(self._thread, self._work, tickets[0].kind, texts)
        try:
            results = list(await work)
        except Exception as error:  # Whatever it is, it belongs to those who wait for it.
            if len(tickets) > 1:
                for ticket in tickets:
                    await self._answer([ticket])
            elif not tickets[0].answer.done():
                tickets[0].answer.set_exception(error)
            return
        now = time.monotonic()
        self._watch(Batched(tickets[0].kind, len(texts), began - tickets[0].since, now - began))
        for ticket in tickets:
            mine, results = results[: len(ticket.texts)], results[len(ticket.texts) :]
            if not ticket.answer.done():
                ticket.answer.set_result(mine)

    def _next(self) -> list[_Ticket]:
        """Takes the requests of the next batch: the first, and those of its kind that fit in with it."""
        while self._queue and self._queue[0].answer.done():
            self._queue.popleft()
        if not self._queue:
            return []
        chosen = [self._queue.popleft()]
        room, left = self._most - len(chosen[0].texts), deque[_Ticket]()
        for ticket in self._queue:
            if ticket.answer.done():
                continue
            if ticket.kind == chosen[0].kind and len(ticket.texts) <= room:
                chosen.append(ticket)
                room -= len(ticket.texts)
            else:
                left.append(ticket)
        self._queue = left
        return chosen
