"""The loop over a tiny model: what it records, what it keeps, whom it leaves out."""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
import transformers

from flexlora import wire
from flexlora.errors import ProtocolError
from flexlora.federation import checkpoint, client_turn, collect, rounds, setup
from flexlora.federation.client_turn import TurnRequest
from flexlora.federation.prepared import PreparedRun
from flexlora.federation.simulated import SimulatedTransport
from flexlora.federation.transport import LateReply, Lost, Reply, WaitPolicy
from flexlora.journal.answers import FIELDS, SampleAnswers
from flexlora.journal.events import LossKind
from flexlora.journal.record import Record
from flexlora.laws.dense import product, relative_error, weighted_sum
from flexlora.lowrank.factors import Adapter, Factors
from flexlora.model import export
from flexlora.peft_format import WEIGHTS
from support import models


@dataclass(frozen=True)
class Watched:
    """A federation that keeps copies of what passes."""

    inner: SimulatedTransport
    jobs: list[TurnRequest]
    replies: list[Reply]

    clients_at_once: int = 1
    present = staticmethod(list)

    def exchange(self, jobs: Iterable[TurnRequest], patience: WaitPolicy) -> Iterator[Reply | Lost]:
        def watch():
            for job in jobs:
                held = job.download
                data = held.read_bytes() if isinstance(held, Path) else held
                self.jobs.append(replace(job, download=data))
                yield job

        for reply in self.inner.exchange(watch(), patience):
            self.replies.append(reply)
            yield reply


@dataclass(frozen=True)
class Outcome:
    ready: PreparedRun
    folder: Path
    events: list[dict]
    watched: Watched

    def of(self, kind: str, **fields) -> list[dict]:
        found = [event for event in self.events if event["event"] == kind]
        return [e for e in found if all(e[key] == value for key, value in fields.items())]

    @property
    def adapter(self) -> Path:
        return Path(self.events[-1]["adapter"])


def go(folder: Path, name: str, **changes) -> Outcome:
    ready = setup.prepare(models.settings(folder, **changes), models.corpus())
    watched = Watched(SimulatedTransport(ready.runtime), [], [])
    events = list(rounds.run(ready, folder / name, watched))
    return Outcome(ready, folder / name, events, watched)


UNSEEN = {"data": {"unseen_clients": 1}, "evaluation": {"every": 2}}


@pytest.fixture(scope="module")
def done(folder) -> Outcome:
    return go(folder, "done", **UNSEEN)


def test_events_come_in_their_order(done):
    one = ["client"] * 4 + ["round", "spectrum"]
    ends = ["evaluation"] * 4  # global, and cut to the three types
    assert [event["event"] for event in done.events] == [
        *("start", "evaluation"),
        *one,
        *(*one, "evaluation"),
        *(*one, *ends),
        "finish",
    ]
    shown = [(event["round"], event["adapter"]) for event in done.of("evaluation")]
    assert shown == [
        (0, "base"),
        (2, "global"),
        (3, "global"),
        *((3, name) for name in ("small", "wide", "large")),
    ]
    assert done.events[-1]["rounds"] == 3


def test_the_journal_holds_what_was_yielded(done):
    assert list(Record(done.folder).events()) == json.loads(json.dumps(done.events))


def test_the_start_describes_the_federation(done):
    start = done.events[0]
    assert (start["clients"], start["unseen_clients"], start["modules"]) == (5, 1, 14)
    assert sum(start["rank_types"].values()) == 5
    assert start["ranks"] == {"small": [2], "wide": [2, 5], "large": [3]}
    layers = {"attention": 2 * (64 + 48 + 48 + 64), "feed_forward": 2 * 3 * 80}
    assert start["trainable"] == {
        "small": 2 * sum(layers.values()),
        "wide": 2 * layers["attention"] + 5 * layers["feed_forward"],
        "large": 3 * sum(layers.values()),
    }
    assert not start["resumed"]


def test_unseen_clients_are_evaluated_and_never_train(done):
    (unseen,) = done.ready.unseen
    assert unseen not in {event["client"] for event in done.of("client")}
    for event in done.of("evaluation"):
        seen = {row["client"]: row["seen"] for row in event["clients"]}
        assert [client_turn for client_turn, was in seen.items() if not was] == [unseen]
        assert sum(seen.values()) == 2


def test_sample_answers_of_every_evaluation_are_written(done):
    answers = list(SampleAnswers(done.folder).all())
    assert {frozenset(answer) for answer in answers} == {frozenset(FIELDS)}
    evaluations = [(event["round"], event["adapter"]) for event in done.of("evaluation")]
    assert list(dict.fromkeys((a["round"], a["adapter"]) for a in answers)) == evaluations
    for event in done.of("evaluation"):
        place = (event["round"], event["adapter"])
        lines = [a for a in answers if (a["round"], a["adapter"]) == place]
        assert [a["client"] for a in lines] == [row["client"] for row in event["clients"]]
        assert [a["rouge_l"] for a in lines] == [row["rouge_l"] for row in event["clients"]]
        assert {a["population"] for a in lines} == {"seen", "unseen"}
        assert all(a["reference"].split()[0] in a["prompt"] for a in lines)


def test_no_answers_are_kept_where_none_are_asked_for(folder):
    run = go(folder, "unkept", federation={"rounds": 1}, evaluation={"answers": 0})
    assert run.of("evaluation")
    assert not SampleAnswers(run.folder).path.exists()


def test_bytes_counted_are_bytes_sent(done):
    sent = {(job.client, job.round): len(job.download) for job in done.watched.jobs}
    replies = zip(done.watched.jobs, done.watched.replies, strict=True)
    received = {(job.client, job.round): len(reply.data) for job, reply in replies}
    events = done.of("client")
    assert len(events) == 12 == len(sent)
    for event in events:
        key = event["client"], event["round"]
        assert event["bytes_down"] == sent[key]
        assert event["bytes_up"] == received[key]


def test_a_round_s_totals_are_those_of_its_clients(done):
    for event in done.of("round"):
        clients = done.of("client", round=event["round"])
        assert event["cohort"] == sorted(client_turn["client"] for client_turn in clients)
        assert event["received"] == 4
        for key in ("examples", "tokens", "loss_total", "loss_tokens", "bytes_up", "bytes_down"):
            assert event[key] == pytest.approx(sum(client_turn[key] for client_turn in clients))
        assert event["aggregate_seconds"] < event["seconds"]


def test_every_upload_has_its_clients_own_rank(done):
    for job, reply in zip(done.watched.jobs, done.watched.replies, strict=True):
        adapter, header = wire.decode(reply.data)
        assert header["client"] == job.client == reply.client
        assert adapter.ranks == done.ready.clients[job.client].ranks
        assert wire.decode_download(job.download).adapter.ranks == adapter.ranks


def test_a_round_is_flexlora_s(done):
    """What is handed out in round 2 is the best approximation of round 1's mean."""
    first = [
        r for j, r in zip(done.watched.jobs, done.watched.replies, strict=True) if j.round == 1
    ]
    uploads = {r.client: wire.decode(r.data)[0] for r in first}
    examples = {client_turn: done.ready.clients[client_turn].examples for client_turn in uploads}
    total = sum(examples.values())
    for job in (job for job in done.watched.jobs if job.round == 2):
        handed = wire.decode_download(job.download).adapter
        for module, factors in handed.items():
            mean = weighted_sum([(examples[c] / total, a[module]) for c, a in uploads.items()])
            S = torch.linalg.svdvals(mean)
            error = torch.linalg.matrix_norm(product(factors) - mean)
            assert float(error) == pytest.approx(
                float(S[factors.rank :].square().sum().sqrt()), rel=1e-4, abs=1e-6
            )


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # in PEFT
def test_the_adapter_loads_in_peft_and_is_the_servers(folder, done):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(model, done.adapter).merge_and_unload()
    state = checkpoint.load(done.folder).state
    adapter = done.ready.method.global_adapter(state, done.ready.context(3))
    assert len(adapter) == 14
    for module, factors in adapter.items():
        delta = merged.get_submodule(module).weight - before[f"{module}.weight"]
        assert relative_error(delta, product(factors)) < 1e-5
    assert torch.equal(merged.lm_head.weight, before["lm_head.weight"])
    config = peft.PeftConfig.from_pretrained(done.adapter)
    assert config.task_type == "CAUSAL_LM"
    assert config.target_modules == {module.rpartition(".")[2] for module in adapter}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # in PEFT
def test_an_adapter_of_some_layers_gives_peft_no_others(folder, done, tmp_path):
    """As in a federation whose clients all leave out a kind of layers, or layers of their own."""
    state = checkpoint.load(done.folder).state
    adapter = done.ready.method.global_adapter(state, done.ready.context(3))
    some = adapter.only([module for module in adapter if "layers.1" not in module])
    export(done.ready.base, some, tmp_path / "adapter")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", low_cpu_mem_usage=True)
    assert sum(".lora_A." in name for name, _ in adapted.named_parameters()) == len(some) == 7
    assert not any(parameter.is_meta for parameter in adapted.parameters())


def test_two_checkpoints_and_every_adapter_are_kept(done):
    assert sorted(path.name for path in done.folder.iterdir()) == [
        ".lock",
        "answers.jsonl",
        "checkpoint.json",
        "metrics.jsonl",
        "rounds",
        "state-00002",
        "state-00003",
    ]
    kept = sorted(
        path.parent.parent.name for path in done.folder.glob(f"rounds/*/adapter/{WEIGHTS}")
    )
    assert kept == ["00001", "00002", "00003"]


def test_old_adapters_may_be_dropped(folder):
    run = go(folder, "thrifty", run={"keep_adapters": "last"}, evaluation={"seen_clients": 0})
    assert [path.name for path in (run.folder / "rounds").iterdir()] == ["00003"]


def test_the_update_norm_is_the_adapters(done):
    adapter = checkpoint.load(done.folder).state.model
    want = math.sqrt(sum(float(product(f).square().sum()) for f in adapter.values()))
    assert done.of("round", round=3)[0]["update_norm"] == pytest.approx(want, rel=1e-6)


def test_the_spectrum_is_that_of_the_mean(done):
    """Shares of the squared singular values in each block of ranks, and beyond the last."""
    (event,) = done.of("spectrum", round=3)
    assert event["rank_levels"] == [2, 3, 5]
    last = [r for j, r in zip(done.watched.jobs, done.watched.replies, strict=True) if j.round == 3]
    uploads = {r.client: wire.decode(r.data)[0] for r in last}
    examples = {client_turn: done.ready.clients[client_turn].examples for client_turn in uploads}
    total = sum(examples.values())
    assert set(event["energy"]) == set(done.ready.base.shapes)
    for module, shares in event["energy"].items():
        mean = weighted_sum([(examples[c] / total, a[module]) for c, a in uploads.items()])
        squares = torch.linalg.svdvals(mean).square()
        kept = done.ready.ranks[module]
        blocks = [squares[:2], squares[2:3], squares[3:5], squares[5:]]
        if kept == 3:  # what lies beyond the largest rank handed out is lost at the server
            blocks = [squares[:2], squares[2:3], squares[:0], squares[3:]]
        want = [float(block.sum() / squares.sum()) for block in blocks]
        assert shares == pytest.approx(want, abs=1e-5)
        assert sum(shares) == pytest.approx(1, abs=1e-6)


def test_the_same_seed_gives_the_same_bytes_and_another_others(folder, done):
    same = go(folder, "same", **UNSEEN)
    other = go(folder, "other", seed=4, **UNSEEN)
    bytes_of = [(run.adapter / WEIGHTS).read_bytes() for run in (done, same, other)]
    assert bytes_of[0] == bytes_of[1] != bytes_of[2]
    cohorts = [[e["cohort"] for e in run.of("round")] for run in (done, same, other)]
    assert cohorts[0] == cohorts[1] != cohorts[2]
    untimed = [[_without_times(event) for event in run.events[1:-1]] for run in (done, same)]
    assert untimed[0] == untimed[1]


def _without_times(event: dict) -> dict:
    # Also the bytes: see test_wire's test of the clock.
    untimed = {k: v for k, v in event.items() if "seconds" not in k}
    return {k: v for k, v in untimed.items() if k not in ("bytes_up", "time")}


@pytest.mark.parametrize(
    ("name", "options", "ranks"),
    [
        ("flexlora", {"split": "balanced"}, None),
        ("hetlora", {"keep": 0.6, "decay": 3.0}, None),
        ("fedit", {}, 3),
    ],
)
def test_each_method_learns(folder, name, options, ranks):
    changes = {"ranks": {"rank": 3, "types": None, "distribution": None}} if ranks else {}
    run = go(
        folder,
        f"method-{name}",
        method={"name": name, **options},
        training={"epochs": 2},
        federation={"cohort": 5},
        evaluation={"seen_clients": 0},
        **changes,
    )
    losses = [event["loss_total"] / event["loss_tokens"] for event in run.of("round")]
    assert losses[-1] < 0.8 * losses[0]
    assert len(checkpoint.load(run.folder).state.model) == 14
    if name == "hetlora":
        pruned = checkpoint.load(run.folder).state.per_client["ranks"]
        assert set(pruned) == set(run.ready.clients)
        assert any(rank == 1 for ranks in pruned.values() for rank in ranks.values())


def test_fewer_bytes_on_a_coarse_wire_and_a_fine_server(folder, done):
    coarse = go(folder, "coarse", federation={"wire_dtype": "bfloat16", "rounds": 1})
    fine = {event["rank_type"]: event["bytes_down"] for event in done.of("client")}
    for event in coarse.of("client"):
        saved = 2 * done.events[0]["trainable"][event["rank_type"]]
        assert fine[event["rank_type"]] - event["bytes_down"] == pytest.approx(saved, abs=64)
    kept = checkpoint.load(coarse.folder).state.model
    f = kept["model.layers.0.mlp.up_proj"]
    assert not torch.equal(f.B, f.B.to(torch.bfloat16).float())


# --- clients that send something else ------------------------------------------------------


@dataclass(frozen=True)
class Replayed:
    """The replies of an earlier round, one of them changed; nobody trains."""

    replies: dict[str, bytes]
    victim: str
    change: object
    clients_at_once: int = 1
    present = staticmethod(list)

    def exchange(self, jobs: Iterable[TurnRequest], patience: WaitPolicy) -> Iterator[Reply | Lost]:
        for job in jobs:
            data = self.replies[job.client]
            if job.client != self.victim:
                yield Reply(job.client, data)
            else:
                changed = self.change(data)
                yield changed if isinstance(changed, Lost) else Reply(job.client, changed)


def rewritten(data: bytes, **header) -> bytes:
    adapter, old = wire.decode(data)
    return _encoded(adapter, {**old, **header})


def _encoded(adapter, header) -> bytes:
    tensors = {
        f"{m}.{half}": getattr(f, half).contiguous() for m, f in adapter.items() for half in "AB"
    }
    return safetensors.torch.save(tensors, metadata={"flexlora": json.dumps(header)})


def with_facts(data: bytes, **facts) -> bytes:
    return rewritten(data, facts={**wire.decode(data)[1]["facts"], **facts})


def with_factors(data: bytes, change) -> bytes:
    """The upload with the first module's factors changed."""
    adapter, header = wire.decode(data)
    module = next(iter(adapter))
    return _encoded({**adapter, module: change(adapter[module])}, header)


@dataclass(frozen=True)
class Odd:
    """Factors that ``Factors`` would refuse."""

    B: torch.Tensor
    A: torch.Tensor


def filled(value: float):
    return lambda f: Factors(f.B, torch.full_like(f.A, value))


BAD = {
    "lost": lambda data: Lost("client2", "unplugged", LossKind.NO_ANSWER),
    "nothing": lambda data: b"",
    "noise": lambda data: b"noise" * 99,
    "cut": lambda data: data[:-9],
    "longer": lambda data: data + b"\0" * 8,
    "a download": lambda data: rewritten(data, kind="download"),
    "another format": lambda data: rewritten(data, format=1),
    "another client": lambda data: rewritten(data, client="client1"),
    "another round": lambda data: rewritten(data, round=2),
    "no examples": lambda data: rewritten(data, examples=0),
    "more examples than it has": lambda data: rewritten(data, examples=10**6),
    "examples beyond all numbers": lambda data: rewritten(data, examples=10**400),
    "no facts": lambda data: rewritten(data, facts={}),
    "facts that are none": lambda data: with_facts(data, seconds=None),
    "facts that are lists": lambda data: with_facts(data, seconds=[1]),
    "facts beyond all numbers": lambda data: with_facts(data, tokens=10**400),
    "facts that are not a number": lambda data: with_facts(data, loss_total=math.nan),
    "counts that are infinite": lambda data: with_facts(data, tokens=math.inf),
    "a header within headers": lambda data: safetensors.torch.save(
        {"a.A": torch.ones(1)}, metadata={"flexlora": "[" * 10**5}
    ),
    "NaN": lambda data: with_factors(data, filled(math.nan)),
    "infinity": lambda data: with_factors(data, filled(math.inf)),
    "a larger rank": lambda data: with_factors(data, lambda f: f.padded(f.rank + 4)),
    "no rank": lambda data: with_factors(data, lambda f: f.first(0)),
    "transposed": lambda data: with_factors(data, lambda f: Factors(f.A.T, f.B.T)),
    "whole numbers": lambda data: with_factors(data, lambda f: f.to(torch.int32)),
    "numbers of eight bits": lambda data: with_factors(data, lambda f: f.to(torch.float8_e5m2)),
    "two kinds of numbers": lambda data: with_factors(data, lambda f: Odd(f.B, f.A.double())),
    "vectors": lambda data: with_factors(data, lambda f: Odd(f.B[:, 0], f.A[0])),
}


@pytest.fixture(scope="module")
def honest(folder) -> Outcome:
    return go(folder, "honest", federation={"rounds": 1}, evaluation={"seen_clients": 0})


def with_bad(honest: Outcome, target: Path, change, ready: PreparedRun | None = None) -> list[dict]:
    replies = {reply.client: reply.data for reply in honest.watched.replies}
    shutil.rmtree(target, ignore_errors=True)
    ready = ready or honest.ready
    return list(rounds.run(ready, target, Replayed(replies, "client2", change)))


def test_honest_replies_replayed_are_all_received(honest, tmp_path):
    events = with_bad(honest, tmp_path / "run", lambda data: data)
    assert "client2" in events[-3]["cohort"]
    assert events[-3]["received"] == 4
    assert (
        rounds.adapter_folder(tmp_path / "run", 1).joinpath(WEIGHTS).read_bytes()
        == (honest.adapter / WEIGHTS).read_bytes()
    )


@pytest.mark.parametrize("fault", BAD)
def test_a_client_that_sends_something_else_is_lost_and_the_round_goes_on(honest, tmp_path, fault):
    events = with_bad(honest, tmp_path / "run", BAD[fault])
    (lost,) = [event for event in events if event["event"] == "lost"]
    assert (lost["client"], lost["round"]) == ("client2", 1)
    assert lost["reason"]
    (ended,) = [event for event in events if event["event"] == "round"]
    assert "client2" in ended["cohort"]
    assert ended["received"] == 3
    clients = [event for event in events if event["event"] == "client"]
    assert {event["client"] for event in clients} == {*ended["cohort"]} - {"client2"}
    assert ended["examples"] == sum(event["examples"] for event in clients)


@pytest.mark.parametrize("name", ["event", "client", "round", "rank_type", "self", "whatever"])
def test_a_fact_of_another_name_neither_stops_the_round_nor_enters_the_journal(
    honest, tmp_path, name
):
    events = with_bad(honest, tmp_path / "run", lambda data: with_facts(data, **{name: 77.0}))
    assert events[-1]["event"] == "finish"
    assert not any(77 in event.values() for event in events)


def test_a_smaller_rank_than_asked_for_does_not_stop_fedit(folder, tmp_path):
    """Its mean needs equal ranks, so such a client must be left out."""
    same = {"ranks": {"rank": 3, "types": None, "distribution": None}, "method": {"name": "fedit"}}
    run = go(folder, "fedit", federation={"rounds": 1}, evaluation={"seen_clients": 0}, **same)
    cut = lambda data: with_factors(data, lambda f: f.first(2))  # noqa: E731
    events = with_bad(run, tmp_path / "run", cut)
    assert [event["client"] for event in events if event["event"] == "lost"] == ["client2"]


def test_a_round_of_which_nothing_came_back_is_an_error(honest, tmp_path):
    class Silent:
        clients_at_once = 1
        present = staticmethod(list)

        def exchange(self, jobs, patience):
            for job in jobs:
                yield Lost(job.client, "unplugged", LossKind.NO_ANSWER)

    events = []
    with pytest.raises(ValueError, match=r"0 of 6 clients of round 1 returned .* after 3 attempts"):
        for event in rounds.run(honest.ready, tmp_path / "run", Silent()):
            events.append(event)
    assert [event["event"] for event in events] == ["start"] + (["lost"] * 4 + ["short"]) * 3


@dataclass(frozen=True)
class Scripted:
    """Answers from an honest run, after a script: for each exchange, who answers what."""

    replies: dict[str, bytes]
    script: list[dict[str, object]]
    asked: list[list[str]]
    clients_at_once: int = 1
    present = staticmethod(list)

    def exchange(self, jobs, patience):
        clients = [job.client for job in jobs]
        said = self.script[len(self.asked)]
        self.asked.append(clients)
        for id in clients:
            if patience.enough():
                return
            yield said.get(id, Reply(id, self.replies[id]))


def scripted(honest: Outcome, folder: Path, script: list[dict[str, object]], **federation):
    """The events of a round of four, played after a script, and whom it asked."""
    how = honest.ready.experiment.federation.model_copy(update=federation)
    ready = replace(
        honest.ready, experiment=honest.ready.experiment.model_copy(update={"federation": how})
    )
    replies = {id: everybody(honest)[id] for id in ready.clients}
    play = Scripted(replies, script, [])
    return list(rounds.run(ready, folder, play)), play.asked


def everybody(honest: Outcome) -> dict[str, bytes]:
    """What each client of the population would send in round 1."""
    state = honest.ready.method.start(honest.ready.fresh(), honest.ready.context(0))
    return {
        id: client_turn.turn(
            next(collect.turn_requests(honest.ready, 1, state, (id,), honest.folder / "again")),
            honest.ready.runtime,
        )
        for id in honest.ready.clients
    }


def kinds(events, *which: str) -> list[str]:
    return [event["event"] for event in events if event["event"] in which]


def test_a_round_short_of_its_quorum_asks_those_who_have_not_answered(honest, tmp_path):
    gone = {id: Lost(id, "unplugged", LossKind.NO_ANSWER) for id in list(honest.ready.clients)[:5]}
    events, asked = scripted(honest, tmp_path / "run", [gone, {}], quorum=3, attempts=2)
    first, second = (set(clients) for clients in asked)
    answered = {event["client"] for event in events if event["event"] == "client"}
    assert len(first) == 4 and not (first - set(gone)) & second
    assert len(answered) == 4 and kinds(events, "short", "round") == ["short", "round"]
    (short,) = [event for event in events if event["event"] == "short"]
    assert (short["attempt"], short["quorum"]) == (1, 3) and short["received"] < 3
    (done,) = [event for event in events if event["event"] == "round"]
    assert done["received"] == 4 and set(done["cohort"]) == first | second


def test_over_selection_goes_on_with_the_first_that_come(honest, tmp_path):
    events, asked = scripted(honest, tmp_path / "run", [{}], over_selection=0.5)
    assert len(asked[0]) == 6
    assert len([event for event in events if event["event"] == "client"]) == 4
    lost = [event for event in events if event["event"] == "lost"]
    assert {event["reason"] for event in lost} == {"Enough uploads had arrived without its own."}
    assert {event["client"] for event in lost} == set(asked[0][4:])


def test_over_selection_makes_up_for_the_lost(honest, tmp_path):
    gone = {id: Lost(id, "unplugged", LossKind.NO_ANSWER) for id in list(honest.ready.clients)[:2]}
    events, _ = scripted(honest, tmp_path / "run", [gone], over_selection=0.5)
    assert len([event for event in events if event["event"] == "client"]) == 4


def test_answers_nobody_waits_for_are_recorded_and_change_nothing(honest, tmp_path):
    class Chatty:
        clients_at_once = 1
        present = staticmethod(list)

        def exchange(self, jobs, patience):
            replies = {reply.client: reply for reply in honest.watched.replies}
            for job in jobs:
                yield replies[job.client]
                yield replies[job.client]
            yield LateReply("client3", "It answers round 0.")

    events = list(rounds.run(honest.ready, tmp_path / "run", Chatty()))
    strays = [event for event in events if event["event"] == "stray"]
    assert len(strays) == 5 and strays[-1]["reason"] == "It answers round 0."
    got = rounds.adapter_folder(tmp_path / "run", 1).joinpath(WEIGHTS).read_bytes()
    assert got == (honest.adapter / WEIGHTS).read_bytes()


def test_turns_not_begun_at_the_deadline_are_lost(honest, tmp_path):
    how = honest.ready.experiment.federation.model_copy(
        update={"deadline_seconds": 1e-9, "attempts": 1}
    )
    changed = honest.ready.experiment.model_copy(update={"federation": how})
    late = replace(honest.ready, experiment=changed)
    with pytest.raises(ValueError, match="0 of 4 clients"):
        list(rounds.run(late, tmp_path / "run"))
    lost = list(Record(tmp_path / "run").events("lost"))
    assert {event["reason"] for event in lost} == {
        "Its local training had not begun after 1e-09 s."
    }


def test_replies_in_another_order_give_the_same_bytes(honest, tmp_path):
    class Backwards:
        clients_at_once = 1
        present = staticmethod(list)

        def exchange(self, jobs, patience):
            replies = {reply.client: reply for reply in honest.watched.replies}
            for job in reversed(list(jobs)):
                yield replies[job.client]

    list(rounds.run(honest.ready, tmp_path / "run", Backwards()))
    got = rounds.adapter_folder(tmp_path / "run", 1).joinpath(WEIGHTS).read_bytes()
    assert got == (honest.adapter / WEIGHTS).read_bytes()


def test_a_client_that_never_answers_is_recorded_as_lost(honest, tmp_path):
    """Though the federation owes one answer for each job."""

    class Forgetful:
        clients_at_once = 1
        present = staticmethod(list)

        def exchange(self, jobs, patience):
            replies = {reply.client: reply for reply in honest.watched.replies}
            for job in jobs:
                if job.client != "client2":
                    yield replies[job.client]

    events = list(rounds.run(honest.ready, tmp_path / "run", Forgetful()))
    assert [event["client"] for event in events if event["event"] == "lost"] == ["client2"]


def test_a_fault_in_a_simulated_turn_is_seen_with_its_place(honest, tmp_path):
    broken = honest.ready.with_runtime(rows={id: [] for id in honest.ready.clients})
    with pytest.raises(ValueError, match="no rows to train on") as caught:
        list(rounds.run(broken, tmp_path / "run"))
    assert "In the turn of client 'client4' in round 1." in caught.value.__notes__


@pytest.mark.parametrize("hook", ["upload_spec", "aggregate"])
def test_a_fault_of_the_method_is_not_taken_for_a_lost_client(honest, tmp_path, monkeypatch, hook):
    """Even one of the library's own errors, by which clients are lost."""

    def broken(*arguments):
        raise ProtocolError("a fault of the method")

    monkeypatch.setattr(type(honest.ready.method), hook, broken)
    with pytest.raises(ProtocolError, match="a fault of the method"):
        with_bad(honest, tmp_path / "run", lambda data: data)
    assert not list(Record(tmp_path / "run").events("lost", "round"))


def test_a_new_run_in_the_folder_of_an_old_one_is_refused(honest, tmp_path):
    """It would go on with the old journal, and with uploads left from a crash."""
    with_bad(honest, tmp_path / "run", lambda data: data)
    with pytest.raises(ValueError, match="already"):
        list(rounds.run(honest.ready, tmp_path / "run"))


def test_resuming_another_experiment_is_refused(folder, honest, tmp_path):
    with_bad(honest, tmp_path / "run", lambda data: data)
    other = setup.prepare(models.settings(folder, seed=99), models.corpus())
    with pytest.raises(ValueError, match=r"seed|config|another"):
        list(rounds.run(other, tmp_path / "run", resume=True))


def test_there_must_be_something_to_resume(honest, tmp_path):
    with pytest.raises(ValueError, match="no run to resume"):
        list(rounds.run(honest.ready, tmp_path / "nowhere", resume=True))


def test_resuming_with_more_rounds_goes_on(folder, honest, tmp_path):
    with_bad(honest, tmp_path / "run", lambda data: data)
    longer = dataclasses.replace(
        honest.ready,
        experiment=models.settings(
            folder, federation={"rounds": 2}, evaluation={"seen_clients": 0}
        ),
    )
    whole = list(rounds.run(longer, tmp_path / "whole"))
    events = list(rounds.run(longer, tmp_path / "run", resume=True))
    assert [event["round"] for event in events if event["event"] == "round"] == [2]
    assert events[0]["resumed"]
    assert (Path(events[-1]["adapter"]) / WEIGHTS).read_bytes() == (
        Path(whole[-1]["adapter"]) / WEIGHTS
    ).read_bytes()


def test_the_base_model_is_as_it_was(folder, done):
    fresh = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    held = {
        name.replace(".base.", "."): weight
        for name, weight in done.ready.base.model.state_dict().items()
    }
    assert set(held) == set(fresh.state_dict())
    assert all(torch.equal(held[name], w) for name, w in fresh.state_dict().items())


def test_adapters_written_are_adapters_of_the_state(done):
    state = checkpoint.load(done.folder).state
    assert isinstance(state.model, Adapter)
    assert state.model.ranks == done.ready.ranks


@pytest.mark.parametrize("method", ["flexlora", "hetlora"])
def test_a_download_is_made_once_for_all_clients_of_the_same_ranks(
    folder, tmp_path, monkeypatch, method
):
    """Unless the method hands out by client, as HetLoRA does."""
    how = {"federation": {"rounds": 1}, "evaluation": {"seen_clients": 0}}
    ready = setup.prepare(models.settings(folder, method={"name": method}, **how), models.corpus())
    made = []
    encode = wire.encode_download
    monkeypatch.setattr(wire, "encode_download", lambda *a: made.append(1) or encode(*a))
    events = list(rounds.run(ready, tmp_path / "run"))
    types = [event["rank_type"] for event in events if event["event"] == "client"]
    assert len(set(types)) < len(types) == 4
    assert len(made) == (len(set(types)) if method == "flexlora" else 4)


def test_nobody_weighs_more_than_the_config_lets_it(tmp_path):
    """At most one example each is to weigh all alike; a limit above all of them changes nothing."""
    models.save(tmp_path / "model")
    how = {"rounds": 1, "cohort": 3}
    found = {}
    for name, most, weights in (
        ("capped", 1, "examples"),
        ("uniform", None, "uniform"),
        ("free", None, "examples"),
        ("roomy", 10**6, "examples"),
    ):
        limit = {} if most is None else {"most_examples": most}
        method = {"name": "flexlora", "weights": weights}
        ran = go(tmp_path, name, federation={**how, **limit}, method=method)
        assert len({event["examples"] for event in ran.of("client")}) > 1
        found[name] = (ran.adapter / WEIGHTS).read_bytes()
    assert found["capped"] == found["uniform"] != found["free"] == found["roomy"]


def test_two_runs_in_one_folder_are_one_too_many(tmp_path):
    models.save(tmp_path / "model")
    settings = models.settings(tmp_path, federation={"rounds": 1, "cohort": 2})
    ready = setup.prepare(settings, models.corpus())
    first = rounds.run(ready, tmp_path / "run")
    next(first)
    for resume in (False, True):
        with pytest.raises(ValueError, match="Another process runs in"):
            next(rounds.run(ready, tmp_path / "run", resume=resume))
    assert list(first)[-1]["event"] == "finish"
    with pytest.raises(ValueError, match="already holds a run"):
        next(rounds.run(ready, tmp_path / "run"))
