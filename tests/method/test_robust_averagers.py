"""Averagers that compare clients: their rules against dense ones, under attack, in every method."""

import math

import numpy as np
import pytest
import torch

from flexlora import methods
from flexlora.errors import ConfigError, ProtocolError
from flexlora.laws.dense import best, product, relative_error
from flexlora.laws.rounds import (
    SHAPES,
    client_turn,
    clients_of,
    context_of,
    first_state,
    noise,
    opened,
)
from flexlora.lowrank import Adapter, Factors, as_vector, product_gram
from flexlora.method import (
    Changes,
    Client,
    Feature,
    Mean,
    Turn,
    Untrained,
    Upload,
    averagers,
    comparable,
    require_means,
    require_uploads,
    space_of,
    with_components,
)
from flexlora.method.averagers.fltrust import FLTrust, trust
from flexlora.method.averagers.geometric_median import GeometricMedian, median, support, supported
from flexlora.method.averagers.multi_krum import MultiKrum, krum_scores
from support.factors import random_factors

ROBUST = (GeometricMedian(), MultiKrum())
JUDGING = (*ROBUST, FLTrust("d2"))
SERVED = [
    name
    for name in methods.shipped()
    if methods.make(name).needs <= GeometricMedian.offers
    and methods.make(name).weights in GeometricMedian.accepts
]
NUMBERED = {Mean.NUMBERED_CHANGES, Mean.NUMBERED_COMPONENTS}
ALIKE = [name for name in SERVED if not methods.make(name).needs & NUMBERED]
"""Those whose clients of equal ranks train the same components."""


# --- the rules against dense ones --------------------------------------------------------------


def vectors(count: int = 13, seed: int = 1) -> list[Factors]:
    """Products of mixed ranks, some of them far from the others."""
    common = random_factors(19, 3, 11, 90)
    return [
        Factors(
            torch.cat([common.B, (0.2 + (n % 5 == 0) * 3) * f.B], 1), torch.cat([common.A, f.A])
        )
        for n, f in enumerate(
            random_factors(19, 1 + n % 4, 11, seed + n, torch.float64) for n in range(count)
        )
    ]


def declared(count: int) -> torch.Tensor:
    examples = torch.arange(3.0, 3 + count, dtype=torch.float64)
    return examples / examples.sum()


def apart(value: torch.Tensor, wanted: torch.Tensor) -> float:
    """The distance of two vectors, relative to the second."""
    return float((value - wanted).norm() / wanted.norm())


def dense(factors: list[Factors]) -> torch.Tensor:
    return torch.stack([product(f).flatten() for f in factors])


def test_the_geometric_median_is_that_of_the_dense_matrices():
    factors = vectors()
    flat, weights = dense(factors), declared(13)
    shares, distances = median(product_gram(factors), weights, 5000, 1e-14)
    center = flat.mean(0)
    for _ in range(5000):
        inverse = weights / (flat - center).norm(dim=1)
        center = (inverse[:, None] * flat).sum(0) / inverse.sum()
    assert apart(shares @ flat, center) < 1e-10
    torch.testing.assert_close(distances, (flat - center).norm(dim=1), rtol=1e-10, atol=0)
    torch.testing.assert_close(shares.sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("left_out", [0, 4, 11])
def test_support_is_that_of_the_dense_matrices(left_out):
    factors = vectors()
    flat = dense(factors)
    directions = flat / flat.norm(dim=1, keepdim=True)
    wanted = []
    for row, each in enumerate(directions @ directions.T):
        others = torch.cat([each[:row], each[row + 1 :]]).sort(descending=True).values
        wanted.append(others[left_out:].mean())
    values = support(product_gram(factors), left_out)
    torch.testing.assert_close(values, torch.stack(wanted), rtol=0, atol=1e-12)


@pytest.mark.parametrize("common", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("size", [0.5, 1.0])
def test_two_colluding_clients_of_ten_do_not_turn_what_others_have_in_common(common, size):
    """Honest changes of norms 1 to 3, further from each other than from a turned change."""
    generator = torch.Generator().manual_seed(3)
    shared, *own = torch.randn(11, 1997, generator=generator, dtype=torch.float64) / 1997**0.5
    honest = torch.stack(
        [
            (1 + n % 3) * (common**0.5 * shared + (1 - common) ** 0.5 * each)
            for n, each in enumerate(own)
        ]
    )
    turned = -honest[:2].mean(0)
    turned *= size * honest.norm(dim=1).median() / turned.norm()
    sent = torch.cat([turned.expand(2, -1), honest[2:]])
    equal = torch.full((10,), 0.1, dtype=torch.float64)
    gram, wanted = sent @ sent.T, honest[2:].mean(0)

    assert supported(gram, 2).tolist() == list(range(2, 10))
    assert supported(gram, 1).tolist() in ([0, *range(2, 10)], list(range(1, 10)))
    assert supported(honest @ honest.T, 2).tolist() == list(range(10))
    shares, _ = median(gram[2:, 2:], equal[2:] / 0.8, 1000, 1e-9)
    alone, _ = median(gram, equal, 1000, 1e-9)
    assert alone[:2].sum() > 0.05
    result = shares @ sent[2:]
    assert result @ wanted / (result.norm() * wanted.norm()) > 0.95


def test_the_scores_of_krum_are_those_of_the_dense_matrices():
    factors = vectors()
    flat = dense(factors)
    squares = (flat[:, None] - flat).square().sum(-1)
    wanted = []
    for row, each in enumerate(squares):
        others = torch.cat([each[:row], each[row + 1 :]])
        wanted.append(others.sort().values[: 13 - 3 - 2].sum())
    torch.testing.assert_close(
        krum_scores(product_gram(factors), 3), torch.stack(wanted), rtol=1e-10, atol=0
    )


@pytest.mark.parametrize("size", [1e3, 1e6, 1e12])
def test_one_client_of_any_size_leaves_the_median_where_it_is(size):
    factors = vectors()
    large = Factors(size * factors[3].B, factors[3].A)
    shares, _ = median(product_gram([*factors[:3], large, *factors[4:]]), declared(13), 1000, 1e-9)
    alone, _ = median(product_gram(factors), declared(13), 1000, 1e-9)
    flat = dense(factors)
    moved = shares @ torch.cat([flat[:3], size * flat[3:4], flat[4:]])
    # By no more than a client of its weight can, 1/12 of the spread.
    assert apart(moved, alone @ flat) < 0.2
    assert shares[3] < 1.0 / size


def test_trust_is_the_cosine_without_what_is_turned_and_without_size():
    factors = vectors()
    turned = [Factors(-2 * factors[4].B, factors[4].A), Factors(1e9 * factors[5].B, factors[5].A)]
    cohort = [*factors[:4], *turned, *factors[6:]]
    flat = dense(cohort)
    sizes = flat.norm(dim=1)
    cosines = flat @ flat[2] / (sizes * sizes[2])
    wanted = cosines.clamp_min(0) * (sizes[2] / sizes).clamp_max(1)
    shares = trust(product_gram(cohort), 2)
    torch.testing.assert_close(shares, wanted, rtol=1e-10, atol=1e-15)
    assert abs(float(shares[2]) - 1) < 1e-14 and shares[4] == 0
    # What a client adds to the sum is never more than the trusted change.
    assert float((shares * sizes).max()) <= float(sizes[2]) * (1 + 1e-12)


def test_the_trusted_client_is_named_present_and_changes_something():
    with pytest.raises(ConfigError, match=r"set averager\.trusted to the name"):
        averagers.make({"name": "fltrust"})
    method = methods.make("flexlora")
    clients, state, context = round_of(method)
    uploads = [client_turn(method, state, c, context, noise(method, 4)).upload for c in clients]
    uploads[2] = untrained_upload(method, state, clients[2], context)
    changes = changes_of(method, state, clients, context, uploads)
    for name, message in (("nobody", "has no upload in round 3"), ("c2", "has changed nothing")):
        with pytest.raises(ProtocolError, match=message):
            FLTrust(name).cohort(uploads, method.weights, context, changes)
    cohort = FLTrust("c0").cohort(uploads, method.weights, context, changes)
    assert cohort.scores["c0"] == pytest.approx(1) and "c2" not in cohort.clients


@pytest.mark.parametrize("averager", [GeometricMedian(), MultiKrum()], ids=["median", "krum"])
def test_a_client_that_reports_a_billion_examples_does_not_lead(averager):
    """Half of all weight in one hand would break every rule; the share is limited before it."""
    method = methods.make("flexlora")
    clients = [
        Client(f"f{n}", {"model.q": 2, "model.up": 2}, "type", 10**9 if n == 0 else 10)
        for n in range(8)
    ]
    state, context = first_state(method, clients), context_of(1, clients)
    learn = [noise(method, 50, size=30.0), *[noise(method, 51, own=False)] * 7]
    uploads = [
        client_turn(method, state, c, context, each).upload
        for c, each in zip(clients, learn, strict=True)
    ]
    known = {client.id: client for client in clients}
    untrained = Untrained(method, state, context, known, torch.float64)
    changes = Changes(uploads, untrained, "products", "examples", 0.2)
    cohort = averager.cohort(uploads, method.weights, context, changes)
    assert cohort.weights.get("f0", 0.0) < 0.05 * sum(cohort.weights.values())


def test_equal_changes_have_a_median():
    same = [random_factors(5, 2, 3, 1)] * 4
    shares, distances = median(product_gram(same), declared(4), 100, 1e-9)
    torch.testing.assert_close(shares, declared(4))
    assert distances.max() < 1e-6
    most = [*same, random_factors(5, 2, 3, 2)]
    shares, _ = median(product_gram(most), declared(5), 1000, 1e-9)
    assert shares[4] < 1e-4
    zero = [Factors(torch.zeros(5, 1), torch.zeros(1, 3))] * 3
    shares, _ = median(product_gram(zero), declared(3), 100, 1e-9)
    torch.testing.assert_close(shares, declared(3))


def test_the_median_expects_less_than_half_of_attackers():
    assert [GeometricMedian().expected(n) for n in (1, 3, 4, 5, 10, 11)] == [0, 1, 1, 1, 2, 3]
    assert [GeometricMedian(0).expected(n) for n in (3, 10)] == [0, 0]
    for wrong in (-0.1, 0.5):
        with pytest.raises(ConfigError, match=r"attackers is a share in \[0, 0\.5\)"):
            GeometricMedian(wrong)


def test_krum_expects_no_more_attackers_than_it_can_find():
    assert [MultiKrum().expected(n) for n in (1, 3, 4, 5, 10, 11, 50)] == [0, 0, 0, 1, 2, 3, 10]
    assert [MultiKrum(0.4).expected(n) for n in (5, 10, 50)] == [1, 3, 20]


# --- row B6 of docs/trust.md ------------------------------------------------------------------

DIM, CLIENTS, ATTACKERS = 96, 50, 10


def spectrum_factors(draw: np.random.Generator, rank: int) -> Factors:
    """A random matrix of rank ``rank``, of norm 1, with singular values 1, 1/2, 1/3 ..."""
    left, right = (np.linalg.qr(draw.normal(size=(DIM, rank)))[0] for _ in range(2))
    values = 1 / np.arange(1, rank + 1)
    values /= np.linalg.norm(values)
    return Factors(torch.from_numpy(left * values), torch.from_numpy(right.T))


def honest_cohort(seed: int) -> list[Factors]:
    """Mixed ranks, 70 percent of each update in common with all others."""
    draw = np.random.default_rng(seed)
    common = spectrum_factors(draw, 8)
    cohort = []
    for _ in range(CLIENTS):
        rank = int(draw.integers(2, 33))
        shared = common.first(min(rank, 8))
        own = spectrum_factors(draw, rank)
        cohort.append(
            Factors(
                torch.cat([0.7**0.5 * shared.B, 0.3**0.5 * own.B], 1),
                torch.cat([shared.A, own.A]),
            )
        )
    return cohort


def attacked(kind: str, honest: list[Factors], seed: int) -> list[Factors]:
    """The cohort after ten clients have attacked."""
    draw = np.random.default_rng(seed + 1000)
    sizes = sorted(float(product(f).norm()) for f in honest)
    together = spectrum_factors(draw, 4)

    def malicious(f: Factors) -> Factors:
        if kind == "sign flip":
            return Factors(-f.B, f.A)
        if kind == "minus ten times":
            return Factors(-10 * f.B, f.A)
        if kind == "noise":
            noise = spectrum_factors(draw, f.rank)
            return Factors(1e6 * noise.B, noise.A)
        if kind == "collusion":
            return Factors(sizes[CLIENTS // 2] * together.B, together.A)
        return f

    return [*map(malicious, honest[:ATTACKERS]), *honest[ATTACKERS:]]


def weights_of(rule: str, gram: torch.Tensor) -> torch.Tensor:
    equal = torch.full((CLIENTS,), 1 / CLIENTS, dtype=torch.float64)
    if rule == "mean":
        return equal
    if rule == "geometric median":
        return median(gram, equal, 1000, 1e-9)[0]
    if rule == "geometric median of those supported":
        kept = supported(gram, ATTACKERS)
        shares = torch.zeros(CLIENTS, dtype=torch.float64)
        even = torch.full((len(kept),), 1 / len(kept), dtype=torch.float64)
        shares[kept] = median(gram[kept][:, kept], even, 1000, 1e-9)[0]
        return shares
    kept = krum_scores(gram, ATTACKERS).argsort()[: CLIENTS - 2 * ATTACKERS]
    shares = torch.zeros(CLIENTS, dtype=torch.float64)
    shares[kept] = 1 / len(kept)
    return shares


B6_ATTACKS = ("none", "sign flip", "minus ten times", "noise", "collusion")
B6_BOUNDS = {
    "geometric median": 0.2,
    "geometric median of those supported": 0.2,
    "multi-Krum": 0.1,
}


def b6_error(rule: str, kind: str, seed: int) -> float:
    """The distance of a rule's result to the mean of the forty honest clients, relative to it."""
    honest = honest_cohort(seed)
    uploads = attacked(kind, honest, seed)
    shares = weights_of(rule, product_gram(uploads))
    wanted = dense(honest[ATTACKERS:]).mean(0)
    return apart(shares @ dense(uploads), wanted)


@pytest.mark.parametrize("kind", B6_ATTACKS[1:])
def test_a_fifth_of_attackers_does_not_lead_a_robust_rule(kind):
    """Row B6: 10 of 50 clients, ranks 2 to 32."""
    for rule, most in B6_BOUNDS.items():
        assert b6_error(rule, kind, seed=0) < most, rule
    assert b6_error("mean", kind, seed=0) > B6_BOUNDS["geometric median"]


# --- in every method ----------------------------------------------------------------------------


def untrained_upload(method, state, client, context):
    """What a client sends that goes through a round without a step."""
    start = opened(method, state, client, context)
    if Feature.PROBES in method.features:
        start = with_components(start, method.select(start, noise(method, 3)(client, start)))
    trained, parameters = start.adapter, method.parametrize(start)
    if parameters is not None:
        trained = Adapter({m: as_vector(p.parameters) for m, p in parameters.items()})
    return Upload(
        client.id,
        context.round,
        method.upload_from(Turn(start, trained, 0, context.round)),
        client.examples,
        {},
        start.component_ids,
    )


def round_of(method, number=3):
    """Clients, the state after rounds of noise, and a round's turns."""
    clients, private = clients_of(method), {}
    state = first_state(method, clients)
    for earlier in range(1, number):
        context = context_of(earlier, clients)
        turns = [
            client_turn(method, state, c, context, noise(method, earlier), private.get(c.id))
            for c in clients
        ]
        private = {turn.client.id: turn.private for turn in turns}
        plain = averagers.make({"name": "plain"})
        cohort = plain.cohort([turn.upload for turn in turns], method.weights, context)
        state = method.aggregate(state, cohort, context)
    return clients, state, context_of(number, clients)


def changes_of(method, state, clients, context, uploads) -> Changes:
    known = {client.id: client for client in clients}
    untrained = Untrained(method, state, context, known, torch.float64)
    return Changes(uploads, untrained, space_of(method))


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("number", [1, 3])
def test_a_client_that_trains_nothing_has_changed_nothing(name, number):
    method = methods.make(name)
    clients, state, context = round_of(method, number)
    uploads = [untrained_upload(method, state, client, context) for client in clients]
    changes = changes_of(method, state, clients, context, uploads)
    size = sum(
        float(f.B.square().sum() + f.A.square().sum()) for u in uploads for f in u.adapter.values()
    )
    assert float(changes.gram(list(SHAPES)).diagonal().max()) <= 1e-12 * max(size, 1)


def reflected(now: Factors, before: Factors, sign: float, space: str) -> Factors:
    """What was handed out, changed by ``sign`` times the honest change."""
    if space == "products":
        return Factors(
            torch.cat([sign * now.B, (1 - sign) * before.B], 1), torch.cat([now.A, before.A])
        )
    return Factors(before.B + sign * (now.B - before.B), before.A + sign * (now.A - before.A))


@pytest.mark.parametrize("name", ALIKE)
def test_a_turned_change_is_seen_behind_what_all_have_in_common(name):
    """Seven clients that learn the same and one that turns it around, by both rules."""
    method = methods.make(name)
    some, state, context = round_of(method)
    clients = [Client(f"d{n}", some[1].ranks, "type1", 10) for n in range(8)]
    turns = [
        client_turn(
            method, state, c, context, lambda client, start: Adapter(mixed(method, client, start))
        )
        for c in clients
    ]
    uploads = [turn.upload for turn in turns]
    changes = changes_of(method, state, clients, context, uploads)
    space, turned = space_of(method), {}
    for m, f in uploads[7].adapter.items():
        before = comparable(f, changes.untrained.of("d7", m), m) or Factors(0 * f.B, 0 * f.A)
        turned[m] = reflected(f.to(torch.float64), before.to(torch.float64), -1, space)
    uploads[7] = Upload("d7", 3, Adapter(turned), 10, {}, uploads[7].component_ids)
    changes = changes_of(method, state, clients, context, uploads)
    for averager in JUDGING:
        require_means(averager, method)
        cohort = averager.cohort(uploads, method.weights, context, changes)
        shares, worst = cohort.weights, min if isinstance(averager, FLTrust) else max
        assert worst(cohort.scores, key=cohort.scores.get) == "d7"
        assert shares.get("d7", 0) < 0.5 * min(v for id, v in shares.items() if id != "d7")
        after = method.aggregate(state, cohort, context)
        update = method.global_adapter(after, context)
        assert all(bool(f.B.isfinite().all() and f.A.isfinite().all()) for f in update.values())


def mixed(method, client, start):
    """Training of which most is the same for all clients."""
    own, common = noise(method, 5)(client, start), noise(method, 6, own=False)(client, start)
    parameters = method.parametrize(start)
    begun = (
        start.adapter
        if parameters is None
        else {m: as_vector(p.parameters) for m, p in parameters.items()}
    )
    return {
        m: Factors(f.B + 0.2 * (own[m].B - begun[m].B), f.A + 0.2 * (own[m].A - begun[m].A))
        for m, f in common.items()
    }


def test_flexlora_under_multi_krum_is_the_best_rank_of_the_mean_of_those_kept():
    method = methods.make("flexlora", {"accuracy": "exact"})
    clients = [
        Client(f"e{n}", {"model.q": 1 + n % 4, "model.up": 2}, f"type{n % 4}", 10 + n)
        for n in range(7)
    ]
    state, context = first_state(method, clients), context_of(1, clients)
    uploads = [
        client_turn(method, state, c, context, noise(method, n, size=1 + 4 * (n == 2))).upload
        for n, c in enumerate(clients)
    ]
    changes = changes_of(method, state, clients, context, uploads)
    cohort = MultiKrum().cohort(uploads, method.weights, context, changes)
    assert len(cohort.clients) == 3 and "e2" not in cohort.clients
    assert set(cohort.scores) == {client.id for client in clients}
    kept = [u for u in uploads if u.client in cohort.clients]
    total = sum(u.examples for u in kept)
    model = method.aggregate(state, cohort, context).model
    for module in SHAPES:
        mean = sum(u.examples / total * product(u.adapter[module]) for u in kept)
        assert relative_error(product(model[module]), best(mean, context.ranks[module])) < 1e-9


def test_methods_that_cannot_be_served_are_refused_by_name():
    refused = set(methods.shipped()) - set(SERVED)
    assert refused == {"florana", "hetlora"}
    with pytest.raises(ConfigError, match=r"single uploads.*FLoRA-NA"):
        require_means(ROBUST[0], methods.make("florana"))
    with pytest.raises(ConfigError, match="norms of what they send"):
        require_means(ROBUST[1], methods.make("hetlora"))
    with pytest.raises(ConfigError, match=r"set method\.weights to 'examples'"):
        require_means(ROBUST[0], methods.make("flexlora", {"weights": "norms"}))
    assert Mean.AUX_FACTORS not in GeometricMedian.offers


def test_rounds_that_may_be_too_small_are_refused():
    for averager, least in zip(ROBUST, (3, 5), strict=True):
        require_uploads(averager, least)
        with pytest.raises(ConfigError, match=f"set federation.quorum to {least}"):
            require_uploads(averager, least - 1)


def test_options_that_make_no_sense_are_refused():
    for options in ({"iterations": 0}, {"tolerance": 0.0}, {"tolerance": math.nan}):
        with pytest.raises(ConfigError):
            averagers.make({"name": "geometric_median", **options})
    for share in (0.0, 0.5, -1.0, math.nan):
        with pytest.raises(ConfigError):
            MultiKrum(share)


def test_without_the_changes_there_is_no_comparison():
    method = methods.make("flexlora")
    clients, state, context = round_of(method)
    uploads = [untrained_upload(method, state, client, context) for client in clients]
    for averager in ROBUST:
        with pytest.raises(ProtocolError, match="needs the clients' changes"):
            averager.cohort(uploads, method.weights, context)
