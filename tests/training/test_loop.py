"""The local loop against PEFT and a plain loop over padded batches."""

import copy
import math
import warnings

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers

import tiny
from flexlora.adapter import Adapter, Factors
from flexlora.data.tokens import Tokens, TokenStore, pack, steps
from flexlora.model import Base, Source, kind
from flexlora.training.loop import pack_loss, train
from flexlora.training.optimizer import Training
from ingredients import random_factors
from oracle import product, relative_error

SIZES = ((3, 2), (5, 1), (2, 4), (7, 3), (1, 5), (4, 6), (6, 2), (2, 2), (3, 7))
"""Prompt and response tokens of each row."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def base(folder) -> Base:
    return Source(str(folder)).load()


@pytest.fixture(scope="module")
def store() -> TokenStore:
    draw = np.random.default_rng(4)
    rows = [Tokens(draw.integers(3, 15, size=a + b).astype(np.int32), a) for a, b in SIZES]
    return TokenStore(
        np.concatenate([row.ids for row in rows]),
        np.cumsum([0, *(len(row) for row in rows)]),
        np.array([row.prompt_tokens for row in rows], np.int32),
        0,
    )


def adapter_of(base: Base, ranks: dict[str, int]) -> Adapter:
    """Random factors, small enough that the model stays itself."""
    modules = {}
    for seed, (module, (out, in_)) in enumerate(base.shapes.items()):
        f = random_factors(out, ranks[kind(module)], in_, seed, torch.float32)
        modules[module] = Factors(0.05 * f.B, f.A / in_**0.5)
    return Adapter(modules)


def of_rank(base: Base, rank: int) -> Adapter:
    return adapter_of(base, {"attention": rank, "feed_forward": rank})


def settings(**changes) -> Training:
    plain = {"learning_rate": 0.01, "batch_examples": 4, "pack_tokens": 12, "alpha": 6.0}
    return Training(**{**plain, **changes})


def draw() -> np.random.Generator:
    return np.random.default_rng(9)


ROWS = list(range(len(SIZES)))


def trained_by_peft(folder, base, adapter, store, how: Training, prompt_loss=False) -> Adapter:
    """The same with Hugging Face's model and PEFT's layers, examples padded on the right."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ranks = adapter.ranks
    config = peft.LoraConfig(
        r=1,
        rank_pattern=ranks,
        lora_alpha=how.alpha,
        use_rslora=how.scaling == "sqrt",
        lora_dropout=0.0,
        target_modules=list(adapter),
    )
    model = peft.get_peft_model(model, config)
    layers = {m: model.base_model.model.get_submodule(m) for m in adapter}
    for module, f in adapter.items():
        layer = layers[module]
        with torch.no_grad():
            layer.lora_B["default"].weight.copy_(f.B / layer.scaling["default"])
            layer.lora_A["default"].weight.copy_(f.A)
    parameters = [p for p in model.parameters() if p.requires_grad]
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    extra = {"momentum": how.momentum} if how.optimizer == "sgd" else {}
    optimizer = kinds[how.optimizer](
        parameters, lr=how.learning_rate, weight_decay=how.weight_decay, **extra
    )
    plan = steps(store.lengths, ROWS, how.batch_examples, 10**6, draw())
    for number, packs in enumerate(plan):
        rows = [store[row] for pack in packs for row in pack]
        longest = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.from_numpy(row.ids.astype(np.int64))
            first = 0 if prompt_loss else row.prompt_tokens
            labels[i, first : len(row)] = ids[i, first : len(row)]
            mask[i, : len(row)] = 1
        for group in optimizer.param_groups:
            group["lr"] = how.learning_rate * (1 - number / len(plan))
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, how.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return Adapter(
            {
                module: Factors(
                    layer.lora_B["default"].weight * layer.scaling["default"],
                    layer.lora_A["default"].weight.clone(),
                )
                for module, layer in layers.items()
            }
        )


def assert_close(got: Adapter, want: Adapter, tolerance: float) -> None:
    for module in want:
        assert relative_error(product(got[module]), product(want[module])) < tolerance, module


def assert_moved(got: Adapter, start: Adapter) -> None:
    for module in start:
        assert relative_error(product(got[module]), product(start[module])) > 1e-3, module


SGD = {"optimizer": "sgd", "learning_rate": 0.5, "momentum": 0.5}


@pytest.mark.parametrize(
    ("ranks", "changes", "tolerance"),
    [
        ((2, 2), SGD, 1e-5),
        ((5, 5), SGD, 1e-5),
        ((2, 5), {**SGD, "scaling": "sqrt"}, 1e-5),
        ((2, 5), {**SGD, "clip_norm": 0.01, "learning_rate": 5.0}, 1e-5),
        ((2, 5), {**SGD, "prompt_loss": True, "weight_decay": 0.1}, 1e-5),
        ((2, 2), {}, 1e-5),
        ((5, 5), {"weight_decay": 0.1}, 1e-5),
    ],
)
def test_training_is_that_of_peft(folder, base, store, ranks, changes, tolerance):
    """Three steps, of examples in packs here and in padded batches there."""
    adapter = adapter_of(base, dict(zip(("attention", "feed_forward"), ranks, strict=True)))
    how = settings(**changes)
    got = train(base, adapter, store, ROWS, how, draw())
    assert got.steps == 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = trained_by_peft(folder, base, adapter, store, how, how.prompt_loss)
    assert got.adapter.ranks == adapter.ranks
    assert_close(got.adapter, want, tolerance)
    assert_moved(got.adapter, adapter)


@pytest.mark.parametrize(("scaling", "power"), [("rank", 1.0), ("sqrt", 0.5), ("none", 0.0)])
def test_the_scale_multiplies_the_step_of_b_by_its_square(base, store, scaling, power):
    """B = s B': a plain gradient step on B' moves B by s^2 times the gradient of B.

    And A by as much as without a scale: its gradient is that of the whole update.
    """
    adapter = of_rank(base, 5)
    plain = {"optimizer": "sgd", "learning_rate": 0.1, "clip_norm": 1e9, "max_steps": 1}
    one = train(base, adapter, store, ROWS, settings(**plain, alpha=1, scaling="none"), draw())
    got = train(base, adapter, store, ROWS, settings(**plain, alpha=2, scaling=scaling), draw())
    s = 2 / 5**power
    for module, f in adapter.items():
        step, unit = got.adapter[module], one.adapter[module]
        assert relative_error(step.B - f.B, s**2 * (unit.B - f.B)) < 1e-3
        assert relative_error(step.A - f.A, unit.A - f.A) < 1e-3


def test_the_pack_size_changes_nothing(base, store):
    adapter = adapter_of(base, {"attention": 2, "feed_forward": 3})
    alone, some, whole = (
        train(base, adapter, store, ROWS, settings(**SGD, pack_tokens=tokens), draw())
        for tokens in (1, 14, 1000)
    )
    for other in (some, whole):
        assert_close(other.adapter, alone.adapter, 1e-5)
        assert other.loss_total == pytest.approx(alone.loss_total, rel=1e-5)
        assert (other.tokens, other.loss_tokens) == (alone.tokens, alone.loss_tokens)
    assert_moved(alone.adapter, adapter)


@pytest.mark.parametrize("above", [0, 11])
def test_recomputing_changes_nothing_and_leaves_no_trace(base, store, above):
    adapter = of_rank(base, 3)
    whole = train(base, adapter, store, ROWS, settings(), draw())
    thrifty = train(base, adapter, store, ROWS, settings(recompute_above=above), draw())
    assert_close(thrifty.adapter, whole.adapter, 1e-6)
    assert not any(module.training for module in base.model.modules())
    assert not any(
        getattr(module, "gradient_checkpointing", False) for module in base.model.modules()
    )
    ids = torch.tensor([[3, 4, 5]])
    assert not base.model.get_input_embeddings()(ids).requires_grad


def test_recomputing_does_recompute(base, store, monkeypatch):
    calls = []
    layer = base.model.model.layers[0].mlp
    forward = type(layer).forward
    monkeypatch.setattr(type(layer), "forward", lambda self, x: calls.append(1) or forward(self, x))
    how = settings(max_steps=1, pack_tokens=1000)
    train(base, of_rank(base, 2), store, ROWS, how, draw())
    plain = len(calls)
    train(
        base, of_rank(base, 2), store, ROWS, settings(**vars(how) | {"recompute_above": 0}), draw()
    )
    assert len(calls) - plain == 2 * plain


def test_only_response_tokens_count(base, store):
    whole = train(base, of_rank(base, 2), store, ROWS, settings(), draw())
    assert whole.loss_tokens == sum(response for _, response in SIZES)
    assert whole.tokens == sum(map(sum, SIZES))
    assert whole.examples == len(SIZES)
    more = train(base, of_rank(base, 2), store, ROWS, settings(prompt_loss=True), draw())
    assert more.loss_tokens == sum(map(sum, SIZES)) - len(SIZES)


@pytest.mark.parametrize("prompt_loss", [False, True])
def test_the_loss_of_a_pack_is_that_of_its_examples_alone(base, store, prompt_loss):
    total = 0.0
    with torch.no_grad():
        for row in ROWS:
            ids = torch.from_numpy(store[row].ids.astype(np.int64))
            first = 1 if prompt_loss else store[row].prompt_tokens
            logits = base.model(input_ids=ids[None], use_cache=False).logits[0].double()
            total += float(F.cross_entropy(logits[first - 1 : -1], ids[first:], reduction="sum"))
        got = float(pack_loss(base, pack(store, ROWS, prompt_loss)))
    assert got == pytest.approx(total, rel=1e-5)


def test_totals_are_those_of_the_losses_before_each_step(base, store):
    how = settings(max_steps=1, batch_examples=99, pack_tokens=9)
    got = train(base, of_rank(base, 2), store, ROWS, how, draw())
    with base.attached(of_rank(base, 2)), torch.no_grad():
        want = float(pack_loss(base, pack(store, ROWS)))
    assert got.loss_total == pytest.approx(want, rel=1e-5)
    assert got.steps == 1


def test_rows_not_given_have_no_part(base, store):
    changed = TokenStore(store.ids.copy(), store.offsets, store.prompt_tokens, 0)
    changed.ids[store.offsets[5] :] = 4
    one = train(base, of_rank(base, 2), store, [0, 2, 3], settings(), draw())
    two = train(base, of_rank(base, 2), changed, [0, 2, 3], settings(), draw())
    assert one.examples == 3
    assert_close(one.adapter, two.adapter, 1e-12)


def test_epochs_and_most_steps(base, store):
    adapter = of_rank(base, 2)
    assert train(base, adapter, store, ROWS, settings(epochs=2), draw()).steps == 6
    cut = train(base, adapter, store, ROWS, settings(epochs=3, max_steps=4), draw())
    assert cut.steps == 4
    assert cut.examples == len(SIZES) + 4


def test_the_draw_alone_decides_the_order(base, store):
    adapter = of_rank(base, 2)
    one, same, other = (
        train(base, adapter, store, ROWS, settings(), np.random.default_rng(seed)).adapter
        for seed in (1, 1, 2)
    )
    for module in adapter:
        assert torch.equal(one[module].B, same[module].B)
        assert torch.equal(one[module].A, same[module].A)
    assert any(not torch.equal(one[m].B, other[m].B) for m in adapter)


def test_later_rounds_learn_less_where_they_decay(base, store):
    adapter = of_rank(base, 2)
    how = settings(optimizer="sgd", learning_rate=0.1, round_decay=0.5, max_steps=1)
    one, three = (train(base, adapter, store, ROWS, how, draw(), round) for round in (1, 3))
    for module, f in adapter.items():
        moved = three.adapter[module].A - f.A
        assert relative_error(moved, 0.25 * (one.adapter[module].A - f.A)) < 1e-3


def test_the_base_is_left_as_it_was_to_the_bit(base, store):
    before = copy.deepcopy(base.model.state_dict())
    adapter = of_rank(base, 3)
    held = {m: (f.B.clone(), f.A.clone()) for m, f in adapter.items()}
    train(base, adapter, store, ROWS, settings(), draw())
    after = base.model.state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None and not p.requires_grad for p in base.model.parameters())
    assert all(
        torch.equal(adapter[m].B, B) and torch.equal(adapter[m].A, A) for m, (B, A) in held.items()
    )


def test_a_penalty_is_added_at_every_step(base, store):
    """A penalty on the effective B alone pulls it to zero, and is not scaled by the tokens."""
    adapter = of_rank(base, 2)
    how = settings(optimizer="sgd", learning_rate=1e-3, clip_norm=1e9, max_steps=1, alpha=4.0)
    plain = train(base, adapter, store, ROWS, how, draw()).adapter
    seen = []

    def penalty(now):
        seen.append({m: f.B.detach().clone() for m, f in now.items()})
        return 0.5 * sum(f.B.square().sum() for f in now.values())

    pulled = train(base, adapter, store, ROWS, how, draw(), penalty=penalty).adapter
    for module, f in adapter.items():
        torch.testing.assert_close(seen[0][module], f.B)
        # B' moves by -rate * s * B, so B by -rate * s^2 * B, with s = 4 / 2.
        torch.testing.assert_close(
            pulled[module].B - plain[module].B, -1e-3 * 4 * f.B, rtol=1e-3, atol=1e-7
        )
        torch.testing.assert_close(pulled[module].A, plain[module].A)


def test_a_method_without_a_penalty_changes_nothing(base, store):
    one = train(base, of_rank(base, 2), store, ROWS, settings(), draw())
    two = train(base, of_rank(base, 2), store, ROWS, settings(), draw(), penalty=lambda now: None)
    assert_close(two.adapter, one.adapter, 1e-12)


def test_no_rows_are_refused(base, store):
    with pytest.raises(ValueError, match="no rows to train on"):
        train(base, of_rank(base, 2), store, [], settings(), draw())


def test_a_loss_that_is_not_finite_is_refused_with_its_step(base, store):
    broken = of_rank(base, 2)
    broken["model.layers.1.mlp.up_proj"].B[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"loss is nan at step 1; lower training\.learning_rate"):
        train(base, broken, store, ROWS, settings(), draw())
    assert all(layer.A is None for layer in base._layers.values())


def test_a_last_step_that_is_not_finite_is_refused_too(base, store):
    """The loss is read before the step: what the last step does is seen by nobody else."""
    how = settings(optimizer="sgd", learning_rate=1e38, max_steps=1, clip_norm=1e30)
    with pytest.raises(ValueError, match=r"step 1; lower training\.learning_rate"):
        train(base, of_rank(base, 2), store, ROWS, how, draw())


def test_a_base_in_half_precision_trains_factors_in_single(folder, store):
    half = Source(str(folder), dtype="bfloat16").load()
    assert half.model.dtype == torch.bfloat16
    adapter = of_rank(half, 3)
    how = settings(max_steps=2, epochs=9, batch_examples=99, learning_rate=0.02)
    first = train(half, adapter, store, ROWS, how, draw())
    assert {f.B.dtype for f in first.adapter.values()} == {torch.float32}
    assert_moved(first.adapter, adapter)
    more = train(half, adapter, store, ROWS, settings(**vars(how) | {"max_steps": 9}), draw())
    assert more.loss_total / 9 < 0.9 * first.loss_total / 2


def test_training_learns(base, store):
    adapter = of_rank(base, 2)
    how = settings(epochs=20, learning_rate=0.03)
    got = train(base, adapter, store, ROWS, how, draw()).adapter
    losses = []
    for each in (adapter, got):
        with base.attached(each), torch.no_grad():
            losses.append(float(pack_loss(base, pack(store, ROWS))))
    assert losses[1] < 0.3 * losses[0]
