"""Requests of many clients become batches, whatever they and the work do."""

import asyncio
import threading

import pytest

from s2s.serve.batcher import Batcher, Closed, Full


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, 20))


class Slow:
    """Work that waits to be let go, and keeps what it was given."""

    def __init__(self):
        self.batches, self.go = [], threading.Event()

    def __call__(self, kind, texts):
        self.batches.append((kind, list(texts)))
        assert self.go.wait(20)
        if "bad" in texts:
            raise ValueError("bad")
        return [text.upper() for text in texts]


async def started(work, **options):
    batcher = Batcher(work, **{"most": 4, "waiting": 100, **options})
    batcher.start()
    return batcher


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def test_what_waits_while_the_device_is_busy_becomes_one_batch_and_everybody_gets_their_own():
    async def scenario():
        work, seen = Slow(), []
        batcher = await started(work, watch=seen.append)
        first = asyncio.create_task(batcher.submit(1, ["a"]))
        await until(lambda: work.batches)
        others = [asyncio.create_task(batcher.submit(1, [text, text * 2])) for text in "bc"]
        await until(lambda: batcher.waiting == 4)
        work.go.set()
        assert await first == ["A"]
        assert await asyncio.gather(*others) == [["B", "BB"], ["C", "CC"]]
        assert work.batches == [(1, ["a"]), (1, ["b", "bb", "c", "cc"])]
        assert [batch.sentences for batch in seen] == [1, 4]
        await batcher.close()

    run(scenario())


def test_kinds_do_not_mix_and_a_long_request_lets_short_ones_pass_between():
    async def scenario():
        work = Slow()
        batcher = await started(work)
        first = asyncio.create_task(batcher.submit("x", list("abcdefghij")))
        await until(lambda: work.batches)
        other = asyncio.create_task(batcher.submit("y", ["q"]))
        short = asyncio.create_task(batcher.submit("x", ["z", "w"]))
        await until(lambda: batcher.waiting == 9)
        work.go.set()
        assert await first == list("ABCDEFGHIJ") and await other == ["Q"] and await short == ["Z", "W"]
        assert work.batches == [
            ("x", list("abcd")), ("x", list("efgh")), ("x", list("ijzw")), ("y", ["q"]),
        ]  # fmt: skip
        await batcher.close()

    run(scenario())


def test_a_failure_belongs_to_the_request_that_caused_it():
    async def scenario():
        work = Slow()
        batcher = await started(work)
        tasks = [asyncio.create_task(batcher.submit(1, [text])) for text in ("a", "b", "bad", "c")]
        work.go.set()
        good, again, bad, last = await asyncio.gather(*tasks, return_exceptions=True)
        assert (good, again, last) == (["A"], ["B"], ["C"]) and isinstance(bad, ValueError)
        assert await batcher.submit(1, ["d"]) == ["D"]
        await batcher.close()

    run(scenario())


def test_too_many_are_turned_away_and_those_who_leave_make_room():
    async def scenario():
        work = Slow()
        batcher = await started(work, waiting=3)
        first = asyncio.create_task(batcher.submit(1, ["a"]))
        await until(lambda: work.batches)
        leaves = asyncio.create_task(batcher.submit(1, ["b", "c", "d"]))
        await until(lambda: batcher.waiting == 3)
        with pytest.raises(Full):
            await batcher.submit(1, ["e"])
        leaves.cancel()
        await until(lambda: batcher.waiting == 0)
        stays = asyncio.create_task(batcher.submit(1, ["f"]))
        work.go.set()
        assert await first == ["A"] and await stays == ["F"]
        assert work.batches == [(1, ["a"]), (1, ["f"])], "what nobody waits for is not done"
        await batcher.close()

    run(scenario())


def test_closing_finishes_what_was_taken_and_takes_no_more():
    async def scenario():
        work = Slow()
        batcher = await started(work)
        tasks = [asyncio.create_task(batcher.submit(kind, ["a"])) for kind in "xyz"]
        await until(lambda: batcher.waiting == 2)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(Closed):
            await batcher.submit(1, ["late"])
        work.go.set()
        assert await asyncio.gather(*tasks) == [["A"]] * 3
        await closing

    run(scenario())
