"""The finished adapter reaches every client of a run, also one that was away, and no other."""

from dataclasses import dataclass, field

import pytest

pytest.importorskip("flwr", reason="needs flexlora[flower]")

from flwr.app import Message

from flexlora.config import RankType
from flexlora.deployment.flower import handover, inbox, records
from flexlora.deployment.flower.handover import Handover
from flexlora.deployment.server.delivery import Finished, Ledger
from flexlora.deployment.server.limits import RankLimits
from flexlora.deployment.server.registry import ClientInfo, ClientRegistry
from flexlora.deployment.server.run_files import ARRIVALS
from support import flower

DIGEST = "ab" * 32
FINISHED = Finished(b"an adapter", DIGEST, 3)


@pytest.fixture(autouse=True)
def messages():
    flower.identified()


@pytest.fixture
def naps(monkeypatch):
    """What happens between one look and the next, and a clock that these naps move on."""
    state = {"now": 100.0, "then": [], "count": 0}

    def sleep(seconds):
        state["now"] += 5.0
        state["count"] += 1
        assert state["count"] < 60, "the server waits for ever"
        if state["then"]:
            state["then"].pop(0)()

    monkeypatch.setattr(handover.time, "sleep", sleep)
    monkeypatch.setattr(handover.time, "monotonic", lambda: state["now"])
    return state


@dataclass
class Clients:
    """Nodes that answer to the finished adapter, each with what is its turn to say."""

    answers: dict[int, list]
    sent: list[tuple[int, str]] = field(default_factory=list)

    def grid(self) -> flower.FakeGrid:
        nodes = {n: flower.Scripted(n, self._says(n)) for n in self.answers}
        return flower.FakeGrid(nodes, self._watch)

    def _says(self, number: int):
        def says(header, payload):
            assert payload == FINISHED.payload
            assert (header["digest"], header["rounds"], header["terms"]) == (DIGEST, 3, "spec")
            answers = self.answers[number]
            return (answers.pop(0) if len(answers) > 1 else answers[0]), b""

        return says

    def _watch(self, message: Message, node) -> None:
        header, _ = records.opened(message.content)
        self.sent.append((node.number, header["kind"]))


def registry(folder, bound: bool = True, **nodes: int) -> ClientRegistry:
    """The clients of a run with Flower's numbers of their nodes, all of which are authorised."""
    flower.let_in(folder, nodes)
    entries = {id: ClientInfo(n, 2, 2, 7, "cpu", None) for id, n in nodes.items()}
    limits = RankLimits(RankType(2, 2), {})
    return ClientRegistry(folder, limits, [], bound, entries=entries)


def handed_over(clients: Clients, members: ClientRegistry, grid=None) -> Ledger:
    ledger = Ledger(members.folder, DIGEST)
    grid = grid or clients.grid()
    Handover(grid, members, "spec", FINISHED, ledger, inbox.of(grid)).run()
    return ledger


def lines(folder) -> list[str]:
    return (folder / ARRIVALS).read_text().splitlines()


HAS = {"digest": DIGEST}


def test_every_client_gets_it_and_is_told_that_the_run_is_over(tmp_path, naps):
    clients = Clients({11: [HAS], 12: [HAS]})
    grid = clients.grid()
    ledger = handed_over(clients, registry(tmp_path, ash=11, birch=12), grid)
    assert ledger.entries.keys() == {"ash", "birch"}
    assert grid.asked("store") == grid.asked("over") == [11, 12]
    assert not any(node.online for node in grid.nodes.values())
    assert lines(tmp_path) == ["client ash has the adapter", "client birch has the adapter"]


def test_one_that_is_away_gets_it_when_it_is_back(tmp_path, naps):
    clients = Clients({11: [HAS], 12: [HAS]})
    grid = clients.grid()
    grid.nodes[12].online = False
    naps["then"] = [lambda: None] * 4 + [lambda: setattr(grid.nodes[12], "online", True)]
    ledger = handed_over(clients, registry(tmp_path, ash=11, birch=12), grid)
    assert ledger.entries.keys() == {"ash", "birch"} and naps["count"] >= 5


def test_one_that_could_not_write_it_is_asked_again_and_its_reason_printed_once(tmp_path, naps):
    full = {"error": "OSError: No space left on device"}
    clients = Clients({11: [full, full, HAS]})
    ledger = handed_over(clients, registry(tmp_path, ash=11))
    assert ledger.entries.keys() == {"ash"}
    assert lines(tmp_path) == [
        "client ash does not have the adapter: OSError: No space left on device",
        "client ash has the adapter",
    ]


@pytest.mark.parametrize("answer", [{"digest": "cd" * 32}, {"digest": None}, {}, {"digest": ["x"]}])
def test_another_digest_is_no_confirmation(tmp_path, naps, answer):
    clients = Clients({11: [answer, HAS]})
    assert handed_over(clients, registry(tmp_path, ash=11)).entries.keys() == {"ash"}
    assert lines(tmp_path)[0].startswith("client ash does not have the adapter: It")


def test_a_client_cannot_confirm_for_another(tmp_path, naps):
    clients = Clients({11: [{**HAS, "client": "birch"}], 12: [HAS]})
    grid = clients.grid()
    grid.nodes[12].online = False
    naps["then"] = [lambda: setattr(grid.nodes[12], "online", True)]
    handed_over(clients, registry(tmp_path, ash=11, birch=12), grid)
    assert grid.asked("store") == [11, 12]


def test_one_that_took_no_part_gets_no_adapter_and_is_told_the_end(tmp_path, naps):
    clients = Clients({11: [HAS], 13: [HAS]})
    grid = clients.grid()
    members = registry(tmp_path, ash=11, cedar=13)
    del members.entries["cedar"]
    assert handed_over(clients, members, grid).entries.keys() == {"ash"}
    assert grid.asked("store") == [11] and sorted(grid.asked("over")) == [11, 13]


def test_a_revoked_client_is_neither_sent_it_nor_waited_for(tmp_path, naps):
    clients = Clients({11: [HAS]})
    members = registry(tmp_path, ash=11, birch=12)
    flower.let_in(tmp_path, {"ash": 11})
    assert handed_over(clients, members).entries.keys() == {"ash"}


def test_without_keys_a_client_gives_its_own_name(tmp_path, naps):
    clients = Clients({21: [{**HAS, "client": "ash"}]})
    ledger = handed_over(clients, registry(tmp_path, bound=False, ash=11))
    assert ledger.entries.keys() == {"ash"}


def test_who_has_it_is_kept_and_does_not_count_for_another_adapter(tmp_path, naps):
    clients = Clients({11: [HAS]})
    handed_over(clients, registry(tmp_path, ash=11))
    assert Ledger(tmp_path, DIGEST).without(["ash", "birch"]) == ["birch"]
    assert Ledger(tmp_path, "ef" * 32).without(["ash"]) == ["ash"]
    grid = clients.grid()
    handed_over(clients, registry(tmp_path, ash=11), grid)
    assert grid.pushed == []
