"""Attention by a forest against a softmax written out with the forest's dense mask."""

import pytest
import torch
import transformers
from transformers import masking_utils

from flexlora.data import packing
from flexlora.data.packing import Forest, pack
from flexlora.model.base import Base
from flexlora.model.inputs import flash_inputs
from flexlora.model.layers import attention
from flexlora.model.layers.attention import MaskRule, PackedPass, UnsupportedAttentionError
from flexlora.model.source import Source
from flexlora.model.trainable import FlatAdapter
from flexlora.training.loop import label_losses
from support.factors import random_adapter
from support.rows import FORESTS, dense_mask, sharing_store

HEADS = [(3, 3), (9, 3), (4, 1)]
"""Heads of queries, and of keys and values."""

SIZE = 5


def inputs(forest: Forest, heads: tuple[int, int], dtype, seed=0):
    """Queries, keys and values as models give them: a transposed view of (row, heads, size)."""
    draw = torch.Generator().manual_seed(seed)
    rows = forest.edges[-1]
    return [
        torch.randn(1, rows, count, SIZE, generator=draw, dtype=torch.float64)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for count in (heads[0], heads[1], heads[1])
    ]


def softmax(query, key, value, forest, scale):
    """The attention in float64, one product for all heads and nothing left out."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = query.double(), key.double(), value.double()
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = (scale * q @ k.transpose(2, 3)).masked_fill(~dense_mask(forest), -torch.inf)
    return (scores.softmax(-1) @ v).to(query.dtype)


def on_cpu(*arguments):
    return attention._OnCPU.apply(*arguments)


def results_of(run, forest, heads, dtype, scale=0.4):
    """The output and the gradients of queries, keys and values."""
    tensors = inputs(forest, heads, dtype)
    out = run(*tensors, forest, scale)
    grad = inputs(forest, heads, dtype, seed=1)[0].detach()
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Of the precisions that a base model may have."""


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("forest", FORESTS.values(), ids=FORESTS)
@pytest.mark.parametrize("run", [on_cpu, attention.masked])
def test_it_is_the_softmax_over_what_each_token_sees(run, forest, heads, dtype):
    results = results_of(run, forest, heads, dtype)
    # What half precision makes of the inputs is not the attention's fault.
    want = results_of(softmax, forest, heads, dtype)
    for got, expected in zip(results, want, strict=True):
        assert got.dtype == dtype
        error = (got.double() - expected.double()).norm() / expected.double().norm()
        assert error < TOLERANCES[dtype]


@pytest.mark.parametrize("run", [on_cpu, attention.masked])
def test_a_long_row_too(run, monkeypatch):
    """Longer than the kernel's own blocks, and of several of ours."""
    monkeypatch.setattr(packing, "_BLOCK_TOKENS", 300)
    forest = Forest((0, 290, 300, 560, 700, 701, 900), (-1, 0, 0, -1, -1, 4))
    assert len(forest.blocks) == 3
    results, want = (results_of(each, forest, (4, 2), torch.float32) for each in (run, softmax))
    for got, expected in zip(results, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("run", [on_cpu, attention.masked])
@pytest.mark.parametrize("shift", [-60.0, 60.0])
def test_large_scores_stay_finite(run, shift):
    """Where one of two joined softmaxes has all the weight, or none."""
    forest = FORESTS["shared"]
    query, key, value = inputs(forest, (4, 2), torch.float32)
    with torch.no_grad():
        query[..., 0], key[..., 0] = 1.0, 0.0
        key[:, :, :6, 0] = shift
    out = run(query, key, value, forest, 2.0)
    torch.testing.assert_close(out, softmax(query, key, value, forest, 2.0), rtol=1e-4, atol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (query, key, value)))


def test_without_a_gradient_it_is_the_same():
    forest = FORESTS["mixed"]
    tensors = inputs(forest, (4, 2), torch.float32)
    with torch.no_grad():
        alone = on_cpu(*tensors, forest, 0.4)
    assert not alone.requires_grad
    assert torch.equal(alone, on_cpu(*tensors, forest, 0.4).detach())


CAUSAL = MaskRule(masking_utils.causal_mask_function, torch.device("cpu"))


def attended(tensors, forest, rule=CAUSAL, **options):
    return attention.attend(
        torch.nn.Identity(), *tensors, rule, attention_pass=PackedPass(forest), **options
    )


def test_the_scale_is_the_head_s_unless_the_model_says_another():
    forest = FORESTS["mixed"]
    tensors = inputs(forest, (4, 2), torch.float32)
    for given, scale in ((None, SIZE**-0.5), (0.3, 0.3)):
        out, weights = attended(tensors, forest, scaling=given)
        assert weights is None
        want = softmax(*tensors, forest, scale).transpose(1, 2)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [1, 4, 9, 10])
def test_a_window_is_counted_in_positions_of_the_example(window):
    forest = FORESTS["mixed"]  # of which the longest example has ten tokens
    rule = MaskRule(masking_utils.sliding_window_causal_mask_function(window), torch.device("cpu"))
    assert rule.is_causal(forest.longest) == (window == 10)
    tensors = inputs(forest, (4, 2), torch.float32)
    out, _ = attended(tensors, forest, rule, scaling=0.4)
    at = forest.positions
    near = at[None] > at[:, None] - window
    scores = 0.4 * tensors[0] @ tensors[1].repeat_interleave(2, dim=1).transpose(2, 3)
    scores = scores.masked_fill(~(dense_mask(forest) & near), -torch.inf)
    want = scores.softmax(-1) @ tensors[2].repeat_interleave(2, dim=1)
    torch.testing.assert_close(out, want.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_what_a_model_does_not_hand_on_is_an_error():
    forest = FORESTS["mixed"]
    tensors = inputs(forest, (4, 2), torch.float32)
    for rule, options in ((None, {}), (torch.zeros(1), {}), (CAUSAL, {"dropout": 0.1})):
        with pytest.raises(UnsupportedAttentionError):
            attended(tensors, forest, rule, **options)
    with pytest.raises(UnsupportedAttentionError):
        attention.attend(torch.nn.Identity(), *tensors, CAUSAL)


# --- in a model ----------------------------------------------------------------------------


def losses_and_gradients(base: Base, share: bool = True):
    row = pack(sharing_store(), range(9), share=share)
    flat = FlatAdapter.of(random_adapter(base.shapes, 3), lambda rank: 1.0, base.device)
    with base.training(flat):
        nats = label_losses(base, row)
        nats.mean().backward()
    order = torch.argsort(row.owners, stable=True)
    return nats.detach()[order], flat.values.grad.clone()


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_transformers_own_attention_gives_the_same_with_a_mask(model_folder, name):
    ours, gradient = losses_and_gradients(Source(str(model_folder)).load())
    theirs, expected = losses_and_gradients(Source(str(model_folder), attention=name).load())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("name", [attention.NAME, "sdpa", "eager"])
def test_what_is_shared_has_the_gradients_of_all(model_folder, name):
    base = Source(str(model_folder), attention=name).load()
    whole, gradient = losses_and_gradients(base)
    alone, expected = losses_and_gradients(base, share=False)
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


def test_flash_attention_is_told_the_bounds_of_the_examples():
    inputs = flash_inputs(FORESTS["alone"], torch.device("cpu"))
    assert inputs["cu_seq_lens_q"].dtype == inputs["cu_seq_lens_k"].dtype == torch.int32
    assert inputs["cu_seq_lens_q"].tolist() == inputs["cu_seq_lens_k"].tolist() == [0, 4, 5, 12]
    assert inputs["max_length_q"] == inputs["max_length_k"] == 7


def test_the_model_keeps_the_attention_of_transformers(model_folder):
    base = Source(str(model_folder)).load()
    base.logits(pack(sharing_store(), range(9)))
    assert base.model.config._attn_implementation == "sdpa"
    assert attention.NAME in transformers.AttentionInterface()
