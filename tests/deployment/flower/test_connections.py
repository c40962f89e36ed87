"""Which connection gives way to a new one, without sockets."""

import asyncio
from collections import Counter

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

from flexlora.deployment.flower import connections
from flexlora.deployment.flower.bodies import BodyBudget
from flexlora.deployment.flower.connections import ConnectionLimits, Door, network_of
from flexlora.deployment.flower.gate_rules import Refused
from flexlora.deployment.flower.log_rate import LogRate

resource = pytest.importorskip("resource", reason="Windows has no limit of descriptors")


class Clock:
    seconds = 100.0

    def __call__(self):
        return self.seconds


def door(**limits):
    clock = Clock()
    return Door(ConnectionLimits(**{"grace_seconds": 0.0, **limits}), clock), clock


def open_from(place, hosts):
    async def opened():
        return [await place.admit(host) for host in hosts]

    return asyncio.run(opened())


def held(place):
    return Counter({address: len(group) for address, group in place._strangers.items()})


def test_the_oldest_of_the_address_that_has_the_most_gives_way():
    place, _ = door(strangers=7)
    others = open_from(place, ["10.0.0.1", "10.0.0.2", "10.0.0.2"])
    flood = open_from(place, ["10.0.0.9"] * 100)
    assert held(place) == {"10.0.0.1": 1, "10.0.0.2": 2, "10.0.0.9": 4}
    assert list(place._strangers["10.0.0.9"]) == flood[-4:]
    open_from(place, ["10.1.0.1", "10.1.0.2"])
    assert held(place)["10.0.0.9"] == 2
    assert all(each in place._strangers[each.address] for each in others)
    open_from(place, [f"10.2.0.{n}" for n in range(7)])  # each of its own address: the oldest
    assert set(held(place)) == {f"10.2.0.{n}" for n in range(7)}


def test_nobody_gives_way_before_his_time():
    place, clock = door(strangers=2, grace_seconds=0.05)
    first = open_from(place, ["10.0.0.9"] * 2)

    async def waits():
        task = asyncio.create_task(place.admit("10.0.0.1"))
        await asyncio.sleep(0.1)
        assert not task.done() and place.strangers == 2
        clock.seconds += 0.1
        return await asyncio.wait_for(task, 2)

    last = asyncio.run(waits())
    assert list(place._strangers["10.0.0.9"]) == first[1:]
    assert last in place._strangers["10.0.0.1"]


def test_nodes_give_way_to_nobody_and_leave_room_for_strangers():
    place, _ = door(total=12, strangers=5, of_node=3)
    nodes = [open_from(place, ["10.0.0.1"])[0] for _ in range(7)]
    for number, connection in enumerate(nodes[2:]):
        connection.prove(f"key {number}")
        connection.prove(f"key {number}")  # with every request
    assert (place.of_nodes, place.strangers) == (5, 0)
    open_from(place, ["10.0.0.9"] * 50)
    assert (place.of_nodes, place.strangers) == (5, 5)
    for number in (5, 6):
        open_from(place, ["10.0.0.1"])[0].prove(f"key {number}")
    with pytest.raises(Refused, match="Too many nodes"):
        open_from(place, ["10.0.0.1"])[0].prove("another key")
    nodes[2].close()
    open_from(place, ["10.0.0.1"])[0].prove("another key")
    assert place.of_nodes == 7


def test_a_node_has_its_own_limit():
    place, _ = door(of_node=3)
    first, second, third, fourth, fifth = open_from(place, ["10.0.0.1"] * 5)
    for connection in (first, second, third):
        connection.prove("key")
    with first.request():
        fourth.prove("key")  # the oldest that is idle makes room
        assert list(place._nodes["key"]) == [first, third, fourth]
        with third.request(), fourth.request(), pytest.raises(Refused, match="too many connec"):
            fifth.prove("key")


def test_an_address_opens_so_many_a_second():
    place, clock = door(new_of_address=10, new_at_once=20)
    assert sum(each is not None for each in open_from(place, ["10.0.0.9"] * 50)) == 20
    assert open_from(place, ["10.0.0.1"]) != [None]
    clock.seconds += 1
    assert sum(each is not None for each in open_from(place, ["10.0.0.9"] * 50)) == 10
    for number in range(3 * connections._MOST_ADDRESSES):
        place._rates.takes(str(number), clock())
    assert len(place._rates._left) == connections._MOST_ADDRESSES


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("fe80::1%eth0", "fe80::"),
        ("::1", "::"),
        ("a name", "a name"),
    ],
)
def test_a_site_is_an_ipv4_address_or_a_network_of_ipv6(host, network):
    assert network_of(host) == network


@pytest.mark.parametrize("hard", [100, 330, 1024, 9000, 2**20, resource.RLIM_INFINITY])
def test_the_descriptors_are_raised_and_bound_the_connections(monkeypatch, hard):
    now = [(min(hard, 256) if hard > 0 else 256, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: now[0])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: now.__setitem__(0, limits))
    limits = ConnectionLimits.of_process()
    assert 64 <= limits.total <= 4096 and limits.strangers <= limits.total // 2
    if hard not in (100, resource.RLIM_INFINITY):
        assert limits.total <= now[0][0] <= hard
    if hard in (9000, 2**20):
        assert (limits.total, limits.strangers) == (4096, 256)


# Bodies and lines


def test_bodies_wait_for_room_and_are_refused_after_a_time():
    budget = BodyBudget(most_bytes=100_000, node_bytes=60_000, wait_seconds=0.1)

    async def scenario():
        async with budget.body("ash", 50_000):
            with pytest.raises(Refused) as refused:
                async with budget.body("ash", 20_000):
                    pass
            assert refused.value.status == 503
            async with budget.body("ash", 9_000), budget.body("elm", 40_000):
                with pytest.raises(Refused):
                    async with budget.body("oak", 20_000):
                        pass

                async def later():
                    async with budget.body("oak", 20_000):
                        return True

                waiting = asyncio.create_task(later())
                await asyncio.sleep(0.02)
            assert await waiting
        assert budget._bytes.total() == 0 and not budget._bytes

    asyncio.run(scenario())


def test_a_node_has_so_many_requests():
    budget = BodyBudget(node_requests=2)

    async def scenario():
        async with budget.request("ash"), budget.request("ash"), budget.request("elm"):
            with pytest.raises(Refused, match="Too many requests"):
                async with budget.request("ash"):
                    pass
        assert not budget._requests

    asyncio.run(scenario())


def test_lines_are_counted_cut_and_made_printable():
    import logging

    clock = Clock()
    rate = LogRate(burst=3, seconds=10, now=clock)

    def said(text):
        record = logging.LogRecord("x", logging.INFO, "", 0, "%s", (text,), None)
        return record.getMessage() if rate(record) else None

    assert said("a\x1b[31m\nforged" + "b" * 999) == "a?[31m?forged" + "b" * 287
    assert [said("c"), said("d"), said("e"), said("f")] == ["c", "d", None, None]
    clock.seconds += 10
    assert said("g") == "g (after 2 lines that were not written)"
    assert said("h") is None
