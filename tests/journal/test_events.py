"""The schema of the journal's events, and the kinds of losses that it tells apart."""

import ast
from pathlib import Path

import pytest

import flexlora
from flexlora.federation import rounds, setup
from flexlora.journal import EVENTS, LossKind, loss_kind
from support import models


@pytest.mark.parametrize("kind", LossKind)
def test_a_lost_event_says_its_kind(kind):
    assert loss_kind({"event": "lost", "kind": kind.value, "reason": "any words"}) is kind


@pytest.mark.parametrize("event", [{}, {"kind": "of a later version"}, {"kind": None}])
def test_a_lost_event_without_a_kind_of_ours_is_other(event):
    # Journals of earlier versions have a reason only, whose words are read by nobody.
    reason = "It was not needed any more."
    assert loss_kind({"event": "lost", "reason": reason, **event}) is LossKind.OTHER


def written(call):
    """The type of event that a call writes, if it is such a call."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    first = call.args[0] if call.args else None
    if (name == "append" and call.keywords) or name == "TransportEvent":
        return first.value if isinstance(first, ast.Constant) else None
    return None


def test_every_event_that_the_library_writes_is_in_the_schema():
    files = Path(flexlora.__file__).parent.rglob("*.py")
    calls = [n for f in files for n in ast.walk(ast.parse(f.read_text())) if type(n) is ast.Call]
    types = {event for call in calls if (event := written(call))}
    assert {"start", "finish", "round", "asked", "joined", "refused", "stopped"} <= types
    # The collector has these two in a variable.
    assert types | {"lost", "stray"} == EVENTS.keys()


def test_the_events_of_a_run_have_the_fields_of_the_schema(tmp_path):
    models.save(tmp_path / "model")
    settings = models.settings(tmp_path, federation={"rounds": 1}, evaluation={"every": 1})
    events = list(rounds.run(setup.prepare(settings, models.corpus()), tmp_path / "run"))
    assert {e["event"] for e in events} >= {"start", "client", "round", "spectrum", "finish"}
    for event in events:
        fields, schema = event.keys() - {"event", "time"}, EVENTS[event["event"]]
        assert schema.fields.keys() <= fields <= schema.fields.keys() | schema.optional.keys()
