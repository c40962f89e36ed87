"""Trackers: they are told the whole journal, in order, once; and never stop a run."""

import dataclasses
import importlib
import json
import sqlite3
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch

from flexlora.cli.progress import Display
from flexlora.cli.run import run_and_report
from flexlora.errors import ConfigError
from flexlora.federation import rounds, setup
from flexlora.journal.record import Record
from flexlora.reporting import tracker, trackers
from flexlora.reporting.tracker import Tracker, following, scalars
from support import models

ROUND = {
    "event": "round", "round": 3, "cohort": ["a", "b", "c"], "received": 2, "examples": 7,
    "tokens": 110, "loss_total": 26.0, "loss_tokens": 13, "seconds": 11.0,
    "aggregate_seconds": 0.5, "bytes_up": 17, "bytes_down": 19, "update_norm": 2.5,
}  # fmt: skip
SCORED = {"client": "a", "seen": False, "examples": 4, "rouge_l": 1.0, "exact_match": 2}
EVALUATION = {
    "event": "evaluation", "round": 3, "adapter": "global", "seconds": 1.0,
    "clients": [{**SCORED, "loss_total": 3.0, "loss_tokens": 2}],
}  # fmt: skip
SPECTRUM = {
    "event": "spectrum", "round": 3, "rank_levels": [2, 5], "values": {},
    "energy": {"q": [0.5, 0.3, 0.2], "v": [0.7, 0.3, 0.0]},
}  # fmt: skip


class Told(Tracker):
    """Remembers what it is told; raises at an event of a kind, or waits there."""

    title = "Told"

    def __init__(self, folder, fails_at=None, waits=None):
        self.folder, self.fails_at, self.waits = folder, fails_at, waits
        self.events, self.closed = [], 0

    @classmethod
    def of(cls, folder):
        (folder / "made").write_text("anew")
        return cls(folder)

    def on(self, event):
        if self.waits:
            self.waits.wait(20)
        if event["event"] == self.fails_at:
            raise ConnectionError("no route to the store.")
        self.events.append(event)

    def close(self):
        self.closed += 1


def running(folder, *kinds):
    """A run that records events of these kinds, numbered."""
    for number, kind in enumerate(kinds):
        yield Record(folder).append(kind, number=number)


# --- following -----------------------------------------------------------------------------


def test_events_pass_and_trackers_are_told_each_once_in_order(tmp_path):
    told = [Told(tmp_path), Told(tmp_path)]
    passed = list(following(running(tmp_path, "start", "round", "finish"), told, tmp_path))
    assert [event["event"] for event in passed] == ["start", "round", "finish"]
    assert told[0].events == told[1].events == passed
    assert [one.closed for one in told] == [1, 1]


def test_without_trackers_events_pass(tmp_path):
    assert len(list(following(running(tmp_path, "start", "finish"), [], tmp_path))) == 2


def test_a_run_that_goes_on_is_told_from_its_beginning(tmp_path):
    record = Record(tmp_path)
    before = [*running(tmp_path, "start", "round")]
    length = record.bytes
    record.append("undone")

    def resumed():
        record.rewind(length)
        yield from running(tmp_path, "start", "finish")

    told = Told(tmp_path)
    passed = list(following(resumed(), [told], tmp_path))
    assert told.events == [*before, *passed]


def test_a_tracker_that_fails_is_said_once_and_stops_nothing(tmp_path, capsys):
    failing, sound = Told(tmp_path, fails_at="round"), Told(tmp_path)
    kinds = ("start", "round", "round", "finish")
    assert len(list(following(running(tmp_path, *kinds), [failing, sound], tmp_path))) == 4
    assert len(sound.events) == 4 and len(failing.events) == 1 and failing.closed == 1
    said = capsys.readouterr().err
    assert said.count("warning: Told is disabled for the rest of this run") == 1
    assert "ConnectionError: no route to the store. The run continues" in said


def test_what_would_exit_ends_the_tracker_alone(tmp_path, capsys, monkeypatch):
    def leave(self, event):
        raise SystemExit(1)

    monkeypatch.setattr(Told, "on", leave)
    assert (
        len(list(following(running(tmp_path, "start", "finish"), [Told(tmp_path)], tmp_path))) == 2
    )
    assert "SystemExit: 1" in capsys.readouterr().err


def test_a_tracker_that_is_slow_holds_up_the_end_alone_and_not_for_long(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(tracker, "PATIENCE_SECONDS", 0.2)
    go_on = threading.Event()
    slow = Told(tmp_path, waits=go_on)
    passed = list(following(running(tmp_path, "start", "round", "finish"), [slow], tmp_path))
    assert len(passed) == 3 and slow.events == []
    assert "still behind 0 s after the last event" in capsys.readouterr().err
    go_on.set()
    for thread in threading.enumerate():
        if thread.name == "flexlora-Told":
            thread.join(20)
    assert slow.events == passed


def test_a_run_that_is_stopped_closes_its_trackers(tmp_path):
    told = Told(tmp_path)
    with closing(following(running(tmp_path, "start", "round", "finish"), [told], tmp_path)) as run:
        next(run)
        next(run)
    assert [event["event"] for event in told.events] == ["start", "round"] and told.closed == 1


def test_a_run_that_fails_closes_its_trackers_and_fails(tmp_path):
    def failing():
        yield from running(tmp_path, "start")
        raise ValueError("nobody answered")

    told = Told(tmp_path)
    with pytest.raises(ValueError, match="nobody answered"):
        list(following(failing(), [told], tmp_path))
    assert len(told.events) == 1 and told.closed == 1


def test_a_journal_that_is_cut_while_it_is_followed_is_told_to_a_new_tracker(tmp_path, monkeypatch):
    made = []
    anew = staticmethod(lambda folder: made.append(Told(folder)) or made[-1])
    monkeypatch.setattr(Told, "of", anew)
    first = Told(tmp_path)

    def cut():
        yield from running(tmp_path, "start", "round", "round")
        while len(first.events) < 3:
            threading.Event().wait(0.01)
        Record(tmp_path).rewind(0)
        yield from running(tmp_path, "start", "finish")

    passed = list(following(cut(), [first], tmp_path))
    assert first.closed == 1 and made[-1].events == passed[3:] and made[-1].closed == 1


# --- numbers -------------------------------------------------------------------------------


def test_what_a_round_says_in_numbers():
    assert scalars(ROUND) == {
        "clients/asked": 3, "clients/received": 2, "bytes/up": 17, "bytes/down": 19,
        "seconds/round": 11, "seconds/server": 0.5, "training/update_norm": 2.5,
        "training/loss": 2, "training/tokens_per_second": 10,
    }  # fmt: skip
    assert "training/loss" not in scalars({**ROUND, "loss_tokens": 0})


def test_what_an_evaluation_and_a_spectrum_say_in_numbers():
    assert scalars(EVALUATION) == {
        "evaluation/rouge_l/global/unseen": 25,
        "evaluation/exact_match/global/unseen": 50,
        "evaluation/loss/global/unseen": 1.5,
    }
    assert scalars(SPECTRUM) == pytest.approx(
        {"energy/ranks_1-2": 60, "energy/ranks_3-5": 30, "energy/ranks_6_and_beyond": 10}
    )
    assert scalars({**SPECTRUM, "energy": {}}) == {}
    assert scalars({"event": "start"}) == scalars({"event": "client", "round": 1}) == {}


# --- by config -----------------------------------------------------------------------------


def test_trackers_are_chosen_by_name(tmp_path):
    chosen = models.settings(tmp_path, run={"trackers": ["tensorboard", "mlflow"]})
    assert chosen.run.trackers == ("tensorboard", "mlflow")
    with pytest.raises(ValueError, match=r"no tracker 'tensorbord'\. Did you mean 'tensorboard'"):
        trackers.of(["tensorbord"], tmp_path)
    assert trackers.names() == ["mlflow", "tensorboard", "wandb"]


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_missing_package_is_named_with_its_extra(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tracker, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=rf"'{name}'.*pip install 'flexlora\[track\]'"):
        trackers.of([name], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_named_twice_is_one(tmp_path):
    pytest.importorskip("tensorboard", reason="needs flexlora[track]")
    (only,) = trackers.of(["tensorboard", "tensorboard"], tmp_path)
    assert only.title == "TensorBoard" and list(tmp_path.iterdir()) == []


# --- a real run ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    models.save(folder / "model")
    settings = models.settings(folder, federation={"rounds": 2}, evaluation={"every": 1})
    return setup.prepare(settings, models.corpus())


def interrupted(ready, folder, names):
    """A run that is stopped within its second round, after some of it was tracked."""
    with closing(following(rounds.run(ready, folder), trackers.of(names, folder), folder)) as run:
        for event in run:
            if event["event"] == "round" and event["round"] == 2:
                return


def resumed(ready, folder, names):
    longer = dataclasses.replace(
        ready,
        experiment=ready.experiment.model_copy(
            update={"federation": ready.experiment.federation.model_copy(update={"rounds": 3})}
        ),
    )
    run = rounds.run(longer, folder, resume=True)
    return list(following(run, trackers.of(names, folder), folder))


def expected(folder):
    """All numbers of the journal by name and round."""
    events = Record(folder).events()
    return {(name, e["round"]): value for e in events for name, value in scalars(e).items()}


def read_tensorboard(folder):
    event_accumulator = importlib.import_module(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    (path,) = (p for p in (folder / "tensorboard").iterdir() if p.stat().st_size)
    found = event_accumulator.EventAccumulator(str(path), size_guidance={"scalars": 0})
    found.Reload()
    return [(t, s.step, s.value) for t in found.Tags()["scalars"] for s in found.Scalars(t)]


def test_tensorboard_holds_what_the_journal_does(ready, tmp_path, capsys):
    pytest.importorskip("tensorboard", reason="needs flexlora[track]")
    interrupted(ready, tmp_path, ["tensorboard"])
    before = read_tensorboard(tmp_path)
    assert {(name, step) for name, step, _ in before} == expected(tmp_path).keys()
    resumed(ready, tmp_path, ["tensorboard"])
    after = read_tensorboard(tmp_path)
    wanted = expected(tmp_path)
    assert len(after) == len(wanted) > len(before)
    for name, step, value in after:
        assert value == pytest.approx(wanted[name, step], rel=1e-6), name
    assert ("evaluation/loss/global/seen", 3) in wanted and ("training/loss", 2) in wanted
    assert capsys.readouterr().err == ""


def test_the_command_feeds_the_trackers(ready, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard", reason="needs flexlora[track]")

    how = ready.experiment.run.model_copy(update={"trackers": ("tensorboard",)})
    settings = ready.experiment.model_copy(update={"run": how})
    tracked = dataclasses.replace(ready, experiment=settings)
    monkeypatch.setattr(setup, "prepare", lambda settings, meter: tracked)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    (tmp_path / "run").mkdir()
    events = run_and_report(settings, tmp_path / "run", Display())
    assert events[-1]["event"] == "finish"
    found = {(name, step) for name, step, _ in read_tensorboard(tmp_path / "run")}
    assert found == expected(tmp_path / "run").keys()
    assert "warning" not in capsys.readouterr().err


def test_tensorboard_is_not_tensorflow(tmp_path):
    """TensorFlow is not needed, and not imported where it is installed."""
    pytest.importorskip("tensorboard", reason="needs flexlora[track]")
    source = Path(trackers.kind("tensorboard").on.__code__.co_filename).read_text()
    assert "tensorboard.compat import tf" not in source and "GFile" not in source
    (one,) = trackers.of(["tensorboard"], tmp_path)
    one.on({"event": "start"})
    one.on({**ROUND, "time": 1234.5})
    one.close()
    assert ("bytes/up", 3, 17.0) in read_tensorboard(tmp_path)


# --- MLflow --------------------------------------------------------------------------------


class Store:
    """An MLflow client's store in memory, which as a real one never forgets a metric."""

    def __init__(self):
        self.logged, self.params, self.status = [], {}, []

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name, artifact_location=None):
        return "7"

    def create_run(self, experiment, run_name, tags):
        return self.get_run("run-1")

    def get_run(self, id):
        metrics = {key: value for key, _, value, _ in self.logged}
        data = type("Data", (), {"metrics": metrics})
        return type("Run", (), {"info": type("Info", (), {"run_id": id}), "data": data})

    def get_metric_history(self, id, key):
        steps = [step for name, step, _, _ in self.logged if name == key]
        return [type("Metric", (), {"step": step}) for step in steps]

    def update_run(self, id, status):
        self.status.append(status)

    set_terminated = update_run

    def log_batch(self, id, metrics=(), params=()):
        self.params |= {param.key: param.value for param in params}
        self.logged += [(m.key, m.step, m.value, m.timestamp) for m in metrics]


def test_mlflow_logs_nothing_twice(ready, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("flexlora.reporting.trackers.mlflow")
    pytest.importorskip("mlflow", reason="needs flexlora[track]")
    store = Store()

    def client(folder):
        folder.mkdir(exist_ok=True)
        return store

    monkeypatch.setattr(mlflow, "_client", client)
    interrupted(ready, tmp_path, ["mlflow"])
    first, undone = list(store.logged), expected(tmp_path)
    assert {(key, step) for key, step, _, _ in first} == undone.keys()
    resumed(ready, tmp_path, ["mlflow"])
    assert store.logged[: len(first)] == first
    wanted = expected(tmp_path)
    assert len(store.logged) == len(wanted)
    assert {(key, step) for key, step, _, _ in store.logged} == wanted.keys()
    assert store.status == ["RUNNING", "KILLED", "RUNNING", "FINISHED"]
    assert store.params["federation.rounds"] == "2" and store.params["method.name"] == "flexlora"
    assert "server_optimizer" not in store.params
    start = next(Record(tmp_path).events("evaluation"))
    assert store.logged[0][3] == int(1000 * start["time"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mlflow_keeps_a_store_in_the_folder(ready, tmp_path, capsys, monkeypatch):
    pytest.importorskip("mlflow", reason="needs flexlora[track]")
    pytest.importorskip("sqlalchemy", reason="needs flexlora[track]")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tracker, "PATIENCE_SECONDS", 200.0)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my run"
    interrupted(ready, folder, ["mlflow"])
    resumed(ready, folder, ["mlflow"])
    assert "warning" not in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["my run"]
    with closing(sqlite3.connect(folder / "mlflow" / "mlflow.db")) as store:
        rows = store.execute("select key, step, value from metrics").fetchall()
        runs = store.execute("select run_uuid, name, status from runs").fetchall()
        params = dict(store.execute("select key, value from params").fetchall())
    wanted = expected(folder)
    assert len(rows) == len(wanted)
    for key, step, value in rows:
        if not key.startswith("seconds") and key != "training/tokens_per_second":
            assert value == pytest.approx(wanted[key, step], rel=1e-9), key
    assert runs == [((folder / "mlflow" / "run_id").read_text(), "my run", "FINISHED")]
    assert params["seed"] == "3" and json.loads(params["federation.rounds"]) == 2


def test_names_as_mlflow_takes_them():
    key = importlib.import_module("flexlora.reporting.trackers.mlflow")._key
    for name in ("training/loss", "energy/ranks_1-2", "method.name", "evaluation/loss/a b/seen"):
        assert key(name) == name
    odd = ["a/é", "a/è", "a//b", "a/../b", "../x", "a/", "", ".", "a" * 300, "a" * 301, "/a"]
    made = [key(name) for name in odd]
    assert len(set(made)) == len(odd) and all(len(name) <= 250 for name in made)
    assert not any("/" in name or "." in name for name in made)


def test_a_config_as_parameters():
    flat = importlib.import_module("flexlora.reporting.trackers.mlflow")._flat
    config = {"a": {"b": 1, "c": {"d": [2, 3]}}, "e": None, "f": "x" * 7000}
    found = dict(flat(config))
    assert found["a.b"] == "1" and found["a.c.d"] == "[2, 3]" and "e" not in found
    assert len(found["f"]) == 6000 and found["f"].endswith("…")


# --- Weights & Biases ------------------------------------------------------------------------


class WandBServer:
    """A stand-in for the package ``wandb``: its runs by id, each with all that was ever logged."""

    def __init__(self):
        self.runs, self.calls = {}, []

    def init(self, **given):
        self.calls.append(given)
        id = given["id"] or f"run{len(self.runs)}"
        run = self.runs.setdefault(id, WandBRun(id))
        run.exit_codes.append(None)
        return run


class WandBRun:
    def __init__(self, id):
        self.id, self.lines, self.axes, self.exit_codes = id, [], {}, []

    def define_metric(self, name, step_metric=None):
        self.axes[name] = step_metric

    def log(self, numbers):
        self.lines.append(numbers)

    def finish(self, exit_code):
        self.exit_codes[-1] = exit_code


@pytest.fixture
def wandb(monkeypatch):
    server = WandBServer()
    monkeypatch.setitem(sys.modules, "wandb", server)
    monkeypatch.setattr(tracker, "find_spec", lambda name: name)
    monkeypatch.setenv("NETRC", "/nowhere")
    monkeypatch.setattr("netrc.netrc", lambda: (_ for _ in ()).throw(FileNotFoundError()))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_SILENT", "WANDB_CONSOLE"):
        monkeypatch.setenv(name, "as it was")
    return server


def test_wandb_gets_every_number_once_although_the_run_is_resumed(ready, tmp_path, wandb):
    interrupted(ready, tmp_path, ["wandb"])
    resumed(ready, tmp_path, ["wandb"])
    (run,) = wandb.runs.values()
    found = [(name, line["round"]) for line in run.lines for name in line if name != "round"]
    assert len(found) == len(set(found))
    assert set(found) == expected(tmp_path).keys()
    assert run.exit_codes == [1, 0]
    assert [call["id"] for call in wandb.calls] == [None, run.id]
    assert all(call["resume"] == "allow" for call in wandb.calls)
    assert wandb.calls[0]["config"]["training"]["learning_rate"] == 0.02
    prefixes = {name.split("/")[0] for name, _ in found}
    assert {run.axes[f"{prefix}/*"] for prefix in prefixes} == {"round"}


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "key"}, "online"),
        ({"WANDB_API_KEY": "key", "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
    ],
)
def test_wandb_sends_nothing_unless_it_has_a_key_and_may(
    tmp_path, wandb, monkeypatch, variables, mode
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (one,) = trackers.of(["wandb"], tmp_path)
    one.on({"event": "start", "config": {}})
    one.close()
    assert wandb.calls[0]["mode"] == mode
    assert ("wandb sync" in one.view) == (mode == "offline")


def test_wandb_missing_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(tracker, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'flexlora\[wandb\]'"):
        trackers.of(["wandb"], tmp_path)


@pytest.mark.parametrize(
    ("name", "command"),
    [("tensorboard", "tensorboard --logdir "), ("mlflow", "mlflow ui --backend-store-uri sqlite:")],
)
def test_a_tracker_says_how_it_is_looked_at(tmp_path, monkeypatch, name, command):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert trackers.kind(name)(tmp_path).view.startswith(command)
