import pytest
import torch

from flexlora.laws.dense import product, relative_error
from flexlora.lowrank.factors import Adapter
from flexlora.model.trainable import FlatAdapter
from support.factors import random_factors

RANKS = {"model.q": 3, "model.up": 2}


@pytest.fixture
def adapter():
    return Adapter(
        {
            "model.q": random_factors(11, 3, 7, 1, torch.float32),
            "model.up": random_factors(13, 2, 5, 2, torch.float32),
        }
    )


def scale(rank: int) -> float:
    return 6.0 / rank


@pytest.fixture
def flat(adapter):
    return FlatAdapter.of(adapter, scale, torch.device("cpu"))


def test_the_scale_is_taken_out_of_b_alone(adapter, flat):
    for module, factors in adapter.items():
        flat_factors = flat.factors[module]
        torch.testing.assert_close(flat_factors.B * (6 / RANKS[module]), factors.B)
        assert torch.equal(flat_factors.A, factors.A)
        folded = flat.folded()[module]
        torch.testing.assert_close(folded.B, factors.B)


def test_finish_gives_the_same_update_back(adapter, flat):
    finished = flat.finish()
    for module in adapter:
        assert relative_error(product(finished[module]), product(adapter[module])) < 1e-6
        assert finished[module].B.dtype == torch.float32


def test_what_is_finished_no_longer_asks_for_gradients(flat):
    for factors in flat.finish().values():
        assert not factors.B.requires_grad
        assert not factors.A.requires_grad


def test_finished_factors_do_not_change_with_the_parameters(flat):
    finished = flat.finish()
    before = {m: product(f).clone() for m, f in finished.items()}
    with torch.no_grad():
        flat.values.add_(1.0)
    assert all(torch.equal(product(f), before[m]) for m, f in finished.items())


def test_the_input_is_copied(adapter, flat):
    before = {m: (f.B.clone(), f.A.clone()) for m, f in adapter.items()}
    with torch.no_grad():
        flat.values.add_(1.0)
    for module, (B, A) in before.items():
        assert torch.equal(adapter[module].B, B)
        assert torch.equal(adapter[module].A, A)


def test_all_values_and_all_gradients_lie_in_one_tensor(adapter, flat):
    assert flat.values.numel() == adapter.parameters
    loss = sum((f.B @ f.A).square().sum() for f in flat.folded().values())
    loss.backward()
    pieces = [g for f in flat.factors.values() for g in (f.B.grad, f.A.grad)]
    assert torch.equal(torch.cat([g.flatten() for g in pieces]), flat.values.grad)
    assert float(flat.values.grad.abs().min()) > 0
    once = flat.values.grad.clone()
    sum((f.B @ f.A).square().sum() for f in flat.folded().values()).backward()
    torch.testing.assert_close(flat.values.grad, 2 * once)
    flat.zero_grad()
    assert not any(f.B.grad.any() or f.A.grad.any() for f in flat.factors.values())


def test_a_step_on_the_flat_tensor_moves_every_factor(flat):
    before = {m: (f.B.detach().clone(), f.A.detach().clone()) for m, f in flat.factors.items()}
    sum((f.B @ f.A).square().sum() for f in flat.folded().values()).backward()
    torch.optim.SGD([flat.values], lr=0.1).step()
    for module, (B, A) in before.items():
        f = flat.factors[module]
        torch.testing.assert_close(f.B, B - 0.1 * f.B.grad)
        torch.testing.assert_close(f.A, A - 0.1 * f.A.grad)


def test_gradients_are_those_of_the_parameters_not_of_the_update(adapter, flat):
    """d/dB' of f(s B' A) is s times d/dB of f(B A)."""
    sum(f.B.sum() * f.A.sum() for f in flat.folded().values()).backward()
    for module, factors in adapter.items():
        want = torch.full_like(factors.B, 6 / RANKS[module] * float(factors.A.sum()))
        torch.testing.assert_close(flat.factors[module].B.grad, want)
