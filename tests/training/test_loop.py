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

from flexlora.data.packing import pack, steps
from flexlora.data.tokens import TokenStore
from flexlora.laws.dense import relative_error
from flexlora.lowrank.factors import Adapter, Factors
from flexlora.model.base import Base
from flexlora.model.source import Source
from flexlora.training.loop import ClientTask, Trained, label_losses
from flexlora.training.optimizer import Training
from support.learning import (
    SGD,
    SLOW,
    adapter_of,
    assert_close,
    assert_moved,
    distance,
    draw,
    of_rank,
    settings,
    train,
)
from support.rounding import rounding
from support.rows import sharing_store, store_of

SIZES = ((3, 2), (5, 1), (2, 4), (7, 3), (1, 5), (4, 6), (6, 2), (2, 2), (3, 7))
"""Prompt and response tokens of each row."""


@pytest.fixture(scope="module")
def store() -> TokenStore:
    draw = np.random.default_rng(4)
    return store_of([(draw.integers(3, 15, a), draw.integers(3, 15, b)) for a, b in SIZES])


@pytest.fixture(scope="module")
def sharing() -> TokenStore:
    """As many rows, of which several share their first tokens."""
    return sharing_store()


ROWS = list(range(len(SIZES)))


def run(
    base, adapter, store, rows=ROWS, training=None, order=None, penalty=None, round=1
) -> Trained:
    """One client alone."""
    learner = ClientTask("client 'c7'", adapter, rows, order or draw(), penalty)
    return train(base, learner, store, training or settings(), round)


def trained_by_peft(
    model_folder, base, adapter, store, training: Training, prompt_loss=False
) -> Adapter:
    """The same with Hugging Face's model and PEFT's layers, examples padded on the right."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    ranks = adapter.ranks
    config = peft.LoraConfig(
        r=1,
        rank_pattern=ranks,
        lora_alpha=training.alpha,
        use_rslora=training.scaling == "sqrt",
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
    extra = {"momentum": training.momentum} if training.optimizer == "sgd" else {}
    optimizer = kinds[training.optimizer](
        parameters, lr=training.learning_rate, weight_decay=training.weight_decay, **extra
    )
    plan = steps(ROWS, training.batch_examples, draw())
    for number, chosen in enumerate(plan):
        rows = [store[row] for row in chosen]
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
            group["lr"] = training.learning_rate * (1 - number / len(plan))
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, training.clip_norm)
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


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        ((2, 2), SGD),
        ((5, 5), SGD),
        ((2, 5), {**SGD, "scaling": "sqrt"}),
        ((2, 5), {**SGD, "clip_norm": 0.01, "learning_rate": 5.0}),
        ((2, 5), {**SLOW, "prompt_loss": True, "weight_decay": 0.1}),
        ((2, 2), {}),
        ((5, 5), {"weight_decay": 0.1}),
    ],
)
@pytest.mark.parametrize("shared", [False, True])
def test_training_is_that_of_peft(model_folder, base, store, sharing, shared, ranks, changes):
    """Three steps, of examples in packs here and in padded batches there.

    Where rows share their first tokens, those stand there in every row and here once.
    """
    adapter = adapter_of(base, dict(zip(("attention", "feed_forward"), ranks, strict=True)))
    training = settings(**changes, **({"pack_tokens": 64} if shared else {}))
    store = sharing if shared else store
    got = run(base, adapter, store, training=training)
    assert (got.computed < got.tokens) == shared
    assert got.steps == 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = trained_by_peft(model_folder, base, adapter, store, training, training.prompt_loss)
    assert got.adapter.ranks == adapter.ranks
    assert distance(got.adapter, want) < rounding(
        base.model,
        lambda: run(base, adapter, store, training=training).adapter,
        got.adapter,
        distance,
    )
    assert_moved(got.adapter, adapter)


@pytest.mark.parametrize(("scaling", "power"), [("rank", 1.0), ("sqrt", 0.5), ("none", 0.0)])
def test_the_scale_multiplies_the_step_of_b_by_its_square(base, store, scaling, power):
    """B = s B': a plain gradient step on B' moves B by s^2 times the gradient of B.

    And A by as much as without a scale: its gradient is that of the whole update.
    """
    adapter = of_rank(base, 5)
    plain = {"optimizer": "sgd", "learning_rate": 0.1, "clip_norm": 1e9, "max_steps": 1}
    one = run(base, adapter, store, training=settings(**plain, alpha=1, scaling="none"))
    got = run(base, adapter, store, training=settings(**plain, alpha=2, scaling=scaling))
    s = 2 / 5**power
    for module, f in adapter.items():
        step, unit = got.adapter[module], one.adapter[module]
        assert relative_error(step.B - f.B, s**2 * (unit.B - f.B)) < 1e-3
        assert relative_error(step.A - f.A, unit.A - f.A) < 1e-3


@pytest.mark.parametrize("shared", [False, True])
def test_the_pack_size_changes_nothing(base, store, sharing, shared):
    store = sharing if shared else store
    adapter = adapter_of(base, {"attention": 2, "feed_forward": 3})
    training = {**SLOW, "batch_examples": 5}
    alone, some, whole = (
        run(base, adapter, store, training=settings(**training, pack_tokens=tokens))
        for tokens in (1, 36 if shared else 14, 1000)
    )
    for other in (some, whole):
        assert_close(other.adapter, alone.adapter, 1e-5)
        assert other.loss_total == pytest.approx(alone.loss_total, rel=1e-5)
        assert (other.tokens, other.loss_tokens) == (alone.tokens, alone.loss_tokens)
    assert alone.computed == alone.tokens
    assert (whole.computed <= some.computed < alone.computed) == shared
    assert_moved(alone.adapter, adapter)


@pytest.mark.parametrize("changes", [SLOW, {}, {**SLOW, "prompt_loss": True}])
@pytest.mark.parametrize("tokens", [36, 1000])
def test_sharing_first_tokens_changes_nothing(base, sharing, monkeypatch, changes, tokens):
    adapter = adapter_of(base, {"attention": 2, "feed_forward": 3})
    training = settings(**changes, pack_tokens=tokens, batch_examples=5)
    shared = run(base, adapter, sharing, training=training)
    monkeypatch.setattr(Base, "shares_prefixes", False)
    whole = run(base, adapter, sharing, training=training)
    assert_close(shared.adapter, whole.adapter, 1e-5)
    assert_moved(whole.adapter, adapter)
    assert shared.loss_total == pytest.approx(whole.loss_total, rel=1e-5)
    assert (shared.tokens, shared.loss_tokens) == (whole.tokens, whole.loss_tokens)
    assert shared.computed < whole.computed == whole.tokens


@pytest.mark.parametrize("above", [0, 11])
def test_recomputing_changes_nothing_and_leaves_no_trace(base, store, above):
    adapter = of_rank(base, 3)
    whole = run(base, adapter, store)
    thrifty = run(base, adapter, store, training=settings(recompute_above=above))
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
    training = settings(max_steps=1, pack_tokens=1000)
    run(base, of_rank(base, 2), store, training=training)
    plain = len(calls)
    run(base, of_rank(base, 2), store, training=settings(**vars(training) | {"recompute_above": 0}))
    assert len(calls) - plain == 2 * plain


def test_only_response_tokens_count(base, store):
    whole = run(base, of_rank(base, 2), store)
    assert whole.loss_tokens == sum(response for _, response in SIZES)
    assert whole.tokens == whole.computed == sum(map(sum, SIZES))
    assert whole.examples == len(SIZES)
    more = run(base, of_rank(base, 2), store, training=settings(prompt_loss=True))
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
        got = float(label_losses(base, pack(store, ROWS, prompt_loss)).double().sum())
    assert got == pytest.approx(total, rel=1e-5)


def test_totals_are_those_of_the_losses_before_each_step(base, store):
    training = settings(max_steps=1, batch_examples=99, pack_tokens=9)
    got = run(base, of_rank(base, 2), store, training=training)
    with base.attached(of_rank(base, 2)), torch.no_grad():
        want = float(label_losses(base, pack(store, ROWS)).sum())
    assert got.loss_total == pytest.approx(want, rel=1e-5)
    assert got.steps == 1


def test_rows_not_given_have_no_part(base, store):
    changed = TokenStore(store.ids.copy(), store.offsets, store.prompt_tokens, 0)
    changed.ids[store.offsets[5] :] = 4
    one = run(base, of_rank(base, 2), store, [0, 2, 3])
    two = run(base, of_rank(base, 2), changed, [0, 2, 3])
    assert one.examples == 3
    assert_close(one.adapter, two.adapter, 1e-12)


def test_epochs_and_most_steps(base, store):
    adapter = of_rank(base, 2)
    assert run(base, adapter, store, training=settings(epochs=2)).steps == 6
    cut = run(base, adapter, store, training=settings(epochs=3, max_steps=4))
    assert cut.steps == 4
    assert cut.examples == len(SIZES) + 4


def test_the_draw_alone_decides_the_order(base, store):
    adapter = of_rank(base, 2)
    one, same, other = (
        run(base, adapter, store, order=np.random.default_rng(seed)).adapter for seed in (1, 1, 2)
    )
    for module in adapter:
        assert torch.equal(one[module].B, same[module].B)
        assert torch.equal(one[module].A, same[module].A)
    assert any(not torch.equal(one[m].B, other[m].B) for m in adapter)


def test_later_rounds_learn_less_where_they_decay(base, store):
    adapter = of_rank(base, 2)
    training = settings(optimizer="sgd", learning_rate=0.1, round_decay=0.5, max_steps=1)
    one, three = (run(base, adapter, store, training=training, round=round) for round in (1, 3))
    for module, f in adapter.items():
        moved = three.adapter[module].A - f.A
        assert relative_error(moved, 0.25 * (one.adapter[module].A - f.A)) < 1e-3


def test_the_base_is_left_as_it_was_to_the_bit(base, store):
    before = copy.deepcopy(base.model.state_dict())
    adapter = of_rank(base, 3)
    held = {m: (f.B.clone(), f.A.clone()) for m, f in adapter.items()}
    run(base, adapter, store)
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
    training = settings(optimizer="sgd", learning_rate=1e-3, clip_norm=1e9, max_steps=1, alpha=4.0)
    plain = run(base, adapter, store, training=training).adapter
    seen = []

    def penalty(now, start):
        seen.append({m: f.B.detach().clone() for m, f in now.items()})
        return 0.5 * sum(f.B.square().sum() for f in now.values())

    pulled = run(base, adapter, store, training=training, penalty=penalty).adapter
    for module, f in adapter.items():
        torch.testing.assert_close(seen[0][module], f.B)
        # B' moves by -rate * s * B, so B by -rate * s^2 * B, with s = 4 / 2.
        torch.testing.assert_close(
            pulled[module].B - plain[module].B, -1e-3 * 4 * f.B, rtol=1e-3, atol=1e-7
        )
        torch.testing.assert_close(pulled[module].A, plain[module].A)


def test_a_method_without_a_penalty_changes_nothing(base, store):
    one = run(base, of_rank(base, 2), store)
    two = run(base, of_rank(base, 2), store, penalty=lambda now, start: None)
    assert_close(two.adapter, one.adapter, 1e-12)


def test_no_rows_are_refused(base, store):
    with pytest.raises(ValueError, match="client 'c7' has no rows to train on"):
        run(base, of_rank(base, 2), store, [])


def test_a_loss_that_is_not_finite_is_refused_with_its_step(base, store):
    broken = of_rank(base, 2)
    broken["model.layers.1.mlp.up_proj"].B[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"loss of client 'c7' is nan at step 1; lower training"):
        run(base, broken, store)
    assert all(layer.adapters == () for layer in base._layers.values())


def test_a_last_step_that_is_not_finite_is_refused_too(base, store):
    """The loss is read before the step: what the last step does is seen by nobody else."""
    training = settings(optimizer="sgd", learning_rate=1e38, max_steps=1, clip_norm=1e30)
    with pytest.raises(ValueError, match=r"client 'c7' .* step 1; lower training\.learning_rate"):
        run(base, of_rank(base, 2), store, training=training)


def test_a_base_in_half_precision_trains_factors_in_single(model_folder, store):
    half = Source(str(model_folder), dtype="bfloat16").load()
    assert half.model.dtype == torch.bfloat16
    adapter = of_rank(half, 3)
    training = settings(max_steps=2, epochs=9, batch_examples=99, learning_rate=0.02)
    first = run(half, adapter, store, training=training)
    assert {f.B.dtype for f in first.adapter.values()} == {torch.float32}
    assert_moved(first.adapter, adapter)
    more = run(half, adapter, store, training=settings(**vars(training) | {"max_steps": 9}))
    assert more.loss_total / 9 < 0.9 * first.loss_total / 2


def test_training_learns(base, store):
    adapter = of_rank(base, 2)
    training = settings(epochs=20, learning_rate=0.03)
    got = run(base, adapter, store, training=training).adapter
    losses = []
    for each in (adapter, got):
        with base.attached(each), torch.no_grad():
            losses.append(float(label_losses(base, pack(store, ROWS)).sum()))
    assert losses[1] < 0.3 * losses[0]
