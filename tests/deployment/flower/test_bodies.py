"""Bodies as they arrive, and the room for them, by themselves, without a gate."""

import asyncio
import selectors
import time

import pytest

pytest.importorskip("starlette", reason="needs the extra 'flower'")

from flexlora.deployment.flower.bodies import BodyBudget, body
from flexlora.deployment.flower.gate_rules import Refused, RequestLimits

SLOW = 20.0
LIMITS = RequestLimits(window_seconds=SLOW, window_bytes=10)


class Jumping(selectors.DefaultSelector):
    """Instead of waiting, the clock of the loop goes on."""

    seconds = 0.0

    def select(self, timeout=None):
        self.seconds += timeout or 0
        return super().select(0)


def chunk(data, more=True):
    return {"type": "http.request", "body": data, "more_body": more}


def received(events, length):
    """The chunks of a body whose events come after so many seconds each.

    Or the status with which it is refused, and after how many seconds in all.
    """
    waiting, selector = iter(events), Jumping()

    def loop():
        made = asyncio.SelectorEventLoop(selector)
        made.time = lambda: selector.seconds
        return made

    async def receive():
        seconds, event = next(waiting)
        await asyncio.sleep(seconds)
        return event

    async def read():
        try:
            return [part async for part in body(receive, length, LIMITS)]
        except Refused as refused:
            return refused.status, selector.seconds

    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(read())


def test_chunks_come_as_they_are_sent_and_empty_ones_do_not():
    events = [(0, chunk(b"ab")), (0, chunk(b"")), (0, chunk(b"cde", False)), (0, chunk(b"f"))]
    assert received(events, 5) == [b"ab", b"cde"]
    assert received([(0, {"type": "http.request"})], 5) == []


def test_more_than_was_announced_is_refused():
    assert received([(0, chunk(b"abcde", False))], 5) == [b"abcde"]
    assert received([(0, chunk(b"abc")), (0, chunk(b"def"))], 5) == (413, 0)


def test_a_node_that_leaves_is_no_whole_request():
    events = [(0, chunk(b"abc")), (1, {"type": "http.disconnect"})]
    assert received(events, 5) == (400, 1)


@pytest.mark.parametrize("part", [b"", b"123456789"])
def test_a_body_must_keep_coming(part):
    """Every window brings so many bytes: what comes in drops, or not at all, is refused."""
    events = [(0, chunk(part)), *[(SLOW / 3, chunk(b""))] * 9]
    status, seconds = received(events, 100)
    assert status == 408 and seconds == pytest.approx(SLOW)


def test_a_window_begins_anew_with_enough_bytes():
    """Also for what was more than one window's bytes; the next needs all of its own again."""
    fast = [(0.9 * SLOW, chunk(b"1234567890"))] * 4 + [(0, chunk(b"", False))]
    assert b"".join(received(fast, 40)) == b"1234567890" * 4
    much = [(1, chunk(b"1" * 35)), *[(0.6 * SLOW, chunk(b"2345"))] * 2]
    status, seconds = received(much, 100)
    assert status == 408 and seconds == pytest.approx(1 + SLOW)


# --- room ----------------------------------------------------------------------------------

KIB = 2**10


def budget(**changes):
    settings = {"most_bytes": 100 * KIB, "node_bytes": 60 * KIB, "node_requests": 2}
    return BodyBudget(**{**settings, "wait_seconds": 0.05, **changes})


async def with_bodies(room, *bodies):
    """Open all of them, one after the other, and then leave them."""
    async with asyncio.TaskGroup() as group:
        over, opened = asyncio.Event(), []

        async def one(node, length, began):
            async with room.body(node, length):
                began.set()
                await over.wait()

        for node, length in bodies:
            began = asyncio.Event()
            task = group.create_task(one(node, length, began))
            waiting = asyncio.create_task(began.wait())
            await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
            opened.append(began.is_set())
            if task.done():
                over.set()
                waiting.cancel()
                break
        over.set()
    return opened


@pytest.mark.parametrize(
    "bodies",
    [
        [("a", 60 * KIB), ("b", 40 * KIB)],
        [("a", 30 * KIB), ("a", 30 * KIB), ("b", 40 * KIB)],
        [("a", 60 * KIB), ("b", 40 * KIB), ("c", 16 * KIB), ("a", 16 * KIB)],
    ],
    ids=["all", "of one node", "small ones beside"],
)
def test_bodies_that_have_room_come_in(bodies):
    room = budget()
    assert all(asyncio.run(with_bodies(room, *bodies)))
    assert not room._bytes  # nothing is kept of those that left


@pytest.mark.parametrize(
    "bodies",
    [
        [("a", 60 * KIB), ("b", 40 * KIB + 1)],
        [("a", 60 * KIB + 1)],
        [("a", 30 * KIB), ("a", 30 * KIB + 1)],
        [("a", 60 * KIB), ("b", 40 * KIB), ("c", 16 * KIB + 1)],
    ],
    ids=["all", "one body", "of one node", "a little more than a small one"],
)
def test_a_body_without_room_is_refused_after_a_while(bodies):
    room = budget()
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(with_bodies(room, *bodies))
    (error,) = caught.value.exceptions
    assert isinstance(error, Refused) and error.status == 503
    assert not room._bytes


def test_a_body_comes_in_as_soon_as_there_is_room():
    """And the next one waits for the next to leave."""

    async def scene():
        room, order = budget(wait_seconds=5.0), []

        async def one(name, seconds):
            async with room.body(name, 60 * KIB):
                order.append(name)
                await asyncio.sleep(seconds)

        started = time.monotonic()
        await asyncio.gather(one("a", 0.05), one("b", 0.05), one("c", 0.0))
        return order, time.monotonic() - started

    order, seconds = asyncio.run(scene())
    assert order == ["a", "b", "c"] and 0.1 <= seconds < 4


def test_requests_of_one_node_are_counted_while_they_last():
    async def scene():
        room = budget()
        async with room.request("a"), room.request("b"), room.request("a"):
            with pytest.raises(Refused) as caught:
                async with room.request("a"):
                    raise AssertionError("too many")
            assert caught.value.status == 503
        async with room.request("a"), room.request("a"):
            pass
        assert not room._requests

    asyncio.run(scene())


def test_the_usual_room_is_as_documented():
    room = BodyBudget()
    assert (room.most_bytes, room.node_bytes, room.node_requests) == (67_108_864, 16_777_216, 16)
    assert room.wait_seconds < 30  # Flower's node gives up on a write
