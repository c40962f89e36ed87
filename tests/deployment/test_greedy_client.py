"""A registered client sends more than it may, and the server's memory does not follow.

All processes are real: the supervisor, the gate, the SuperLink, the process of the rounds, and
three clients. Measured is the memory of the server's four together.
"""

import contextlib
import http.client
import os
import ssl
import threading
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs flexlora[flower]")

from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node

from flexlora import addresses
from flexlora.deployment.flower.processes import ProcessId
from flexlora.deployment.key_files import read_private_key
from flexlora.deployment.server.run_files import NODES, numbers
from flexlora.journal import LossKind
from support.gate import Signer, resident
from support.processes import SOONER, Site

pytestmark = pytest.mark.trust

MIB = 2**20
MOST_GROWTH = 50 * MIB
MOST_IN_A_FLOOD = 512 * MIB
"""What a registered client may cost that sends as fast as it can: 355 MiB was seen, nearly all in
the SuperLink. It is the process's whole growth, and not that of each upload."""
HOSTILE = Path(__file__).parents[1] / "support" / "hostile_client"
GREEDY = "client1"


@pytest.fixture
def site(tmp_path):
    """A site one of whose clients turns hostile when it is told to."""
    paths = os.pathsep.join([str(HOSTILE), SOONER["PYTHONPATH"]])
    hostile = ["env", f"HOSTILE={tmp_path / 'hostile'}", f"PYTHONPATH={paths}"]
    site = Site(tmp_path, rounds=5, quorum=2, deadline=30.0, within={GREEDY: hostile})
    yield site
    site.stop()


def server_pids(site: Site) -> list[int]:
    rounds = ProcessId.read(site.run / "serverapp.pid")
    return [
        site.processes["serve"].pid,
        *site.pids("flexlora.deployment.flower.gate", site.address),
        *site.pids("flower.superlink_program", str(site.run)),
        *([] if rounds is None else [rounds.pid]),
    ]


class Memory(threading.Thread):
    """The largest memory of the server's processes together, in bytes, since it was last read."""

    def __init__(self, site: Site) -> None:
        super().__init__(daemon=True)
        self.pids, self.most, self.over = server_pids(site), 0, threading.Event()
        self.each: list[int] = []
        assert len(self.pids) == 4
        self.start()

    def run(self) -> None:
        while not self.over.wait(0.1):
            with contextlib.suppress(OSError):
                each = [resident(pid) for pid in self.pids]
                if sum(each) > self.most:
                    self.most, self.each = sum(each), each

    def taken(self) -> int:
        most, self.most = self.most, 0
        print([f"{each / MIB:.0f} MiB" for each in self.each])
        return most


def flood(site: Site, over: threading.Event, sent: list[int]) -> None:
    """Answers that nobody asked for, and objects of five MiB, as fast as they are taken."""
    key = read_private_key(site.folder / "keys" / GREEDY / f"{GREEDY}.key", openssh=True)
    node, signer = Node(node_id=numbers(site.run, NODES)[GREEDY]), Signer(key)
    context = ssl.create_default_context(cafile=site.folder / "keys" / "ca.crt")
    host, port = addresses.split(site.address)
    number = 0
    while not over.is_set():
        number += 1
        name = f"{number:064x}"
        # A tree of as many objects as an announcement can name.
        children = [ObjectTree(object_id=f"{number:032x}{n:032x}") for n in range(3000)]
        metadata = Metadata(message_id=name, reply_to_message_id=name, src_node_id=node.node_id)
        tree = ObjectTree(object_id=name, children=children)
        requests = {
            "push-messages": PushMessagesRequest(
                node=node,
                messages_list=[Message(metadata=metadata)],
                message_object_trees=[tree],
            ),
            "push-object": PushObjectRequest(
                node=node, object_id=name, object_content=os.urandom(5 * MIB)
            ),
        }
        for call, request in requests.items():
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPSConnection(host, port, timeout=20, context=context)
                with contextlib.closing(connection):
                    body = request.SerializeToString()
                    connection.request("POST", f"/v1/fleet/{call}", body, signer.headers())
                    connection.getresponse().read()
                    sent.append(len(body))


def losses(site: Site) -> list[tuple[str, str | None]]:
    return [(event["kind"], event.get("code")) for event in site.events("lost")]


def test_uploads_of_a_size_that_nobody_asked_for_do_not_cost_the_server_memory(site):
    site.begin()
    site.until(site.done(1), 180, "the first round")
    memory = Memory(site)
    site.until(site.done(2), 120, "an honest round")
    before = memory.taken()
    (site.folder / "hostile").write_text("equal")
    site.until(lambda: len(losses(site)) > 0, 120, "a refused upload")
    equal = memory.taken() - before
    (site.folder / "hostile").write_text("different")
    over, sent = threading.Event(), []
    flooding = [threading.Thread(target=flood, args=(site, over, sent)) for _ in range(4)]
    for thread in flooding:
        thread.start()
    site.until(site.finished, 120, "the end")
    over.set()
    for thread in flooding:
        thread.join()
    memory.over.set()
    different = memory.taken() - before
    stored = sum(f.stat().st_size for f in (site.run / "flower").rglob("*") if f.is_file())
    print(
        f"\n{before / MIB:.0f} MiB; +{equal / MIB:.1f} MiB for 100 MiB of equal chunks, "
        f"+{different / MIB:.1f} MiB for 100 MiB of different ones beside {len(sent)} unasked "
        f"answers and objects of {sum(sent) / MIB:.0f} MiB; {stored / MIB:.1f} MiB on the disk"
    )
    assert equal < MOST_GROWTH and different < MOST_IN_A_FLOOD and stored < 2 * MOST_GROWTH
    assert sum(sent) > 200 * MIB
    # Chunks that may not be stored never arrive; an answer of too many objects is refused.
    assert {kind for kind, _ in losses(site)} <= {LossKind.NO_ANSWER, LossKind.INVALID_UPLOAD}
    assert len(losses(site)) >= 2 and {e["client"] for e in site.events("lost")} == {GREEDY}
    assert all(e["received"] >= 2 for e in site.events("round"))
