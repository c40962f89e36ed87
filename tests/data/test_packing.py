import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.data import packing
from flexlora.data.packing import Forest, Pack, first_fit, join, pack, packs, steps
from support.rows import FORESTS, dense_mask, examples, sharing_store, store_of

quick = settings(deadline=None, max_examples=150)

SIZES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), min_size=1, max_size=11)


@st.composite
def stores(draw, rows=11):
    """Rows of which many share their beginnings with others, or are others."""
    beginnings = draw(st.lists(st.lists(st.integers(0, 2), max_size=14), min_size=1, max_size=3))
    result = []
    for _ in range(draw(st.integers(1, rows))):
        beginning = draw(st.sampled_from(beginnings))
        cut = draw(st.integers(0, len(beginning)))
        rest = draw(st.lists(st.integers(0, 2), max_size=5))
        ids = [*beginning[: len(beginning) - cut // 2], *rest] or [1]
        prompt = draw(st.integers(1, len(ids)))
        result.append((ids[:prompt], ids[prompt:]))
    return store_of(result)


def distinct(sizes):
    """A store whose row i has prompt and response of these sizes, all ids different."""
    ids = iter(range(100, 10_000))
    return store_of(
        [([next(ids) for _ in range(p)], [next(ids) for _ in range(r)]) for p, r in sizes]
    )


# --- the forest ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edges", "prefixes", "message"),
    [
        ((0, 3), (-1, -1), "do not bound 2 segments"),
        ((0, 3, 5), (-1,), "do not bound 1 segments"),
        ((), (), "do not bound 0 segments"),
        ((2, 5), (-1,), r"Edges \(2, 5\) do not bound 1 segments"),
        ((0, 3, 3), (-1, -1), r"Edges \(0, 3, 3\)"),
        ((0, 3, 2), (-1, -1), r"Edges \(0, 3, 2\)"),
        ((0, 3), (0,), "Segment 0 cannot continue segment 0"),
        ((0, 3, 5), (-1, 1), "Segment 1 cannot continue segment 1"),
        ((0, 3, 5), (-1, 2), "Segment 1 cannot continue segment 2"),
        ((0, 3, 5, 6), (-1, 0, 1), "Segment 2 cannot continue segment 1"),
        ((0, 3, 5, 6), (-1, -1, 0), "Segment 2 cannot continue segment 0"),
        ((0, 3, 5), (-1, -2), "Segment 1 cannot continue segment -2"),
    ],
)
def test_what_is_no_forest_is_refused(edges, prefixes, message):
    with pytest.raises(ValueError, match=message):
        Forest(edges, prefixes)


def test_a_forest_says_its_trees_and_its_longest_example():
    mixed = FORESTS["mixed"]
    assert mixed.trees == (
        ((0, 3),),
        ((3, 8), (8, 10), (10, 15)),
        ((15, 16), (16, 18)),
        ((18, 25), (25, 26)),
    )
    assert [mixed.root(segment) for segment in range(8)] == [0, 1, 1, 1, 4, 4, 6, 6]
    longest = {"one": 5, "alone": 7, "shared": 13, "mixed": 10}
    for name, forest in FORESTS.items():
        assert forest.longest == longest[name] == max(map(len, examples(forest)))


@st.composite
def forests(draw):
    """Trees of a prefix with what continues it, or of one segment."""
    edges, prefixes = [0], []
    for _ in range(draw(st.integers(1, 5))):
        root = len(prefixes)
        for number in range(draw(st.integers(1, 4))):
            prefixes.append(root if number else -1)
            edges.append(edges[-1] + draw(st.integers(1, 6)))
    return Forest(tuple(edges), tuple(prefixes))


@given(forests())
@quick
def test_the_mask_is_that_of_the_examples_token_by_token(forest):
    tokens = forest.edges[-1]
    want = dense_mask(forest)
    assert torch.equal(forest.mask(0, tokens), want)
    for tree in forest.trees:
        first, end = tree[0][0], tree[-1][1]
        assert torch.equal(forest.mask(first, end), want[first:end, first:end])
        # No token sees another tree.
        assert not want[first:end, :first].any() and not want[first:end, end:].any()


@given(forests(), st.integers(1, 40))
@quick
def test_blocks_are_whole_trees_in_order(forest, room):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_BLOCK_TOKENS", room)
        blocks = forest.blocks
    assert [first for first, _, _ in blocks] == [0, *(end for _, end, _ in blocks[:-1])]
    assert blocks[-1][1] == forest.edges[-1]
    borders = {tree[0][0] for tree in forest.trees}
    for first, end, mask in blocks:
        assert first in borders and end > first
        assert torch.equal(mask, dense_mask(forest)[first:end, first:end])
        inside = [tree for tree in forest.trees if first <= tree[0][0] < end]
        assert end - first <= room or len(inside) == 1
    for one, other in itertools.pairwise(blocks):
        following = next(tree for tree in forest.trees if tree[0][0] == other[0])
        assert following[-1][1] - one[0] > room


# --- steps and bins ------------------------------------------------------------------------


@given(st.lists(st.integers(0, 90), unique=True, max_size=40), st.integers(1, 13))
@quick
def test_an_epoch_takes_every_row_once(indices, per_step):
    plan = steps(indices, per_step, np.random.default_rng(1))
    assert sorted(row for step in plan for row in step) == sorted(indices)
    assert all(len(step) == per_step for step in plan[:-1])
    assert len(plan) == -(-len(indices) // per_step)
    assert all(plan)
    assert plan == steps(np.array(indices, np.int64), per_step, np.random.default_rng(1))


def test_steps_shuffle_and_refuse_nothing_by_order():
    plan = steps(range(29), 7, np.random.default_rng(2))
    assert plan != steps(range(29), 7, np.random.default_rng(3))
    assert [len(step) for step in plan] == [7, 7, 7, 7, 1]
    with pytest.raises(ValueError, match="step cannot have 0 examples"):
        steps([0], 0, np.random.default_rng(2))


@given(st.lists(st.integers(1, 30), max_size=25), st.integers(1, 47))
@quick
def test_first_fit_takes_the_largest_first(sizes, room):
    bins = first_fit(sizes, room)
    assert sorted(item for members in bins for item in members) == list(range(len(sizes)))
    filled: list[int] = []
    order = {item: number for number, members in enumerate(bins) for item in members}
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fits = [number for number, members in enumerate(filled) if members + sizes[item] <= room]
        assert order[item] == (fits[0] if fits else len(filled))
        if fits:
            filled[fits[0]] += sizes[item]
        else:
            filled.append(sizes[item])


# --- one row -------------------------------------------------------------------------------


def learned(tokens, prompt_loss):
    """Places (from the example's begin) and labels of the loss of one example."""
    first = 1 if prompt_loss else tokens.prompt_tokens
    return [(place - 1, int(tokens.ids[place])) for place in range(first, len(tokens))]


@given(stores(), st.booleans(), st.booleans(), st.data())
@quick
def test_a_row_says_of_each_example_what_the_store_says(store, prompt_loss, share, data):
    rows = data.draw(st.lists(st.sampled_from(range(len(store))), min_size=1, max_size=9))
    row = pack(store, rows, prompt_loss, share)
    tokens, places = row.input_ids[0].tolist(), row.position_ids[0].tolist()
    result = examples(row.forest)
    assert Counter(tuple(tokens[at] for at in one) for one in result) == Counter(
        tuple(store[r].ids.tolist()) for r in rows
    )
    for one in result:
        assert [places[at] for at in one] == list(range(len(one)))
    for owner, r in enumerate(rows):
        selected = row.owners == owner
        got = zip(row.loss_positions[selected].tolist(), row.labels[selected].tolist(), strict=True)
        homes = [
            [(one[place], label) for place, label in learned(store[r], prompt_loss)]
            for one in result
            if [tokens[at] for at in one] == store[r].ids.tolist()
        ]
        assert sorted(got) in homes
    assert set(row.owners.tolist()) <= set(range(len(rows)))


@given(stores(), st.data())
@quick
def test_what_is_shared_stands_there_once(store, data):
    """Tokens are those of all examples less those that a prefix saves the others."""
    rows = data.draw(st.lists(st.sampled_from(range(len(store))), min_size=1, max_size=9))
    row = pack(store, rows)
    assert row.tokens == row.forest.edges[-1] == row.input_ids.shape[1] == row.position_ids.shape[1]
    saved = 0
    for tree in row.forest.trees:
        if len(tree) > 1:
            once = (tree[0][1] - tree[0][0]) * (len(tree) - 2)
            assert once >= packing._WORTH_TOKENS
            saved += once
    assert row.tokens == sum(len(store[r]) for r in rows) - saved


@given(stores(), st.booleans(), st.data())
@quick
def test_without_sharing_nothing_is_shared(store, prompt_loss, data):
    rows = data.draw(st.lists(st.sampled_from(range(len(store))), min_size=1, max_size=9))
    row = pack(store, rows, prompt_loss, share=False)
    assert row.forest.prefixes == (-1,) * len(rows)
    assert row.input_ids[0].tolist() == [t for r in rows for t in store[r].ids.tolist()]
    assert row.position_ids[0].tolist() == [p for r in rows for p in range(len(store[r]))]
    assert row.tokens == sum(len(store[r]) for r in rows)


@given(SIZES, st.booleans(), st.data())
@quick
def test_a_row_of_strangers_is_one_after_the_other(sizes, prompt_loss, data):
    """Rows whose ids all differ share nothing, whether they may or not."""
    store = distinct(sizes)
    picked = st.lists(st.sampled_from(range(len(sizes))), min_size=1, max_size=5, unique=True)
    rows = sorted(data.draw(picked))  # by their first ids, as sharing has them
    one, other = (pack(store, rows, prompt_loss, share) for share in (True, False))
    assert one.forest == other.forest
    for name in ("input_ids", "position_ids", "loss_positions", "labels", "owners"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_a_pack_written_out():
    """Two examples share ten tokens and one of them learns within the shared part."""
    store = store_of([(range(10, 20), [30]), ([5, 6], [7, 8]), (range(10, 18), [18, 19, 40, 41])])
    row = pack(store, [0, 1, 2])
    assert row.input_ids.tolist() == [[5, 6, 7, 8, *range(10, 20), 30, 40, 41]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, *range(10), 10, 10, 11]]
    assert row.forest == Forest((0, 4, 14, 15, 17), (-1, -1, 1, 1))
    result = zip(row.owners.tolist(), row.loss_positions.tolist(), row.labels.tolist(), strict=True)
    assert list(result) == [
        *((1, 1, 7), (1, 2, 8)),
        (0, 13, 30),
        *((2, 11, 18), (2, 12, 19), (2, 13, 40), (2, 15, 41)),
    ]


def test_pack_gives_torch_integers():
    row = pack(distinct([(3, 2), (2, 5)]), [1, 0], share=False)
    names = ("input_ids", "position_ids", "loss_positions", "labels", "owners")
    assert {getattr(row, name).dtype for name in names} == {torch.int64}
    assert row.loss_positions.tolist() == [1, 2, 3, 4, 5, 9, 10]
    with pytest.raises(ValueError, match="at least one row"):
        pack(distinct([(3, 2)]), [])


def test_rows_that_are_the_same_each_keep_a_token():
    """The last token is each one's own, and so are its losses."""
    store = store_of([(range(9), [20, 21])] * 3)
    row = pack(store, [2, 0, 1])
    assert row.forest == Forest((0, 10, 11, 12, 13), (-1, 0, 0, 0))
    assert row.input_ids.tolist() == [[*range(9), 20, 21, 21, 21]]
    assert sorted(zip(row.owners.tolist(), row.loss_positions.tolist(), strict=True)) == [
        *((0, 8), (0, 9)),
        *((1, 8), (1, 9)),
        *((2, 8), (2, 9)),
    ]


def test_a_row_that_begins_another_keeps_its_last_token():
    store = store_of([(range(9), [9, 10, 11, 12]), (range(9), [9])])
    row = pack(store, [0, 1])
    assert row.forest == Forest((0, 9, 10, 14), (-1, 0, 0))
    assert row.input_ids.tolist() == [[*range(9), 9, 9, 10, 11, 12]]


@pytest.mark.parametrize("prompt_loss", [False, True])
def test_rows_of_one_token_have_no_loss(prompt_loss):
    store = store_of([([4], []), ([4], []), ([4, 5], [])])
    row = pack(store, [0, 1, 2], prompt_loss)
    assert row.forest == Forest((0, 1, 2, 4), (-1, -1, -1))
    assert row.labels.tolist() == ([5] if prompt_loss else [])
    assert row.owners.tolist() == ([2] if prompt_loss else [])


# --- which prefixes ------------------------------------------------------------------------


def cheapest(ids: list[list[int]]) -> int:
    """The fewest tokens, and 8 for each prefix, over all ways to cut the sorted rows in runs.

    A run shares what is common to all, if each keeps a token, and if 8 tokens are saved.
    """
    order = sorted(ids)
    best = None
    for cuts in itertools.product([False, True], repeat=len(order) - 1):
        bounds = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(order)]
        cost = sum(map(len, order))
        for first, end in itertools.pairwise(bounds):
            run = order[first:end]
            prefix = 0
            while prefix < min(map(len, run)) - 1 and len({row[prefix] for row in run}) == 1:
                prefix += 1
            saved = prefix * (len(run) - 1)
            cost -= max(saved - 8, 0) if saved >= 8 else 0
        best = cost if best is None else min(best, cost)
    return best


def cost_of(row: Pack) -> int:
    return row.tokens + 8 * sum(len(tree) > 1 for tree in row.forest.trees)


@given(stores(rows=6))
@settings(deadline=None, max_examples=300)
def test_no_other_cut_into_runs_is_cheaper(store):
    rows = range(len(store))
    assert cost_of(pack(store, rows)) == cheapest([store[r].ids.tolist() for r in rows])


# --- several rows --------------------------------------------------------------------------


@given(stores(), st.integers(1, 60), st.booleans(), st.data())
@settings(deadline=None, max_examples=400)
def test_packs_hold_every_row_once_and_no_more_than_they_may(store, room, share, data):
    rows = data.draw(st.lists(st.sampled_from(range(len(store))), max_size=12))
    result = packs(store, rows, room, share)
    assert sorted(row for members in result for row in members) == sorted(rows)
    for members in result:
        assert members
        assert pack(store, members, share=share).tokens <= room or len(members) == 1
    assert result == packs(store, rows, room, share)


def test_packs_refuse_no_room():
    with pytest.raises(ValueError, match=r"0 tokens; set training\.pack_tokens to at least 1"):
        packs(distinct([(3, 2)]), [0], 0)


def test_what_is_shared_stays_together():
    """Of six rows, three of either instruction: two packs and not mixed ones."""
    one, other = range(20, 50), range(60, 90)
    store = store_of(
        [([*(one if i % 2 else other), 100 + i], [200 + i, 300 + i]) for i in range(6)]
    )
    assert sorted(map(sorted, packs(store, range(6), 47))) == [[0, 2, 4], [1, 3, 5]]
    assert [pack(store, members).tokens for members in packs(store, range(6), 47)] == [39, 39]
    assert len(packs(store, range(6), 47, share=False)) == 6
    # One tree is cut where there is no room; the prefix then stands in both.
    cut = packs(store, [0, 2, 4], 46)
    assert sorted(map(len, cut)) == [1, 2]


def test_a_pack_does_not_grow_where_its_rows_share_in_another_way():
    """Three rows share ten tokens, two nine, all five five: without the third, five are enough.

    One prefix of five is then cheaper than two of ten and of nine, and has more tokens.
    """
    five = [1, 2, 3, 4, 5]
    ten, nine = [*five, *range(10, 15)], [*five, *range(20, 24)]
    rows = [[*ten, 30], [*ten, 31], [*ten, *range(32, 62)], [*nine, 70], [*nine, 71]]
    store = store_of([(row, []) for row in rows])
    assert [len(tree) for tree in pack(store, range(5)).forest.trees] == [4, 3]
    assert pack(store, [0, 1, 3, 4]).tokens == 27
    for room in range(18, 60):
        for members in packs(store, range(5), room):
            assert pack(store, members).tokens <= room or len(members) == 1


# --- packs as one --------------------------------------------------------------------------


@given(stores(), st.booleans(), st.data())
@quick
def test_joined_packs_are_their_rows_one_after_the_other(store, prompt_loss, data):
    groups = data.draw(
        st.lists(
            st.lists(st.sampled_from(range(len(store))), min_size=1, max_size=5),
            min_size=1,
            max_size=4,
        )
    )
    parts = [pack(store, rows, prompt_loss) for rows in groups]
    whole = join(parts)
    assert whole.tokens == whole.forest.edges[-1] == sum(part.tokens for part in parts)
    first = losses = segments = 0
    for number, part in enumerate(parts):
        tokens = slice(first, first + part.tokens)
        assert torch.equal(whole.input_ids[:, tokens], part.input_ids)
        assert torch.equal(whole.position_ids[:, tokens], part.position_ids)
        assert torch.equal(
            whole.forest.mask(0, whole.tokens)[tokens, tokens], part.forest.mask(0, part.tokens)
        )
        selected = slice(losses, losses + len(part.labels))
        assert torch.equal(whole.loss_positions[selected], part.loss_positions + first)
        assert torch.equal(whole.labels[selected], part.labels)
        assert whole.owners[selected].tolist() == [number] * len(part.labels)
        first, losses = first + part.tokens, losses + len(part.labels)
        segments += len(part.forest.prefixes)
    assert len(whole.labels) == losses and len(whole.forest.prefixes) == segments
    assert torch.equal(whole.forest.mask(0, whole.tokens), dense_mask(whole.forest))


def test_one_pack_joined_is_itself_but_for_its_owners():
    row = pack(sharing_store(), range(9))
    alone = join([row])
    assert alone.forest == row.forest
    assert alone.owners.tolist() == [0] * len(row.labels)
    for name in ("input_ids", "position_ids", "loss_positions", "labels"):
        assert torch.equal(getattr(alone, name), getattr(row, name))
