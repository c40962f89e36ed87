"""The feed-forward block against that of transformers' own models, with adapters and without."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, SmolLM3Config
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
from transformers.models.smollm3.modeling_smollm3 import SmolLM3MLP

from flexlora.model.layers.lora import LayerAdapter, Layout, LoRALinear
from flexlora.model.layers.mlp import KINDS, GatedMLP, fits
from support.factors import random_factors

OWN = {
    LlamaMLP: LlamaConfig,
    MistralMLP: MistralConfig,
    Qwen2MLP: Qwen2Config,
    Qwen3MLP: Qwen3Config,
    SmolLM3MLP: SmolLM3Config,
}
NAMES = ("gate_proj", "up_proj", "down_proj")
SIZE, INNER = 6, 11


def block_of(kind=LlamaMLP, dtype=torch.float64, **changes) -> nn.Module:
    """The model's block, its layers with places for adapters."""
    sizes = {"hidden_size": SIZE, "intermediate_size": INNER}
    config = OWN[kind](**sizes, num_attention_heads=1, num_key_value_heads=1, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        block = kind(config).to(dtype).requires_grad_(False)
    layout = Layout()
    for name in NAMES:
        setattr(block, name, LoRALinear(getattr(block, name), layout))
    return block


def parts_of(ranks, dtype=torch.float64) -> dict[str, list[LayerAdapter]]:
    """Of every layer, a part for each rank, which is one more in each next layer."""
    results = {}
    for i, (name, out, in_) in enumerate(
        zip(NAMES, (INNER, INNER, SIZE), (SIZE, SIZE, INNER), strict=True)
    ):
        each = [random_factors(out, rank + i, in_, 7 * i + rank, dtype) for rank in ranks]
        results[name] = [LayerAdapter(f.A, 0.3 * f.B, 0.7 + i) for f in each]
    return results


def found_by(block, layers, parts, shape, edges, dtype=torch.float64):
    """The output and all gradients: of the input, then of each A and B."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, SIZE, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    grad = torch.randn(*shape, SIZE, generator=draw, dtype=torch.float64).to(dtype)
    factors = []
    for name, present in parts.items():
        fresh = [
            LayerAdapter(p.A.clone().requires_grad_(), p.B.clone().requires_grad_(), p.scale)
            for p in present
        ]
        factors += [f for part in fresh for f in (part.A, part.B)]
        getattr(layers, name).adapters = tuple(fresh)
    with layers.gate_proj.layout.of(edges):
        y = block(x)
        y.backward(grad)
    return [y.detach(), x.grad] + [
        torch.zeros_like(f) if f.grad is None else f.grad for f in factors
    ]


def assert_the_same(block, parts, shape, edges, dtype=torch.float64, tolerance=1e-10):
    results, want = (
        found_by(each, block, parts, shape, edges, dtype) for each in (GatedMLP(block), block)
    )
    for got, expected in zip(results, want, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_every_kind_is_tested():
    assert sorted(kind.__name__ for kind in OWN) == sorted(KINDS)


@pytest.mark.parametrize("shape", [(1,), (1, 13), (2, 3, 5)])
@pytest.mark.parametrize("kind", OWN)
def test_it_is_the_model_s_own(kind, shape):
    block = block_of(kind)
    assert fits(block)
    assert_the_same(block, {}, shape, None)
    assert_the_same(block, parts_of((2,)), shape, None)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("ranks", "edges"),
    [
        ((2, 5), (0, 4, 13)),
        ((2, 5), (0, 0, 13)),
        ((5, 1, 3), (0, 8, 9, 13)),
        ((5, 1, 3), (0, 6, 6, 13)),
    ],
)
def test_adapters_have_their_own_rows(ranks, edges, bias):
    block = block_of(mlp_bias=bias)
    assert_the_same(block, parts_of(ranks), (1, 13), edges)


@pytest.mark.parametrize(
    "present", [("gate_proj",), ("up_proj",), ("down_proj",), ("gate_proj", "down_proj")]
)
def test_some_layers_may_have_no_adapters(present):
    parts = {name: part for name, part in parts_of((3, 4)).items() if name in present}
    assert_the_same(block_of(), parts, (2, 5), (0, 3, 10))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06), (torch.float16, 0.01)]
)
def test_in_every_precision_with_factors_in_single(dtype, tolerance):
    parts = parts_of((2, 4), torch.float32)
    assert_the_same(block_of(dtype=dtype), parts, (2, 5), (0, 3, 10), dtype, tolerance)


def test_its_gradients_are_those_of_its_values():
    block, parts = block_of(), parts_of((2, 3))
    ours = GatedMLP(block)

    def forward(x, *factors):
        pairs = iter(zip(factors[::2], factors[1::2], strict=True))
        for name in NAMES:
            getattr(block, name).adapters = tuple(
                LayerAdapter(*next(pairs), part.scale) for part in parts[name]
            )
        with block.gate_proj.layout.of((0, 2, 6)):
            return ours(x)

    x = torch.randn(1, 6, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = [x, *(f for name in NAMES for part in parts[name] for f in (part.A, part.B))]
    assert torch.autograd.gradcheck(forward, [t.clone().requires_grad_() for t in inputs])


def test_only_the_gradients_asked_for_are_made():
    """A frozen input, as below the first adapted layer, and factors that do not train."""
    block = block_of()
    parts = parts_of((3,))
    B = parts["up_proj"][0].B.clone().requires_grad_()
    for name in NAMES:
        getattr(block, name).adapters = tuple(parts[name])
    block.up_proj.adapters = (parts["up_proj"][0]._replace(B=B),)
    x = torch.ones(1, 4, SIZE, dtype=torch.float64)
    GatedMLP(block)(x).sum().backward()
    got, B.grad = B.grad, None
    block(x).sum().backward()
    torch.testing.assert_close(got, B.grad, rtol=1e-10, atol=1e-10)
    assert x.grad is None


def test_a_layout_that_does_not_fit_is_refused():
    block = block_of()
    for name, parts in parts_of((2, 3)).items():
        getattr(block, name).adapters = tuple(parts)
    with pytest.raises(ValueError, match="7 rows cannot be split equally among 2 adapters"):
        GatedMLP(block)(torch.ones(1, 7, SIZE, dtype=torch.float64))


def test_its_layers_keep_their_names():
    block = block_of()
    names = [name for name, _ in block.named_parameters()]
    assert [name for name, _ in GatedMLP(block).named_parameters()] == names
    assert all(getattr(GatedMLP(block), name) is getattr(block, name) for name in NAMES)


class Quantised(nn.Linear):
    pass


def test_what_is_another_block_does_not_fit():
    assert not fits(block_of(hidden_act="gelu"))
    assert not fits(nn.Linear(SIZE, INNER))
    strange = type("StrangeMLP", (LlamaMLP,), {})
    assert not fits(_with(block_of(), strange))
    quantised = block_of()
    quantised.up_proj = LoRALinear(Quantised(SIZE, INNER), Layout())
    assert not fits(quantised)
    part = block_of()
    part.up_proj = part.up_proj.base
    assert not fits(part)


def _with(block, kind):
    block.__class__ = kind
    return block
