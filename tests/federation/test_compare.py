"""Comparisons of methods on the tiny federation: what is alike, what goes on, what is refused."""

import json
import sys

import pyarrow.parquet as pq
import pytest

from flexlora import methods
from flexlora.cli import main
from flexlora.config import ComparisonSettings
from flexlora.errors import ConfigError
from flexlora.federation import compare, setup
from flexlora.journal.record import Record
from flexlora.methods.hetlora import HetLoRA
from flexlora.model.source import Source
from flexlora.peft_format import WEIGHTS
from flexlora.reporting import comparison
from flexlora.reporting.comparison import texts
from support import models

ROUNDS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    models.save(folder / "model")
    pq.write_table(models.corpus().table, folder / "rows.parquet")
    return folder


@pytest.fixture
def settings(folder):
    """A federation that reads its rows from a file."""

    def settings(**changes):
        changes.setdefault("data", {})
        changes["data"] = {"path": str(folder / "rows.parquet"), **changes["data"]}
        changes.setdefault("federation", {"rounds": ROUNDS, "cohort": 3})
        return models.settings(folder, **changes)

    return settings


def nothing(cell, events):
    for _ in events:
        pass


def run(cells, watch=nothing):
    return list(compare.run(cells, watch))


def of(cell, kind):
    return list(Record(cell.folder).events(kind))


def states(outcomes):
    return [(o.cell.method, o.cell.seed, o.state) for o in outcomes]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A whole comparison of three methods, of which one cannot mix ranks, and two seeds."""
    loads = []
    plain = Source.load
    Source.load = lambda self: loads.append(self.name) or plain(self)
    try:
        config = models.settings(
            folder,
            data={"path": str(folder / "rows.parquet")},
            federation={"rounds": ROUNDS, "cohort": 3},
        )
        target = tmp_path_factory.mktemp("whole") / "comparison"
        cells = compare.plan(config, ["flexlora", "fedit", "hetlora"], 2, target)
        return cells, run(cells), loads
    finally:
        Source.load = plain


def test_every_method_has_a_cell_for_every_seed(whole):
    cells, outcomes, _ = whole
    assert states(outcomes) == [
        ("flexlora", 3, "finished"),
        ("fedit", 3, "refused"),
        ("hetlora", 3, "finished"),
        ("flexlora", 4, "finished"),
        ("fedit", 4, "refused"),
        ("hetlora", 4, "finished"),
    ]
    assert cells[0].folder.parts[-3:] == ("cells", "flexlora", "seed-3")
    assert "one rank for all clients" in outcomes[1].reason
    assert not cells[1].folder.exists()


def test_cells_of_a_seed_have_the_same_clients_and_rows(whole):
    (first, _, second, other, _, _), _, _ = whole

    def work(cell):
        cohorts = [event["cohort"] for event in of(cell, "round")]
        turns = [(e["client"], e["rank_type"], e["tokens"], e["steps"]) for e in of(cell, "client")]
        return cohorts, sorted(turns)

    assert work(first) == work(second)
    assert work(first) != work(other)


def test_the_model_is_loaded_once_and_evaluated_once_for_a_seed(whole):
    _, outcomes, loads = whole
    assert len(loads) == 1
    base = [
        o.cell.seed
        for o in outcomes
        if o.state == "finished"
        for e in of(o.cell, "evaluation")
        if e["adapter"] == "base"
    ]
    assert base == [3, 4]


def test_a_cell_keeps_its_last_adapter_alone_unless_the_config_says_more(whole, settings, tmp_path):
    cells, _, _ = whole
    kept = [path.name for path in sorted((cells[0].folder / "rounds").iterdir())]
    assert kept == [f"{ROUNDS:05d}"]
    wanted = settings(run={"keep_adapters": "all"})
    (cell,) = compare.plan(wanted, ["flexlora"], 1, tmp_path / "c")
    run([cell])
    assert len(list((cell.folder / "rounds").iterdir())) == ROUNDS


def test_all_cells_train_as_many_clients_at_a_time(whole):
    _, outcomes, _ = whole
    finished = [o.cell for o in outcomes if o.state == "finished"]
    assert {of(cell, "start")[0]["clients_at_once"] for cell in finished} == {1}


def test_the_number_of_clients_at_a_time_is_measured_in_the_first_cell(
    settings, tmp_path, monkeypatch
):
    measured = iter([2, 3])
    monkeypatch.setattr("flexlora.federation.rounds.clients_at_once", lambda *given: next(measured))
    wanted = settings(run={"clients_at_once": None})
    cells = compare.plan(wanted, ["flexlora", "hetlora"], 1, tmp_path / "c")
    run(cells)
    assert [of(cell, "start")[0]["clients_at_once"] for cell in cells] == [2, 2]


def test_finished_cells_are_not_run_again(whole):
    cells, _, _ = whole
    before = [cell.folder.exists() and Record(cell.folder).bytes for cell in cells]
    seen = []
    outcomes = run(cells, lambda cell, events: seen.append(cell))
    assert not seen and states(outcomes) == states(whole[1])
    assert before == [cell.folder.exists() and Record(cell.folder).bytes for cell in cells]


def test_an_interrupted_comparison_goes_on_and_ends_the_same(whole, settings, tmp_path):
    names, target = ["flexlora", "hetlora"], tmp_path / "c"

    def stopped(cell, events):
        for event in events:
            if (cell.method, event["event"], event.get("round")) == ("hetlora", "spectrum", 2):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(compare.plan(settings(), names, 1, target), stopped)
    left = []

    def noted(cell, events):
        left.append(cell.method)
        nothing(cell, events)

    # Another run section does not make it another config.
    again = compare.plan(settings(run={"keep_adapters": "last"}), names, 1, target)
    outcomes = run(again, noted)
    assert left == ["hetlora"]
    assert [o.state for o in outcomes] == ["finished", "finished"]
    assert [start["resumed"] for start in of(again[1], "start")] == [False, True]
    adapter = f"rounds/{ROUNDS:05d}/adapter/{WEIGHTS}"
    for cell, same in ((again[0], whole[0][0]), (again[1], whole[0][2])):
        assert (cell.folder / adapter).read_bytes() == (same.folder / adapter).read_bytes()


def test_a_cell_that_fails_stops_no_other_and_is_tried_again(settings, tmp_path, monkeypatch):
    target = tmp_path / "c"

    def plan():
        return compare.plan(settings(), ["hetlora", "flexlora"], 1, target)

    def broken(self, state, cohort, context):
        raise ArithmeticError("The norm is not finite.")

    with monkeypatch.context() as patch:
        patch.setattr(HetLoRA, "aggregate", broken)
        failed, finished = run(plan())
    assert (failed.state, finished.state) == ("failed", "finished")
    assert failed.reason == "ArithmeticError: The norm is not finite."
    note = target / "cells/hetlora/seed-3.error.txt"
    assert "in broken" in note.read_text()
    assert [o.state for o in run(plan())] == ["finished", "finished"]
    assert not note.exists()


def test_options_stand_in_the_config_or_on_the_command_line(settings, tmp_path):
    wanted = settings(method={"name": "hetlora", "decay": 0.5})
    cells = compare.plan(
        wanted,
        ["flexlora", "hetlora"],
        1,
        tmp_path / "c",
        ["hetlora.keep=0.75", "flexlora.weights=uniform"],
    )
    assert [cell.experiment.method for cell in cells] == [
        {"name": "flexlora", "weights": "uniform"},
        {"name": "hetlora", "decay": 0.5, "keep": 0.75},
    ]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("hetlora", "takes METHOD.KEY=VALUE"),
        ("hetlora=3", "takes METHOD.KEY=VALUE"),
        ("hetlora.name=fedit", "takes METHOD.KEY=VALUE"),
        ("hetlra.keep=0.5", "Did you mean 'hetlora'"),
        ("fedit.keep=0.5", "is for a method that is not compared"),
        ("hetlora.kep=0.5", "no option 'kep'. Did you mean 'keep'"),
        ("hetlora.keep=7", "keep is a share of the rank"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_run(settings, tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        compare.plan(settings(), ["flexlora", "hetlora"], 1, tmp_path / "c", [option])


def test_methods_are_all_or_some_of_them():
    assert compare.chosen("all") == methods.names()
    assert compare.chosen("hetlora, fedit,hetlora") == ["hetlora", "fedit"]
    with pytest.raises(ValueError, match="Did you mean 'flexlora'"):
        compare.chosen("hetlora,flexlroa")
    with pytest.raises(ValueError, match="names no method"):
        compare.chosen(" , ")


def test_a_folder_of_something_else_is_refused(whole, settings, tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"something else than a comparison \(metrics.jsonl\)"):
        compare.plan(settings(), ["flexlora"], 1, tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        compare.plan(settings(), ["flexlora"], 1, tmp_path / "metrics.jsonl")
    target = whole[0][0].folder.parents[2]
    other = settings(training={"learning_rate": 0.03}, evaluation={"rows_per_client": 2})
    with pytest.raises(
        ValueError, match=r"differs in evaluation.rows_per_client, training.learning_rate\)"
    ):
        compare.plan(other, ["hetlora"], 1, target)
    with pytest.raises(ValueError, match=r"it differs in method.keep\)"):
        compare.plan(settings(), ["hetlora"], 1, target, ["hetlora.keep=0.5"])
    (tmp_path / "d/cells/flexlora/seed-3/else").mkdir(parents=True)
    with pytest.raises(ValueError, match="is no cell of a comparison"):
        compare.plan(settings(), ["flexlora"], 1, tmp_path / "d")


def test_a_model_that_is_loaded_already_is_taken(whole, settings, monkeypatch):
    base = settings().model.load()
    monkeypatch.setattr(Source, "load", lambda self: pytest.fail("It was loaded again."))
    assert setup.prepare(settings(), base=base).base is base


@pytest.fixture
def call(folder, tmp_path, monkeypatch, capsys):
    """Calls ``flexlora compare`` and gives the exit code, the output and the errors."""
    path = models.write_config(
        tmp_path / "config.toml",
        folder,
        data={"path": str(folder / "rows.parquet"), "unseen_clients": None},
        ranks={
            "types": {
                "small": {"attention": 2, "feed_forward": 2},
                "large": {"attention": 3, "feed_forward": 5},
            },
            "distribution": {"small": 0.5, "large": 0.5},
        },
        federation={"rounds": 1, "cohort": 2},
        evaluation={"unseen_clients": None, "truncated": None},
    )

    def call(*words, config=path):
        monkeypatch.setattr(sys, "argv", ["flexlora", "compare", str(config), *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main.main()
        said = capsys.readouterr()
        return stop.value.code or 0, said.out, said.err

    return call


def test_the_command_compares_and_says_where(call, tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "names", lambda: ["fedit", "flexlora", "hetlora"])
    code, said, _ = call("--methods", "all", "--seeds", "1", "--out", tmp_path / "c")
    assert code == 0
    assert "★" in said and "Skipped, it needs the same rank for all clients: fedit" in said
    assert "One seed does not show how much" in said
    found = json.loads((tmp_path / "c/comparison.json").read_text())
    assert [m["cells"][0]["state"] for m in found["methods"]].count("finished") == 2
    assert found["methods"][-1]["method"] == "fedit"
    for name in ("comparison.md", "comparison.html"):
        assert "it needs the same rank" in (tmp_path / "c" / name).read_text()
    # A method that was asked for by its name is to run.
    code, said, _ = call("--methods", "flexlora,fedit", "--seeds", "1", "--out", tmp_path / "c")
    assert code == 1 and "flexlora, seed" not in said


def test_the_command_fails_if_a_cell_does(call, tmp_path, monkeypatch):
    monkeypatch.setattr(HetLoRA, "aggregate", lambda *given: 1 / 0)
    words = ("--methods", "flexlora,hetlora", "--seeds", "1", "--out", tmp_path / "c")
    code, said, _ = call(*words)
    assert code == 1 and "seed 3 failed: ZeroDivisionError" in said


def test_a_command_that_is_stopped_writes_what_it_has(call, tmp_path, monkeypatch):
    def stopped(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(HetLoRA, "aggregate", stopped)
    words = ("--methods", "flexlora,hetlora", "--seeds", "1", "--out", tmp_path / "c")
    code, said, error = call(*words)
    assert code == 130 and "resume with the same command" in error
    assert "hetlora: seed 3 not completed" in said
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "flexlroa"], "Did you mean 'flexlora'?"),
        (["--seeds", "0"], "--seeds is 0; give at least 1"),
        (["--set", "training.learning_rate=fast"], "'training.learning_rate' is 'fast'"),
        (["--set", "data.path=none.parquet", "--methods", "flexlora"], "none.parquet"),
    ],
)
def test_wrong_words_are_one_message(call, tmp_path, words, message):
    code, _, said = call(*words, "--out", tmp_path / "c")
    assert code == 2 and said.startswith("error: ") and message in said
    assert not (tmp_path / "c").exists()


def test_a_missing_config_is_one_message(call, tmp_path):
    code, _, said = call(config=tmp_path / "missing.toml")
    assert code == 2 and "missing.toml cannot be read" in said


def test_variants_and_settings_of_methods_are_compared(settings, tmp_path):
    compared = ComparisonSettings(
        settings={"HetLoRA": {"keep": 0.9, "training.learning_rate": 0.005}},
        variants={"rank 2": {"ranks.rank": 2}, "mixed": {}},
    )
    names, target = ["flexlora", "fedit", "hetlora"], tmp_path / "c"
    cells = compare.plan(settings(), names, 1, target, compared=compared)
    assert [(cell.variant, cell.method) for cell in cells] == [
        (variant, name) for variant in ("rank 2", "mixed") for name in names
    ]
    assert len({cell.folder for cell in cells}) == 6
    assert [cell.experiment.ranks.rank for cell in cells] == [2, 2, 2, None, None, None]
    rates = [cell.experiment.training.learning_rate for cell in cells]
    assert rates == [0.02, 0.02, 0.005] * 2
    assert cells[2].experiment.method == {"name": "hetlora", "keep": 0.9}
    outcomes = run(cells)
    states = {outcome.cell.name: outcome.state for outcome in outcomes}
    assert states["fedit, rank 2"] == "finished" and states["fedit, mixed"] == "refused"
    bases = [
        cell.variant
        for cell in cells
        for event in of(cell, "evaluation")
        if event["adapter"] == "base"
    ]
    assert bases == ["rank 2", "mixed"]
    found = comparison.write(target, outcomes)
    assert [row.method for row in found.rows if row.refused] == ["fedit, mixed"]
    assert texts.title(found) == "3 methods and 2 variants compared"
    written = json.loads((target / "comparison.json").read_text())
    assert {(row["method"], row["variant"]) for row in written["methods"]} == {
        (cell.method, cell.variant) for cell in cells
    }
    assert compare.plan(settings(), names, 1, target, compared=compared) == cells


@pytest.mark.parametrize(
    ("compared", "message"),
    [
        (ComparisonSettings(variants={"a": {"ranks.rnk": 2}}), "variant 'a'.*ranks.rnk"),
        (ComparisonSettings(settings={"hetlora": {"training.rate": 1}}), "settings of hetlora"),
        (ComparisonSettings(settings={"hetlora": {"keeps": 1}}), "no option 'keeps'"),
        (ComparisonSettings(settings={"hetlore": {"keep": 1}}), "Did you mean 'hetlora'"),
    ],
)
def test_wrong_variants_and_settings_are_refused_before_anything_runs(
    settings, tmp_path, compared, message
):
    with pytest.raises(ConfigError, match=message):
        compare.plan(settings(), ["hetlora"], 1, tmp_path / "c", compared=compared)


def test_the_command_varies_a_setting_and_takes_the_table_of_the_file(call, tmp_path):
    code, said, _ = call(
        *("--methods", "FlexLoRA", "--seeds", "1", "--vary", "ranks.rank=2,3"),
        *("--option", "flexlora.training.learning_rate=0.01", "--out", tmp_path / "c"),
    )
    assert code == 0
    assert "1 of 2: flexlora, rank=2, seed 3" in said
    assert "1 method and 2 variants compared" in said
    stored = json.loads((tmp_path / "c/cells/rank=3/flexlora/seed-3/config.json").read_text())
    assert (stored["ranks"]["rank"], stored["training"]["learning_rate"]) == (3, 0.01)
