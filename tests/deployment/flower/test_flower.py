"""Real clients over Flower: the same numbers as in process, and whom it leaves out."""

import errno
import io
import json
import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from rich.console import Console

pytest.importorskip("flwr", reason="needs flexlora[flower]")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from flexlora import model, storage, wire
from flexlora.cli import progress
from flexlora.config.ranks import RankType
from flexlora.deployment.flower import local_users, records
from flexlora.deployment.flower.grid import FlowerTransport
from flexlora.deployment.node import node
from flexlora.deployment.server import server_run
from flexlora.deployment.server.limits import RankLimits
from flexlora.deployment.server.registry import ClientRegistry
from flexlora.deployment.server.run_files import (
    ARRIVALS,
    CERTIFICATES,
    CertificateNote,
    write_certificate_notes,
)
from flexlora.federation import rounds, setup
from flexlora.federation.client_turn import TurnRequest
from flexlora.federation.transport import LateReply, Lost, Reply, TransportEvent, WaitPolicy
from flexlora.journal import LossKind
from flexlora.journal.record import Record
from flexlora.peft_format import WEIGHTS
from support import flower, models

RANKS = {"client0": 2, "client1": 5, "client2": 3}
LONGEST = {"flora": 4}
"""How many rounds a method is simulated for, where three are not enough."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flower")
    models.save(folder / "model")
    flower.identified()
    return folder


@pytest.fixture(scope="module")
def loaded() -> dict[str, model.Base]:
    return {}


@pytest.fixture(autouse=True)
def quick(monkeypatch, loaded):
    """The same model is read from the disk once, and nothing waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    models.load_once(monkeypatch, loaded)


@pytest.fixture
def sockets():
    # A test's own folder is too deep for a socket.
    path = Path(tempfile.mkdtemp(prefix="flexlora-"))
    yield path
    shutil.rmtree(path)


def serve(folder: Path, grid, settings, clients=3, bound=True) -> list[dict]:
    """A run of real clients; its journal."""
    if not (folder / server_run.PLAN).exists():
        server_run.write_run_folder(folder, settings, server_run.ServePlan.new(clients, bound))
        names = [client for client in RANKS][: len(grid.nodes)]
        flower.let_in(folder, dict(zip(names, grid.nodes, strict=True)))
    server_run.run_server(
        folder, lambda registry, spec, quorum: FlowerTransport(grid, registry, spec, quorum, 0.01)
    )
    return list(Record(folder).events())


@pytest.fixture(scope="module")
def simulated(folder):
    """The events of the same run in process, of a method and enough rounds; run once."""
    found = {}

    def run(method: str = "flexlora") -> list[dict]:
        if method not in found:
            how = {
                "method": {"name": method},
                "federation": {"rounds": LONGEST.get(method, 3), "cohort": 3},
            }
            corpus = models.corpus()
            mine = corpus.select([owner in RANKS for owner in corpus.keys("client")])
            settings = flower.settings(folder, ranks_of(method), **how)
            ready = setup.prepare(settings, mine)
            found[method] = list(rounds.run(ready, folder / f"simulated-{method}"))
        return found[method]

    return run


def ranks_of(method: str) -> dict[str, int]:
    return dict.fromkeys(RANKS, 3) if method == "fedsalora" else RANKS


def weights(events: list[dict], number: int) -> bytes:
    """The global adapter of a round."""
    last = Path(events[-1]["adapter"]).parent
    return (last.with_name(f"{number:05d}") / "adapter" / WEIGHTS).read_bytes()


def remote(folder: Path, ranks=RANKS, **changes):
    data = {"format": "remote", "path": None, "prompt": "plain", "max_tokens": 32}
    return flower.settings(folder, ranks, **{"data": data, **changes})


@pytest.fixture
def nodes(folder, sockets, tmp_path):
    """Starts the nodes of ranks; ends them."""
    started = []
    (tmp_path / "model").symlink_to(folder / "model")

    def start(ranks=RANKS):
        started.append(flower.start(tmp_path / f"nodes{len(started)}", sockets, ranks))
        return started[-1]

    yield start
    for each in started:
        flower.stop(each)


@pytest.mark.parametrize("method", ["flexlora", "flora", "fedsalora", "flexfold"])
def test_three_rounds_give_the_numbers_of_the_simulation(
    folder, nodes, simulated, tmp_path, method
):
    how = {"method": {"name": method}, "federation": {"rounds": 3, "cohort": 3}}
    ranks = ranks_of(method)
    wanted = simulated(method)
    got = serve(tmp_path / "served", nodes(ranks), remote(folder, ranks, **how))
    assert got[-1]["event"] == "finish"
    assert weights(got, 3) == weights(wanted, 3)
    assert [e["client"] for e in of(got, "joined")] == list(RANKS)
    assert len(of(got, "round")) == 3
    for mine, theirs in zip(of(got, "round"), of(wanted, "round"), strict=False):
        for key in ("cohort", "bytes_up", "bytes_down", "loss_total", "update_norm"):
            assert mine[key] == theirs[key]


EVALUATED = {
    **{"seen_clients": 0, "unseen_clients": 0, "truncated": False, "base": True},
    **{"client_share": 0.3, "client_rows": 2},
}


@pytest.mark.parametrize("method", ["flexlora", "flora", "fedsalora"])
def test_evaluations_by_the_clients_give_the_numbers_of_the_simulation(
    folder, nodes, tmp_path, method
):
    """On the same rows, to the bit; of a method with personal models each evaluates its own."""
    how = {"method": {"name": method}, "federation": {"rounds": 2, "cohort": 3}}
    ranks, corpus = ranks_of(method), models.corpus()
    mine = corpus.select([owner in RANKS for owner in corpus.keys("client")])
    here = flower.settings(folder, ranks, evaluation=EVALUATED, **how)
    wanted = list(rounds.run(setup.prepare(here, mine), tmp_path / "simulated"))
    there = remote(folder, ranks, evaluation=EVALUATED, **how)
    got = serve(tmp_path / "served", nodes(ranks), there)
    assert weights(got, 2) == weights(wanted, 2)
    pairs = list(zip(of(got, "client_evaluation"), of(wanted, "client_evaluation"), strict=True))
    assert [one["round"] for one, _ in pairs] == [0, 1, 2]
    for one, other in pairs:
        assert one["clients"] == other["clients"] and one["missing"] == other["missing"] == {}
        assert [row["client"] for row in one["clients"]] == list(RANKS)
        assert one["loss"] == other["loss"] and one["worst"] == other["worst"]
    assert of(got, "client_evaluation")[1]["bytes_down"] > 0
    assert all(e["holdout"] > 0 for e in of(got, "joined"))


def test_a_client_that_refuses_to_evaluate_or_fails_keeps_nobody_from_it(folder, nodes, tmp_path):
    grid = nodes()
    first, second, _ = grid.nodes.values()

    def spoil(message, node):
        header, _ = records.opened(message.content)
        if node is first and header["kind"] == "enrol":
            answer = node.handle(message)
            said, _ = records.opened(answer.content)
            return Message(records.record({**said, "holdout": 0}), reply_to=message)
        if node is second and header["kind"] == "evaluate":
            return Message(records.record({"loss_total": "none"}), reply_to=message)
        return None

    grid.spoil = spoil
    how = {"evaluation": {**EVALUATED, "base": False}, "federation": {"rounds": 1, "cohort": 3}}
    got = serve(tmp_path / "served", grid, remote(folder, **how))
    (event,) = of(got, "client_evaluation")
    assert [row["client"] for row in event["clients"]] == ["client2"]
    assert event["missing"] == {"client1": "It sent [None, None] as numbers of rows and tokens."}
    assert grid.asked("evaluate") == list(grid.nodes)[1:]


def test_an_upload_that_was_not_used_is_said_to_its_client(folder, nodes, tmp_path):
    """With its next request, in words that are no failure."""
    grid, told = nodes(), []
    slow = list(grid.nodes.values())[-1]

    def spoil(message, node):
        header, _ = records.opened(message.content)
        if node is slow:
            told.append(header.get("unused"))
            if header["kind"] == "turn" and header["round"] == 1:
                enough = [m for m in grid.waiting.values() if m is not message]
                return "later" if enough else None
        return None

    grid.spoil = spoil
    how = {"federation": {"rounds": 2, "cohort": 2, "over_selection": 0.5}}
    got = serve(tmp_path / "served", grid, remote(folder, **how))
    lost = of(got, "lost", round=1)
    assert [(e["client"], e["kind"]) for e in lost] == [("client2", "not_needed")]
    assert {"1": "enough uploads had arrived before it"} in told


def test_clients_of_different_modules_give_the_numbers_of_the_simulation(folder, sockets, tmp_path):
    """One trains the attention alone, which its owner and not the server decides."""
    (tmp_path / "model").symlink_to(folder / "model")
    how = {"federation": {"rounds": 3, "cohort": 3}}
    corpus = models.corpus()
    mine = corpus.select([owner in RANKS for owner in corpus.keys("client")])
    here = with_r5(flower.settings(folder, RANKS, **how), feed_forward=0)
    wanted = list(rounds.run(setup.prepare(here, mine), tmp_path / "simulated"))
    grid = flower.start(tmp_path / "nodes", sockets, RANKS, {"client1": "attention"})
    # Both start from the largest rank of each module, which the server does not learn from nodes.
    got = serve(tmp_path / "served", grid, with_r5(remote(folder, **how), feed_forward=3))
    flower.stop(grid)
    assert got[-1]["event"] == "finish" and of(got, "lost") == []
    assert {e["rank_type"] for e in of(got, "client", client="client1")} == {"r5-0"}
    assert weights(got, 3) == weights(wanted, 3)


def with_r5(settings, feed_forward):
    """The settings with another rank for the feed-forward layers of type r5."""
    kind = settings.ranks.types["r5"].model_copy(update={"feed_forward": feed_forward})
    types = {**settings.ranks.types, "r5": kind}
    return settings.model_copy(update={"ranks": settings.ranks.model_copy(update={"types": types})})


# What may go wrong with one client, in whole runs


def of(events: list[dict], kind: str, **fields) -> list[dict]:
    found = [event for event in events if event["event"] == kind]
    return [e for e in found if all(e[key] == value for key, value in fields.items())]


TWO = {"federation": {"rounds": 2, "cohort": 3, "quorum": 2, "attempts": 1}}


def test_a_client_whose_disk_is_full_is_lost_with_that_reason_and_takes_its_next_turn(
    folder, nodes, tmp_path, monkeypatch
):
    write, left = storage.write_summed, [1]

    def full(path, data):
        if path.name.startswith("upload-") and "client1" in str(path) and left:
            left.pop()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    monkeypatch.setattr(node, "write_summed", full)
    events = serve(tmp_path / "served", nodes(), remote(folder, **TWO))
    (lost,) = of(events, "lost")
    assert (lost["round"], lost["client"]) == (1, "client1")
    assert "No space left on device. Free some space" in lost["reason"]
    assert [e["received"] for e in of(events, "round")] == [2, 3]


def test_a_second_attempt_asks_a_client_whose_answer_was_cut_off(
    folder, nodes, simulated, tmp_path
):
    """The upload that its node has kept is taken, and the numbers are those without a fault."""
    how = {"federation": {"rounds": 2, "cohort": 3, "quorum": 3, "attempts": 2}}
    grid, cut = nodes(), []

    def spoil(message, node):
        if records.opened(message.content)[0]["kind"] == "turn" and not cut:
            cut.append(node.number)
            node.handle(message)
            return flower.failed(message, 4, "Reply unavailable")
        return None

    grid.spoil = spoil
    got = serve(tmp_path / "served", grid, remote(folder, **how))
    assert [e["reason"] for e in of(got, "lost")] == ["Flower's error 4: Reply unavailable"]
    assert of(got, "short", attempt=1, received=2)
    assert weights(got, 2) == weights(simulated(), 2)


def test_a_node_that_joins_between_rounds_takes_part_in_the_next(folder, nodes, tmp_path):
    grid = nodes()
    late = list(grid.nodes.values())[2]
    late.online = False

    def spoil(message, node):
        header, _ = records.opened(message.content)
        late.online |= header.get("round") == 1
        return None

    grid.spoil = spoil
    events = serve(tmp_path / "served", grid, remote(folder, **TWO), clients=2)
    cohorts = [e["cohort"] for e in of(events, "round")]
    assert cohorts == [["client0", "client1"], ["client0", "client1", "client2"]]
    assert [e["client"] for e in of(events, "joined")] == list(RANKS)


def test_a_node_that_is_gone_at_the_start_of_a_round_is_not_waited_for(folder, nodes, tmp_path):
    grid = nodes()
    gone = next(iter(grid.nodes.values()))

    def spoil(message, node):
        header, _ = records.opened(message.content)
        if header["kind"] == "store":
            gone.online = True  # it gets the adapter when it is back
        if node is not gone or header.get("round") != 1:
            return None
        gone.online = False
        return node.handle(message)

    grid.spoil = spoil
    events = serve(tmp_path / "served", grid, remote(folder, **TWO))
    cohorts = [e["cohort"] for e in of(events, "round")]
    assert cohorts == [list(RANKS), ["client1", "client2"]]
    assert not of(events, "lost", round=2)


def test_a_server_that_was_stopped_goes_on_with_those_who_are_there(
    folder, nodes, simulated, tmp_path
):
    """The roll is kept, nodes are asked anew who they are, and the numbers are the same."""
    how = {"federation": {"rounds": 3, "cohort": 3, "quorum": 3, "attempts": 1}}
    grid, place = nodes(), tmp_path / "served"

    def spoil(message, node):
        if records.opened(message.content)[0].get("round") == 2 and node.number % 2:
            raise httpx.ConnectError("the power is gone")
        return None

    grid.spoil = spoil
    with pytest.raises(httpx.ConnectError, match="power"):
        serve(place, grid, remote(folder, **how))
    assert Record(place).events("stopped")
    grid.spoil = None
    grid.waiting.clear()  # another run of Flower's has messages of its own
    got = serve(place, grid, remote(folder, **how))
    assert got[-1]["event"] == "finish" and weights(got, 3) == weights(simulated(), 3)


def test_uploads_of_another_client_or_with_no_end_are_lost(folder, nodes, tmp_path):
    grid = nodes()
    first = {}

    def spoil(message, node):
        header, _ = records.opened(message.content)
        if header.get("round") != 1:
            return None
        _, data = records.opened(node.handle(message).content)
        # The client with the most examples is asked first.
        sent = {"client2": data, "client1": data[:-9], "client0": first.get("client2")}
        first[header["client"]] = data
        said = records.record({"round": 1}, records.payload(sent[header["client"]]))
        return Message(said, reply_to=message)

    grid.spoil = spoil
    one = {"federation": {"rounds": 1, "cohort": 3, "quorum": 1, "attempts": 1}}
    events = serve(tmp_path / "served", grid, remote(folder, **one))
    lost = {e["client"]: e["reason"] for e in of(events, "lost")}
    assert set(lost) == {"client0", "client1"}
    assert "does not lie within the file" in lost["client1"]
    assert "request asks for 10448 at most" in lost["client0"]
    assert {e["code"] for e in of(events, "lost")} == {"wrong_size", "cut_off"}


def test_an_upload_whose_facts_are_zero_does_not_stop_who_watches(folder, nodes, tmp_path):
    grid = nodes()

    def spoil(message, node):
        header, _ = records.opened(message.content)
        if header["kind"] != "turn":
            return None
        _, data = records.opened(node.handle(message).content)
        (tmp_path / "upload").write_bytes(data)
        upload = wire.open_upload(tmp_path / "upload")
        metrics = dict.fromkeys(upload.metrics, 0)
        made = type(upload)(**{**vars(upload), "metrics": metrics})
        data = wire.encode_upload(made, next(iter(upload.adapter.values())).B.dtype)
        return Message(records.record({"round": 1}, records.payload(data)), reply_to=message)

    grid.spoil = spoil
    one = {"federation": {"rounds": 1, "cohort": 3}}
    events = serve(tmp_path / "served", grid, remote(folder, **one))
    progress.show(events, Console(file=io.StringIO()))


def test_a_client_that_lost_what_it_had_merged_is_handed_all_of_it_again(
    folder, nodes, simulated, tmp_path
):
    how = {
        "method": {"name": "flora"},
        "federation": {"rounds": 4, "cohort": 3, "quorum": 3, "attempts": 2},
    }
    grid, cut = nodes(), []

    def spoil(message, node):
        if records.opened(message.content)[0].get("round") == 3 and not cut:
            (held,) = (tmp_path / "nodes0" / "state-client0").glob("*/private")
            shutil.rmtree(held)
            cut.append(held)
        return None

    grid.spoil = spoil
    got = serve(tmp_path / "served", grid, remote(folder, **how))
    assert cut and weights(got, 4) == weights(simulated("flora"), 4)
    (lost,) = of(got, "lost")
    assert (lost["round"], lost["client"]) == (3, "client0")
    assert "The base updates of rounds [1] are not complete in" in lost["reason"]


# One exchange, with nodes that say what a test wants


def client(number: int, name: str, says=None, **more) -> flower.Scripted:
    """A node that enrols, and answers a turn with its name unless ``says`` is given."""
    usual = {"client": name, "examples": 7, "attention": 3, "feed_forward": 3, "device": "cpu"}

    def answer(header, payload):
        if header["kind"] == "enrol":
            return {**usual, **more}, b""
        return says(header, payload) if says else ({"round": header["round"]}, name.encode())

    return flower.Scripted(number, answer)


def federation(folder: Path, *nodes, quorum=None, **options) -> FlowerTransport:
    """These nodes, enrolled."""
    grid = flower.FakeGrid({node.number: node for node in nodes})
    roll = ClientRegistry(
        folder, RankLimits(RankType(5, 5), {}), ["m.self_attn.q_proj"], **{"bound": False}
    )
    online = sum(node.online for node in nodes)
    made = FlowerTransport(grid, roll, "{}", online if quorum is None else quorum, 0.001, **options)
    made.wait_for_clients(made.quorum)
    return made


def heard(made: FlowerTransport, *clients, round=1, patience=None, download=b"download") -> list:
    jobs = [TurnRequest(name, round, download) for name in clients]
    return list(made.exchange(jobs, patience or WaitPolicy()))


def answers(events: list) -> list:
    return [event for event in events if not isinstance(event, TransportEvent)]


def news(events: list, kind: str) -> list[dict]:
    return [dict(e.facts) for e in events if isinstance(e, TransportEvent) and e.event == kind]


@pytest.fixture
def three(tmp_path) -> FlowerTransport:
    names = ("ash", "birch", "cedar")
    return federation(tmp_path, *(client(2**63 + n, name) for n, name in enumerate(names)))


def test_a_system_that_does_not_keep_other_users_out_is_named_in_the_journal(
    folder, nodes, tmp_path, monkeypatch
):
    monkeypatch.setattr(local_users, "_TABLE", tmp_path / "tcp")
    there = remote(folder, federation={"rounds": 1, "cohort": 3})
    events = of(serve(tmp_path / "served", nodes(), there), "start")
    [note] = [n for n in events[0]["notices"] if "other users of this machine" in n]
    assert "reach the SuperLink" in note


def test_what_the_gate_says_of_certificates_is_an_event_once(three, tmp_path):
    assert news(heard(three, "ash"), "certificate") == []
    soon = CertificateNote("server.crt expires on 2031-02-03, in 9 days; renew it", False)
    write_certificate_notes(tmp_path, {"server.crt expires on 2031-02-03": soon})
    said = news(heard(three, "ash", round=2), "certificate")
    assert said == [{"note": soon.sentence, "renewed": False}]
    later = replace(soon, sentence=soon.sentence.replace("9", "8"))
    write_certificate_notes(tmp_path, {"server.crt expires on 2031-02-03": later})
    assert news(heard(three, "ash", round=3), "certificate") == []
    (tmp_path / CERTIFICATES).write_text("{")
    assert news(heard(three, "ash", round=4), "certificate") == []


def test_every_client_gets_its_own_job_and_its_answer_is_its_own(three):
    found = answers(heard(three, "cedar", "ash"))
    assert sorted(found, key=str) == [Reply("ash", b"ash"), Reply("cedar", b"cedar")]
    assert [sorted(three.grid.asked("turn", client=name)) for name in ("ash", "birch")] == [
        [2**63],
        [],
    ]


def test_a_client_with_other_means_is_asked_again_who_it_is(tmp_path):
    """Its owner has started it again with a smaller rank, before it was seen to be away."""
    means = {"rank": 3}

    def says(header, payload):
        if header["kind"] == "enrol":
            ranks = {"attention": means["rank"], "feed_forward": means["rank"]}
            return {"client": "ash", "examples": 7, "device": "cpu", **ranks}, b""
        if means["rank"] < made.registry.entries["ash"].attention:
            return {"error": "The server asks to train rank 3; its owner gives 2 at most."}, b""
        return {"round": header["round"]}, b"ash"

    made = federation(tmp_path, flower.Scripted(2**63, says))
    means["rank"] = 2
    found = heard(made, "ash")
    assert [type(e) for e in answers(found)] == [Lost]
    assert made.present(["ash"]) == ["ash"]  # at once, not after half a minute
    assert made.registry.entries["ash"].attention == 2
    found = heard(made, "ash")
    assert [e["ranks"] for e in news(found, "joined")] == [[2]]
    assert answers(found) == [Reply("ash", b"ash")]


def test_a_client_that_fails_and_is_who_it_was_does_not_join_again(tmp_path):
    fails = iter([True, False])

    def says(header, payload):
        return ({"error": "full"}, b"") if next(fails) else ({"round": 1}, b"ash")

    made = federation(tmp_path, client(2**63, "ash", says))
    first = heard(made, "ash")
    assert len(made.grid.asked("enrol")) == 2
    made.present(["ash"])
    found = [*first, *heard(made, "ash")]
    assert [type(e) for e in answers(found)] == [Lost, Reply]
    assert len(news(found, "joined")) == 1


def test_a_client_that_forgot_is_not_asked_who_it_is(tmp_path):
    forgets = {"error": "lost it", "forgot": True}
    made = federation(tmp_path, client(2**63, "ash", lambda header, payload: (forgets, b"")))
    assert [e.lost_base for e in answers(heard(made, "ash"))] == [True]
    assert len(made.grid.asked("enrol")) == 1


def test_what_a_client_says_it_has_weighs_no_more_than_the_limit_and_it_is_said(tmp_path):
    ash = client(2**63, "ash", examples=7000)
    ash.online = False
    made = federation(tmp_path, ash)
    made.registry.most_examples, ash.online = 500, True
    made.wait_for_clients(1)
    (fact,) = news(heard(made, "ash"), "joined")
    assert fact["note"] == (
        "Client 'ash' reports 7000 examples; its uploads are weighted as 500, the limit "
        "federation.most_examples."
    )
    assert fact["note"] in (tmp_path / ARRIVALS).read_text()
    assert fact["examples"] == 7000  # what it was asked for is checked against its word


def test_who_came_is_told_once(three):
    first = heard(three, "ash")
    assert [e["client"] for e in news(first, "joined")] == ["ash", "birch", "cedar"]
    assert news(first, "joined")[0]["ranks"] == [3] and news(first, "asked") == [{"client": "ash"}]
    assert news(heard(three, "ash", round=2), "joined") == []


def test_downloads_of_equal_rank_are_one_record(three, tmp_path):
    """So that Flower uploads it once."""
    (tmp_path / "small").write_bytes(b"rank 2")
    (tmp_path / "large").write_bytes(b"rank 5")
    files = {"ash": "small", "birch": "large", "cedar": "small"}
    jobs = [TurnRequest(name, 1, tmp_path / file) for name, file in files.items()]
    list(three.exchange(jobs, WaitPolicy()))
    held = [m.content["flexlora.payload"] for m in three.grid.pushed[-3:]]
    assert held[0] is held[2] and held[0] is not held[1]
    assert [h["flexlora"].data for h in held] == [b"rank 2", b"rank 5", b"rank 2"]
    assert held[0].object_id == records.payload(b"rank 2").object_id


def test_messages_go_out_as_flower_needs_them(three):
    heard(three, "ash", round=12, patience=WaitPolicy(30.0))
    enrol, turn = three.grid.pushed[0], three.grid.pushed[-1]
    assert (enrol.metadata.message_type, turn.metadata.message_type) == ("query", "train")
    assert turn.metadata.group_id == "12" and turn.metadata.dst_node_id == 2**63
    # Longer than the round, as late answers are of use to the next attempt.
    assert 30.0 < turn.metadata.ttl < 12 * 3600


def test_errors_of_the_superlink_are_of_the_client_they_are_about(three):
    """It says them in its own name: only the message tells whose they are."""
    for number in (2**63, 2**63 + 2):
        three.grid.nodes[number].online = False
    found = answers(heard(three, "ash", "birch", "cedar"))
    reason = "Flower's error 5: Node Unavailable"
    assert sorted(found, key=str) == [
        Lost("ash", reason, LossKind.UNREACHABLE),
        Lost("cedar", reason, LossKind.UNREACHABLE),
        Reply("birch", b"birch"),
    ]


def test_a_message_that_flower_does_not_take_is_a_loss(three):
    del three.grid.nodes[2**63]
    reason = "Flower did not accept the message to it."
    assert answers(heard(three, "ash")) == [Lost("ash", reason, LossKind.UNREACHABLE)]


def test_a_client_that_is_not_online_is_lost_at_once(three):
    three.grid.nodes[2**63].online = False
    assert three._wait_for(2) == ["birch", "cedar"]
    asked = len(three.grid.pushed)
    reason = "Its node is not online."
    assert answers(heard(three, "ash")) == [Lost("ash", reason, LossKind.UNREACHABLE)]
    assert len(three.grid.pushed) == asked


def test_those_who_are_online_are_present_in_the_rolls_order(three):
    assert three.present([]) == ["ash", "birch", "cedar"]
    three.grid.nodes[2**63 + 1].online = False
    three.quorum = 2
    assert three.present(["birch"]) == ["ash", "cedar"]


def test_a_round_waits_for_its_quorum(three, monkeypatch):
    node, naps = three.grid.nodes[2**63 + 1], []
    node.online = False

    def nap(seconds):
        naps.append(seconds)
        node.online = len(naps) > 4

    monkeypatch.setattr(time, "sleep", nap)
    assert three.present([]) == ["ash", "birch", "cedar"]
    assert len(naps) >= 5


def test_what_a_client_says_went_wrong_is_its_loss(tmp_path):
    says = lambda header, payload: ({"error": "OSError: " + "x" * 5000}, b"left over")  # noqa: E731
    made = federation(tmp_path, client(7, "ash", says))
    (lost,) = answers(heard(made, "ash"))
    assert lost.client == "ash" and lost.reason.startswith("OSError: xxx")
    assert len(lost.reason) == 500


@pytest.mark.parametrize(
    "said",
    [
        {"error": "It did not answer within 30 s."},
        {"error": "Enough uploads had arrived without its own."},
        {"error": "x", "kind": "not_needed"},
        {"error": "x", "forgot": "yes"},
    ],
)
def test_a_reason_that_a_client_sends_does_not_decide_the_kind(tmp_path, said):
    made = federation(tmp_path, client(7, "ash", lambda header, payload: (said, b"")))
    (lost,) = answers(heard(made, "ash"))
    assert (lost.kind, lost.lost_base) == (LossKind.CLIENT_ERROR, False)


def test_a_client_that_lost_its_base_is_of_that_kind(tmp_path):
    said = {"error": "x", "forgot": True}
    made = federation(tmp_path, client(7, "ash", lambda header, payload: (said, b"")))
    (lost,) = answers(heard(made, "ash"))
    assert (lost.kind, lost.lost_base) == (LossKind.LOST_STATE, True)


def strange(content: RecordDict):
    """Answers a turn with this content."""

    def spoil(message, node):
        if message.metadata.message_type != "train":
            return None
        return Message(content, reply_to=message)

    return spoil


HEADER = {"flexlora.header": ConfigRecord({"json": '{"round": 1}'})}


def array(stype=records.STYPE, name="flexlora", data=b"abc"):
    return ArrayRecord({name: Array("uint8", (len(data),), stype, data)})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({}, "not one of flexlora's"),
        ({"other": ConfigRecord({"json": "{}"})}, "not one of flexlora's"),
        ({"flexlora.header": ConfigRecord({"text": "{}"})}, "not one of flexlora's"),
        ({"flexlora.header": ConfigRecord({"json": "no JSON"})}, "not one of flexlora's"),
        ({"flexlora.header": ConfigRecord({"json": 7.5})}, "not one of flexlora's"),
        ({"flexlora.header": ConfigRecord({"json": "[1]"})}, "is not a JSON object"),
        ({"flexlora.header": array()}, "not one of flexlora's"),
        ({**HEADER, "flexlora.payload": ConfigRecord({"a": 1})}, "payload is not one of"),
        ({**HEADER, "flexlora.payload": array("numpy.ndarray")}, "payload is not one of"),
        ({**HEADER, "flexlora.payload": array(name="other")}, "payload is not one of"),
        (
            {**HEADER, "flexlora.payload": ArrayRecord({**array(), **array(name="more")})},
            "payload is not one of",
        ),
        ({**HEADER, "flexlora.payload": ArrayRecord()}, "payload is not one of"),
    ],
)
def test_a_message_that_is_none_of_ours_is_a_loss(three, content, reason):
    three.grid.spoil = strange(RecordDict(content))
    (lost,) = answers(heard(three, "ash"))
    assert isinstance(lost, Lost) and reason in lost.reason
    assert lost.kind is LossKind.INVALID_UPLOAD
    three.grid.spoil = None
    assert answers(heard(three, "ash", round=2)) == [Reply("ash", b"ash")]


def test_a_header_nested_too_deep_is_a_loss(three):
    three.grid.spoil = strange(RecordDict({"flexlora.header": ConfigRecord({"json": "[" * 10**5})}))
    (lost,) = answers(heard(three, "ash"))
    assert isinstance(lost, Lost)


def test_an_answer_that_flower_itself_cannot_read_is_a_loss(three, monkeypatch):
    """Its grid makes objects of a node's bytes while it pulls, and raises what it will."""
    pull = three.grid.pull_messages

    def broken(ids):
        for message in pull(ids):
            if message.metadata.src_node_id == 2**63:
                raise KeyError("arraychunk_ids")
            yield message

    monkeypatch.setattr(three.grid, "pull_messages", lambda ids: list(broken(ids)))
    found = answers(heard(three, "ash", "birch"))
    assert {type(e): e.client for e in found} == {Lost: "ash", Reply: "birch"}


def test_downloads_that_are_handed_out_are_not_held(three):
    """Methods with a download for each client: a round's would be in memory at once."""
    held = []

    class Weighed(bytes):
        def __del__(self):
            held.remove(len(self))

    def jobs():
        for number, name in enumerate(("ash", "birch", "cedar")):
            held.append(number + 3)
            yield TurnRequest(name, 1, Weighed(number + 3))
            assert len(held) <= 2

    three.grid.pushed, three.grid.waiting = _Nothing(), _Sent()
    list(three.exchange(jobs(), WaitPolicy()))
    assert len(held) <= 1


class _Nothing(list):
    def append(self, item):
        """A grid that forgets what it took."""


class _Sent(dict):
    def __setitem__(self, id, message):
        """A grid that keeps no payload that it has sent, as Flower's own."""
        del message.content["flexlora.payload"]
        super().__setitem__(id, message)


# Answers that come late


def waits(*numbers):
    """Nodes whose answers do not come."""

    def spoil(message, node):
        return "later" if node.number in numbers else None

    return spoil


def test_who_does_not_answer_in_time_is_lost(three):
    three.grid.spoil = waits(2**63)
    # Looked at before and after: an answer that is there when the time is over still counts.
    three.poll_seconds = 0.05
    started = time.monotonic()
    found = answers(heard(three, "birch", "ash", patience=WaitPolicy(0.2)))
    late = Lost("ash", "It did not answer within 0.2 s.", LossKind.NO_ANSWER)
    assert found == [Reply("birch", b"birch"), late]
    assert 0.2 <= time.monotonic() - started < 5


def test_with_enough_the_others_are_not_waited_for(three):
    three.grid.spoil = waits(2**63 + 2)
    found = []
    jobs = [TurnRequest(name, 1, b"") for name in ("ash", "birch", "cedar")]
    for event in three.exchange(jobs, WaitPolicy(None, lambda: len(answers(found)) == 2)):
        found.append(event)
    assert answers(found) == [Reply("ash", b"ash"), Reply("birch", b"birch")]
    three.grid.spoil = None
    late = answers(heard(three, "ash", "cedar", round=2))
    stray = LateReply("cedar", "It answers an earlier request, for round 1.")
    assert stray in late and Reply("cedar", b"cedar") in late and len(late) == 3


def test_a_late_answer_of_the_same_round_is_taken_by_the_next_attempt(three):
    three.grid.spoil = waits(2**63)
    heard(three, "ash", patience=WaitPolicy(0.01))
    first = three.grid.pushed[-1].metadata.message_id

    def slow(message, node):
        return None if message.metadata.message_id == first else "later"

    three.grid.spoil = slow
    assert answers(heard(three, "ash")) == [Reply("ash", b"ash")]
    # The second answer, when it comes, is nobody's.
    three.grid.spoil = None
    found = answers(heard(three, "ash", "birch", round=2))
    assert sorted(found, key=str) == [
        LateReply("ash", "It answers an earlier request, for round 1."),
        Reply("ash", b"ash"),
        Reply("birch", b"birch"),
    ]


def test_a_late_answer_of_an_earlier_round_is_not_taken_for_this_one(three):
    three.grid.spoil = waits(2**63)
    heard(three, "ash", patience=WaitPolicy(0.01))
    three.grid.spoil = None
    three.grid.nodes[2**63].says = lambda header, payload: ({}, b"%d" % header["round"])
    found = answers(heard(three, "ash", round=2))
    assert sorted(found, key=str) == [
        LateReply("ash", "It answers an earlier request, for round 1."),
        Reply("ash", b"2"),
    ]


def test_a_late_error_does_not_cost_the_next_attempt(three):
    three.grid.spoil = waits(2**63)
    heard(three, "ash", patience=WaitPolicy(0.01))
    first = three.grid.pushed[-1].metadata.message_id

    def spoil(message, node):
        expired = message.metadata.message_id == first
        return flower.failed(message, 3, "Message expired") if expired else None

    three.grid.spoil = spoil
    found = answers(heard(three, "ash"))
    assert {type(event) for event in found} == {LateReply, Reply}


# Who is let in while it goes on


def test_a_node_that_is_refused_is_told_of_and_not_asked_again_and_again(tmp_path):
    made = federation(tmp_path, client(7, "ash"), client(8, "birch", examples=0), quorum=1)
    made.present([])
    made.present([])
    (refused,) = news(heard(made, "ash"), "refused")
    assert "Client 'birch' sent an invalid number of examples: '0'" in refused["reason"]
    assert made.grid.asked("enrol") == [7, 8]


def test_a_node_that_says_what_is_wrong_is_refused_with_that(tmp_path):
    broken = flower.Scripted(8, lambda header, payload: ({"error": "No model here."}, b""))
    made = federation(tmp_path, client(7, "ash"), broken, quorum=1)
    made.present([])
    assert news(heard(made, "ash"), "refused") == [{"reason": "No model here."}]


def test_a_node_whose_owner_has_mended_it_is_asked_again(tmp_path, monkeypatch):
    """With a key it has the same number as before."""
    made = federation(tmp_path, client(7, "ash"), client(8, "birch", examples=0), quorum=1)
    made.present([])
    made.grid.nodes[8] = client(8, "birch", examples=3)
    assert made.present([]) == ["ash"]  # not at once
    monkeypatch.setattr(f"{FlowerTransport.__module__}._AGAIN_SECONDS", 0.0)
    made.quorum = 2
    assert made.present([]) == ["ash", "birch"]


def test_a_node_that_is_refused_again_for_the_same_is_told_of_once(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{FlowerTransport.__module__}._AGAIN_SECONDS", 0.0)
    made = federation(tmp_path, client(7, "ash"), client(8, "birch", examples=0), quorum=1)
    for _ in range(5):
        made.present([])
    assert len(made.grid.asked("enrol")) > 3
    assert len(news(heard(made, "ash"), "refused")) == 1


def test_who_comes_is_said_also_before_the_first_round(tmp_path):
    """In words and in lines of our own, whatever a node says of itself."""
    bad = flower.Scripted(8, lambda header, payload: ({"error": "No\nmodel\n" + "x" * 999}, b""))
    federation(tmp_path, client(7, "ash"), bad, quorum=1).present([])
    lines = (tmp_path / ARRIVALS).read_text().splitlines()
    assert lines[0] == "client ash connected: rank 3, 7 examples" and len(lines) == 2
    assert lines[1].startswith("a client was rejected: No model xxx") and len(lines[1]) == 500


def test_a_rejected_node_with_a_key_is_called_by_its_name(tmp_path):
    """What it says of itself may have no name in it."""
    bad = flower.Scripted(8, lambda header, payload: ({"error": "No model."}, b""))
    flower.let_in(tmp_path, {"ash": 7, "birch": 8})
    federation(tmp_path, client(7, "ash"), bad, quorum=1).present([])
    assert "client birch was rejected: No model." in (tmp_path / ARRIVALS).read_text()


@pytest.mark.parametrize("code", [1, 2, 8])
def test_a_node_whose_app_fails_is_told_of(three, code):
    """Another version of flexlora or of Flower, for instance."""
    three.grid.nodes[9] = client(9, "elm")

    def spoil(message, node):
        return flower.failed(message, code, "ImportError") if node.number == 9 else None

    three.grid.spoil = spoil
    for _ in range(5):
        three.present([])
    assert "ImportError" in str([e.facts for e in three._events])


def test_a_node_that_went_away_before_it_answered_is_asked_when_it_is_back(tmp_path):
    made = federation(tmp_path, client(7, "ash"), quorum=1)
    made.grid.nodes[8] = client(8, "birch")
    made.present([])
    made.grid.nodes[8].online = False
    made.present([])
    made.grid.nodes[8].online = True
    made.quorum = 2
    assert made.present([]) == ["ash", "birch"]


def test_a_node_that_takes_long_to_load_its_model_arrives_once(three, monkeypatch):
    monkeypatch.setattr(f"{FlowerTransport.__module__}._AGAIN_SECONDS", 0.0)
    three.grid.nodes[9] = client(9, "elm")
    three.grid.spoil = waits(9)
    for _ in range(4):
        three.present([])
    three.grid.spoil = None
    three.quorum = 4
    three.present([])
    arrived = [e["client"] for e in news(heard(three, "ash"), "joined")]
    assert arrived.count("elm") == 1


def test_a_client_with_a_new_number_takes_the_place_of_its_old_one(three):
    """Without a key every start of a node has another one."""
    three.grid.nodes[2**63].online = False
    three.grid.nodes[11] = client(11, "ash", attention=2, feed_forward=2)
    assert three.present([]) == ["ash", "birch", "cedar"]
    assert three.registry.entries["ash"].node == 11 and three.registry["ash"].rank_type == "r2"
    assert answers(heard(three, "ash")) == [Reply("ash", b"ash")]
    assert three.grid.asked("turn") == [11]


def test_a_bound_name_is_not_taken_over(tmp_path):
    flower.let_in(tmp_path, {"ash": 7, "birch": 8})
    made = federation(tmp_path, client(7, "ash"), quorum=1)
    made.registry.bound = True
    made.grid.nodes[8] = client(8, "ash", lambda *_: ({}, b"poison"))
    assert made.present([]) == ["ash"]
    made.present([])
    found = heard(made, "ash")
    assert answers(found) == [Reply("ash", b"ash")]
    assert "another name" in news(found, "refused")[0]["reason"]
    assert made.grid.asked("turn") == [7]


def test_a_node_may_join_while_a_round_goes_on(three):
    """It is written down at once, and asked in the next round."""
    three.grid.nodes[9] = client(9, "elm")
    three.present([])
    found = heard(three, "ash")
    assert [e["client"] for e in news(found, "joined")][-1] == "elm"
    assert three.present([]) == ["ash", "birch", "cedar", "elm"]


def test_a_message_says_its_terms_to_a_worker_that_was_restarted(three):
    three.spec = json.dumps({"run": "x"})
    heard(three, "ash")
    header, payload = records.opened(three.grid.pushed[-1].content)
    assert header == {"kind": "turn", "terms": '{"run": "x"}', "client": "ash", "round": 1}
    assert payload == b"download"


# The app on the node


def handled(number: int, message: Message, config: dict) -> dict:
    from flwr.app import Context

    from flexlora.deployment.flower.client_app import app

    answer = app(message, Context(1, number, config, RecordDict(), {}))
    return records.opened(answer.content)[0]


def test_a_node_without_a_worker_says_so(three):
    heard(three, "ash")
    said = handled(7, three.grid.pushed[-1], {})
    assert "has no worker; start it with `flexlora join`" in said["error"]


def test_a_node_whose_worker_has_ended_says_so(three, sockets):
    heard(three, "ash")
    said = handled(7, three.grid.pushed[-1], {"worker": str(sockets / "gone")})
    assert "`flexlora join` has ended on this client's machine" in said["error"]


def test_a_message_that_is_none_of_ours_is_answered_with_what_is_wrong(three, sockets):
    heard(three, "ash")
    message = three.grid.pushed[-1]
    message.content = RecordDict({"other": ConfigRecord({"a": 1})})
    said = handled(7, message, {"worker": str(sockets / "gone")})
    assert "not one of flexlora's" in said["error"]
