import pytest

from flexlora.cli import demo
from flexlora.journal import Record
from support import commands, models


@pytest.mark.parametrize("arm", demo.ARMS)
def test_both_arms_are_valid_and_differ_in_ranks_alone(arm):
    found = demo.experiment(arm, "folder", evaluate_base=True)
    other = demo.experiment("rank 8 everywhere", "folder", evaluate_base=True)
    assert found.model_copy(update={"ranks": other.ranks}) == other


def test_the_demo_has_the_clients_it_promises():
    from flexlora.data.corpora.procedural import FAMILIES

    found = demo.experiment("mixed ranks 8-64", "folder", evaluate_base=False)
    assert len(FAMILIES) - found.data.unseen_clients >= 24


def test_scores_are_of_the_last_evaluation_and_the_group_asked_for():
    def event(adapter, rouge):
        row = {"examples": 2, "exact_match": 1, "loss_total": 3.0, "loss_tokens": 4}
        rows = [
            {**row, "seen": True, "rouge_l": rouge},
            {**row, "seen": False, "rouge_l": 2 * rouge},
        ]
        return {"event": "evaluation", "adapter": adapter, "clients": rows}

    events = [event("base", 0.1), event("global", 0.2), event("global", 0.5)]
    assert demo.scores(events, "global", True)["rouge_l"] == pytest.approx(25)
    assert demo.scores(events, "global", False)["rouge_l"] == pytest.approx(50)
    assert demo.scores(events, "base", True)["rouge_l"] == pytest.approx(5)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The demonstration on the tiny model, in a folder of its own; the settings of an arm."""
    models.save(tmp_path / "model")
    ranks = {"rank 8 everywhere": {"types": None, "distribution": None, "rank": 2}}

    def experiment(arm, folder, evaluate_base):
        changes = {"federation": {"rounds": 2}, "evaluation": {"base": evaluate_base}}
        if arm in ranks:
            changes["ranks"] = ranks[arm]
        return models.settings(tmp_path, data={"unseen_clients": 2}, **changes)

    monkeypatch.setattr(demo, "experiment", experiment)
    monkeypatch.setattr("flexlora.federation.client_data.read", lambda *_: models.corpus())
    monkeypatch.chdir(tmp_path)


def test_an_interrupted_demonstration_goes_on_as_a_whole(tiny, monkeypatch, capsys, tmp_path):
    appended = Record.append

    def stopped(self, event, **fields):
        entry = appended(self, event, **fields)
        if "everywhere" in str(self.folder) and (event, fields.get("round")) == ("round", 1):
            raise KeyboardInterrupt
        return entry

    with monkeypatch.context() as patch:
        patch.setattr(Record, "append", stopped)
        result = commands.call(monkeypatch, capsys, "demo", "--out", "runs/new")
    assert result.code == 130
    assert result.err.strip() == "stopped; resume with: flexlora demo --out runs/new"
    first = (tmp_path / "runs/new/mixed-ranks-8-64/metrics.jsonl").read_bytes()
    result = commands.call(monkeypatch, capsys, "demo", "--out", "runs/new")
    assert result.code == 0, result.err
    assert "finished before" in result.out
    assert "Held-out clients" in result.out and "before training" in result.out
    assert (tmp_path / "runs/new/mixed-ranks-8-64/metrics.jsonl").read_bytes() == first
    events = list(Record(tmp_path / "runs/new/rank-8-everywhere").events("round", "finish"))
    assert [event.get("round") for event in events] == [1, 2, None]


def test_a_demonstration_that_trained_nothing_has_nothing_to_resume(tiny, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("flexlora.federation.client_data.read", stopped)
    result = commands.call(monkeypatch, capsys, "demo", "--out", "new")
    assert (result.code, result.err.strip()) == (130, "stopped; nothing was trained yet")
