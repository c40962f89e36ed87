"""Parameters that factors are made of, against autograd through dense weights."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from flexlora.data.packing import steps
from flexlora.laws.dense import product, relative_error
from flexlora.lowrank.factors import Factors
from flexlora.lowrank.parametrization import Parametrization, as_vector
from flexlora.training.loop import ClientTask, train_together
from flexlora.training.reparametrized import ReparametrizedAdapter
from support.factors import random_adapter, random_factors
from support.learning import draw, of_rank, settings, train
from support.rounding import rounding
from support.rows import sharing_store

CPU = torch.device("cpu")
ROWS = range(9)


def both(out, parameters, side):
    """Both factors depend on the parameters, and one on a frozen tensor as well."""
    rank = side.shape[1]
    B = parameters[: out * rank].view(out, rank)
    return Factors(B.sin() @ side, parameters[out * rank :].view(rank, -1).exp() - 1)


def left(bases, parameters, A):
    """``A`` is frozen: the parameters are a core between it and another base."""
    return Factors(bases.to(parameters) @ parameters.view(len(A), len(A)), A)


def form_of(kind, out, in_, seed):
    f = random_factors(out, 3, in_, seed, torch.float32)
    if kind == "left":
        return Parametrization(0.1 * f.B[:3].flatten(), partial(left, f.B), (f.A / 9,))
    parameters = torch.cat([0.3 * f.B.flatten(), f.A.flatten() / 9])
    return Parametrization(parameters, partial(both, out), (f.B[:3],))


def forms_of(shapes, seed=0):
    """Forms of two kinds by turns."""
    return {
        m: form_of(("both", "left")[i % 2], *shape, seed + i)
        for i, (m, shape) in enumerate(shapes.items())
    }


def learner_of(shapes, seed=0, name="client 'f'", rows=ROWS, **options):
    forms = forms_of(shapes, seed)
    start = {m: form.factors() for m, form in forms.items()}
    return ClientTask(name, start, rows, draw(seed), form=forms, **options)


@pytest.fixture(scope="module")
def store():
    return sharing_store()


SHAPES = {"model.q": (11, 7), "model.up": (13, 5)}


def loss_of(factors):
    return sum((f.B @ f.A - 0.1).pow(3).sum() for f in factors.values())


def test_gathered_gradients_are_those_of_the_parameters():
    forms = forms_of(SHAPES)
    flat = ReparametrizedAdapter.of(forms, CPU)
    loss_of(flat.leaves.factors).backward()
    flat.pull_back_gradients()
    copies = {m: form.parameters.clone().requires_grad_() for m, form in forms.items()}
    loss_of({m: form.factors(copies[m]) for m, form in forms.items()}).backward()
    want = torch.cat([p.grad for p in copies.values()])
    assert float(want.norm()) > 0.1
    assert relative_error(flat.values.grad[None], want[None]) < 1e-6


def test_gradients_are_finite_differences():
    form = form_of("both", 11, 7, 4)
    form = Parametrization(form.parameters.double(), form.make, form.frozen)
    flat = ReparametrizedAdapter.of({"model.q": form}, CPU)
    loss_of(flat.leaves.factors).backward()
    flat.pull_back_gradients()
    step = 1e-6
    for place in (0, 5, 32, 33, 40):
        up, down = (form.parameters.clone() for _ in range(2))
        up[place] += step
        down[place] -= step
        slope = (loss_of({"": form.factors(up)}) - loss_of({"": form.factors(down)})) / (2 * step)
        assert float(flat.values.grad[place]) == pytest.approx(float(slope), rel=1e-4, abs=1e-6)


def test_the_factors_follow_the_parameters_in_place():
    forms = forms_of(SHAPES)
    flat = ReparametrizedAdapter.of(forms, CPU)
    copies = {m: (f.B, f.A) for m, f in flat.leaves.factors.items()}
    with torch.no_grad():
        flat.values.mul_(1.5)
    flat.update_factors()
    for module, form in forms.items():
        want, (B, A) = form.factors(1.5 * form.parameters), copies[module]
        torch.testing.assert_close(B.detach(), want.B)
        torch.testing.assert_close(A.detach(), want.A)
        assert flat.leaves.factors[module].B is B
        torch.testing.assert_close(flat.folded()[module].B, want.B)


def test_all_gradients_are_set_to_zero():
    flat = ReparametrizedAdapter.of(forms_of(SHAPES), CPU)
    loss_of(flat.leaves.factors).backward()
    flat.pull_back_gradients()
    flat.zero_grad()
    copies = [x.grad for f in flat.leaves.factors.values() for x in (f.B, f.A)]
    assert [g is None for g in copies] == [False, False, False, True]
    assert not any(g.any() for g in copies if g is not None)
    assert not flat.values.grad.any()


def test_what_is_finished_are_the_parameters():
    forms = forms_of(SHAPES)
    flat = ReparametrizedAdapter.of(forms, CPU)
    done = flat.finish()
    with torch.no_grad():
        flat.values.add_(1.0)
    for module, form in forms.items():
        assert done[module].shape == (form.parameters.numel(), 0) and done[module].rank == 1
        assert torch.equal(done[module].B[:, 0], form.parameters)
        assert not done[module].B.requires_grad
    assert flat.values.grad is None


def test_inputs_are_copied_and_coarse_ones_made_single():
    form = form_of("both", 11, 7, 1)
    coarse = Parametrization(form.parameters.bfloat16(), form.make, form.frozen)
    before = coarse.parameters.clone()
    flat = ReparametrizedAdapter.of({"model.q": coarse}, CPU)
    assert flat.values.dtype == flat.leaves.factors["model.q"].B.dtype == torch.float32
    with torch.no_grad():
        flat.values.add_(1.0)
    assert torch.equal(coarse.parameters, before)


@pytest.mark.parametrize("parameters", [torch.zeros(2, 3), torch.zeros(0)])
def test_parameters_that_are_not_flat_are_refused(parameters):
    with pytest.raises(ValueError, match="one flat tensor with at least one element"):
        Parametrization(parameters, lambda p: Factors(p, p))


def test_a_column_has_one_term_and_no_width():
    f = as_vector(torch.arange(5.0))
    assert (f.shape, f.rank, f.B.numel() + f.A.numel()) == ((5, 0), 1, 5)


def trained_densely(model_folder, forms, store, training, order, rest=None):
    """The same on dense weights with autograd alone, row by row."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    copies = {m: form.parameters.clone().requires_grad_() for m, form in forms.items()}
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    optimizer = kinds[training.optimizer](
        copies.values(), lr=training.learning_rate, weight_decay=0.0
    )
    plan = steps(ROWS, training.batch_examples, order)
    for number, chosen in enumerate(plan):
        changed = {}
        for module, form in forms.items():
            f = form.factors(copies[module])
            changed[f"{module}.weight"] = weights[f"{module}.weight"] + f.B @ f.A
            if rest is not None:
                changed[f"{module}.weight"] = changed[f"{module}.weight"] + product(rest[module])
        total, tokens = 0.0, 0
        for row in (store[number] for number in chosen):
            ids = torch.from_numpy(row.ids.astype(np.int64))
            now = {k: v.float() for k, v in {**weights, **changed}.items()}
            logits = torch.func.functional_call(model, now, (ids[None],)).logits[0]
            first = row.prompt_tokens
            total += F.cross_entropy(logits[first - 1 : -1], ids[first:], reduction="sum")
            tokens += len(ids) - first
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * (1 - number / len(plan))
        (total / tokens).backward()
        torch.nn.utils.clip_grad_norm_(copies.values(), training.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return {m: p.detach() for m, p in copies.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd", "learning_rate": 0.3, "clip_norm": 1e9},
        {"optimizer": "sgd", "learning_rate": 5.0, "clip_norm": 0.02},
        {"learning_rate": 0.01},
    ],
    ids=str,
)
def test_training_is_autograd_through_dense_weights(model_folder, base, store, changes):
    training, rest = settings(**changes, pack_tokens=40), random_adapter(base.shapes, 2, 90)
    learner = learner_of(base.shapes, rest=rest)
    got = train(base, learner, store, training)
    want = trained_densely(model_folder, learner.form, store, training, draw(0), rest)
    assert got.steps == 3
    for module, form in learner.form.items():
        moved, wanted = (p - form.parameters for p in (got.adapter[module].B[:, 0], want[module]))
        assert float(wanted.norm()) > 1e-3 * float(form.parameters.norm())
        assert relative_error(moved[None], wanted[None]) < 2e-3


def test_the_lora_scale_has_no_part(base, store):
    one, other = (
        train(base, learner_of(base.shapes), store, settings(alpha=alpha)).adapter
        for alpha in (1.0, 24.0)
    )
    assert all(torch.equal(one[m].B, other[m].B) for m in one)


def test_a_penalty_reaches_the_parameters(base, store):
    training = settings(optimizer="sgd", learning_rate=1e-3, clip_norm=1e9, max_steps=1)

    def penalty(now, start):
        return 50.0 * sum(product_of(f).square().sum() for f in now.values())

    def product_of(f):
        return f.B @ f.A

    plain = train(base, learner_of(base.shapes), store, training).adapter
    learner = learner_of(base.shapes, penalty=penalty)
    pulled = train(base, learner, store, training).adapter
    for module, form in learner.form.items():
        copies = form.parameters.clone().requires_grad_()
        (50.0 * product_of(form.factors(copies)).square().sum()).backward()
        got = pulled[module].B[:, 0] - plain[module].B[:, 0]
        assert relative_error(got[None], -1e-3 * copies.grad[None]) < 1e-3


def test_who_else_is_trained_changes_nothing(base, store):
    """Formed learners beside a plain one, each as it is alone."""
    training = settings(optimizer="sgd", learning_rate=0.1, pack_tokens=40)

    def learners():
        return [
            learner_of(base.shapes, 0, "client 'a'", ROWS),
            ClientTask("client 'b'", of_rank(base, 2), [4, 1, 8, 6, 2], draw(3)),
            learner_of(base.shapes, 50, "client 'c'", [3, 0]),
        ]

    together = train_together(base, learners(), store, training)
    for number, (got, learner) in enumerate(zip(together, learners(), strict=True)):

        def alone(number=number):
            return train(base, learners()[number], store, training)

        def distance(got, want, learner=learner):
            """Relative to what training has changed."""
            forms = learner.form or {}
            begun = {m: form.parameters[:, None] for m, form in forms.items()}
            begun |= {m: f.B for m, f in learner.adapter.items() if m not in begun}
            return max(relative_error(got[m].B - begun[m], want[m].B - begun[m]) for m in want)

        want = alone()
        assert (got.steps, got.tokens, got.computed) == (want.steps, want.tokens, want.computed)
        assert distance(got.adapter, want.adapter) < rounding(
            base.model, lambda alone=alone: alone().adapter, want.adapter, distance
        )
