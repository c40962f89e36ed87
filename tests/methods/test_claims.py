"""What the papers claim of their methods, and how methods meet where they should."""

import dataclasses

import pytest
import torch

from flexlora.lowrank.factors import Adapter, Factors
from flexlora.lowrank.sums import LowRankSum
from flexlora.method import averaging
from flexlora.method.interface import Client, Download, Upload
from support.factors import random_factors
from support.oracle import best, product, relative_error, weighted_sum
from support.rounds import (
    EXAMPLES,
    MIXED,
    SAME,
    SHAPES,
    clients_of,
    fresh,
    jolt,
    made,
    merged,
    opened,
    played,
    started,
    still,
    turn,
)

Q = "model.q"
SHARES = [n / sum(EXAMPLES) for n in EXAMPLES]


def aggregates(name, uploads_of, ranks=SAME, **options):
    method = made(name, **options)
    clients = clients_of(method, ranks)
    state = started(method, clients)
    return method.update(method.aggregate(state, uploads_of(method, state, clients)))


def trained(method, state, clients):
    return [turn(method, state, c, 1, jolt(1)).upload for c in clients]


@pytest.mark.parametrize(
    ("names", "ranks"),
    [
        ({"flexlora": {}, "raflora": {}, "flexfold": {}, "fullrank": {"remainder": "drop"}}, SAME),
        ({"fedit": {}, "replication": {}, "fedplora": {"weights": "examples"}}, SAME),
        ({"flora": {}, "florist": {"energy": 1.0}}, MIXED),
        ({"fedexlora": {}, "fullrank": {}}, SAME),
    ],
)
def test_methods_meet(names, ranks):
    """At equal ranks the product rules are one, as are the rules on factors."""
    found = [aggregates(n, trained, ranks, **options) for n, options in names.items()]
    for module in SHAPES:
        rank = min(f[module].rank for f in found)
        want = best(product(found[0][module]), rank)
        for other in found[1:]:
            assert relative_error(best(product(other[module]), rank), want) < 1e-6


def energies(name, rounds, **options):
    """The singular values of module q after rounds without any gradient.

    They start equal, so that each term's fate is its own.
    """
    method = made(name, split="left", accuracy="exact", **options)
    clients = clients_of(method, [{Q: 2}, {Q: 3}, {Q: 6}])
    f = random_factors(11, 6, 7, 4)
    start = Factors(torch.linalg.qr(f.B)[0], torch.linalg.qr(f.A.T)[0].T)
    state = method.start(Adapter({Q: start}))
    for number in range(1, rounds + 1):
        uploads = [turn(method, state, c, number, still).upload for c in clients]
        state = method.aggregate(state, uploads)
    return torch.linalg.svdvals(product(method.update(state)[Q]))[:6]


def test_flexlora_loses_what_few_clients_hold_geometrically():
    """The singular values of the block that rank h is needed for are (N_h / N)^t."""
    got = energies("flexlora", 5)
    held = [1.0, 1.0, SHARES[1] + SHARES[2], *[SHARES[2]] * 3]
    assert torch.allclose(got, torch.tensor(held, dtype=torch.float64) ** 5, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "options"),
    [("raflora", {}), ("flexfold", {}), ("flexfold", {"normalise": "holders"})],
)
def test_others_keep_it(name, options):
    assert torch.allclose(energies(name, 5, **options), torch.ones(6).double(), rtol=1e-9)


def test_rank_wise_weights_are_those_of_rb_lora():
    """p_k N / N_j with a rank rarity N / N_j is n_k / N_j."""
    held = [(p, random_factors(rank=r, seed=r)) for p, r in zip(SHARES, (2, 3, 6), strict=True)]
    for (p, f), got in zip(held, averaging.rank_wise(held), strict=True):
        for term in range(f.rank):
            rarity = 1 / sum(q for q, g in held if g.rank > term)
            assert float(got[term]) == pytest.approx(p * rarity, rel=1e-12)


def test_a_term_without_holders_is_carried_over():
    """Clients of rank 2 and 3 alone: the terms from 3 on stay as they were."""
    for name in ("raflora", "flexfold"):
        options = {"normalise": "holders"} if name == "flexfold" else {}
        method = made(name, accuracy="exact", **options)
        clients = clients_of(method)
        state = played(method, clients, 1, jolt)
        last = state.adapters["global"][Q]
        few = [turn(method, state, c, 2, still).upload for c in clients[:2]]
        after = method.update(method.aggregate(state, few))[Q]
        assert relative_error(product(after), product(last)) < 1e-9
    dropped = made("raflora", carry=False, accuracy="exact")
    after = dropped.update(dropped.aggregate(state, few))[Q]
    assert relative_error(product(after), product(last.first(3))) < 1e-9


def test_folding_hands_every_client_the_whole_model():
    method = made("flexfold")
    clients = clients_of(method)
    state = played(method, clients, 1, jolt)
    whole = {m: product(f) for m, f in state.adapters["global"].items()}
    for client in clients:
        start = opened(method, state, client, 2)
        assert start.adapter.ranks == client.ranks
        model = turn(method, state, client, 2, still).model()
        assert all(relative_error(model[m], whole[m]) < 1e-12 for m in SHAPES)
    assert opened(method, state, clients[2], 2).rest is not None
    plain = made("flexfold", fold=False)
    assert opened(plain, state, clients[0], 2).rest is None


def test_energy_bounds_the_rank_that_travels():
    method = made("flexfold", energy=0.6)
    clients = clients_of(method)
    cut = played(method, clients, 1, jolt).adapters["global"]
    full = played(made("flexfold"), clients, 1, jolt).adapters["global"]
    for module in SHAPES:
        S = torch.linalg.svdvals(product(full[module])).square()
        rank = cut[module].rank
        assert S[:rank].sum() / S.sum() >= 0.6 > S[: rank - 1].sum() / S.sum()


def test_fedex_sends_a_residual_of_rank_k_minus_one_times_r():
    method = made("fedexlora")
    clients = clients_of(method, [{"model.q": 2, "model.up": 1}] * 3)
    state = played(method, clients, 1, jolt)
    assert {f.rank for f in merged(state)[0].values()} == {4, 2}
    S = torch.linalg.svdvals(product(merged(state)[0][Q]))
    assert S[3] > 1e-6 > S[4] / S[0]
    alone = played(method, clients[:1], 1, jolt)
    assert {f.rank for f in merged(alone)[0].values()} == {0}


def test_fedsvd_renews_the_bases_and_not_the_product():
    method = made("fedsvd")
    clients = clients_of(method)
    state = started(method, clients)
    uploads = trained(method, state, clients)
    after = method.aggregate(state, uploads).adapters["global"]
    for module, f in after.items():
        A = state.adapters["global"][module].A
        mean = weighted_sum(
            [(p, Factors(u.adapter[module].B, A)) for p, u in zip(SHARES, uploads, strict=True)]
        )
        assert relative_error(product(f), mean) < 1e-9
        assert torch.allclose(f.A @ f.A.T, torch.eye(f.rank, dtype=f.A.dtype), atol=1e-9)


def test_rolora_takes_turns_and_begins_with_b():
    method = made("rolora")
    clients = clients_of(method)
    state = started(method, clients)
    for number, half in ((1, "B"), (2, "A"), (3, "B")):
        done = turn(method, state, clients[0], number, jolt(number))
        assert done.start.halves == half
        sent = done.upload.adapter[Q]
        assert (sent.B.numel() > 0, sent.A.numel() > 0) == (half == "B", half == "A")
        state = method.aggregate(state, [done.upload])


def meeting(name, **options):
    """By module, the product after a round and the mean of the clients' products."""
    method = made(name, **options)
    clients = clients_of(method)
    state = played(method, clients, 1, jolt)
    turns = [turn(method, state, c, 2, jolt(2)) for c in clients]
    got = method.update(method.aggregate(state, [t.upload for t in turns]))
    return {
        m: (product(got[m]), sum(p * t.model()[m] for p, t in zip(SHARES, turns, strict=True)))
        for m in SHAPES
    }


@pytest.mark.parametrize("name", ["lorafair", "florana"])
def test_corrected_means_are_nearer_to_the_mean_of_products(name):
    plain, corrected = meeting("fedit"), meeting(name)
    for module in SHAPES:
        assert relative_error(*corrected[module]) < relative_error(*plain[module])


def test_the_papers_solver_of_lorafair_turns_towards_the_mean_of_products():
    options = {"solver": "cosine", "strength": 1e-4, "steps": 300, "step_size": 1.0}
    plain, corrected = meeting("fedit"), meeting("lorafair", **options)
    for module in SHAPES:
        similar = [
            torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), dim=0)
            for got, want in (plain[module], corrected[module])
        ]
        assert similar[1] > similar[0] + 0.01


def test_the_ridge_of_lorafair_is_stationary():
    """g = ((B + D) A - W) A' + strength * scale * D is zero at its minimum."""
    method = made("lorafair", strength=0.2)
    held = [(p, random_factors(seed=i)) for i, p in enumerate(SHARES)]
    mean = averaging.factor_means(held)
    D = method._ridge(held, mean)
    missed = product(Factors(mean.B + D, mean.A)) - weighted_sum(held)
    scale = 0.2 * (mean.A @ mean.A.T).diagonal().mean()
    assert float((missed @ mean.A.T + scale * D).abs().max()) < 1e-9
    assert float(D.norm()) > 0.01


def test_fedrot_recovers_a_planted_rotation():
    """Clients that differ by a rotation alone send the same factors after the whole one."""
    method = made("fedrotlora", softness=1.0)
    f, R = random_factors(), torch.linalg.qr(random_factors(3, 3, 3, 8).B)[0]
    R = R * torch.tensor([1.0, 1.0, float(torch.linalg.det(R).sign())], dtype=R.dtype)
    there = Adapter({Q: Factors(f.B @ R, R.T @ f.A)})
    for rounds in (1, 2):
        start = Download(Adapter({Q: f}), facts={"rounds": rounds})
        sent = method.shares(start, there)[Q]
        assert relative_error(sent.B, f.B) < 1e-9 and relative_error(sent.A, f.A) < 1e-9
    first = method.shares(dataclasses.replace(start, facts={"rounds": 0}), there)[Q]
    assert torch.equal(first.A, there[Q].A)
    soft = made("fedrotlora", softness=0.5).shares(start, there)[Q]
    assert relative_error(product(soft), product(f)) < 1e-9
    assert 1e-3 < relative_error(soft.B, f.B) < relative_error(there[Q].B, f.B)


def test_loraa2_trains_the_terms_that_move_most():
    method = made("loraa2")
    clients = clients_of(method)
    state = played(method, clients, 1, lambda number: jolt(number))

    def learn(client, start):
        """In the probing epoch, terms 0 and 5 of q and 1 of up move, and these alone."""
        modules = {}
        for module, f in start.adapter.items():
            A = f.A.clone()
            moved = {"model.q": [0, 5], "model.up": [1]}[module]
            for term in moved if f.rank > 5 or module == "model.up" else []:
                A[term] += 10.0
            modules[module] = Factors(f.B, A)
        return Adapter(modules)

    start = opened(method, state, clients[0], 2)
    assert start.halves == "A" and start.facts["budget"] == 3
    assert method.choose(start, learn(clients[0], start)) == {"model.q": [0, 5], "model.up": [1]}


def test_fedplora_trains_every_term_in_time_and_leaves_the_others():
    method = made("fedplora")
    clients = clients_of(method)
    state, seen = started(method, clients), set()
    for number in range(1, 9):
        done = turn(method, state, clients[0], number, jolt(number))
        seen |= set(done.upload.terms[Q])
        after = method.aggregate(state, [done.upload])
        for term in range(6):
            before, now = (s.adapters["global"][Q].terms([term]) for s in (state, after))
            assert torch.equal(before.B, now.B) == (term not in done.upload.terms[Q])
        state = after
    assert seen == set(range(6))


def test_fslora_is_the_global_model_on_average():
    """The mean of sketches over many draws nears the whole product."""
    method = made("fslora")
    clients = clients_of(method)
    state = played(method, clients, 1, jolt)
    draws = [
        product(turn(method, state, clients[1], number, still).trained[Q])
        for number in range(1, 400)
    ]
    want = product(state.adapters["global"][Q])
    assert relative_error(sum(draws) / len(draws), want) < 0.15
    assert relative_error(draws[0], want) > 0.3


def test_fslora_takes_the_scale_of_the_sketch_out_of_the_change():
    """A client of rank 2 of 6 whose B grew by 3 in a sketch moves the global B by 3 * 2 / 6."""
    method = made("fslora")
    clients = clients_of(method)
    state = played(method, clients, 1, jolt)

    def grow(client, start):
        return Adapter({m: Factors(f.B + 3.0, f.A) for m, f in start.adapter.items()})

    done = turn(method, state, clients[0], 2, grow)
    before = state.adapters["global"][Q]
    after = method.aggregate(state, [done.upload]).adapters["global"][Q]
    for term in range(6):
        moved = 3 * 2 / 6 if term in done.upload.terms[Q] else 0.0
        want = torch.full_like(after.B[:, term], moved)
        assert torch.allclose(after.B[:, term] - before.B[:, term], want)
    assert torch.equal(after.A, before.A)


def test_fedsa_keeps_b_at_home():
    method = made("fedsalora")
    clients = clients_of(method)
    state = started(method, clients)
    first = turn(method, state, clients[0], 1, jolt(1))
    assert first.upload.adapter[Q].B.numel() == 0
    state = method.aggregate(state, [first.upload])
    again = opened(method, state, clients[0], 2, first.kept)
    assert torch.equal(again.adapter[Q].B, first.trained[Q].B)
    assert torch.equal(again.adapter[Q].A, first.trained[Q].A)
    assert float(opened(method, state, clients[1], 2).adapter[Q].B.norm()) == 0


def test_ffa_shares_one_a_of_which_small_clients_hold_the_first_rows():
    method = made("ffalora")
    clients = clients_of(method)
    starts = [opened(method, started(method, clients), c, 1) for c in clients]
    longest = starts[2].adapter[Q].A
    for client, start in zip(clients, starts, strict=True):
        assert torch.equal(start.adapter[Q].A, longest[: client.ranks[Q]])


def test_flora_starts_afresh_on_the_merged_base():
    method = made("flora")
    clients = clients_of(method)
    state = played(method, clients, 1, jolt)
    start = opened(method, state, clients[0], 2)
    assert float(start.adapter[Q].B.norm()) == 0 and float(start.adapter[Q].A.norm()) > 0
    assert start.merge[1][Q].rank == 2 + 3 + 6
    other = opened(method, state, clients[0], 3)
    assert not torch.equal(other.adapter[Q].A, start.adapter[Q].A)


def test_florist_keeps_its_energy():
    method = made("florist", energy=0.7)
    clients = clients_of(method)
    state = started(method, clients)
    uploads = trained(method, state, clients)
    got = method.update(method.aggregate(state, uploads))
    for module in SHAPES:
        whole = LowRankSum.of((p, u.adapter[module]) for p, u in zip(SHARES, uploads, strict=True))
        S = torch.linalg.svdvals(product(whole.stacked())).square()
        rank = got[module].rank
        assert S[:rank].sum() / S.sum() >= 0.7 > S[: rank - 1].sum() / S.sum()
        assert relative_error(product(got[module]), best(product(whole.stacked()), rank)) < 1e-9


@pytest.mark.parametrize(
    ("name", "options", "fault"),
    [
        ("florist", {"energy": 0.0}, "energy is a share"),
        ("flexfold", {"energy": 1.5}, "energy is a share"),
        ("fedrotlora", {"softness": 2.0}, "softness is a share"),
        ("florana", {"sweeps": 0}, "sweeps is at least 1"),
        ("lorafair", {"strength": 0.0}, "strength is finite"),
        ("lorafair", {"steps": 0}, "steps is at least 1"),
    ],
)
def test_options_out_of_range_are_refused(name, options, fault):
    with pytest.raises(ValueError, match=fault):
        made(name, **options)


def test_a_late_client_is_sent_all_that_it_missed():
    method = made("flora")
    clients = clients_of(method)
    state = started(method, clients)
    for number in (1, 2, 3):
        state = method.aggregate(
            state, [turn(method, state, clients[0], number, jolt(number)).upload]
        )
    draw = None
    assert list(method.handout(state, clients[0], draw).merge) == [3]
    assert list(method.handout(state, clients[1], draw).merge) == [1, 2, 3]
    assert isinstance(clients[0], Client)


def product_of(name, wire_dtype, rounds, **options):
    """Norms of module q's update before and after rounds of equal clients that do not train."""
    method = made(name, **options)
    clients = clients_of(method, SAME)
    state = played(method, clients, 1, lambda number: jolt(number, own=False))
    norms = []
    for number in range(2, rounds + 2):
        uploads = []
        for client in clients:
            done = turn(method, state, client, number, still)
            coarse = done.upload.adapter.to(wire_dtype)
            uploads.append(dataclasses.replace(done.upload, adapter=coarse))
        state = method.aggregate(state, uploads)
        norms.append(float(product(method.update(state)[Q]).norm()))
    return norms


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flexlora", {}),
        ("raflora", {}),
        ("flexfold", {}),
        ("flexfold", {"normalise": "holders"}),
        ("ffalora", {}),
        ("replication", {}),
        ("fedit", {}),
    ],
)
def test_shares_are_not_rounded_to_the_wire(name, options):
    """With thirds in bfloat16 the update would grow by a fifth of a percent in each round."""
    norms = product_of(name, torch.bfloat16, 40, **options)
    assert abs(norms[-1] / norms[0] - 1) < 0.01


def test_what_never_travels_is_not_rounded_to_the_wire():
    for name in ("fedsalora", "ffalora"):
        method = made(name)
        clients = clients_of(method)
        state = started(method, clients)
        handed = method.handout(state, clients[0], None)
        coarse = dataclasses.replace(handed, adapter=handed.adapter.to(torch.bfloat16))
        kept = Adapter(
            {
                m: Factors(torch.full((f.shape[0], f.rank), 1.001), torch.zeros(f.rank, 0))
                for m, f in state.adapters["global"].first(clients[0].ranks).items()
            }
        )
        start = method.receive(coarse, kept, fresh(clients[0], 1)).adapter[Q]
        if name == "fedsalora":
            assert float(start.B[0, 0]) == pytest.approx(1.001, rel=1e-6)
        else:
            A = state.adapters["global"][Q].A[: start.rank]
            assert torch.equal(start.A, A.to(torch.float32))


def test_carried_terms_stay_trainable_in_raflora():
    """Terms that nobody has trained yet pass through the SVD with one half alive."""
    method = made("raflora")
    clients = clients_of(method)
    state = started(method, clients)
    small = [turn(method, state, clients[0], 1, jolt(1)).upload]
    state = method.aggregate(state, small)
    start = opened(method, state, clients[2], 2).adapter[Q]
    assert bool((start.A.norm(dim=1) > 0.5).all())


@pytest.mark.parametrize(
    ("name", "options"), [("florana", {}), ("lorafair", {}), ("lorafair", {"solver": "cosine"})]
)
@pytest.mark.parametrize("zero", ["B", "A"])
def test_a_module_without_gradients_stays_as_it_is(name, options, zero):
    method = made(name, **options)
    clients = clients_of(method)
    state = started(method, clients)
    f = random_factors(11, 3, 7)
    dead = Factors(f.B * (zero != "B"), f.A * (zero != "A"))
    rest = random_factors(13, 2, 5)
    uploads = [
        Upload(c.id, 1, Adapter({"model.q": dead, "model.up": rest}), c.examples) for c in clients
    ]
    after = method.aggregate(state, uploads).adapters["global"]["model.q"]
    assert torch.allclose(after.B, dead.B) and torch.allclose(after.A, dead.A)


def test_fedrot_turns_by_a_in_its_second_round_and_by_b_in_its_third():
    """With another rotation in each factor, only the one looked at is recovered."""
    method = made("fedrotlora", softness=1.0)
    f = random_factors()
    turns = [torch.linalg.qr(random_factors(3, 3, 3, seed).B)[0] for seed in (8, 9)]
    R, S = (R * torch.tensor([1.0, 1.0, float(torch.linalg.det(R).sign())]) for R in turns)
    there = Adapter({Q: Factors(f.B @ R, S.T @ f.A)})
    for rounds, half in ((1, "A"), (2, "B")):
        start = Download(Adapter({Q: f}), facts={"rounds": rounds})
        sent = method.shares(start, there)[Q]
        found = {"B": relative_error(sent.B, f.B), "A": relative_error(sent.A, f.A)}
        assert found.pop(half) < 1e-9 < found.popitem()[1]
