import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.evaluation.prefix_tree import groups, tree

# Few letters and a common beginning, so that much is shared, at several depths.
letters = st.lists(st.integers(0, 2), min_size=1, max_size=9)
beginnings = st.sampled_from([[], [1] * 5, [1] * 5 + [0] * 4])
some = st.lists(st.builds(lambda a, b: np.array(a + b, np.int32), beginnings, letters), max_size=9)
least = st.integers(1, 5)


def paths_of(nodes):
    paths = []
    for index, node in enumerate(nodes):
        paths.append([*([] if node.parent is None else paths[node.parent]), index])
    return [path for path, node in zip(paths, nodes, strict=True) if node.last]


@settings(deadline=None)
@given(some, least)
def test_every_prompt_is_one_way_through_the_tree(prompts, least_shared):
    nodes = tree(prompts, least_shared)
    paths = {nodes[path[-1]].prompt: path for path in paths_of(nodes)}
    assert sorted(paths) == list(range(len(prompts)))
    for prompt, path in paths.items():
        spans = [prompts[nodes[n].prompt][nodes[n].start : nodes[n].end] for n in path]
        assert np.concatenate(spans).tolist() == prompts[prompt].tolist()
        assert [nodes[n].start for n in path] == [0, *(nodes[n].end for n in path[:-1])]
        assert all(not nodes[n].last and nodes[n].tokens >= least_shared for n in path[:-1])
        assert nodes[path[-1]].tokens >= 1


@settings(deadline=None)
@given(some)
def test_no_token_is_computed_twice_but_the_last_of_equal_prompts(prompts):
    """With nothing too short to be shared, the tokens are those of a prefix tree."""
    prefixes = {tuple(p[: n + 1].tolist()) for p in prompts for n in range(len(p) - 1)}
    assert sum(node.tokens for node in tree(prompts, 1)) <= len(prefixes) + len(prompts)


def test_prompts_that_begin_each_other_and_equal_ones():
    prompts = [np.arange(n, dtype=np.int32) for n in (7, 3, 11, 7)]
    nodes = tree(prompts, 2)
    spans = {(node.start, node.end, node.last) for node in nodes}
    assert spans == {(0, 2, False), (2, 3, True), (2, 6, False), (6, 7, True), (6, 11, True)}
    assert sum(node.tokens for node in nodes) == 2 + 1 + 4 + 1 + 1 + 5


def test_many_nested_prompts_do_not_exceed_the_stack():
    prompts = [np.zeros(n, np.int32) for n in range(1, 1500, 2)]
    assert sum(node.last for node in tree(prompts, 1)) == len(prompts)


def test_a_short_beginning_is_not_worth_it():
    prompts = [np.array([5, 5, 5, n], np.int32) for n in range(6)]
    assert [(node.tokens, node.last) for node in tree(prompts, 4)] == [(4, True)] * 6
    assert [(node.tokens, node.last) for node in tree(prompts, 3)] == [(3, False)] + [(1, True)] * 6


@settings(deadline=None)
@given(some, least, st.integers(1, 4), st.integers(1, 60))
def test_groups_hold_every_prompt_once_within_the_room(prompts, least_shared, new, room):
    nodes = tree(prompts, least_shared)
    result = groups(nodes, new, room)
    members = [nodes[path[-1]].prompt for group in result for path in group]
    assert sorted(members) == list(range(len(prompts)))
    assert sorted(path for group in result for path in group) == sorted(paths_of(nodes))
    for group in result:
        tokens = sum(nodes[n].tokens for n in set().union(*group))
        assert len(group) == 1 or tokens + new * len(group) <= room


def test_the_longest_is_first_and_those_like_it_follow():
    begin = ((2, 3, 1), (1, 3, 1), (2, 4, 20), (1, 4, 5))
    prompts = [np.array([a] * 9 + [b] * n, np.int32) for a, b, n in begin]
    nodes = tree(prompts, 8)
    order = [nodes[path[-1]].prompt for group in groups(nodes, 1, 999) for path in group]
    assert order == [2, 0, 3, 1]


def test_strangers_with_long_prompts_are_no_group():
    """Each would be shown the other's keys, only to have them masked."""
    prompts = [np.full(n, n, np.int32) for n in (2000, 1900, 1800, 1700)]
    assert [len(group) for group in groups(tree(prompts), 3, 10**6)] == [2, 2]
