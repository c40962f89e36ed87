"""The layer with several adapters against a plain loop over them."""

import itertools

import pytest
import torch
from torch import nn

from flexlora.model.layers.lora import LayerAdapter, Layout, LoRALinear
from support.factors import random_factors

OUT, IN = 11, 7


class Doubling(nn.Linear):
    """Quantised layers are subclasses with a forward of their own; so is this."""

    def forward(self, x):
        return 2 * super().forward(x)


def layer_of(dtype, bias=True, kind=nn.Linear) -> LoRALinear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LoRALinear(kind(IN, OUT, bias=bias, dtype=dtype).requires_grad_(False), Layout())


def parts_of(ranks, dtype) -> list[LayerAdapter]:
    results = [random_factors(OUT, rank, IN, rank, dtype) for rank in ranks]
    return [LayerAdapter(f.A, f.B, 0.7 + i) for i, f in enumerate(results)]


def random(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain(layer: LoRALinear, parts, edges, x):
    """Each adapter's rows by themselves, in plain autograd."""
    sizes = [end - first for first, end in itertools.pairwise(edges)]
    rows, of = layer.base(x).reshape(-1, OUT).split(sizes), x.reshape(-1, IN).split(sizes)
    results = [
        y + part.scale * (own @ part.A.T) @ part.B.T
        for y, own, part in zip(rows, of, parts, strict=True)
    ]
    return torch.cat(results).view(*x.shape[:-1], OUT)


def gradients(run, x, parts, grad):
    """The output and all gradients of what ``run`` makes of the input and the parts."""
    x = x.clone().requires_grad_()
    parts = [
        LayerAdapter(p.A.clone().requires_grad_(), p.B.clone().requires_grad_(), p.scale)
        for p in parts
    ]
    y = run(x, parts)
    y.backward(grad)
    results = [y.detach(), x.grad]
    for part in parts:
        # A part without rows may have no gradient, which is a gradient of zero.
        results += [torch.zeros_like(f) if f.grad is None else f.grad for f in (part.A, part.B)]
    return results


LAYOUTS = [
    ((3,), (2, 5), (0, 10)),
    ((3,), (6,), (0, 6)),
    ((3,), (2, 3, 4), (0, 24)),
    ((2, 5), (1, 13), (0, 4, 13)),
    ((2, 5), (13,), (0, 0, 13)),
    ((2, 5), (1, 13), (0, 13, 13)),
    ((5, 2, 3), (1, 17), (0, 8, 9, 17)),
    ((5, 2, 3), (1, 17), (0, 6, 6, 17)),
    ((5, 2, 3), (2, 8), (0, 1, 13, 16)),
    ((1, 9, 4), (1, 12), (0, 0, 0, 12)),
]


@pytest.mark.parametrize("kind", [nn.Linear, Doubling])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("ranks", "shape", "edges"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fused_layer_is_the_plain_one(dtype, ranks, shape, edges, bias, kind):
    layer, parts = layer_of(dtype, bias, kind), parts_of(ranks, dtype)
    x, grad = random(*shape, IN, dtype=dtype), random(*shape, OUT, dtype=dtype, seed=1)

    def fused(x, parts):
        layer.adapters = tuple(parts)
        with layer.layout.of(edges):
            return layer(x)

    results = gradients(fused, x, parts, grad)
    want = gradients(lambda x, parts: plain(layer, parts, edges, x), x, parts, grad)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for got, expected in zip(results, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert layer.base.weight.grad is None


@pytest.mark.parametrize("kind", [nn.Linear, Doubling])
@pytest.mark.parametrize(
    ("ranks", "edges"), [((3,), (0, 8)), ((2, 5), (0, 3, 8)), ((2, 5, 3), (0, 3, 3, 8))]
)
def test_the_fused_layer_s_gradients_are_those_of_its_values(ranks, edges, kind):
    layer, parts = layer_of(torch.float64, True, kind), parts_of(ranks, torch.float64)

    def forward(x, *factors):
        pairs = zip(factors[::2], factors[1::2], parts, strict=True)
        layer.adapters = tuple(LayerAdapter(A, B, part.scale) for A, B, part in pairs)
        with layer.layout.of(edges):
            return layer(x)

    inputs = [random(2, 4, IN, dtype=torch.float64), *(f for p in parts for f in (p.A, p.B))]
    assert torch.autograd.gradcheck(forward, [t.clone().requires_grad_() for t in inputs])


@pytest.mark.parametrize("kind", [nn.Linear, Doubling])
def test_without_edges_every_adapter_has_an_equal_part(kind):
    layer, parts = layer_of(torch.float64, kind=kind), parts_of((2, 5, 3), torch.float64)
    layer.adapters = tuple(parts)
    x = random(6, 4, IN, dtype=torch.float64)
    want = plain(layer, parts, (0, 8, 16, 24), x)
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("edges", "rows", "message"),
    [
        (None, 7, "7 rows cannot be split equally among 2 adapters"),
        ((0, 3, 7), 8, r"Edges \(0, 3, 7\) do not split 8 rows among 2 adapters"),
        ((0, 8), 8, r"Edges \(0, 8\) do not split 8 rows among 2"),
        ((0, 2, 5, 8), 8, "do not split 8 rows among 2"),
        ((1, 3, 8), 8, "do not split 8 rows among 2"),
        ((0, 9, 8), 8, "do not split 8 rows among 2"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(edges, rows, message):
    layer = layer_of(torch.float32)
    layer.adapters = tuple(parts_of((2, 5), torch.float32))
    with layer.layout.of(edges), pytest.raises(ValueError, match=message):
        layer(random(1, rows, IN, dtype=torch.float32))


def test_a_layout_is_as_before_afterwards():
    layout = Layout()
    with layout.of([0, 3, 5]):
        assert layout.spans(5, 2) == ((0, 3), (3, 5))
        with pytest.raises(KeyError), layout.of(None):
            assert layout.spans(6, 2) == ((0, 3), (3, 6))
            raise KeyError
        assert layout.edges == (0, 3, 5)
    assert layout.edges is None


@pytest.mark.parametrize("kind", [nn.Linear, Doubling])
def test_only_the_gradients_asked_for_are_made(kind):
    layer, parts = layer_of(torch.float32, kind=kind), parts_of((2, 3), torch.float32)
    x = random(2, 4, IN, dtype=torch.float32)
    B = parts[1].B.clone().requires_grad_()
    layer.adapters = (parts[0], parts[1]._replace(B=B))
    layer(x).sum().backward()
    assert x.grad is None
    assert all(f.grad is None for part in parts for f in (part.A, part.B))
    torch.testing.assert_close(
        B.grad, parts[1].scale * (x[1] @ parts[1].A.T).sum(0).expand(OUT, -1)
    )


def test_what_another_layer_returns_stays_as_it_is():
    """It may be needed by that layer's own backward."""

    class Keeping(nn.Linear):
        def forward(self, x):
            self.kept = super().forward(x)
            return self.kept

    layer, x = layer_of(torch.float32, kind=Keeping), random(2, 4, IN, dtype=torch.float32)
    layer.adapters = tuple(parts_of((2, 3), torch.float32))
    y = layer(x)
    assert torch.equal(layer.base.kept, nn.functional.linear(x, layer.base.weight, layer.base.bias))
    assert not torch.allclose(y, layer.base.kept)


def test_a_layer_without_factors_is_the_layer_itself():
    layer, x = layer_of(torch.float32), random(2, 4, IN, dtype=torch.float32)
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("kind", [nn.Linear, Doubling])
def test_half_precision_takes_factors_in_single(kind):
    layer, x = layer_of(torch.float32, kind=kind), random(2, 5, IN, dtype=torch.float32)
    half = LoRALinear(layer_of(torch.float32, kind=kind).base.bfloat16(), Layout())
    parts, edges = parts_of((2, 3), torch.float32), (0, 3, 10)
    grad = random(2, 5, OUT, dtype=torch.float32, seed=1)

    def run(x, parts):
        half.adapters = tuple(parts)
        with half.layout.of(edges):
            return half(x)

    results = gradients(run, x.bfloat16(), parts, grad.bfloat16())
    want = gradients(lambda x, parts: plain(layer, parts, edges, x), x, parts, grad)
    assert [t.dtype for t in results] == [torch.bfloat16] * 2 + [torch.float32] * 4
    # Sums of magnitudes: a rounding of a term or of a sum is at most this times eps / 2.
    layer.base.weight.abs_()
    most = gradients(
        lambda x, parts: plain(layer, parts, edges, x),
        x.abs(),
        [LayerAdapter(p.A.abs(), p.B.abs(), p.scale) for p in parts],
        grad.abs(),
    )
    # At most eight: of the input, W, A, B, the gradient, A x', the base product and the sum.
    allowed = 8 * torch.finfo(torch.bfloat16).eps / 2
    for got, expected, size in zip(results, want, most, strict=True):
        assert bool(((got.float() - expected).abs() <= allowed * size).all())
