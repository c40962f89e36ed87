import copy
import re

import pytest
import torch
import transformers
from torch import nn

import tiny
from flexlora.adapter import Adapter, Factors
from flexlora.data.tokens import Tokens, TokenStore, pack
from flexlora.model import SEGMENTS, Base, LoRALinear, Source, kind
from flexlora.seeds import rng
from flexlora.tasks.generation import answers
from flexlora.training.flat import FlatAdapter
from ingredients import random_factors

SIZES = ((3, 2), (5, 1), (2, 4), (7, 3), (1, 5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def base(folder) -> Base:
    return Source(str(folder)).load()


@pytest.fixture
def adapter(base) -> Adapter:
    return Adapter(
        {
            module: random_factors(out, 3, in_, seed, torch.float32)
            for seed, (module, (out, in_)) in enumerate(base.shapes.items())
        }
    )


def store() -> TokenStore:
    draw = rng(3, "rows")
    rows = [Tokens(draw.integers(3, 15, size=a + b).astype("int32"), a) for a, b in SIZES]
    return TokenStore(
        torch.cat([torch.from_numpy(row.ids) for row in rows]).numpy(),
        torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).numpy(),
        torch.tensor([a for a, _ in SIZES]).numpy(),
        0,
    )


def snapshot(base: Base):
    state = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    return state, base.model.training, [layer.scale for layer in base._layers.values()]


def assert_untouched(base: Base, before) -> None:
    state = base.model.state_dict()
    assert set(state) == set(before[0])
    assert all(torch.equal(state[name], before[0][name]) for name in state)
    assert base.model.training == before[1]
    assert all(layer.A is None and layer.B is None for layer in base._layers.values())


# --- the layer -----------------------------------------------------------------------------


def layer_and_input(dtype, bias, shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    layer = LoRALinear(nn.Linear(7, 11, bias=bias, dtype=dtype).requires_grad_(False))
    x = torch.randn(*shape, 7, generator=draw, dtype=dtype)
    f = random_factors(11, 3, 7, 1, dtype)
    return layer, x, f


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fused_layer_is_the_plain_one(dtype, bias, shape):
    layer, x, f = layer_and_input(dtype, bias, shape)
    grad = torch.randn(*shape, 11, generator=torch.Generator().manual_seed(1), dtype=dtype)
    found = []
    for fused in (True, False):
        x1, A, B = (t.clone().requires_grad_() for t in (x, f.A, f.B))
        if fused:
            layer.A, layer.B, layer.scale = A, B, 0.7
            y = layer(x1)
        else:
            y = layer.base(x1) + 0.7 * ((x1 @ A.T) @ B.T)
        y.backward(grad)
        found.append((y.detach(), x1.grad, A.grad, B.grad))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert layer.base.weight.grad is None


@pytest.mark.parametrize("bias", [False, True])
def test_the_fused_layer_s_gradients_are_those_of_its_values(bias):
    layer, x, f = layer_and_input(torch.float64, bias, (2, 4))

    def forward(x, A, B):
        layer.A, layer.B, layer.scale = A, B, 1.3
        return layer(x)

    inputs = [t.clone().requires_grad_() for t in (x, f.A, f.B)]
    assert torch.autograd.gradcheck(forward, inputs)


def test_only_the_gradients_asked_for_are_made():
    layer, x, f = layer_and_input(torch.float32, True, (2, 4))
    layer.A, layer.B = f.A, f.B.clone().requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert x.grad is None and f.A.grad is None
    assert layer.B.grad is not None


def test_a_layer_without_factors_is_the_layer_itself():
    layer, x, _ = layer_and_input(torch.float32, True, (2, 4))
    assert torch.equal(layer(x), layer.base(x))


def test_half_precision_takes_factors_in_single():
    layer, x, f = layer_and_input(torch.float32, True, (2, 5))
    half = LoRALinear(layer.base.bfloat16())
    half.A, half.B = (t.float().requires_grad_() for t in (f.A, f.B))
    half.scale = 0.7
    y = half(x.bfloat16())
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert half.A.grad.dtype == half.B.grad.dtype == torch.float32
    want = half.base.float()(x) + 0.7 * (x @ f.A.T) @ f.B.T
    torch.testing.assert_close(y.float(), want, rtol=0.05, atol=0.2)


def test_another_kind_of_linear_layer_is_added_to():
    """Quantised layers are subclasses with a forward of their own."""

    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    _, x, f = layer_and_input(torch.float32, True, (2, 4))
    layer = LoRALinear(Doubling(7, 11).requires_grad_(False))
    layer.A, layer.B, layer.scale = f.A, f.B, 0.5
    torch.testing.assert_close(layer(x), layer.base(x) + 0.5 * (x @ f.A.T) @ f.B.T)


# --- attention of examples in one row ------------------------------------------------------


@pytest.mark.parametrize("attention", [SEGMENTS, "eager", "sdpa"])
def test_examples_in_one_row_do_not_see_each_other(folder, attention):
    base = Source(str(folder), attention=attention).load()
    rows = store()
    laid = pack(rows, range(len(SIZES)))
    everywhere = torch.arange(laid.tokens)
    with torch.no_grad():
        got = base.logits(laid.input_ids, laid.position_ids, laid.starts, everywhere)
        alone = [
            base.model(input_ids=torch.from_numpy(rows[i].ids)[None].long(), use_cache=False)
            for i in range(len(SIZES))
        ]
    torch.testing.assert_close(got, torch.cat([a.logits[0] for a in alone]), rtol=1e-4, atol=1e-4)


def test_logits_are_of_the_positions_asked_for(base):
    laid = pack(store(), range(3))
    at = torch.tensor([4, 0, 9])
    with torch.no_grad():
        some = base.logits(laid.input_ids, laid.position_ids, laid.starts, at)
        every = base.logits(
            laid.input_ids, laid.position_ids, laid.starts, torch.arange(laid.tokens)
        )
    torch.testing.assert_close(some, every[at])


def test_gradients_do_not_cross_between_examples(base, adapter):
    """The loss of one example has the same gradient whatever stands beside it."""
    rows = store()
    found = []
    for beside in ([1], [1, 3], [0, 1]):
        laid = pack(rows, beside)
        flat = FlatAdapter.of(adapter, lambda rank: 1.0, base.device)
        place = beside.index(1)
        start, end = laid.starts[place], laid.starts[place + 1]
        with base.training(flat):
            logits = base.logits(
                laid.input_ids, laid.position_ids, laid.starts, torch.arange(start, end)
            )
            logits.square().sum().backward()
        found.append(flat.values.grad.clone())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-3, atol=1e-3)


def test_a_sliding_window_shorter_than_an_example_is_refused(tmp_path):
    config = transformers.MistralConfig(
        vocab_size=15,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=6,
    )
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path)
    tiny.words_tokenizer().save_pretrained(tmp_path)
    base = Source(str(tmp_path)).load()
    rows = store()
    for chosen, fits in (([0, 1, 2], True), ([0, 3], False)):
        laid = pack(rows, chosen)
        call = (laid.input_ids, laid.position_ids, laid.starts, laid.loss_positions)
        if fits:
            assert base.logits(*call).isfinite().all()
        else:
            with pytest.raises(ValueError, match=r"sliding window.*set model\.attention"):
                base.logits(*call)


# --- adapters in and out -------------------------------------------------------------------


def test_all_linear_layers_but_the_head_are_adapted(base):
    assert len(base.shapes) == 14
    assert "lm_head" not in base.shapes
    assert base.shapes["model.layers.1.self_attn.k_proj"] == (16, 32)
    assert base.shapes["model.layers.0.mlp.down_proj"] == (32, 48)


def test_attached_is_the_model_with_its_weights_changed(folder, base, adapter):
    before = snapshot(base)
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for module, f in adapter.items():
            merged.get_submodule(module).weight += 0.1 * f.B @ f.A
    small = Adapter({m: Factors(0.1 * f.B, f.A) for m, f in adapter.items()})
    ids = torch.tensor([[3, 7, 4, 9, 14]])
    plain = Base(merged, base.tokenizer, "merged")
    draw = rng(1, "prompts")
    questions = [draw.integers(3, 15, size).astype("int32") for size in (2, 7, 11, 5)]
    with torch.no_grad():
        without = base.model(ids).logits
        with base.attached(small):
            torch.testing.assert_close(
                base.model(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4
            )
            assert not torch.allclose(base.model(ids).logits, without, atol=0.1)
            assert answers(base, questions, 9, 100) == answers(plain, questions, 9, 100)
        assert torch.equal(base.model(ids).logits, without)
    assert_untouched(base, before)


def test_what_is_attached_is_taken_off_after_an_error(base, adapter):
    before = snapshot(base)
    flat = FlatAdapter.of(adapter, lambda rank: 2.0, base.device)
    for place in (base.attached(adapter), base.training(flat), base.recomputing(True)):
        with pytest.raises(KeyError), place:
            raise KeyError
        assert_untouched(base, before)


def test_training_applies_the_scale_of_each_rank(base):
    ranks = {"attention": 2, "feed_forward": 5}
    mixed = Adapter(
        {
            m: random_factors(out, ranks[kind(m)], in_, i, torch.float32)
            for i, (m, (out, in_)) in enumerate(base.shapes.items())
        }
    )
    ids = torch.tensor([[3, 7, 4]])
    flat = FlatAdapter.of(mixed, lambda rank: 3 / rank, base.device)
    with torch.no_grad():
        with base.training(flat):
            assert {layer.scale for layer in base._layers.values()} == {3 / 2, 3 / 5}
            trained = base.model(ids).logits
        with base.attached(mixed):
            torch.testing.assert_close(base.model(ids).logits, trained, rtol=1e-4, atol=1e-3)


def test_part_of_the_modules_may_be_attached(base, adapter):
    some = Adapter({m: f for m, f in adapter.items() if m.endswith("q_proj")})
    ids = torch.tensor([[3, 7, 4]])
    with torch.no_grad():
        without = base.model(ids).logits
        with base.attached(some):
            assert not torch.equal(base.model(ids).logits, without)
            assert sum(layer.A is not None for layer in base._layers.values()) == 2


@pytest.mark.parametrize(
    ("module", "factors", "message"),
    [
        ("lm_head", random_factors(15, 2, 32), "'lm_head' is none of"),
        (
            "model.layers.0.self_attn.k_proj",
            random_factors(32, 2, 16),
            r"k_proj' is \(32, 16\) \(out, in\), but .* is \(16, 32\)",
        ),
    ],
)
def test_an_adapter_of_another_model_is_refused(base, module, factors, message):
    before = snapshot(base)
    strange = Adapter({module: factors.to(torch.float32)})
    flat = FlatAdapter.of(strange, lambda rank: 1.0, base.device)
    for place in (base.attached(strange), base.training(flat)):
        with pytest.raises(ValueError, match=message), place:
            pass
    assert_untouched(base, before)


def test_the_same_model_for_all_and_nothing_of_it_trains(base):
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())


# --- loading -------------------------------------------------------------------------------


def test_targets_choose_layers_by_their_last_name(folder):
    base = Source(str(folder), targets=("q_proj", "v_proj")).load()
    assert {path.rsplit(".", 1)[-1] for path in base.shapes} == {"q_proj", "v_proj"}
    assert len(base.shapes) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("q_proj", "w1")}, r"No linear layer is called \['w1'\].*'k_proj'"),
        ({"device": "cuda"}, "no CUDA device; set 'cpu'"),
        ({"quantize": "4bit"}, "on CUDA only"),
        ({"quantize": "8bit"}, "8bit"),
        ({"dtype": "float64x"}, "float64x"),
        ({"dtype": "int8"}, "int8"),
        ({"dtype": "load"}, "load"),
        ({"device": "gpu"}, "gpu"),
        ({"attention": "flashy"}, "flashy"),
    ],
)
def test_what_this_machine_or_model_has_not_is_refused(folder, options, message):
    if options == {"device": "cuda"} and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ValueError, match=message):
        Source(str(folder), **options).load()


def test_a_model_that_is_not_there_is_refused_with_its_name(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"base model '{tmp_path / 'nowhere'}'")):
        Source(str(tmp_path / "nowhere")).load()


def test_a_tokenizer_without_padding_pads_with_its_end(base):
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id == 2


def test_a_model_that_cannot_recompute_is_refused(base, monkeypatch):
    monkeypatch.setattr(base.model, "modules", lambda: iter(()))
    with (
        pytest.raises(ValueError, match=r"cannot recompute; unset training\.recompute_above"),
        base.recomputing(True),
    ):
        pass


def test_recomputing_leaves_no_hooks(base):
    """Each one costs time in every later forward."""
    embeddings = base.model.get_input_embeddings()
    before = copy.copy(embeddings._forward_hooks)
    for _ in range(3):
        with base.recomputing(True):
            pass
    assert embeddings._forward_hooks == before


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("model.layers.0.self_attn.q_proj", "attention"),
        ("transformer.h.3.attn.c_attn", "attention"),
        ("bert.encoder.layer.0.attention.self.query", "attention"),
        ("model.layers.7.mlp.gate_proj", "feed_forward"),
        ("decoder.block.1.ffn.w1", "feed_forward"),
        ("model.layers.0.feed_forward.w2", "feed_forward"),
    ],
)
def test_kinds_of_layers(module, expected):
    assert kind(module) == expected


@pytest.mark.parametrize("module", ["lm_head", "model.embed", "model.layers.0.attn_like"])
def test_a_layer_of_neither_kind_is_refused(module):
    with pytest.raises(ValueError, match=f"{module}.*Give types with one rank"):
        kind(module)
