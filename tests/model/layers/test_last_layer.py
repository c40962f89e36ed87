"""The last layer that works where there is loss against the model's own."""

from dataclasses import replace

import pytest
import torch

from flexlora.data.packing import join, pack
from flexlora.model.base import Base
from flexlora.model.layers.last_layer import LastLayer
from flexlora.model.trainable import FlatAdapter
from support.learning import of_rank
from support.rows import sharing_store


def outcome(base: Base, row, edges, adapters, recompute):
    """The logits, and the gradients of every adapter, of a loss of unequal weights."""
    flats = [FlatAdapter.of(adapter, lambda rank: 1.0, base.device) for adapter in adapters]
    with base.training(*flats), base.recomputing(recompute):
        logits = base.logits(row, edges)
        weights = torch.arange(1.0, logits.numel() + 1).view_as(logits) / logits.numel()
        (logits * weights).sum().backward()
    return [logits.detach(), *(flat.values.grad for flat in flats)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("prompt_loss", [False, True])
def test_what_no_loss_looks_at_is_not_missed(base, monkeypatch, prompt_loss, recompute):
    """Also where several examples have a loss at the same place of their prefix."""
    rows = sharing_store()
    laid = [pack(rows, part, prompt_loss) for part in ([0, 1, 2, 3], [4, 5])]
    if prompt_loss:
        assert len(laid[0].loss_positions.unique()) < len(laid[0].loss_positions)
    adapters = [of_rank(base, 2), of_rank(base, 3, seed=1)]
    edges = [0, laid[0].tokens, laid[0].tokens + laid[1].tokens]
    got = outcome(base, join(laid), edges, adapters, recompute)
    monkeypatch.setattr(base, "_ends_early", False)
    want = outcome(base, join(laid), edges, adapters, recompute)
    for a, b in zip(got, want, strict=True):
        assert torch.linalg.vector_norm(a - b) < 1e-5 * b.norm()


def test_places_are_answered_in_the_order_asked(base):
    laid = pack(sharing_store(), [0, 1, 2])
    at = torch.tensor([5, 1, 5, 3])
    with torch.no_grad():
        some = base.logits(replace(laid, loss_positions=at))
        every = base.logits(replace(laid, loss_positions=torch.arange(laid.tokens)))
    torch.testing.assert_close(some, every[at])


def test_the_rest_of_the_row_is_left_out(base, monkeypatch):
    seen = []
    mlp = base.model.model.layers[-1].mlp
    forward = type(mlp).forward
    monkeypatch.setattr(type(mlp), "forward", lambda s, x: seen.append(x.shape[1]) or forward(s, x))
    laid = pack(sharing_store(), [0, 1, 2])
    with torch.no_grad():
        base.logits(laid)
    assert isinstance(base.model.model.layers[-1], LastLayer)
    assert seen == [laid.tokens, len(laid.loss_positions.unique())]
