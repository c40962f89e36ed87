from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.config.ranks import (
    DISTRIBUTIONS,
    PAPER_TYPES,
    RankType,
    assign,
    distribution,
)
from flexlora.seeds import rng

MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.1.mlp.down_proj",
]


def names(count: int) -> list[str]:
    return [f"c{i:04d}" for i in range(count)]


def test_the_paper_s_types():
    """Table 1 of arXiv 2402.11505: ranks for attention and feed-forward layers."""
    ranks = {name: tuple(kind.by_module(MODULES).values()) for name, kind in PAPER_TYPES.items()}
    assert ranks == {
        "type1": (8, 8, 8),
        "type2": (30, 30, 30),
        "type3": (30, 200, 200),
        "type4": (200, 200, 200),
    }


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("uniform", (100, 100, 100, 100)),
        ("heavy-tail-light", (340, 20, 20, 20)),
        ("heavy-tail-light-code", (320, 20, 20, 40)),
        ("heavy-tail-strong", (20, 20, 20, 340)),
        ("heavy-tail-strong-code", (20, 20, 40, 320)),
        ("normal", (23, 177, 177, 23)),
        ("normal-code", (23, 23, 177, 177)),
    ],
)
def test_the_paper_s_distributions(name, counts):
    dealt = assign(names(400), PAPER_TYPES, distribution(name), rng(1))
    assert tuple(dealt.histogram.values()) == counts
    assert sum(distribution(name).values()) == pytest.approx(1)


def test_every_distribution_is_tested_here():
    (parameters,) = [
        mark.args[1] for mark in test_the_paper_s_distributions.pytestmark if mark.args
    ]
    assert {name for name, _ in parameters} == set(DISTRIBUTIONS)


def test_an_unknown_distribution_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'heavy-tail-light'"):
        distribution("heavy-tail-ligt")


@settings(deadline=None)
@given(
    st.integers(1, 60),
    st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any),
    st.integers(0, 9),
)
def test_quotas_are_met_but_for_less_than_a_client(count, parts, seed):
    types = {f"t{i}": RankType(i + 1, i + 1) for i in range(len(parts))}
    shares = {f"t{i}": part / sum(parts) for i, part in enumerate(parts)}
    dealt = assign(names(count), types, shares, rng(seed))
    assert set(dealt.of) == set(names(count))
    for name, share in shares.items():
        assert abs(dealt.histogram[name] - share * count) < 1


def test_who_is_of_which_type_is_random_and_repeatable():
    shares = distribution("uniform")
    one, same, other = (assign(names(40), PAPER_TYPES, shares, rng(s)).of for s in (1, 1, 2))
    assert one == same != other
    assert Counter(one.values()) == Counter(other.values())
    assert sorted(one.values()) != list(one.values())


def test_explicit_types_come_first_and_the_rest_is_dealt():
    explicit = {"c0003": "type4", "c0001": "type4"}
    dealt = assign(names(10), PAPER_TYPES, {"type1": 0.5, "type2": 0.5}, rng(1), explicit)
    assert {client for client, kind in dealt.of.items() if kind == "type4"} == set(explicit)
    assert dealt.histogram == {"type1": 4, "type2": 4, "type3": 0, "type4": 2}


def test_all_clients_named_need_no_shares():
    dealt = assign(["a", "b"], PAPER_TYPES, {}, rng(1), {"a": "type1", "b": "type2"})
    assert dealt.of == {"a": "type1", "b": "type2"}


@pytest.mark.parametrize(
    ("shares", "explicit", "message"),
    [
        ({"type1": 0.5, "type2": 0.4}, {}, "must add up to 1"),
        ({"type1": 1.5, "type2": -0.5}, {}, "must add up to 1"),
        ({}, {}, "must add up to 1"),
        ({"type9": 1.0}, {}, "ranks.distribution names the type 'type9'"),
        ({"type1": 1.0}, {"c0000": "big"}, "ranks.clients names the type 'big'"),
        ({"type1": 1.0}, {"nobody": "type1"}, "names client 'nobody', which is not one of the 4"),
    ],
)
def test_what_cannot_be_dealt_is_refused(shares, explicit, message):
    with pytest.raises(ValueError, match=message):
        assign(names(4), PAPER_TYPES, shares, rng(1), explicit)


def test_a_held_out_client_of_ranks_is_called_that():
    with pytest.raises(ValueError, match=r"'mary', which is one of the 2 held-out clients"):
        assign(names(4), PAPER_TYPES, {}, rng(1), {"mary": "type1"}, ["mary", "john"])
    with pytest.raises(ValueError, match=r"that have training rows. Did you mean 'c0003'"):
        assign(names(4), PAPER_TYPES, {}, rng(1), {"c0030": "type1"}, ["mary"])


def test_kinds_of_layers_are_told_apart():
    assert RankType(3, 5).by_module(MODULES) == dict(zip(MODULES, (3, 5, 5), strict=True))
    assert set(RankType(3, 3).by_module(["odd.name"]).values()) == {3}
    with pytest.raises(ValueError, match=r"'odd\.name' is neither in an attention"):
        RankType(3, 5).by_module(["odd.name"])


@pytest.mark.parametrize("ranks", [(0, 0), (3, -1), (-1, 3), (-1, -1)])
def test_a_client_trains_something(ranks):
    with pytest.raises(ValueError, match="give at least 1 for one of them"):
        RankType(*ranks)


@pytest.mark.parametrize(("ranks", "modules"), [((3, 0), MODULES[:1]), ((0, 5), MODULES[1:])])
def test_layers_of_rank_0_are_not_trained(ranks, modules):
    assert RankType(*ranks).by_module(MODULES) == dict.fromkeys(modules, max(ranks))
    assert RankType(*ranks).targets == (ranks[0] > 0, ranks[1] > 0)
