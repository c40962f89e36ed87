import numpy as np
import pytest

from flexlora.federation.sampling import cohort
from flexlora.seeds import rng

CLIENTS = [f"c{i}" for i in range(11)]


def test_distinct_clients_in_their_order():
    for round in range(20):
        chosen = cohort(CLIENTS, 4, rng(1, round))
        assert len(set(chosen)) == 4
        assert chosen == sorted(chosen, key=CLIENTS.index)


def test_the_draw_alone_decides():
    assert cohort(CLIENTS, 4, rng(1, 2)) == cohort(CLIENTS, 4, rng(1, 2))
    assert len({tuple(cohort(CLIENTS, 4, rng(1, round))) for round in range(9)}) > 5


def test_every_client_is_as_likely():
    counts = dict.fromkeys(CLIENTS, 0)
    for round in range(2200):
        for client in cohort(CLIENTS, 3, rng(5, round)):
            counts[client] += 1
    assert np.allclose(list(counts.values()), 600, atol=5 * (600 * 8 / 11) ** 0.5)


@pytest.mark.parametrize("size", [11, 12, 99])
def test_everybody_if_there_are_no_more(size):
    assert cohort(CLIENTS, size, rng(1)) == CLIENTS


@pytest.mark.parametrize(("clients", "size"), [([], 3), (CLIENTS, 0), (CLIENTS, -1)])
def test_a_round_of_nobody_is_refused(clients, size):
    with pytest.raises(ValueError, match=f"not {size} of {len(clients)}"):
        cohort(clients, size, rng(1))
