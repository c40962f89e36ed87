"""What a client keeps between rounds."""

import pytest
import torch

from flexlora.federation.client_store import ClientStore, LostBase
from flexlora.lowrank.factors import Adapter
from support.factors import random_factors


def adapter(seed):
    return Adapter({"model.q": random_factors(seed=seed, dtype=torch.float32)})


def same(got, want):
    return torch.equal(got["model.q"].B, want["model.q"].B)


def test_merged_updates_are_those_of_earlier_rounds(tmp_path):
    private = ClientStore(tmp_path)
    private.add_updates({1: adapter(1), 12: adapter(12)})
    private.add_updates({2: adapter(2)})
    assert private.updates_before(1) == []
    assert [
        same(a, adapter(n)) for a, n in zip(private.updates_before(12), (1, 2), strict=True)
    ] == [
        True,
        True,
    ]
    assert len(private.updates_before(13)) == 3


def test_a_repeated_round_finds_what_it_found_the_first_time(tmp_path):
    private = ClientStore(tmp_path)
    assert private.private("anna", 1) == {}
    private.keep("anna", 1, {"control": adapter(1)})
    private.keep("anna", 4, {"control": adapter(4)})
    assert same(private.private("anna", 4)["control"], adapter(1))
    private.keep("anna", 4, {"control": adapter(5)})
    assert same(private.private("anna", 4)["control"], adapter(1))
    assert same(private.private("anna", 9)["control"], adapter(5))
    private.keep("anna", 9, {"control": adapter(9)})
    assert same(private.private("anna", 9)["control"], adapter(5))
    assert same(private.private("anna", 10)["control"], adapter(9))


def test_clients_of_any_name_have_places_of_their_own(tmp_path):
    private = ClientStore(tmp_path / "private")
    names = ["../../etc", "a/b", "a", "ä" * 400]
    for number, name in enumerate(names):
        private.keep(name, 1, {"control": adapter(number)})
    assert all(same(private.private(n, 2)["control"], adapter(i)) for i, n in enumerate(names))
    assert [path.name for path in tmp_path.iterdir()] == ["private"]


def test_a_client_that_lost_what_it_had_merged_says_so(tmp_path):
    entry = adapter(3)
    private = ClientStore(tmp_path / "private")
    private.add_updates({1: entry, 2: entry})
    private.add_updates({4: entry}, expected=[1, 2])
    assert len(private.updates_before(5)) == 3
    with pytest.raises(LostBase, match=r"base updates of rounds \[1, 4\] are not complete"):
        ClientStore(tmp_path / "new").add_updates({5: entry}, expected=[1, 4])
