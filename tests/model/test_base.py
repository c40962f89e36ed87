import copy
import re
from dataclasses import replace

import pytest
import torch
import transformers

from flexlora.data.packing import Forest, join, pack
from flexlora.data.tokens import TokenStore
from flexlora.errors import ConfigError
from flexlora.evaluation.generation import answers_of_each
from flexlora.lowrank.factors import Adapter, Factors
from flexlora.model.base import Base, Rows
from flexlora.model.blocks import kind
from flexlora.model.layers import attention
from flexlora.model.layers.mlp import GatedMLP
from flexlora.model.layers.norm import RMSNorm
from flexlora.model.source import Source
from flexlora.model.trainable import FlatAdapter
from flexlora.seeds import rng
from support import families, models
from support.factors import random_adapter, random_factors
from support.rounding import rounding
from support.rows import sharing_store, store_of

SIZES = ((3, 2), (5, 1), (2, 4), (7, 3), (1, 5))


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
    return store_of([(draw.integers(3, 15, a), draw.integers(3, 15, b)) for a, b in SIZES])


def snapshot(base: Base):
    state = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    return state, base.model.training


def assert_untouched(base: Base, before) -> None:
    state = base.model.state_dict()
    assert set(state) == set(before[0])
    assert all(torch.equal(state[name], before[0][name]) for name in state)
    assert base.model.training == before[1]
    assert all(layer.adapters == () for layer in base._layers.values())
    assert base._layout.edges is None


def everywhere(laid):
    """The same row with its loss at every place, of which the labels do not matter."""
    return replace(laid, loss_positions=torch.arange(laid.tokens))


# --- attention of examples in one row ------------------------------------------------------


def spans(forest: Forest):
    """For each segment in turn: its tokens and its prefix's, as slices."""
    for segment, prefix in enumerate(forest.prefixes):
        before = slice(0, 0) if prefix < 0 else slice(*forest.edges[prefix : prefix + 2])
        yield slice(*forest.edges[segment : segment + 2]), before


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", [attention.NAME, "eager", "sdpa"])
def test_examples_in_one_row_do_not_see_each_other(model_folder, name, share):
    base = Source(str(model_folder), attention=name).load()
    rows = sharing_store()
    laid = pack(rows, range(len(rows)), share=share)
    assert any(prefix >= 0 for prefix in laid.forest.prefixes) == share
    ids = laid.input_ids
    with torch.no_grad():
        got = base.logits(everywhere(laid))
        for own, before in spans(laid.forest):
            one = torch.cat([ids[:, before], ids[:, own]], dim=1)
            alone = base.model(input_ids=one, use_cache=False).logits[0]
            torch.testing.assert_close(
                got[own], alone[before.stop - before.start :], rtol=1e-4, atol=1e-4
            )


def test_logits_are_of_the_positions_asked_for(base):
    laid = pack(store(), range(3))
    at = torch.tensor([4, 0, 9])
    with torch.no_grad():
        some = base.logits(replace(laid, loss_positions=at))
        every = base.logits(everywhere(laid))
    assert every.shape == (laid.tokens, 15)
    torch.testing.assert_close(some, every[at])


def test_gradients_do_not_cross_between_examples(base, adapter):
    """The loss of one example has the same gradient whatever stands beside it."""
    rows = store()

    def gradient(beside):
        laid = pack(rows, beside, share=False)
        flat = FlatAdapter.of(adapter, lambda rank: 1.0, base.device)
        place = beside.index(1)
        start, end = laid.forest.edges[place : place + 2]
        with base.training(flat):
            logits = base.logits(replace(laid, loss_positions=torch.arange(start, end)))
            logits.square().sum().backward()
        return flat.values.grad.clone()

    def distance(got, want):
        return float((got - want).norm() / want.norm())

    alone = gradient([1])
    tolerance = rounding(base.model, lambda: gradient([1]), alone, distance)
    for beside in ([1, 3], [0, 1]):
        assert distance(gradient(beside), alone) < tolerance


@pytest.mark.parametrize("name", ["auto", attention.NAME, "sdpa", "eager"])
def test_a_window_is_that_of_the_model_with_every_attention(tmp_path, name):
    """Training, evaluation and answers of a model whose window is shorter than an example."""
    model = families.build("mistral", {"sliding_window": families.WINDOW})
    model.save_pretrained(tmp_path)
    models.words_tokenizer().save_pretrained(tmp_path)
    base = Source(str(tmp_path), attention=name).load()
    assert base.rows is Rows.SHARED
    rows = sharing_store(families.VOCABULARY)
    laid = pack(rows, range(len(rows)))
    with torch.no_grad():
        got = base.logits(laid)
        for index in range(len(rows)):
            tokens = rows[index]
            ids = torch.from_numpy(tokens.ids.astype("int64"))[None]
            want = model(input_ids=ids).logits[0, tokens.prompt_tokens - 1 : -1]
            torch.testing.assert_close(got[laid.owners == index], want, rtol=1e-4, atol=1e-4)


def test_a_model_that_cannot_pack_is_refused_if_packing_is_asked_for(tmp_path):
    families.build("mamba", families.SINGLE["mamba"]).save_pretrained(tmp_path)
    models.words_tokenizer().save_pretrained(tmp_path)
    message = r"backbone\.layers\.0\.mixer \(MambaMixer\).*set model\.attention to 'auto'"
    with pytest.raises(ConfigError, match=message):
        Source(str(tmp_path), attention=attention.NAME).load()
    base = Source(str(tmp_path)).load()
    assert base.rows is Rows.PADDED
    assert "MambaMixer" in base.notices[-1]


# --- adapters in and out -------------------------------------------------------------------


def test_all_linear_layers_but_the_head_are_adapted(base):
    assert len(base.shapes) == 14
    assert "lm_head" not in base.shapes
    assert base.shapes["model.layers.1.self_attn.k_proj"] == (16, 32)
    assert base.shapes["model.layers.0.mlp.down_proj"] == (32, 48)


def test_attached_is_the_model_with_its_weights_changed(model_folder, base, adapter):
    before = snapshot(base)
    merged = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
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
            both = [answers_of_each(each, 1, questions, 9, 100) for each in (base, plain)]
            assert both[0] == both[1]
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
            scales = {part.scale for layer in base._layers.values() for part in layer.adapters}
            assert scales == {3 / 2, 3 / 5}
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
            assert sum(len(layer.adapters) for layer in base._layers.values()) == 2


def test_adapters_side_by_side_have_equal_parts_of_a_batch(base, adapter):
    ids = torch.tensor([[3, 7, 4, 9], [8, 5, 12, 6], [3, 3, 14, 10]])
    several = (random_adapter(base.shapes, 5, 90), adapter, random_adapter(base.shapes, 2, 70))
    before = snapshot(base)
    with torch.no_grad():
        with base.attached(*several):
            got = base.model(ids).logits
        for row, alone in enumerate(several):
            with base.attached(alone):
                want = base.model(ids[row : row + 1]).logits[0]
            torch.testing.assert_close(got[row], want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got[0], got[2], atol=1e-2)
    assert_untouched(base, before)


def test_adapters_in_training_have_the_rows_of_their_edges(base):
    """Outputs and gradients are those of each alone; one without rows has no gradient."""
    parts = [pack(sharing_store(), rows) for rows in ([0, 4, 7], [1], [2, 3, 6, 8])]
    adapters = [random_adapter(base.shapes, rank, 10 * rank) for rank in (2, 4, 5, 3)]
    flats = [FlatAdapter.of(adapter, lambda rank: 3 / rank, base.device) for adapter in adapters]
    sizes = [parts[0].tokens, 0, parts[1].tokens, parts[2].tokens]
    with base.training(*flats):
        logits = base.logits(join(parts), torch.tensor([0, *sizes]).cumsum(0).tolist())
        logits.square().sum().backward()
    first = 0
    for part, number in zip(parts, (0, 2, 3), strict=True):
        flat = FlatAdapter.of(adapters[number], lambda rank: 3 / rank, base.device)
        with base.training(flat):
            alone = base.logits(part)
            alone.square().sum().backward()
        got = logits[first : first + len(alone)]
        torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-4)
        error = flats[number].values.grad - flat.values.grad
        assert error.norm() < 1e-5 * flat.values.grad.norm()
        first += len(alone)
    assert not flats[1].values.grad.any()


def test_edges_that_do_not_fit_are_refused_and_forgotten(base, adapter):
    before = snapshot(base)
    laid = pack(store(), range(3))
    with (
        base.attached(adapter, random_adapter(base.shapes, 2)),
        pytest.raises(ValueError, match=r"Edges \(0, 4, 9\) do not split 17 rows"),
    ):
        base.logits(laid, [0, 4, 9])
    assert_untouched(base, before)


def test_adapters_side_by_side_may_have_different_modules(model_folder, adapter):
    """Each sees its own modules alone, whatever the other one has."""
    base = Source(str(model_folder)).load()
    before = snapshot(base)
    some, others = adapter.only(list(adapter)[::2]), adapter.only(list(adapter)[1::3])
    ids = torch.tensor([[1, 4, 6, 3, 9]])
    with base.attached(some, others):
        both = base.model(ids.repeat(2, 1)).logits
    for place, each in enumerate((some, others)):
        with base.attached(each):
            alone = base.model(ids).logits[0]
        assert torch.allclose(both[place], alone, atol=1e-5)
    assert not torch.allclose(both[0], both[1], atol=1e-3)
    assert_untouched(base, before)


@pytest.mark.parametrize(
    ("module", "factors", "message"),
    [
        ("lm_head", random_factors(15, 2, 32), "module 'lm_head', but"),
        (
            "model.layers.0.self_attn.k_proj",
            random_factors(32, 2, 16),
            r"k_proj' has the shape \(32, 16\) .* it is \(16, 32\)",
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


# --- layers of our own ---------------------------------------------------------------------


SMALL = {
    "vocab_size": 15,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


def of_kind(kind: str, **changes):
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return getattr(transformers, f"{kind}ForCausalLM")(config)


def ours(model) -> tuple[int, int]:
    """How many norms and blocks are ours."""
    kinds = [type(module) for module in model.modules()]
    return kinds.count(RMSNorm), kinds.count(GatedMLP)


@pytest.mark.parametrize(
    ("kind", "changes", "norms", "blocks"),
    [
        ("Llama", {}, 5, 2),
        ("Mistral", {}, 5, 2),
        ("Qwen2", {}, 5, 2),
        ("Qwen3", {}, 9, 2),
        ("SmolLM3", {}, 5, 2),
        ("Llama", {"hidden_act": "gelu"}, 5, 0),
        ("Gemma", {}, 0, 0),
        ("Granite", {}, 0, 0),
    ],
)
def test_norms_and_blocks_that_we_know_are_ours_and_say_the_same(
    model_folder, kind, changes, norms, blocks
):
    model = of_kind(kind, **changes)
    names = set(model.state_dict())
    ids = torch.tensor([[3, 7, 4, 9, 14]])
    with torch.no_grad():
        want = model(ids).logits
        base = Base(model, models.words_tokenizer(), kind)
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-5, atol=1e-5)
    assert ours(base.model) == (norms, blocks)
    assert {name.replace(".base.", ".") for name in base.model.state_dict()} == names


def test_a_block_of_which_not_all_is_adapted_stays_the_model_s():
    base = Base(of_kind("Llama"), models.words_tokenizer(), "llama", ("q_proj", "up_proj"))
    assert ours(base.model) == (5, 0)


@pytest.mark.parametrize("kind", ["Gemma", "Qwen3"])
def test_other_models_train_side_by_side_too(kind):
    """With and without blocks of our own."""
    base = Base(of_kind(kind), models.words_tokenizer(), kind)
    ids = torch.tensor([[3, 7, 4, 9], [8, 5, 12, 6]])
    adapters = [random_adapter(base.shapes, rank) for rank in (2, 3)]
    with torch.no_grad():
        with base.attached(*adapters):
            got = base.model(ids).logits
        for row, alone in enumerate(adapters):
            with base.attached(alone):
                want = base.model(ids[row : row + 1]).logits[0]
            torch.testing.assert_close(got[row], want, rtol=1e-4, atol=1e-4)


# --- loading -------------------------------------------------------------------------------


def test_targets_choose_layers_by_their_last_name(model_folder):
    base = Source(str(model_folder), targets=("q_proj", "v_proj")).load()
    assert {path.rsplit(".", 1)[-1] for path in base.shapes} == {"q_proj", "v_proj"}
    assert len(base.shapes) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("q_proj", "w1")}, r"no linear layer named w1.* k_proj"),
        ({"device": "cuda"}, "no CUDA device; set model.device to 'cpu'"),
        ({"quantize": "4bit"}, "only on CUDA"),
        ({"quantize": "8bit"}, "8bit"),
        ({"dtype": "float64x"}, "float64x"),
        ({"dtype": "int8"}, "int8"),
        ({"dtype": "load"}, "load"),
        ({"device": "gpu"}, "gpu"),
        ({"attention": "flashy"}, "flashy"),
    ],
)
def test_what_this_machine_or_model_has_not_is_refused(model_folder, options, message):
    if options == {"device": "cuda"} and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ValueError, match=message):
        Source(str(model_folder), **options).load()


def test_a_model_that_is_not_there_is_refused_with_its_name(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"base model '{tmp_path / 'nowhere'}'")):
        Source(str(tmp_path / "nowhere")).load()


def test_a_tokenizer_without_padding_pads_with_its_end(base):
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id == 2


def test_a_model_that_cannot_recompute_is_refused(base, monkeypatch):
    monkeypatch.setattr(base.model, "modules", lambda: iter(()))
    with (
        pytest.raises(ValueError, match=r"does not support .*remove training\.recompute_above"),
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
    with pytest.raises(ValueError, match=f"{module}.*Use rank types with equal ranks"):
        kind(module)
