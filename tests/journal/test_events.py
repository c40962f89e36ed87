"""The kinds of losses that a journal tells apart."""

import pytest

from flexlora.journal import LossKind, loss_kind


@pytest.mark.parametrize("kind", LossKind)
def test_a_lost_event_says_its_kind(kind):
    assert loss_kind({"event": "lost", "kind": kind.value, "reason": "any words"}) is kind


@pytest.mark.parametrize("event", [{}, {"kind": "of a later version"}, {"kind": None}])
def test_a_lost_event_without_a_kind_of_ours_is_other(event):
    # Journals of earlier versions have a reason only, whose words are read by nobody.
    reason = "It was not needed any more."
    assert loss_kind({"event": "lost", "reason": reason, **event}) is LossKind.OTHER
