import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.data.partition import Partition, by_code, by_key, dirichlet, iid, shards

LABELS = st.lists(st.sampled_from("abcde"), min_size=1, max_size=60)


def draw(seed):
    return np.random.default_rng(seed)


def check_law(parts, rows, clients):
    """Disjoint, complete, ascending, and as many clients as asked for."""
    assert list(parts) == [str(client) for client in range(clients)]
    together = np.concatenate(list(parts.values()))
    assert sorted(together.tolist()) == list(range(rows))
    assert all((np.diff(part) > 0).all() for part in parts.values())


def same(one, other):
    return all(np.array_equal(one[c], other[c]) for c in one) and one.keys() == other.keys()


@given(st.lists(st.text(max_size=3), max_size=40))
@settings(deadline=None)
def test_by_key_gathers_the_rows_of_each_key(keys):
    parts = by_key(keys)
    assert list(parts) == list(dict.fromkeys(keys))
    for key, rows in parts.items():
        assert rows.tolist() == [row for row, k in enumerate(keys) if k == key]


def test_by_code_leaves_out_names_without_rows():
    parts = by_code(np.array([4, 1, 4, 2, 1, 4]), ["v", "w", "x", "y", "z"])
    assert {client: rows.tolist() for client, rows in parts.items()} == {
        "w": [1, 4],
        "x": [3],
        "z": [0, 2, 5],
    }
    assert not by_code(np.array([], int), ["v"])


@given(LABELS, st.data())
@settings(deadline=None)
def test_a_partition_of_a_part_and_by_a_mask(labels, data):
    """Against the rows of each client one by one."""
    parts = by_key(labels)
    rows = np.sort(draw(7).permutation(3 * len(labels))[: len(labels)])
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))))
    whole = np.zeros(3 * len(labels), bool)
    whole[rows] = mask
    result = parts.within(rows).where(whole)
    slow = {client: [row for row in rows[own] if whole[row]] for client, own in parts.items()}
    assert {c: own.tolist() for c, own in result.items()} == {c: h for c, h in slow.items() if h}
    assert result.sizes.tolist() == [len(own) for own in slow.values() if own]


def test_a_partition_is_a_mapping_of_views():
    parts = Partition.of(["b", "a"], np.array([3, 2]), np.array([0, 2, 5, 1, 7]))
    assert list(parts) == ["b", "a"] and len(parts) == 2
    assert parts["a"].base is parts.rows
    assert "c" not in parts
    with pytest.raises(KeyError, match="c"):
        parts["c"]


@given(st.integers(1, 71), st.data())
@settings(deadline=None)
def test_iid_deals_equal_shares(rows, data):
    clients = data.draw(st.integers(1, rows))
    parts = iid(rows, clients, draw(3))
    check_law(parts, rows, clients)
    sizes = [len(part) for part in parts.values()]
    assert max(sizes) - min(sizes) <= 1
    assert same(parts, iid(rows, clients, draw(3)))


@given(LABELS, st.sampled_from([1e-300, 1e-3, 0.5, 7.0, 1e6]), st.integers(0, 2), st.data())
@settings(deadline=None)
def test_dirichlet_is_a_partition_with_its_minimum(labels, alpha, minimum, data):
    labels = [*labels, "a", "b"]
    clients = data.draw(st.integers(1, len(labels) // max(minimum, 1)))
    parts = dirichlet(labels, clients, alpha, draw(4), minimum)
    check_law(parts, len(labels), clients)
    assert min(len(part) for part in parts.values()) >= minimum
    assert same(parts, dirichlet(labels, clients, alpha, draw(4), minimum))


def shares(parts, labels):
    """(clients, labels): which share of each label each client holds."""
    kinds = sorted(set(labels.tolist()))
    counts = [[(labels[rows] == kind).sum() for kind in kinds] for rows in parts.values()]
    return np.array(counts) / np.array([(labels == kind).sum() for kind in kinds])


def test_dirichlet_at_its_extremes():
    labels = np.repeat(["a", "b", "c"], [700, 1100, 1300])
    narrow = shares(dirichlet(labels, 5, 1e-4, draw(1), minimum=0), labels)
    assert (narrow.max(axis=0) > 0.99).all()
    wide = shares(dirichlet(labels, 5, 1e6, draw(1)), labels)
    assert np.abs(wide - 1 / 5).max() < 0.01


@given(st.integers(1, 3), st.integers(1, 5), st.data())
@settings(deadline=None)
def test_shards_give_few_labels(per_client, clients, data):
    labels = data.draw(
        st.lists(st.sampled_from("abcde"), min_size=per_client * clients, max_size=60)
    )
    parts = shards(labels, clients, per_client, draw(5))
    check_law(parts, len(labels), clients)
    shortest = len(labels) // (per_client * clients)
    assert min(len(part) for part in parts.values()) >= per_client * shortest
    assert same(parts, shards(labels, clients, per_client, draw(5)))


def test_one_shard_a_client_means_one_label_when_they_fit():
    labels = np.array(["a", "b", "c"] * 13)
    parts = shards(labels, 3, 1, draw(2))
    assert all(len(set(labels[rows].tolist())) == 1 for rows in parts.values())


def test_the_draw_decides():
    assert not same(iid(29, 3, draw(1)), iid(29, 3, draw(2)))


def test_the_impossible_is_refused():
    with pytest.raises(ValueError, match="5 rows do not suffice for 7 clients"):
        iid(5, 7, draw(0))
    with pytest.raises(ValueError, match=r"3 each; set data\.partition\.clients to at most 1"):
        dirichlet(["a"] * 5, 2, 1.0, draw(0), minimum=3)
    with pytest.raises(ValueError, match="alpha is 0"):
        dirichlet(["a"] * 5, 2, 0.0, draw(0))
    with pytest.raises(ValueError, match="11 rows do not suffice for 4 clients"):
        shards(["a"] * 11, 4, 3, draw(0))
    with pytest.raises(ValueError, match="shards_per_client is 0"):
        shards(["a"] * 11, 4, 0, draw(0))
    with pytest.raises(ValueError, match="among 0 clients"):
        iid(5, 0, draw(0))
