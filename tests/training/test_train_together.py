"""Clients trained at the same time against each trained alone."""

import copy
import math

import numpy as np
import pytest
import torch
import transformers

from flexlora.data.tokens import TokenStore
from flexlora.lowrank.factors import Adapter
from flexlora.model.base import Base
from flexlora.model.source import Source
from flexlora.training.loop import ClientTask, Trained, train_together
from flexlora.training.optimizer import Training
from support import models
from support.learning import (
    SLOW,
    adapter_of,
    assert_close,
    assert_moved,
    distance_from,
    draw,
    of_rank,
    settings,
    train,
)
from support.rounding import rounding
from support.rows import sharing_store

ADAMW = {"optimizer": "adamw", "learning_rate": 0.01}


@pytest.fixture(scope="module")
def store() -> TokenStore:
    return sharing_store()


@pytest.fixture
def smooth(monkeypatch):
    """AdamW whose first steps do not turn on the sign of gradients that are all but zero."""

    def make(self, parameters):
        kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
        options = {"eps": 1e-2} if self.optimizer == "adamw" else {"momentum": self.momentum}
        return kinds[self.optimizer](
            parameters, lr=self.learning_rate, weight_decay=self.weight_decay, **options
        )

    monkeypatch.setattr(Training, "make", make)


def pull(now, start):
    return 0.05 * sum(f.B.square().sum() + f.A.square().sum() for f in now.values())


def learners(base: Base) -> list[ClientTask]:
    """Four clients alike in nothing: of 3, 1, 2 and 1 steps of four rows."""
    mixed = adapter_of(base, {"attention": 2, "feed_forward": 5})
    return [
        ClientTask("client 'a'", mixed, range(9), draw(1)),
        ClientTask("client 'b'", of_rank(base, 3, 20), [4, 1], draw(2), pull),
        ClientTask("client 'c'", of_rank(base, 4, 40), np.array([2, 3, 5, 6, 7]), draw(3)),
        ClientTask("client 'd'", of_rank(base, 1, 60), [8], draw(4), lambda now, start: None),
    ]


def alone(base, store, training: Training, number: int, round: int = 1) -> Trained:
    """One of the learners, trained by itself."""
    return train(base, learners(base)[number], store, training, round)


def rounding_alone(
    base, store, training: Training, number: int, want: Adapter, round: int = 1
) -> float:
    """How far rounding may move what this learner changes, trained by itself to ``want``."""
    return rounding(
        base.model,
        lambda: alone(base, store, training, number, round).adapter,
        want,
        distance_from(learners(base)[number].adapter),
    )


def assert_as_alone(base, store, training: Training, round: int = 1) -> None:
    together = train_together(base, learners(base), store, training, round)
    for number, got in enumerate(together):
        start = learners(base)[number].adapter
        want = alone(base, store, training, number, round)
        assert got.adapter.ranks == start.ranks
        error = distance_from(start)(got.adapter, want.adapter)
        assert error < rounding_alone(base, store, training, number, want.adapter, round)
        assert_moved(want.adapter, start)
        for name in ("steps", "examples", "tokens", "computed", "loss_tokens"):
            assert getattr(got, name) == getattr(want, name), name
        assert got.loss_total == pytest.approx(want.loss_total, rel=1e-5)
    steps = [each.steps for each in together]
    assert len(set(steps)) > 1 or training.max_steps == 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pack_tokens": 1},
        {"pack_tokens": 40},
        {"pack_tokens": 1000},
        {"pack_tokens": 1000, "prompt_loss": True},
        {"epochs": 2, "batch_examples": 3, "schedule": "cosine", "warmup_steps": 1},
        {"epochs": 3, "max_steps": 4},
        {"scaling": "sqrt", "weight_decay": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", [SLOW, ADAMW], ids=["sgd", "adamw"])
def test_who_else_is_trained_changes_nothing(base, store, smooth, optimizer, changes):
    assert_as_alone(base, store, settings(**{**optimizer, **changes}))


def test_the_optimiser_that_is_shipped_too(base, store):
    """AdamW with its own eps: where a gradient is all but zero, rounding may turn its sign."""
    assert_as_alone(base, store, settings(pack_tokens=1000))


def test_later_rounds_too(base, store):
    assert_as_alone(base, store, settings(**SLOW, round_decay=0.5), round=2)


@pytest.mark.parametrize("above", [0, 30])
@pytest.mark.parametrize("tokens", [12, 60, 1000])
def test_recomputing_too(base, store, above, tokens):
    training = settings(**SLOW, recompute_above=above, pack_tokens=tokens)
    assert_as_alone(base, store, training)
    whole = train_together(base, learners(base), store, settings(**SLOW, pack_tokens=tokens))
    thrifty = train_together(base, learners(base), store, training)
    for got, want in zip(thrifty, whole, strict=True):
        assert_close(got.adapter, want.adapter, 1e-5)
    assert not any(
        module.training or getattr(module, "gradient_checkpointing", False)
        for module in base.model.modules()
    )


def test_each_client_is_clipped_for_itself(base, store, monkeypatch):
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def recorded(*arguments):
        norms.append(float(clip(*arguments)))
        return torch.tensor(norms[-1])

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recorded)
    training = settings(**{**SLOW, "learning_rate": 0.02}, clip_norm=11.0)
    train_together(base, learners(base), store, training)
    assert len(norms) == 3 + 1 + 2 + 1
    assert min(norms) < 0.5 * training.clip_norm and max(norms) > 1.4 * training.clip_norm
    assert_as_alone(base, store, training)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_with_transformers_own_attention_too(model_folder, store, name):
    other = Source(str(model_folder), attention=name).load()
    assert_as_alone(other, store, settings(**SLOW, pack_tokens=1000))


def test_a_model_without_layers_of_our_own_too(store):
    config = transformers.GemmaConfig(
        vocab_size=15,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        pad_token_id=0,
        initializer_range=0.3,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = transformers.GemmaForCausalLM(config)
    base = Base(model, models.words_tokenizer(), "gemma")
    assert_as_alone(base, store, settings(**SLOW, pack_tokens=1000))


def test_a_base_in_half_precision_too(model_folder, store):
    """As far as its sums agree: who stands beside whom decides how they are rounded."""
    half = Source(str(model_folder), dtype="bfloat16").load()
    training = settings(**SLOW, pack_tokens=1000, max_steps=1)
    for got, learner in zip(
        train_together(half, learners(half), store, training), learners(half), strict=True
    ):
        want = train(half, learner, store, training)
        assert {f.B.dtype for f in got.adapter.values()} == {torch.float32}
        assert distance_from(learner.adapter)(got.adapter, want.adapter) < 0.1


def test_the_same_client_twice_is_the_same_twice(base, store):
    """Whatever its place, and though both are in one row."""
    twins = [ClientTask(f"client {i}", of_rank(base, 3), range(9), draw(1)) for i in range(2)]
    one, two = train_together(base, twins, store, settings(**SLOW, pack_tokens=1000))
    start = twins[0].adapter
    assert distance_from(start)(two.adapter, one.adapter) < rounding(
        base.model,
        lambda: (
            train(
                base, ClientTask("one", start, range(9), draw(1)), store, settings(**SLOW)
            ).adapter
        ),
        one.adapter,
        distance_from(start),
    )


def test_the_order_of_clients_changes_nothing(base, store):
    training = settings(**SLOW, pack_tokens=50)
    forth = train_together(base, learners(base), store, training)
    back = train_together(base, learners(base)[::-1], store, training)[::-1]
    for number, (got, want) in enumerate(zip(forth, back, strict=True)):
        error = distance_from(learners(base)[number].adapter)(got.adapter, want.adapter)
        assert error < rounding_alone(base, store, training, number, want.adapter)


def test_rows_are_joined_up_to_what_fits(base, store, monkeypatch):
    """As many passes as one client alone would take, not one for each client and step."""
    seen = []
    logits = Base.logits

    def counted(self, row, edges=None):
        seen.append((row.tokens, list(edges)))
        return logits(self, row, edges)

    monkeypatch.setattr(Base, "logits", counted)
    results = train_together(base, learners(base), store, settings(pack_tokens=1000))
    assert len(seen) == 3
    assert [len(edges) - 1 for _, edges in seen] == [4, 2, 1]  # the others are done
    assert all(edges[-1] == tokens for tokens, edges in seen)
    assert sum(tokens for tokens, _ in seen) == sum(each.computed for each in results)
    seen.clear()
    train_together(base, learners(base), store, settings(pack_tokens=60))
    assert max(tokens for tokens, _ in seen) <= 60
    assert len(seen) > 3


def test_seconds_are_shared_by_tokens_computed(base, store):
    results = train_together(base, learners(base), store, settings())
    rates = [each.seconds / each.computed for each in results]
    assert rates == pytest.approx([rates[0]] * 4, rel=1e-9)
    assert rates[0] > 0


def test_the_base_and_the_starts_are_left_as_they_were_to_the_bit(base, store):
    before = copy.deepcopy(base.model.state_dict())
    tasks = learners(base)
    starts = [{m: (f.B.clone(), f.A.clone()) for m, f in each.adapter.items()} for each in tasks]
    train_together(base, tasks, store, settings(pack_tokens=60))
    after = base.model.state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None and not p.requires_grad for p in base.model.parameters())
    assert all(layer.adapters == () for layer in base._layers.values())
    for start, learner in zip(starts, tasks, strict=True):
        for module, f in learner.adapter.items():
            assert torch.equal(f.B, start[module][0]) and torch.equal(f.A, start[module][1])


# --- errors --------------------------------------------------------------------------------


def test_a_client_without_rows_is_refused_by_name(base, store):
    some = learners(base)
    some[2] = ClientTask("client 'c'", of_rank(base, 4), [], draw())
    with pytest.raises(ValueError, match=r"^client 'c' has no rows to train on"):
        train_together(base, some, store, settings())


@pytest.mark.parametrize("tokens", [12, 1000])
@pytest.mark.parametrize("broken", [0, 2])
def test_a_client_whose_loss_is_not_finite_is_refused_by_name(base, store, broken, tokens):
    """And no other: what one has broken does not reach the rows of the others."""
    some = learners(base)
    some[broken].adapter["model.layers.1.mlp.up_proj"].B[0, 0] = math.nan
    name = some[broken].name
    with pytest.raises(ValueError, match=f"loss of {name} is nan at step 1; lower training"):
        train_together(base, some, store, settings(pack_tokens=tokens))
    assert all(layer.adapters == () for layer in base._layers.values())


def test_nan_in_attention_stays_with_its_client_too(base, store):
    some = learners(base)
    some[1].adapter["model.layers.0.self_attn.v_proj"].B[0, 0] = math.nan
    with pytest.raises(ValueError, match="loss of client 'b' is nan at step 1"):
        train_together(base, some, store, settings(pack_tokens=1000))


def test_a_client_whose_last_step_is_not_finite_is_refused_by_name(base, store):
    def explode(now, start):
        return math.inf * sum(f.B.sum() for f in now.values())

    some = learners(base)
    some[1] = ClientTask("client 'b'", of_rank(base, 3), [4, 1], draw(), explode)
    with pytest.raises(ValueError, match="adapter of client 'b' is not finite at step 1"):
        train_together(base, some, store, settings())


def test_a_client_of_fewer_modules_trains_as_it_would_alone(model_folder, store):
    base = Source(str(model_folder)).load()
    fewer = learners(base)[3].adapter
    fewer = fewer.only(list(fewer)[::2])

    def fourth():
        return ClientTask("client 'd'", fewer, [8], draw())

    together = train_together(base, [*learners(base)[:3], fourth()], store, settings())
    alone = train_together(base, [fourth()], store, settings())[0]
    assert list(together[3].adapter) == list(fewer)
    for module, f in alone.adapter.items():
        assert torch.allclose(together[3].adapter[module].B, f.B, atol=1e-6)
        assert torch.allclose(together[3].adapter[module].A, f.A, atol=1e-6)


def test_nobody_is_trained_at_once(base, store):
    assert train_together(base, [], store, settings()) == []
