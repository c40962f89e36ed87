"""What the papers claim of their methods, and how methods meet where they should."""

import dataclasses

import pytest
import torch

from flexlora.errors import ConfigError
from flexlora.laws.dense import best, product, relative_error, weighted_sum
from flexlora.laws.rounds import (
    EQUAL_RANKS,
    EXAMPLES,
    MIXED_RANKS,
    SEED,
    SHAPES,
    after_rounds,
    aggregated,
    base_updates,
    client_turn,
    clients_of,
    context_of,
    first_state,
    no_training,
    noise,
    opened,
)
from flexlora.lowrank import Adapter, Factors, LowRankSum
from flexlora.method import (
    Download,
    FreshAdapters,
    Turn,
    Upload,
    component_shares,
    factor_means,
)
from flexlora.methods import make
from support.factors import random_factors

Q = "model.q"
SHARES = [n / sum(EXAMPLES) for n in EXAMPLES]


def turns_of(method, state, clients, number, learn=None):
    """A round of all these clients, by noise of that round's number unless said otherwise."""
    context, learn = context_of(number, clients), learn or noise(method, number)
    return [client_turn(method, state, c, context, learn) for c in clients]


def uploads_of(method, state, clients, number, learn=None):
    return [turn.upload for turn in turns_of(method, state, clients, number, learn)]


def after_one_round(method, clients):
    return after_rounds(method, clients, 1, lambda number: noise(method, number))


def aggregate(name, ranks=EQUAL_RANKS, **options):
    """The update after the first round."""
    method = make(name, options)
    clients = clients_of(method, ranks)
    return method.global_adapter(after_one_round(method, clients), context_of(1, clients))


@pytest.mark.parametrize(
    ("names", "ranks"),
    [
        (
            {"flexlora": {}, "raflora": {}, "flexfold": {}, "fullrank": {"remainder": "drop"}},
            EQUAL_RANKS,
        ),
        ({"fedit": {}, "replication": {}, "fedplora": {"weights": "examples"}}, EQUAL_RANKS),
        ({"flora": {}, "florist": {"energy": 1.0}}, MIXED_RANKS),
        ({"fedexlora": {}, "fullrank": {}}, EQUAL_RANKS),
    ],
)
def test_methods_meet(names, ranks):
    """At equal ranks the product rules are one, as are the rules on factors."""
    updates = [aggregate(name, ranks, **options) for name, options in names.items()]
    for module in SHAPES:
        rank = min(update[module].rank for update in updates)
        want = best(product(updates[0][module]), rank)
        for other in updates[1:]:
            assert relative_error(best(product(other[module]), rank), want) < 1e-6


def energies(name, rounds, **options):
    """The singular values of module q after rounds without any gradient.

    They start equal, so that each term's fate is its own.
    """
    method = make(name, {"split": "left", "accuracy": "exact", **options})
    clients = clients_of(method, [{Q: 2}, {Q: 3}, {Q: 6}])
    f = random_factors(11, 6, 7, 4)
    start = Factors(torch.linalg.qr(f.B)[0], torch.linalg.qr(f.A.T)[0].T)
    state = method.start(Adapter({Q: start}), context_of(0, clients))
    for number in range(1, rounds + 1):
        uploads = uploads_of(method, state, clients, number, no_training)
        state = aggregated(method, state, uploads, context_of(number, clients))
    update = method.global_adapter(state, context_of(rounds, clients))
    return torch.linalg.svdvals(product(update[Q]))[:6]


def test_flexlora_loses_what_few_clients_hold_geometrically():
    """The singular values of the block that rank h is needed for are (N_h / N)^t."""
    got = energies("flexlora", 5)
    shares = [1.0, 1.0, SHARES[1] + SHARES[2], *[SHARES[2]] * 3]
    assert torch.allclose(got, torch.tensor(shares, dtype=torch.float64) ** 5, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "options"),
    [("raflora", {}), ("flexfold", {}), ("flexfold", {"normalise": "holders"})],
)
def test_others_keep_it(name, options):
    assert torch.allclose(energies(name, 5, **options), torch.ones(6).double(), rtol=1e-9)


def test_component_shares_are_the_weights_of_rb_lora():
    """p_k N / N_j with a rank rarity N / N_j is n_k / N_j."""
    terms = [(p, random_factors(rank=r, seed=r)) for p, r in zip(SHARES, (2, 3, 6), strict=True)]
    shares = component_shares(SHARES, [f.rank for _, f in terms])
    for (p, f), got in zip(terms, shares, strict=True):
        for term in range(f.rank):
            rarity = 1 / sum(q for q, g in terms if g.rank > term)
            assert float(got[term]) == pytest.approx(p * rarity, rel=1e-12)


def test_a_term_without_holders_is_carried_over():
    """Clients of rank 2 and 3 alone: the terms from 3 on stay as they were."""
    for name in ("raflora", "flexfold"):
        options = {"normalise": "holders"} if name == "flexfold" else {}
        method = make(name, {"accuracy": "exact", **options})
        clients = clients_of(method)
        state, context = after_one_round(method, clients), context_of(2, clients)
        last = state.model[Q]
        few = uploads_of(method, state, clients, 2, no_training)[:2]
        after = method.global_adapter(aggregated(method, state, few, context), context)[Q]
        assert relative_error(product(after), product(last)) < 1e-9
    dropped = make("raflora", {"carry": False, "accuracy": "exact"})
    after = dropped.global_adapter(aggregated(dropped, state, few, context), context)[Q]
    assert relative_error(product(after), product(last.first(3))) < 1e-9


def test_folding_hands_every_client_the_whole_model():
    method = make("flexfold")
    clients = clients_of(method)
    state, context = after_one_round(method, clients), context_of(2, clients)
    whole = {m: product(f) for m, f in state.model.items()}
    for client in clients:
        start = opened(method, state, client, context)
        assert start.adapter.ranks == client.ranks
        model = client_turn(method, state, client, context, no_training).model()
        assert all(relative_error(model[m], whole[m]) < 1e-12 for m in SHAPES)
    assert opened(method, state, clients[2], context).frozen is not None
    plain = make("flexfold", {"fold": False})
    assert opened(plain, state, clients[0], context).frozen is None


def test_energy_bounds_the_rank_that_travels():
    method = make("flexfold", {"energy": 0.6})
    clients = clients_of(method)
    cut = after_one_round(method, clients).model
    full = after_one_round(make("flexfold"), clients).model
    for module in SHAPES:
        S = torch.linalg.svdvals(product(full[module])).square()
        rank = cut[module].rank
        assert S[:rank].sum() / S.sum() >= 0.6 > S[: rank - 1].sum() / S.sum()


def test_fedex_sends_a_residual_of_rank_k_minus_one_times_r():
    method = make("fedexlora")
    clients = clients_of(method, [{"model.q": 2, "model.up": 1}] * 3)
    (residual,) = base_updates(after_one_round(method, clients))
    assert {f.rank for f in residual.values()} == {4, 2}
    S = torch.linalg.svdvals(product(residual[Q]))
    assert S[3] > 1e-6 > S[4] / S[0]
    (nothing,) = base_updates(after_one_round(method, clients[:1]))
    assert {f.rank for f in nothing.values()} == {0}


def test_fedsvd_renews_the_bases_and_not_the_product():
    method = make("fedsvd")
    clients = clients_of(method)
    state = first_state(method, clients)
    uploads = uploads_of(method, state, clients, 1)
    after = aggregated(method, state, uploads, context_of(1, clients)).model
    for module, f in after.items():
        A = state.model[module].A
        mean = weighted_sum(
            [(p, Factors(u.adapter[module].B, A)) for p, u in zip(SHARES, uploads, strict=True)]
        )
        assert relative_error(product(f), mean) < 1e-9
        assert torch.allclose(f.A @ f.A.T, torch.eye(f.rank, dtype=f.A.dtype), atol=1e-9)


def test_rolora_takes_turns_and_begins_with_b():
    method = make("rolora")
    clients = clients_of(method)
    state = first_state(method, clients)
    for number, factor in ((1, "B"), (2, "A"), (3, "B")):
        done = turns_of(method, state, clients, number)[0]
        assert done.start.factors == factor
        sent = done.upload.adapter[Q]
        assert (sent.B.numel() > 0, sent.A.numel() > 0) == (factor == "B", factor == "A")
        state = aggregated(method, state, [done.upload], context_of(number, clients))


def meeting(name, **options):
    """By module, the product after a round and the mean of the clients' products.

    All methods meet in the same second round: that after FedIT's first.
    """
    method = make(name, options)
    clients = clients_of(method)
    state, context = after_one_round(make("fedit"), clients), context_of(2, clients)
    turns = turns_of(method, state, clients, 2, noise(method, 3))
    after = aggregated(method, state, [t.upload for t in turns], context)
    got = method.global_adapter(after, context)
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
    method = make("lorafair", {"strength": 0.2})
    terms = [(p, random_factors(seed=i)) for i, p in enumerate(SHARES)]
    mean = factor_means(terms)
    D = method._ridge(LowRankSum.of(terms), mean)
    missed = product(Factors(mean.B + D, mean.A)) - weighted_sum(terms)
    scale = 0.2 * (mean.A @ mean.A.T).diagonal().mean()
    assert float((missed @ mean.A.T + scale * D).abs().max()) < 1e-9
    assert float(D.norm()) > 0.01


def test_fedrot_recovers_a_planted_rotation():
    """Clients that differ by a rotation alone send the same factors after the whole one."""
    method = make("fedrotlora", {"softness": 1.0})
    f, R = random_factors(), torch.linalg.qr(random_factors(3, 3, 3, 8).B)[0]
    R = R * torch.tensor([1.0, 1.0, float(torch.linalg.det(R).sign())], dtype=R.dtype)
    there = Adapter({Q: Factors(f.B @ R, R.T @ f.A)})
    start = Download(Adapter({Q: f}))
    for number in (2, 3):
        sent = method.upload_from(Turn(start, there, 4, number))[Q]
        assert relative_error(sent.B, f.B) < 1e-9 and relative_error(sent.A, f.A) < 1e-9
    first = method.upload_from(Turn(start, there, 4, 1))[Q]
    assert torch.equal(first.A, there[Q].A)
    soft = make("fedrotlora", {"softness": 0.5}).upload_from(Turn(start, there, 4, 3))[Q]
    assert relative_error(product(soft), product(f)) < 1e-9
    assert 1e-3 < relative_error(soft.B, f.B) < relative_error(there[Q].B, f.B)


def test_loraa2_trains_the_terms_that_move_most():
    method = make("loraa2")
    clients = clients_of(method)
    state = after_one_round(method, clients)

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

    start = opened(method, state, clients[0], context_of(2, clients))
    assert start.factors == "A" and start.ints["budget"] == 3
    assert method.select(start, learn(clients[0], start)) == {"model.q": [0, 5], "model.up": [1]}


def test_fedplora_trains_every_term_in_time_and_leaves_the_others():
    method = make("fedplora")
    clients = clients_of(method)
    state, seen = first_state(method, clients), set()
    for number in range(1, 9):
        upload = uploads_of(method, state, clients, number)[0]
        seen |= set(upload.component_ids[Q])
        after = aggregated(method, state, [upload], context_of(number, clients))
        for term in range(6):
            before, now = (s.model[Q].components([term]) for s in (state, after))
            assert torch.equal(before.B, now.B) == (term not in upload.component_ids[Q])
        state = after
    assert seen == set(range(6))


def test_fslora_is_the_global_model_on_average():
    """The mean of sketches over many draws nears the whole product."""
    method = make("fslora")
    clients = clients_of(method)
    state = after_one_round(method, clients)
    draws = [
        product(opened(method, state, clients[1], context_of(number, clients)).adapter[Q])
        for number in range(1, 400)
    ]
    want = product(state.model[Q])
    assert relative_error(sum(draws) / len(draws), want) < 0.15
    assert relative_error(draws[0], want) > 0.3


def test_fslora_takes_the_scale_of_the_sketch_out_of_the_change():
    """A client of rank 2 of 6 whose B grew by 3 in a sketch moves the global B by 3 * 2 / 6."""
    method = make("fslora")
    clients = clients_of(method)
    state = after_one_round(method, clients)

    def grow(client, start):
        return Adapter({m: Factors(f.B + 3.0, f.A) for m, f in start.adapter.items()})

    upload = uploads_of(method, state, clients, 2, grow)[0]
    before = state.model[Q]
    after = aggregated(method, state, [upload], context_of(2, clients)).model[Q]
    for term in range(6):
        moved = 3 * 2 / 6 if term in upload.component_ids[Q] else 0.0
        want = torch.full_like(after.B[:, term], moved)
        assert torch.allclose(after.B[:, term] - before.B[:, term], want)
    assert torch.equal(after.A, before.A)


def test_fedsa_keeps_b_at_home():
    method = make("fedsalora")
    clients = clients_of(method)
    state = first_state(method, clients)
    first = turns_of(method, state, clients, 1)[0]
    assert first.upload.adapter[Q].B.numel() == 0
    state = aggregated(method, state, [first.upload], context_of(1, clients))
    again = opened(method, state, clients[0], context_of(2, clients), first.private)
    assert torch.equal(again.adapter[Q].B, first.trained[Q].B)
    assert torch.equal(again.adapter[Q].A, first.trained[Q].A)
    other = opened(method, state, clients[1], context_of(2, clients))
    assert float(other.adapter[Q].B.norm()) == 0


def test_ffa_shares_one_a_of_which_small_clients_hold_the_first_rows():
    method = make("ffalora")
    clients = clients_of(method)
    state, context = first_state(method, clients), context_of(1, clients)
    starts = [opened(method, state, c, context) for c in clients]
    longest = starts[2].adapter[Q].A
    for client, start in zip(clients, starts, strict=True):
        assert torch.equal(start.adapter[Q].A, longest[: client.ranks[Q]])


def test_flora_starts_afresh_on_the_merged_base():
    method = make("flora")
    clients = clients_of(method)
    state = after_one_round(method, clients)
    start = opened(method, state, clients[0], context_of(2, clients))
    assert start.adapter.ranks == clients[0].ranks
    assert float(start.adapter[Q].B.norm()) == 0 and float(start.adapter[Q].A.norm()) > 0
    assert start.base_updates[1][Q].rank == 2 + 3 + 6
    other = opened(method, state, clients[0], context_of(3, clients))
    assert not torch.equal(other.adapter[Q].A, start.adapter[Q].A)


def test_florist_keeps_its_energy():
    method = make("florist", {"energy": 0.7})
    clients = clients_of(method)
    state, context = first_state(method, clients), context_of(1, clients)
    uploads = uploads_of(method, state, clients, 1)
    got = method.global_adapter(aggregated(method, state, uploads, context), context)
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
    with pytest.raises(ConfigError, match=fault):
        make(name, options)


def test_a_late_client_is_sent_all_that_it_missed():
    method = make("flora")
    clients = clients_of(method)
    state = first_state(method, clients)
    for number in (1, 2, 3):
        uploads = uploads_of(method, state, clients, number)[:1]
        state = aggregated(method, state, uploads, context_of(number, clients))
    context = context_of(4, clients)
    assert list(method.handout(state, clients[0], context).base_updates) == [3]
    assert list(method.handout(state, clients[1], context).base_updates) == [1, 2, 3]


def product_of(name, wire_dtype, rounds, **options):
    """Norms of module q's update before and after rounds of equal clients that do not train."""
    method = make(name, options)
    clients = clients_of(method, EQUAL_RANKS)
    state = after_rounds(method, clients, 1, lambda number: noise(method, number, own=False))
    norms = []
    for number in range(2, rounds + 2):
        context = context_of(number, clients)
        uploads = [
            dataclasses.replace(upload, adapter=upload.adapter.to(wire_dtype))
            for upload in uploads_of(method, state, clients, number, no_training)
        ]
        state = aggregated(method, state, uploads, context)
        norms.append(float(product(method.global_adapter(state, context)[Q]).norm()))
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
        method = make(name)
        clients = clients_of(method)
        state = first_state(method, clients)
        handed = method.handout(state, clients[0], context_of(1, clients))
        coarse = dataclasses.replace(handed, adapter=handed.adapter.to(torch.bfloat16))
        own = Adapter(
            {
                m: Factors(torch.full((f.shape[0], f.rank), 1.001), torch.zeros(f.rank, 0))
                for m, f in state.model.first(clients[0].ranks).items()
            }
        )
        fresh = FreshAdapters(SHAPES, SEED, clients[0].id, 1)
        start = method.prepare(coarse, {"B": own}, fresh).adapter[Q]
        if name == "fedsalora":
            assert float(start.B[0, 0]) == pytest.approx(1.001, rel=1e-6)
        else:
            A = state.model[Q].A[: start.rank]
            assert torch.equal(start.A, A.to(torch.float32))


def test_carried_terms_stay_trainable_in_raflora():
    """Terms that nobody has trained yet pass through the SVD with one half alive."""
    method = make("raflora")
    clients = clients_of(method)
    state = first_state(method, clients)
    small = uploads_of(method, state, clients, 1)[:1]
    state = aggregated(method, state, small, context_of(1, clients))
    start = opened(method, state, clients[2], context_of(2, clients)).adapter[Q]
    assert bool((start.A.norm(dim=1) > 0.5).all())


@pytest.mark.parametrize(
    ("name", "options"), [("florana", {}), ("lorafair", {}), ("lorafair", {"solver": "cosine"})]
)
@pytest.mark.parametrize("zero", ["B", "A"])
def test_a_module_without_gradients_stays_as_it_is(name, options, zero):
    method = make(name, options)
    clients = clients_of(method)
    state = first_state(method, clients)
    f = random_factors(11, 3, 7)
    dead = Factors(f.B * (zero != "B"), f.A * (zero != "A"))
    rest = random_factors(13, 2, 5)
    uploads = [
        Upload(c.id, 1, Adapter({"model.q": dead, "model.up": rest}), c.examples) for c in clients
    ]
    after = aggregated(method, state, uploads, context_of(1, clients)).model["model.q"]
    assert torch.allclose(after.B, dead.B) and torch.allclose(after.A, dead.A)


def test_fedrot_turns_by_a_in_its_second_round_and_by_b_in_its_third():
    """With another rotation in each factor, only the one looked at is recovered."""
    method = make("fedrotlora", {"softness": 1.0})
    f = random_factors()
    turns = [torch.linalg.qr(random_factors(3, 3, 3, seed).B)[0] for seed in (8, 9)]
    R, S = (R * torch.tensor([1.0, 1.0, float(torch.linalg.det(R).sign())]) for R in turns)
    there = Adapter({Q: Factors(f.B @ R, S.T @ f.A)})
    for number, factor in ((2, "A"), (3, "B")):
        sent = method.upload_from(Turn(Download(Adapter({Q: f})), there, 4, number))[Q]
        errors = {"B": relative_error(sent.B, f.B), "A": relative_error(sent.A, f.A)}
        assert errors.pop(factor) < 1e-9 < errors.popitem()[1]
