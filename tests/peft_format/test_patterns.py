import time

from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from flexlora.peft_format import (
    matched,
)


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet=r"aq.*+?()|[]{}\d^$-0,", max_size=14))
def test_patterns_match_as_in_peft_or_are_refused(pattern):
    modules = ["a.q", "q", "aa.aq.q", "a.0.aaaq", "0.a"]
    try:
        values = matched({pattern: 3}, modules, "config: rank_pattern")
    except ValueError:
        return
    for module in modules:
        matches = pattern == get_pattern_key([pattern], module) and pattern != module
        assert bool(values[module]) == (matches or pattern == module)


def test_no_accepted_pattern_takes_long():
    modules = ["a" * 120 for _ in range(40)]
    start = time.perf_counter()
    for pattern in (".*.*x", "a*a*x", ".*a+.*x", "a?" * 12 + "x", "(a|a)" * 9 + "x"):
        try:
            matched({pattern: 1}, modules, "place")
        except ValueError as error:
            assert "too long" in str(error)
    assert time.perf_counter() - start < 10
