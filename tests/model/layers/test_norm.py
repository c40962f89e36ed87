"""The norm against that of transformers' own models, and only in place of those."""

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.smollm3.modeling_smollm3 import SmolLM3RMSNorm

from flexlora.model.layers.norm import KINDS, RMSNorm, fits

OWN = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, SmolLM3RMSNorm)
SIZE = 13


def norm_of(kind, dtype, eps=1e-5):
    norm = kind(SIZE, eps=eps).to(dtype).requires_grad_(False)
    norm.weight.copy_(torch.randn(SIZE, generator=torch.Generator().manual_seed(2)))
    return norm


def found_by(layer, shape, dtype, scale=1.0):
    """The output and the input's gradient."""
    draw = torch.Generator().manual_seed(0)
    x = scale * torch.randn(*shape, SIZE, generator=draw)
    grad = torch.randn(*shape, SIZE, generator=draw)
    x = x.to(dtype).requires_grad_()
    y = layer(x)
    y.backward(grad.to(y.dtype))
    return y.detach(), x.grad


def test_every_kind_is_tested():
    assert sorted(kind.__name__ for kind in OWN) == sorted(KINDS)


@pytest.mark.parametrize("shape", [(1,), (1, 7), (2, 3, 5)])
@pytest.mark.parametrize("kind", OWN)
def test_it_is_the_model_s_own(kind, shape):
    own = norm_of(kind, torch.float32)
    assert fits(own)
    for got, want in zip(
        found_by(RMSNorm(own), shape, torch.float32),
        found_by(own, shape, torch.float32),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_normed_in_single(dtype):
    """To the bit in the values; the gradient's passes round in another order."""
    own = norm_of(LlamaRMSNorm, dtype)
    got, want = (found_by(layer, (3, 5), dtype) for layer in (RMSNorm(own), own))
    assert [t.dtype for t in got] == [dtype] * 2
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_eps_counts_for_small_inputs(scale):
    own = norm_of(LlamaRMSNorm, torch.float32, eps=1e-3)
    for got, want in zip(
        found_by(RMSNorm(own), (2, 3), torch.float32, scale),
        found_by(own, (2, 3), torch.float32, scale),
        strict=True,
    ):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_the_weight_is_the_norm_s_own_and_gets_no_gradient():
    own = norm_of(LlamaRMSNorm, torch.float32)
    ours = RMSNorm(own)
    assert ours.weight is own.weight
    assert [name for name, _ in ours.named_parameters()] == ["weight"]
    found_by(ours, (2, 3), torch.float32)
    assert own.weight.grad is None


def test_other_norms_do_not_fit():
    """Gemma's multiplies by 1 + weight."""
    assert not fits(GemmaRMSNorm(SIZE))
    assert not fits(torch.nn.RMSNorm(SIZE))
    assert not fits(torch.nn.LayerNorm(SIZE))
