"""Machines apart: a cable that is pulled, what a client can reach, a disk that is full.

Real processes with TLS, each machine in a network namespace of its own. Every client's turn is
asked for until it is there (quorum = cohort), so the adapter at the end must be that of a
simulation in which nothing happened, to the bit.
"""

import time

import pytest

pytest.importorskip("flwr", reason="needs flexlora[flower]")

from support import network_namespaces
from support.network_namespaces import SERVER, SERVER_HOST
from support.processes import Site

pytestmark = pytest.mark.slow

RANKS = {"client0": 2, "client1": 5}
PORT = 8090
CUT_SECONDS = 25.0
NO_NETWORKS = network_namespaces.missing_for_networks()
NO_DISKS = network_namespaces.missing_for_disks()


@pytest.fixture
def network():
    with network_namespaces.network(tuple(RANKS)) as made:
        yield made


@pytest.fixture
def apart(tmp_path, network):
    """A site of which each process is on a machine of its own."""
    within = {client: network.within(client) for client in RANKS}
    within["serve"] = network.within(SERVER)
    made = Site(
        *(tmp_path, 3, "flora"), ranks=RANKS, address=f"{SERVER_HOST}:{PORT}", within=within
    )
    yield made
    made.stop()


@pytest.mark.skipif(NO_NETWORKS is not None, reason=str(NO_NETWORKS))
def test_a_cable_that_is_pulled_in_the_middle_of_a_round(apart, network):
    network.slow_down("client0")
    apart.begin()
    apart.until(apart.done(1), 120, "round 1")

    before = handed_to(apart, "client1")
    apart.until(lambda: handed_to(apart, "client1") > before, 60, "a turn of round 2 to begin")
    with network.cut("client1"):
        time.sleep(CUT_SECONDS)
        only_the_gate_is_reached(network)  # now, as the run cannot end before the cable is back
        # The turn went on without a network, and its upload has to wait.
        assert list(apart.state("client1").glob("*/upload-00002-*"))
        assert apart.has_come(2, "client0")
        assert not apart.has_come(2, "client1")
    took = apart.until(apart.done(2), 120, "round 2 with the cable back")
    print(f"round 2 is done {took:.0f} s after the cable is back", flush=True)

    apart.until(apart.finished, 120, "the run to finish")
    apart.assert_as_if_nothing_happened()


def handed_to(site, client) -> int:
    """When the client last took a download from Flower, in nanoseconds."""
    return max(path.stat().st_mtime_ns for path in site.state(client).glob("*/download"))


def only_the_gate_is_reached(network) -> None:
    """From a client's machine, of all ports; and from the server's, none of a client's."""
    assert len(network.listening(SERVER)) > 1  # the SuperLink's own are there
    assert network.open_ports("client0", SERVER_HOST) == [PORT]
    assert network.listening("client0")
    assert network.open_ports(SERVER, network.host("client0")) == []


@pytest.fixture
def cramped(tmp_path):
    """A site of which one client has a small disk."""
    made = Site(tmp_path, 3, "flora", ranks=RANKS)
    made.state("client1").mkdir(mode=0o700)
    made.within = {"client1": network_namespaces.with_disk(made.state("client1"), mebibytes=16)}
    yield made
    made.stop()


@pytest.mark.skipif(NO_DISKS is not None, reason=str(NO_DISKS))
def test_a_client_whose_disk_is_full_loses_its_turn_until_there_is_room(cramped):
    cramped.begin()
    cramped.until(cramped.done(1), 120, "round 1")
    disk = network_namespaces.seen_by(cramped.processes["client1"].pid, cramped.state("client1"))
    filler = network_namespaces.fill(disk)

    cramped.until(lambda: cramped.lost(2, "client1"), 120, "a turn to be lost")
    assert "No space left on device" in cramped.lost(2, "client1")[0]
    assert not cramped.done(2)()
    filler.unlink()
    took = cramped.until(cramped.done(2), 120, "round 2 with room again")
    print(f"round 2 is done {took:.0f} s after there is room", flush=True)
    cramped.until(cramped.finished, 120, "the run to finish")
    cramped.assert_as_if_nothing_happened()
