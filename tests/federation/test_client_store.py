"""What a client keeps between rounds."""

import pytest
import torch

from flexlora.federation.client_store import ClientStore, Forgotten
from flexlora.lowrank.factors import Adapter
from support.factors import random_factors


def adapter(seed):
    return Adapter({"model.q": random_factors(seed=seed, dtype=torch.float32)})


def same(got, want):
    return torch.equal(got["model.q"].B, want["model.q"].B)


def test_merged_updates_are_those_of_earlier_rounds(tmp_path):
    private = ClientStore(tmp_path)
    private.merge({1: adapter(1), 12: adapter(12)})
    private.merge({2: adapter(2)})
    assert private.merged(1) == []
    assert [same(a, adapter(n)) for a, n in zip(private.merged(12), (1, 2), strict=True)] == [
        True,
        True,
    ]
    assert len(private.merged(13)) == 3


def test_a_repeated_round_finds_what_it_found_the_first_time(tmp_path):
    private = ClientStore(tmp_path)
    assert private.kept("anna", 1) is None
    private.keep("anna", 1, adapter(1))
    private.keep("anna", 4, adapter(4))
    assert same(private.kept("anna", 4), adapter(1))
    private.keep("anna", 4, adapter(5))
    assert same(private.kept("anna", 4), adapter(1))
    assert same(private.kept("anna", 9), adapter(5))
    private.keep("anna", 9, adapter(9))
    assert same(private.kept("anna", 9), adapter(5))
    assert same(private.kept("anna", 10), adapter(9))


def test_clients_of_any_name_have_places_of_their_own(tmp_path):
    private = ClientStore(tmp_path / "private")
    names = ["../../etc", "a/b", "a", "ä" * 400]
    for number, name in enumerate(names):
        private.keep(name, 1, adapter(number))
    assert all(same(private.kept(n, 2), adapter(i)) for i, n in enumerate(names))
    assert [path.name for path in tmp_path.iterdir()] == ["private"]


def test_a_client_that_lost_what_it_had_merged_says_so(tmp_path):
    entry = adapter(3)
    private = ClientStore(tmp_path / "private")
    private.merge({1: entry, 2: entry})
    private.merge({4: entry}, held=[1, 2])
    assert len(private.merged(5)) == 3
    with pytest.raises(Forgotten, match="in rounds"):
        ClientStore(tmp_path / "new").merge({5: entry}, held=[1, 4])
