import numpy as np
import pytest
import torch

from flexlora.data.encoding import Tokens
from flexlora.evaluation.held_out_loss import losses

SIZES = ((3, 1), (11, 5), (1, 7), (19, 2), (2, 13))
"""Prompt and response tokens of each example."""


@pytest.fixture(scope="module")
def examples():
    draw = np.random.default_rng(2)
    return [Tokens(draw.integers(0, 15, size=a + b).astype(np.int32), a) for a, b in SIZES]


def loss_alone(base, tokens: Tokens) -> float:
    """All logits of one example alone, in float64 from there on."""
    ids = torch.from_numpy(tokens.ids.astype(np.int64))
    with torch.no_grad():
        logits = base.model(input_ids=ids[None], use_cache=False).logits[0].double()
    each = logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
    return -float(each[tokens.prompt_tokens - 1 :].sum())


@pytest.mark.parametrize("batch_tokens", [1, 20, 1000])
def test_packed_losses_are_those_of_each_example_alone(base, examples, batch_tokens):
    results = losses(base, examples, batch_tokens)
    assert [loss.tokens for loss in results] == [response for _, response in SIZES]
    expected = [loss_alone(base, tokens) for tokens in examples]
    np.testing.assert_allclose([loss.total for loss in results], expected, rtol=1e-5)


def test_losses_are_those_of_the_attached_adapter(base, adapter, examples):
    without = [loss.total for loss in losses(base, examples, 40)]
    with base.attached(adapter):
        results = [loss.total for loss in losses(base, examples, 40)]
        expected = [loss_alone(base, tokens) for tokens in examples]
    np.testing.assert_allclose(results, expected, rtol=1e-4)
    assert all(abs(a - b) > 1e-3 for a, b in zip(results, without, strict=True))


def test_packs_hold_every_token_once_within_their_room(base, examples, monkeypatch):
    rows = []
    logits = base.logits
    monkeypatch.setattr(base, "logits", lambda row, *a: rows.append(row.tokens) or logits(row, *a))
    losses(base, examples, 20)
    assert sum(rows) == sum(map(sum, SIZES))
    assert [tokens for tokens in rows if tokens > 20] == [19 + 2]
    assert len(rows) < len(SIZES)


def test_no_examples_no_losses(base):
    assert losses(base, [], 10) == []
