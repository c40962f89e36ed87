"""Intervals: what holds for every one, how often they cover the truth, and who is the worst."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.reporting import tables
from flexlora.reporting.tables import ClientScore, EvaluationRow
from flexlora.reporting.tables.uncertainty import bootstrapped, mean_interval, student_t, wilson
from flexlora.seeds import rng

ROUGE, EXACT, LOSS = tables.METRICS


def row(scores, group="unseen", round_=5, examples=None):
    """An evaluation with these Rouge-L scores in percent, one per client."""
    sizes = examples or [11 + i for i in range(len(scores))]
    clients = tuple(
        ClientScore(f"c{i}", n, {"rouge_l": n * score / 100, "examples": n})
        for i, (score, n) in enumerate(zip(scores, sizes, strict=True))
    )
    mean = sum(c.sums["rouge_l"] for c in clients) / sum(sizes) * 100
    return EvaluationRow(
        round_, "global", group, len(scores), sum(sizes), mean, None, None, clients
    )


def test_wilson_s_interval_has_the_published_values():
    """Newcombe (1998), Statistics in Medicine 17, 857-872, table I, method 3."""
    for successes, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        interval = wilson(successes / count, count)
        assert interval.low / 100 == pytest.approx(low, abs=6e-5)
        assert interval.high / 100 == pytest.approx(high, abs=6e-5)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 500), st.floats(0, 1))
def test_wilson_s_interval_is_a_mirror_and_contains_the_share(count, share):
    ours, mirrored = wilson(share, count), wilson(1 - share, count)
    assert 0 <= ours.low <= 100 * share + 1e-9 and 100 * share - 1e-9 <= ours.high <= 100 + 1e-9
    assert ours.low == pytest.approx(100 - mirrored.high, abs=1e-6)


clients = st.lists(st.tuples(st.floats(0, 90), st.integers(1, 60)), min_size=2, max_size=9)


@settings(deadline=None, max_examples=40)
@given(clients, st.floats(0.1, 30))
def test_a_bootstrapped_interval_scales_with_its_values_and_stays_within_them(values, factor):
    sums = [(score * n, n) for score, n in values]
    found = bootstrapped(sums)
    scaled = bootstrapped([(factor * total, n) for total, n in sums])
    scores = [score for score, _ in values]
    if found and scaled:
        assert min(scores) - 1e-6 <= found.low <= found.high <= max(scores) + 1e-6
        assert scaled.low == pytest.approx(factor * found.low, abs=1e-6)
        assert scaled.high == pytest.approx(factor * found.high, abs=1e-6)


def test_there_is_no_interval_of_one_client_or_of_equal_ones():
    assert bootstrapped([(3.0, 7)]) is None
    assert bootstrapped([(0.0, 5), (0.0, 7), (0.0, 11)]) is None
    # All gained alike: samples of the clients cannot tell how sure that is.
    assert bootstrapped([(4.0, 2), (9.0, 3)], [(2.0, 2), (6.0, 3)]) is None


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    draw, covered, repeats = rng(3, "coverage"), 0, 300
    for _ in range(repeats):
        scores = draw.normal(40, 9, size=25)
        interval = bootstrapped([(13 * score, 13) for score in scores])
        covered += interval.low <= 40 <= interval.high
    # Of 95 % nominally; with 25 clients somewhat less.
    assert 0.88 < covered / repeats < 0.98


def test_a_change_is_surer_than_its_ends_because_the_clients_are_the_same():
    before = row([10.0, 30.0, 55.0, 80.0, 20.0], round_=0)
    after = row([16.0, 35.0, 62.0, 85.0, 27.0])
    change, end = after.change(before, ROUGE), after.interval(ROUGE)
    assert 4 < change.low < change.high < 8 and not change.has_zero
    assert end.high - end.low > 10 * (change.high - change.low)
    assert after.interval(EXACT) is None and after.interval(LOSS) is None


def test_a_change_is_over_the_clients_that_both_have():
    before, after = row([10.0, 30.0, 55.0], round_=0), row([11.0, 32.0])
    assert after.change(before, ROUGE) == row([11.0, 32.0]).change(row([10.0, 30.0]), ROUGE)


def test_every_client_counts_once_and_the_worst_is_named():
    spread = tables.client_spread(row([50.0, 20.0, 80.0, 20.0], examples=[1, 5, 100, 7]), ROUGE)
    assert spread.mean == pytest.approx(42.5) and spread.median == pytest.approx(35)
    # Of two equally bad clients the one with more examples, whose score is surer.
    assert (spread.worst_client, spread.worst_examples) == ("c3", 7)
    assert (spread.worst, spread.worst_tenth, spread.best) == pytest.approx((20, 20, 80))
    assert tables.client_spread(row([50.0]), ROUGE) is None
    tenth = tables.client_spread(row([float(n) for n in range(40)]), ROUGE)
    assert tenth.worst_tenth == pytest.approx(1.5)


def test_of_losses_the_highest_is_the_worst():
    clients = tuple(
        ClientScore(name, 3, {"loss_total": 10 * loss, "loss_tokens": 10})
        for name, loss in (("a", 2.0), ("b", 4.5), ("c", 1.0))
    )
    loss = EvaluationRow(3, "global", "seen", 3, 9, None, None, 2.5, clients)
    spread = tables.client_spread(loss, LOSS)
    assert (spread.worst_client, spread.worst, spread.best) == ("b", 4.5, 1.0)


def test_clients_are_compared_where_they_differ():
    alike = ClientScore("a", 4, {"rouge_l": 0, "examples": 4, "loss_total": 8, "loss_tokens": 4})
    other = ClientScore("b", 4, {"rouge_l": 0, "examples": 4, "loss_total": 4, "loss_tokens": 4})
    rows = [EvaluationRow(3, "global", "seen", 2, 8, 0.0, None, 1.5, (alike, other))]
    assert tables.distinguishing_metric(rows) is LOSS
    assert tables.distinguishing_metric([]) is None


def test_changes_are_those_of_each_client():
    before, after = row([10.0, 30.0], round_=0), row([16.0, 25.0, 40.0])
    changes = tables.client_changes(before, after, ROUGE)
    assert [(c.client, c.before, c.after) for c in changes] == [
        ("c0", pytest.approx(10), pytest.approx(16)),
        ("c1", pytest.approx(30), pytest.approx(25)),
        ("c2", None, pytest.approx(40)),
    ]


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.3027), (10, 2.2281), (11, 2.2010), (20, 2.0860), (60, 2.0003)],
)
def test_student_s_quantiles_are_the_tabulated_ones(degrees, quantile):
    assert student_t(degrees) == pytest.approx(quantile, rel=2e-3)


def test_the_interval_of_few_seeds_is_wide():
    assert mean_interval([2.0]) is None
    two, three = mean_interval([1.0, 2.0]), mean_interval([1.0, 1.5, 2.0])
    assert two.high - two.low == pytest.approx(12.706) and two.has_zero
    assert (three.low + three.high) / 2 == pytest.approx(1.5) and not three.has_zero
