import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora import methods
from flexlora.laws.dense import product
from flexlora.laws.rounds import SEED, SHAPES, aggregated
from flexlora.lowrank import Adapter, Factors
from flexlora.method import Client, Download, RoundContext, State, Turn, Upload
from flexlora.methods.hetlora import HetLoRA
from support.factors import random_factors

Q, UP = "model.q", "model.up"


def context_of(number: int) -> RoundContext:
    return RoundContext(number, SEED, SHAPES, {Q: 6, UP: 5})


def started(adapter: Adapter) -> State:
    return HetLoRA().start(adapter, context_of(0))


def after(state: State, uploads: list[Upload]) -> State:
    return aggregated(HetLoRA(), state, uploads, context_of(1))


def handed(state: State, client: Client) -> Adapter:
    return HetLoRA().handout(state, client, context_of(2)).adapter


def sent(method: HetLoRA, start: Adapter, trained: Adapter) -> Adapter:
    return method.upload_from(Turn(Download(start), trained, 4, 1))


def adapter(ranks: dict[str, int], seed: int) -> Adapter:
    return Adapter(
        {m: random_factors(*_sizes(m, r), seed + i) for i, (m, r) in enumerate(ranks.items())}
    )


def _sizes(module: str, rank: int):
    out, in_ = SHAPES[module]
    return out, rank, in_


def uploads_of(*ranks: dict[str, int]) -> list[Upload]:
    return [Upload(f"c{i}", 1, adapter(r, 10 * i), 7 + i) for i, r in enumerate(ranks)]


def tail(modules, heads: dict[str, int]) -> torch.Tensor:
    """The formula: sum over layers of ||B[:, g:]|| ||A[g:]||."""
    return sum(
        f.B[:, heads[m] :].square().sum().sqrt() * f.A[heads[m] :].square().sum().sqrt()
        for m, f in modules.items()
    )


def shrunk(start: Adapter, heads: dict[str, int], by: float) -> Adapter:
    """The same factors with their tails multiplied."""
    modules = {}
    for m, f in start.items():
        B = f.B.clone()
        B[:, heads[m] :] *= by
        modules[m] = Factors(B, f.A)
    return Adapter(modules)


@settings(deadline=None)
@given(st.floats(0.1, 0.95), st.integers(1, 9))
def test_the_penalty_is_the_formula_and_so_is_its_gradient(keep, rank):
    start = adapter({Q: rank, UP: rank + 2}, 1)
    heads = {m: max(math.floor(keep * f.rank), 1) for m, f in start.items()}
    method = HetLoRA(keep=keep, decay=0.3)
    values = []
    for formula in (
        lambda now: method.penalty(now, Download(start)),
        lambda now: 0.3 * tail(now, heads),
    ):
        leaves = {
            m: Factors(f.B.clone().requires_grad_(), f.A.clone().requires_grad_())
            for m, f in start.items()
        }
        value = formula(leaves)
        gradients = torch.autograd.grad(
            value, [t for f in leaves.values() for t in (f.B, f.A)], allow_unused=True
        )
        values.append([value.detach(), *gradients])
    for got, want in zip(*values, strict=True):
        torch.testing.assert_close(got, want, equal_nan=False)


def test_a_tail_of_zeros_has_a_finite_gradient():
    """As at the start, where B is zero."""
    f = random_factors(11, 5, 7)
    B, A = torch.zeros_like(f.B).requires_grad_(), f.A.clone().requires_grad_()
    HetLoRA(keep=0.5).penalty({Q: Factors(B, A)}, Download(Adapter({Q: f}))).backward()
    assert B.grad.isfinite().all()
    assert A.grad.isfinite().all()


@pytest.mark.parametrize(
    ("by", "pruned"), [(0.5, True), (0.99, True), (1.0, False), (1.01, False), (3.0, False)]
)
def test_a_client_prunes_itself_where_the_tail_shrank_and_only_there(by, pruned):
    start = adapter({Q: 6, UP: 3}, 1)
    heads = {Q: 4, UP: 2}
    returned = sent(HetLoRA(keep=0.7), start, shrunk(start, heads, by))
    assert returned.ranks == (heads if pruned else start.ranks)
    for m in start:
        assert torch.equal(returned[m].A, start[m].A[: returned[m].rank])


def test_the_tails_of_all_layers_count_together():
    start = adapter({Q: 6, UP: 3}, 1)
    one = Adapter(
        {Q: shrunk(start, {Q: 4, UP: 2}, 0.1)[Q], UP: shrunk(start, {Q: 4, UP: 2}, 1.05)[UP]}
    )
    assert sent(HetLoRA(keep=0.7), start, one).ranks == {Q: 4, UP: 2}


def test_nobody_prunes_below_the_smallest_rank():
    start = adapter({Q: 6, UP: 3}, 1)
    method = HetLoRA(keep=0.4, smallest_rank=3)
    assert sent(method, start, shrunk(start, {Q: 3, UP: 3}, 0.5)).ranks == {Q: 3, UP: 3}
    below = adapter({Q: 2, UP: 1}, 1)
    assert sent(method, below, shrunk(below, {Q: 0, UP: 0}, 0.5)).ranks == {Q: 2, UP: 1}


def test_the_default_prunes_one_term_of_up_to_a_hundred():
    for rank in (2, 8, 30, 100):
        start = Adapter({Q: random_factors(11, rank, 7, rank)})
        returned = sent(HetLoRA(), start, shrunk(start, {Q: rank - 1}, 0.5))
        assert returned.ranks == {Q: rank - 1}


def test_ranks_never_recover():
    state = started(adapter({Q: 6, UP: 5}, 3))
    client = Client("c0", {Q: 6, UP: 5}, "large", 7)
    for number, ranks in enumerate(({Q: 5, UP: 4}, {Q: 3, UP: 4}), start=1):
        state = after(state, [Upload("c0", number, adapter(ranks, number), 7)])
        assert handed(state, client).ranks == ranks
        # A round without this client, in which others have more, does not give it back.
        state = after(state, [Upload("c1", number, adapter({Q: 6, UP: 5}, 40), 7)])
        assert handed(state, client).ranks == ranks
    assert handed(state, Client("c9", {Q: 6, UP: 5}, "large", 7)).ranks == {Q: 6, UP: 5}


def test_what_was_pruned_survives_json():
    state = after(started(adapter({Q: 6, UP: 5}, 3)), uploads_of({Q: 2, UP: 3}))
    again = State(state.model, per_client=json.loads(json.dumps(state.per_client)))
    client = Client("c0", {Q: 6, UP: 5}, "large", 7)
    assert handed(again, client).ranks == {Q: 2, UP: 3}


def test_weights_are_the_shares_of_the_products_norms():
    """One weight for a client, over all of its modules, whatever examples it counts."""
    uploads = uploads_of({Q: 2, UP: 1}, {Q: 3, UP: 4}, {Q: 6, UP: 3})
    norms = [
        math.sqrt(sum(float(product(f).square().sum()) for f in u.adapter.values()))
        for u in uploads
    ]
    got = after(started(adapter({Q: 6, UP: 4}, 77)), uploads).model
    for m, rank in ((Q, 6), (UP, 4)):
        B = sum(
            n / sum(norms) * u.adapter[m].padded(rank).B
            for n, u in zip(norms, uploads, strict=True)
        )
        A = sum(
            n / sum(norms) * u.adapter[m].padded(rank).A
            for n, u in zip(norms, uploads, strict=True)
        )
        torch.testing.assert_close(got[m].B, B)
        torch.testing.assert_close(got[m].A, A)


def test_updates_of_zero_weigh_alike():
    zero = [
        Upload(f"c{i}", 1, Adapter({m: Factors(0 * f.B, f.A) for m, f in u.adapter.items()}), 3)
        for i, u in enumerate(uploads_of({Q: 2, UP: 2}, {Q: 2, UP: 2}))
    ]
    got = after(started(adapter({Q: 2, UP: 2}, 7)), zero).model
    want = (zero[0].adapter[Q].A + zero[1].adapter[Q].A) / 2
    torch.testing.assert_close(got[Q].A, want)


def test_terms_that_nobody_holds_are_carried_on():
    state = started(adapter({Q: 6, UP: 5}, 3))
    last = state.model
    got = after(state, uploads_of({Q: 2, UP: 5})).model
    assert got.ranks == {Q: 6, UP: 5}
    assert torch.equal(got[Q].B[:, 2:], last[Q].B[:, 2:])
    assert torch.equal(got[Q].A[2:], last[Q].A[2:])
    assert not torch.equal(got[UP].A, last[UP].A)


def test_the_server_keeps_single_precision_whatever_the_wire_is():
    state = started(adapter({Q: 2, UP: 2}, 3).to(torch.float32))
    (upload,) = uploads_of({Q: 2, UP: 2})
    coarse = Upload("c0", 1, upload.adapter.to(torch.bfloat16), 7)
    got = after(state, [coarse]).model
    assert {f.B.dtype for f in got.values()} == {torch.float32}


def test_a_handout_is_the_first_terms():
    whole = adapter({Q: 6, UP: 5}, 3)
    first = handed(started(whole), Client("c0", {Q: 2, UP: 3}, "small", 7))
    for m, rank in ((Q, 2), (UP, 3)):
        assert torch.equal(first[m].B, whole[m].B[:, :rank])
        assert torch.equal(first[m].A, whole[m].A[:rank])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("keep", 0.0),
        ("keep", 1.5),
        ("keep", -0.1),
        ("keep", "0.9"),
        ("decay", -0.1),
        ("decay", np.nan),
        ("smallest_rank", 0),
        ("smallest_rank", 2.5),
    ],
)
def test_values_that_no_option_has_are_refused(option, value):
    with pytest.raises(ValueError, match=option):
        methods.make("hetlora", {option: value})
