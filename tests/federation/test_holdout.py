"""Rows that clients hold out: they never train, and the global adapter is evaluated on them."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from flexlora.errors import ConfigError, ProtocolError
from flexlora.evaluation import losses
from flexlora.evaluation.scoring import Evaluation
from flexlora.federation import client_evaluations, holdout, rounds, setup
from flexlora.federation.holdout import HoldoutLoss
from flexlora.journal import EVENTS
from flexlora.lowrank import Adapter
from flexlora.peft_format import read
from support import models


@pytest.mark.parametrize(
    ("count", "share", "held"),
    [
        (10, 0.2, 2),
        (2, 0.2, 1),
        (3, 0.99, 2),
        (1, 0.5, 0),
        (0, 0.5, 0),
        (7, 0.0, 0),
        (100, 0.07, 7),
    ],
)
def test_a_share_of_the_rows_is_held_out_and_one_remains(count, share, held):
    rows = holdout.drawn(count, share, 5, "ash")
    assert len(rows) == len(set(rows.tolist())) == held
    assert sorted(rows.tolist()) == rows.tolist()
    assert all(0 <= row < count for row in rows)


def test_the_draw_depends_on_the_seed_and_the_client_alone():
    first = holdout.drawn(50, 0.3, 5, "ash")
    assert np.array_equal(first, holdout.drawn(50, 0.3, 5, "ash"))
    assert not np.array_equal(first, holdout.drawn(50, 0.3, 6, "ash"))
    assert not np.array_equal(first, holdout.drawn(50, 0.3, 5, "birch"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two rounds in which all clients hold out rows."""
    folder = tmp_path_factory.mktemp("holdout")
    models.save(folder / "model")
    settings = models.settings(
        folder,
        federation={"rounds": 2},
        evaluation={"client_share": 0.3, "client_rows": 2, "seen_clients": 0, "unseen_clients": 0},
    )
    ready = setup.prepare(settings, models.corpus())
    return SimpleNamespace(
        ready=ready,
        plain=setup.prepare(models.settings(folder), models.corpus()),
        events=list(rounds.run(ready, folder / "run")),
        folder=folder,
    )


def test_held_out_rows_are_no_training_rows(finished):
    ready, plain = finished.ready, finished.plain
    assert ready.runtime.holdout.keys() == ready.runtime.rows.keys() == plain.runtime.rows.keys()
    for client, every in plain.runtime.rows.items():
        train, held = ready.runtime.rows[client], ready.runtime.holdout[client]
        assert sorted([*train, *held]) == sorted(every)
        assert len(held) == max(round(0.3 * len(every)), 1)
        assert ready.clients[client].examples == len(train)
    assert plain.runtime.holdout == {}


def test_the_base_and_every_round_are_evaluated(finished):
    events = [e for e in finished.events if e["event"] == "client_evaluation"]
    assert [e["round"] for e in events] == [0, 1, 2]
    for event in events:
        assert event.keys() - {"event", "time"} == EVENTS["client_evaluation"].fields.keys()
        assert [row["client"] for row in event["clients"]] == sorted(finished.ready.clients)
        assert event["missing"] == {} and event["bytes_down"] == 0
        means = {r["client"]: r["loss_total"] / r["loss_tokens"] for r in event["clients"]}
        total = sum(r["loss_total"] for r in event["clients"])
        tokens = sum(r["loss_tokens"] for r in event["clients"])
        assert event["loss"] == pytest.approx(total / tokens, rel=1e-12)
        assert event["loss_min"] == min(means.values())
        assert event["loss_max"] == max(means.values()) == means[event["worst"]]
        assert event["loss_std"] == pytest.approx(np.std(list(means.values())), rel=1e-9)
    assert events[0]["loss"] > events[2]["loss"]


def test_the_losses_are_those_of_the_rows_and_of_the_adapter_in_the_folder(finished):
    ready, runtime = finished.ready, finished.ready.runtime
    adapter = read(rounds.adapter_folder(finished.folder / "run", 2)).adapter
    last = [e for e in finished.events if e["event"] == "client_evaluation"][-1]
    for row in last["clients"]:
        assert row["examples"] == min(2, len(runtime.holdout[row["client"]]))
        with ready.base.attached(adapter):
            every = [
                losses(ready.base, [runtime.store[int(i)]], 64)[0]
                for i in runtime.holdout[row["client"]]
            ]
        sums = {round(a.total + b.total, 4) for a in every for b in every if a is not b}
        sums |= {round(each.total, 4) for each in every}
        assert any(abs(row["loss_total"] - each) < 1e-3 for each in sums)


def test_rows_marked_for_validation_are_held_out_instead(tmp_path):
    models.save(tmp_path / "model")
    corpus = models.corpus()
    splits = ["validation" if s == "test" else s for s in corpus.keys("split")]
    marked = corpus.select(range(len(corpus)))
    columns = {name: marked.table[name].to_pylist() for name in marked.columns if name != "split"}
    marked = type(corpus).build({**columns, "split": splits})
    settings = models.settings(tmp_path, evaluation={"client_share": 0.3})
    ready = setup.prepare(settings, marked)
    for client, held in ready.runtime.holdout.items():
        assert {splits[row] for row in held} == {"validation"}
        owned = [i for i, owner in enumerate(marked.keys("client")) if owner == client]
        assert sorted(held) == [i for i in owned if splits[i] == "validation"]
        assert sorted(ready.runtime.rows[client]) == [i for i in owned if splits[i] == "train"]


@pytest.mark.parametrize("kind", ["iid", "category"])
def test_clients_of_another_partition_than_the_column_hold_out_rows_of_their_own(tmp_path, kind):
    """The data's own clients are others then."""
    models.save(tmp_path / "model")
    partition = {"kind": kind, **({"clients": 4} if kind == "iid" else {})}

    def prepared(share):
        evaluation = {"client_share": share, "seen_clients": 0, "unseen_clients": 0}
        settings = models.settings(tmp_path, data={"partition": partition}, evaluation=evaluation)
        return setup.prepare(settings, models.corpus()).runtime

    plain, runtime = prepared(0.0), prepared(0.3)
    assert runtime.holdout.keys() == runtime.rows.keys() == plain.rows.keys()
    for client, every in plain.rows.items():
        train, held = runtime.rows[client], runtime.holdout[client]
        assert sorted([*train, *held]) == sorted(every) and len(held) == round(0.3 * len(every))


def test_a_loss_that_is_not_finite_is_refused(finished):
    ready = finished.ready
    broken = Adapter(dict(ready.fresh()))
    module = next(name for name in broken if name.endswith("v_proj"))
    factors = broken[module]
    bad = Adapter({**broken, module: type(factors)(factors.B + math.inf, factors.A)})
    with pytest.raises(ConfigError, match="held-out rows of client 'client0' is nan"):
        holdout.holdout_loss(ready.runtime, "client0", bad, 5)


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"examples": 0, "loss_total": 1.0, "loss_tokens": 3},
        {"examples": True, "loss_total": 1.0, "loss_tokens": 3},
        {"examples": 2, "loss_total": math.nan, "loss_tokens": 3},
        {"examples": 2, "loss_total": math.inf, "loss_tokens": 3},
        {"examples": 2, "loss_total": -1.0, "loss_tokens": 3},
        {"examples": 2, "loss_total": "1", "loss_tokens": 3},
        {"examples": 2, "loss_total": 1.0, "loss_tokens": 10**99},
        {"examples": 2, "loss_total": 1e9, "loss_tokens": 3},
        {"examples": 2, "loss_total": [1], "loss_tokens": None},
    ],
)
def test_an_answer_that_is_no_loss_is_refused(facts):
    with pytest.raises(ProtocolError, match="It sent"):
        client_evaluations._loss(facts)


def test_clients_count_alike_in_the_spread_and_by_tokens_in_the_mean():
    spread = client_evaluations.spread(
        {"ash": HoldoutLoss(1, 2.0, 1), "birch": HoldoutLoss(9, 12.0, 3)}
    )
    assert spread == {
        "loss": 14 / 4,
        "loss_min": 2.0,
        "loss_max": 4.0,
        "loss_std": 1.0,
        "worst": "birch",
    }
    assert set(client_evaluations.spread({}).values()) == {None}


@pytest.mark.parametrize(
    ("name", "value"), [("client_share", 1.0), ("client_share", -0.1), ("client_rows", 0)]
)
def test_a_share_or_a_number_of_rows_that_cannot_be_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"evaluation.{name} is {value}"):
        Evaluation(**{name: value})
