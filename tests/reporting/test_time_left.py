"""The time left of runs whose times are known: exact, never negative, never growing in between."""

import itertools

import pytest

from flexlora.reporting.watch import RunState, TimeLeft

CLIENT = {"event": "client", "rank_type": "a", "examples": 3, "tokens": 30, "seconds": 1.0}
CLIENT |= {"loss_total": 1.0, "loss_tokens": 2, "bytes_up": 1, "bytes_down": 1}
TURN, CLOSING, SPECTRUM, ADAPTER = 7.0, 2.0, 1.5, 20.0
"""Seconds of a client, from the last upload to the round's end, of a spectrum, of an adapter."""


def start(at=100.0, rounds=3, cohort=2, every=0, **facts):
    config = {
        "federation": {"rounds": rounds, "cohort": cohort, "over_selection": 0.5},
        "evaluation": {"base": True, "every": every, "truncated": True},
    }
    facts = {"questions": 5, "truncated": ["a"], "clients": 9, "resumed": False, **facts}
    return {"event": "start", "time": at, "config": config, **facts}


def a_round(at, number, uploads=2, lost=("late", "unwanted"), evaluated=()):
    """A round in which more clients are invited than needed, and some do not answer."""
    lose = [{"event": "lost", "round": number, "client": name, "reason": "."} for name in lost]
    yield {**lose[0], "time": at} if lose else {"event": "stray", "round": number, "client": "z"}
    for client in range(uploads):
        at += TURN
        yield {**CLIENT, "round": number, "client": str(client), "time": at}
    yield from ({**event, "time": at} for event in lose[1:])
    at += CLOSING
    yield {**CLIENT, "event": "round", "round": number, "time": at, "seconds": 9.0}
    at += SPECTRUM
    yield {"event": "spectrum", "round": number, "time": at}
    at += ADAPTER * len(evaluated)
    for name in evaluated:
        # All of an evaluation's events come at its end.
        event = {"event": "evaluation", "round": number, "adapter": name, "clients": []}
        yield {**event, "time": at, "seconds": ADAPTER}


def a_run(**changes):
    """A run whose every part takes equally long each time."""
    begin = start(**changes)
    rounds, every = (begin["config"]["federation"]["rounds"], changes.get("every", 0))
    events, asked = [begin], begin["questions"]
    if asked and not begin["resumed"]:
        base = {"event": "evaluation", "round": 0, "adapter": "base", "clients": []}
        events.append({**base, "time": begin["time"] + ADAPTER, "seconds": ADAPTER})
    for number in range(begin.get("rounds_done", 0) + 1, rounds + 1):
        due = ["global"] if asked and every and number % every == 0 else []
        due = ["global", "a"] if asked and number == rounds else due
        events += a_round(events[-1]["time"], number, evaluated=due)
    last = events[-1]["time"]
    return [*events, {"event": "finish", "rounds": rounds, "seconds": 1.0, "time": last}]


def followed(events):
    """The estimate, with the events up to each of them."""
    state = RunState()
    left = TimeLeft(state)
    for event in events:
        state.add(event)
        left.add(event)
        yield left, event


@pytest.mark.parametrize(
    "run",
    [
        a_run(rounds=5),
        a_run(rounds=7, every=3),
        a_run(rounds=4, questions=0),
        a_run(rounds=6, rounds_done=2, resumed=True, every=2),
    ],
    ids=["whole", "evaluations between", "no evaluation", "resumed"],
)
def test_after_a_round_and_an_evaluation_the_estimate_is_the_time_that_is_left(run):
    end, checked = run[-1]["time"], 0
    for left, event in followed(run):
        if event["event"] in ("finish", "evaluation") and event.get("round"):
            continue  # all adapters of an evaluation are done when its first event comes
        estimate = left.left(event["time"])
        if left.rounds_timed and estimate and not estimate.without_evaluations:
            if event["event"] == "round":
                continue  # the spectrum of the first round is not timed yet
            assert estimate.seconds == pytest.approx(end - event["time"])
            checked += 1
    assert checked >= 10


def test_the_evaluations_to_come_are_in_it_before_any_round_is_over():
    run = a_run(rounds=3)
    for left, event in followed(run[:4]):
        estimate = left.left(event["time"])
    # Of the round half is done; two whole rounds follow, and at the end two adapters.
    assert estimate.seconds == pytest.approx(TURN + 2 * 2 * TURN + 2 * ADAPTER)
    assert not estimate.without_evaluations


def test_an_evaluation_that_was_never_timed_is_said_to_be_missing():
    run = [event for event in a_run(rounds=3) if event["event"] != "evaluation"]
    run[0]["config"]["evaluation"]["base"] = False
    estimates = [left.left(event["time"]) for left, event in followed(run)]
    assert all(e is None or e.without_evaluations for e in estimates)
    assert any(estimates)


def test_a_resumed_run_keeps_the_time_of_the_evaluations_before_and_not_of_the_rounds():
    first = a_run(rounds=4)[:8]
    again = start(at=5000.0, rounds=4, resumed=True, rounds_done=1)
    (*_, (left, event)) = followed([*first, again])
    assert left.left(event["time"]) is None
    (*_, (left, event)) = followed([*first, again, *list(a_round(5000.0, 2))[:2]])
    estimate = left.left(event["time"])
    assert estimate.seconds == pytest.approx(TURN + 2 * 2 * TURN + 2 * ADAPTER)
    assert not estimate.without_evaluations


def test_it_is_never_negative_and_grows_with_events_only():
    uneven = [
        start(rounds=2, cohort=3),
        {"event": "evaluation", "round": 0, "adapter": "base", "clients": [], "time": 104.0},
        *a_round(104.0, 1, uploads=1),  # ends by its deadline
        *a_round(190.0, 2, uploads=5, evaluated=["global", "a"]),  # more than are needed
    ]
    times = [event["time"] for event in uneven[1:]] + [9000.0]
    for (left, event), until in zip(followed(uneven), times, strict=True):
        moments = [event["time"] + (until - event["time"]) * n / 9 for n in range(10)]
        estimates = [e.seconds for at in moments if (e := left.left(at))]
        assert len(estimates) in (0, 10)
        assert all(seconds >= 0 for seconds in estimates)
        assert all(a >= b for a, b in itertools.pairwise(estimates))


def test_the_answers_so_far_tell_how_long_an_evaluation_takes():
    (*_, (left, _)) = followed([*a_run(rounds=1)[:7]])
    assert left.phase == "evaluation"
    begun = left.since
    assert left.left(begun + 30, 0.25).seconds == pytest.approx(90)
    assert left.left(begun + 40, 0.25).seconds == pytest.approx(80)
    assert left.left(begun + 60, 0.5).seconds == pytest.approx(60)
    assert left.left(begun + 600, 0.5).seconds == 0


def test_a_journal_without_times_or_plans_has_no_estimate():
    for left, event in followed([{**e, "time": 1.0} for e in a_run()]):
        assert left.left(event["time"]) is None or left.left(event["time"]).seconds >= 0
    untimed = [{k: v for k, v in event.items() if k != "time"} for event in a_run()]
    assert [left.left(5.0) for left, _ in followed(untimed)] == [None] * len(untimed)
