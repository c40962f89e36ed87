"""What malicious clients send: within their ranks, and as the kind of attack says."""

import dataclasses
import math

import pytest
import torch

from flexlora.errors import ConfigError
from flexlora.federation.attacks.attack import Malicious
from flexlora.federation.attacks.kinds import KINDS, named
from flexlora.laws.dense import product, relative_error
from flexlora.lowrank import Adapter, Factors
from support.factors import random_factors

SHAPES = {"model.q": (11, 7), "model.up": (13, 5)}
CLIP = 3.0


def adapter(ranks, seed) -> Adapter:
    return Adapter(
        {
            m: random_factors(out, rank, in_, seed + n)
            for n, ((m, (out, in_)), rank) in enumerate(zip(SHAPES.items(), ranks, strict=True))
        }
    )


def malicious(number=0, ranks=(3, 2), start=True, space="products", factors="BA") -> Malicious:
    """A client that has trained from its start, or from a zero product."""
    begun = adapter(ranks, 40)
    if not start:
        begun = Adapter({m: Factors(0 * f.B, f.A) for m, f in begun.items()})
    learnt = adapter(ranks, 60 + 10 * number)
    trained = {
        m: Factors(f.B + 0.1 * learnt[m].B, f.A + 0.1 * learnt[m].A) for m, f in begun.items()
    }
    return Malicious(
        f"m{number}",
        2,
        begun.restricted(factors),
        Adapter(trained).restricted(factors),
        space,
        CLIP,
        5,
    )


def sent(attack, *clients):
    changes = attack.changes(clients)
    return [one.sending(change) for one, change in zip(clients, changes, strict=True)]


def change_of(one: Malicious, upload: Adapter, module: str) -> torch.Tensor:
    if one.space == "products":
        return product(upload[module]) - product(one.start[module])
    f, s = upload[module], one.start[module]
    return torch.cat([(f.B - s.B).flatten(), (f.A - s.A).flatten()]).double()[None]


def norm_of(one: Malicious, upload: Adapter) -> float:
    return math.sqrt(sum(float(change_of(one, upload, m).square().sum()) for m in SHAPES))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("space", ["products", "parameters"])
@pytest.mark.parametrize("ranks", [(1, 1), (3, 2), (6, 5)])
def test_an_upload_has_the_shapes_of_an_honest_one(name, space, ranks):
    clients = [malicious(n, ranks, space=space) for n in range(3)]
    for one, upload in zip(clients, sent(KINDS[name](), *clients), strict=True):
        assert upload.ranks == one.trained.ranks
        for module, f in upload.items():
            assert f.shape == one.trained[module].shape and f.B.dtype == one.trained[module].B.dtype
            assert bool(f.B.isfinite().all() and f.A.isfinite().all())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("factors", ["B", "A"])
def test_where_one_factor_travels_the_other_stays_at_home(name, factors):
    clients = [malicious(n, space="parameters", factors=factors) for n in range(2)]
    for one, upload in zip(clients, sent(KINDS[name](), *clients), strict=True):
        for module, f in upload.items():
            assert f.shape == one.trained[module].shape


@pytest.mark.parametrize("space", ["products", "parameters"])
def test_a_sign_flip_is_the_change_turned_around(space):
    # From zero, so that the client's ranks can hold it.
    one = malicious(start=False, space=space)
    for strength in (1.0, 10.0):
        (upload,) = sent(named(f"sign-flip:{strength:g}"), one)
        for module in SHAPES:
            wanted = -strength * change_of(one, one.trained, module)
            assert relative_error(change_of(one, upload, module), wanted) < 1e-12


def test_a_small_rank_holds_the_best_part_of_a_turned_change():
    one = malicious()
    (upload,) = sent(KINDS["sign-flip"](), one)
    for module in SHAPES:
        wanted = 2 * product(one.start[module]) - product(one.trained[module])
        values = torch.linalg.svdvals(wanted)
        lost = float((product(upload[module]) - wanted).norm())
        assert lost == pytest.approx(float(values[one.trained[module].rank :].norm()), rel=1e-9)


def test_collusion_is_one_change_of_the_median_size():
    clients = [malicious(n, start=False, ranks=(6, 5)) for n in range(3)]
    uploads = sent(KINDS["collusion"](), *clients)
    sizes = sorted(norm_of(one, one.trained) for one in clients)
    for one, upload in zip(clients, uploads, strict=True):
        assert norm_of(one, upload) == pytest.approx(sizes[1], rel=0.05)
        inner = sum(
            float((change_of(one, upload, m) * change_of(one, one.trained, m)).sum())
            for m in SHAPES
        )
        assert inner < 0
    first, second = ({m: product(u[m]) for m in SHAPES} for u in uploads[:2])
    assert all(relative_error(first[m], second[m]) < 1e-12 for m in SHAPES)


@pytest.mark.parametrize("name", ["adaptive", "direction"])
def test_adaptive_attacks_stay_below_the_clip_bound(name):
    one = malicious(start=False)
    attack = KINDS[name]()
    size = norm_of(one, one.trained)
    assert norm_of(one, *sent(attack, one)) == pytest.approx(0.95 * CLIP * size, rel=1e-9)
    unbounded = dataclasses.replace(one, clip_factor=0.0)
    assert norm_of(one, *sent(attack, unbounded)) == pytest.approx(0.95 * 3.0 * size, rel=1e-9)


def test_a_direction_is_the_same_in_every_round_and_of_rank_one():
    attack = KINDS["direction"]()
    first, later = (
        sent(attack, dataclasses.replace(malicious(start=False), round=number))[0]
        for number in (1, 7)
    )
    for module in SHAPES:
        assert relative_error(product(first[module]), product(later[module])) < 1e-12
        values = torch.linalg.svdvals(product(first[module]))
        assert float(values[1]) < 1e-9 * float(values[0])


def test_noise_is_another_in_every_round_and_for_every_client():
    attack = KINDS["noise"]()
    one, other = malicious(0), malicious(1)
    uploads = [*sent(attack, one, other), *sent(attack, dataclasses.replace(one, round=3))]
    products = [product(upload["model.q"]) for upload in uploads]
    for n in range(3):
        assert relative_error(products[n], products[n - 1]) > 0.5


def test_one_round_is_attacked_alone():
    once = KINDS["scale-once"]()
    assert [once.is_due(number, 4) for number in (1, 2, 3, 4)] == [False, True, False, False]
    assert once.is_due(1, 1)
    assert all(KINDS["scale"]().is_due(number, 4) for number in (1, 2, 3, 4))


def test_attacks_are_named_with_a_strength():
    assert named("none") is None
    assert named("scale").strength == 1000 and named("scale:7.5").strength == 7.5
    for text, message in (
        ("flip", "There is no attack 'flip'; there are none, sign-flip"),
        ("none:2", "There is no attack 'none'"),
        ("scale:", "is a number above 0"),
        ("scale:-1", "is a number above 0"),
        ("scale:nan", "is a number above 0"),
        ("scale:1e300", "is a number above 0"),
        ("", "There is no attack ''"),
    ):
        with pytest.raises(ConfigError, match=message):
            named(text)
