"""What a run prints: true counts, no line wider than the terminal, and what is going on."""

import io
import re

import pytest
from rich.console import Console

from flexlora.cli.progress import WIDE, live_line, show
from flexlora.cli.sentences import sentences
from flexlora.cli.tally import Tally, left_text
from flexlora.journal import Meter
from flexlora.reporting.watch import Estimate

CONFIG = {
    "federation": {"rounds": 3, "cohort": 2, "over_selection": 0.5},
    "evaluation": {"base": True, "every": 0, "truncated": True},
}
START = {
    "event": "start",
    "config": CONFIG,
    "clients": 9,
    "unseen_clients": 5,
    "modules": 210,
    "rank_types": {"small": 6, "a-type-with-a-long-name": 3},
    "ranks": {"small": [8], "a-type-with-a-long-name": [0, 64]},
    "hardware": "x86_64, 2 cores, cpu, 1 threads",
    "questions": 4,
    "truncated": ["small"],
    "resumed": False,
}
CLIENT = {
    "event": "client",
    "round": 1,
    "client": "<b>x</b>",
    "rank_type": "small",
    "examples": 3,
    "tokens": 300,
    "seconds": 2.0,
    "loss_total": 6.0,
    "loss_tokens": 4,
    "bytes_up": 2048,
    "bytes_down": 1024,
}
ROUND = {**CLIENT, "event": "round", "aggregate_seconds": 0.5}
SCORED = {"seen": False, "examples": 4, "rouge_l": 1.0, "exact_match": 2}
EVALUATION = {
    "event": "evaluation",
    "adapter": "global",
    "round": 3,
    "seconds": 4.0,
    "clients": [{**SCORED, "loss_total": 3.0, "loss_tokens": 2}],
}
BASE = {**EVALUATION, "adapter": "base", "round": 0}
LOST = {"event": "lost", "round": 1, "client": "y", "reason": "It did not answer."}
FINISH = {"event": "finish", "rounds": 3, "seconds": 9.0, "adapter": "a"}


def upload(round_, client):
    return {**CLIENT, "round": round_, "client": client}


def lost(round_, client, kind):
    return {**LOST, "round": round_, "client": client, "kind": kind}


def a_round(number):
    """A round that invites three clients and needs two; the third is lost or not needed."""
    kind = "not_needed" if number == 2 else "no_answer"
    return [
        upload(number, "a"),
        lost(number, "c", kind),
        upload(number, "b"),
        {**ROUND, "round": number},
    ]


SPECTRUM = {"event": "spectrum", "round": 1, "energy": {}, "values": {}}
TRUNCATED = {**EVALUATION, "adapter": "small"}


def whole_run():
    rounds = [event for number in (1, 2, 3) for event in a_round(number)]
    return [START, BASE, *rounds, EVALUATION, TRUNCATED, FINISH]


def timed(seconds_before):
    """The events, each so many seconds after the one before."""
    now, events = 1000.0, []
    for event, seconds in seconds_before:
        now += seconds
        events.append({**event, "time": now})
    return events


def printed(events, terminal=False, width=80):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width)
    assert show(iter(events), console) == events
    return out.getvalue()


def tallied(events):
    tally = Tally()
    for event in events:
        tally.add(event)
    return tally


def test_plain_lines_where_there_is_no_terminal():
    said = printed([CLIENT, {**LOST, "kind": "no_answer"}, ROUND, EVALUATION])
    assert "\x1b" not in said and "\N{NO-BREAK SPACE}" not in said
    assert "client <b>x</b> (small): loss 1.500, 300 tokens in 2.0 s, upload 1\n" in said
    assert "round 1: client y failed (no answer): It did not answer." in said
    assert "round 1: loss 1.500, 150 tokens/s, up 2.0 KiB, down 1.0 KiB, 2 s\n" in said
    assert "evaluation of the global adapter after round 3:\n" in said
    assert "  unseen clients  Rouge-L 25.0 %, exact match 50.0 %, loss 1.500\n" in said


def test_a_terminal_gets_one_line_that_moves():
    said = printed(whole_run(), terminal=True, width=200)
    assert "finished: 3 rounds, 9 s, 150 tokens/s, up 12.0 KiB, down 6.0 KiB" in said
    assert "client <b>x</b>" not in said


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_broken(width):
    said = printed(whole_run(), terminal=True, width=width)
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split("[\r\n]+", said)]
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    for phrase in ("210 adapted modules", "down 1.0 KiB", "ranks 0 and 64"):
        assert phrase in text
        assert any(phrase in line for line in lines), f"{phrase!r} is broken in two"


def test_losses_and_over_selection_do_not_change_how_far_the_run_is():
    events = whole_run()
    shares = [tallied(events[: n + 1]).share for n in range(len(events))]
    assert shares == sorted(shares) and shares[-1] == 1.0
    # After START, BASE and a whole round of three invited clients, one of three rounds is done.
    assert shares[5] == pytest.approx(1 / 3)
    assert tallied(events[:3]).share == pytest.approx(1 / 6)


def test_more_uploads_than_wanted_count_as_one_round():
    events = [START, upload(1, "a"), upload(1, "b"), upload(1, "c")]
    assert tallied(events).share == pytest.approx(1 / 3)
    assert tallied(events).doing == "round 1/3: aggregating"


def test_no_time_is_left_at_the_end_and_none_is_guessed_at_the_beginning():
    events = timed((event, 10) for event in whole_run())
    assert tallied(events).time_left.left(2000.0) is None
    assert tallied(events[:2]).time_left.left(1020.0) is None
    assert left_text(None) == ""


def test_the_time_left_in_words():
    assert left_text(Estimate(68.0, False)) == "about 68 s left"
    assert left_text(Estimate(400.0, True)) == "about 6 min + evaluation left"
    assert left_text(Estimate(0.4, True)) == "evaluation left"
    assert left_text(Estimate(0.4, False)) == ""


def test_the_next_run_knows_how_long_an_evaluation_takes():
    events = timed((event, 10) for event in whole_run())
    tally = tallied(events).next_run()
    start = {**START, "config": {**CONFIG, "evaluation": {"base": False, "truncated": True}}}
    for event in timed((event, 10) for event in [start, upload(1, "a")]):
        tally.add(event)
    estimate = tally.time_left.left(1020.0)
    # All evaluations before took 10 s for each adapter; half a round and two rounds are left.
    assert estimate.seconds == pytest.approx(10 + 2 * 20 + 2 * 10)
    assert not estimate.without_evaluations


def test_a_resumed_run_goes_on_where_it_was():
    tally = tallied([{**START, "resumed": True}, upload(3, "a")])
    assert tally.share == pytest.approx((2 + 1 / 2) / 3)
    assert tally.doing == "round 3/3: training, 1 of 2 uploads"


def test_it_says_what_is_going_on():
    doing = [tallied(whole_run()[: n + 1]).doing for n in range(len(whole_run()))]
    assert list(dict.fromkeys(doing)) == [
        "evaluating the base model",
        "round 1/3: training, 0 of 2 uploads",
        "round 1/3: training, 1 of 2 uploads",
        "round 1/3: aggregating",
        "round 2/3: training, 0 of 2 uploads",
        "round 2/3: training, 1 of 2 uploads",
        "round 2/3: aggregating",
        "round 3/3: training, 0 of 2 uploads",
        "round 3/3: training, 1 of 2 uploads",
        "round 3/3: aggregating",
        "evaluating the trained adapter",
        "finishing",
        "finished",
    ]


def test_without_rows_to_evaluate_on_no_evaluation_is_announced():
    start = {**START, "questions": 0}
    assert tallied([start]).doing == "starting the first round"
    assert tallied([start, *a_round(1), *a_round(2), *a_round(3)]).doing == "finishing"


def test_a_stage_between_two_events_is_named_with_how_far_it_is():
    meter = Meter()
    meter.begin("evaluating the base model", 256)
    meter.advance(113)
    line = live_line(tallied([START]), meter, 67, 0.0, 80).plain
    assert line.startswith("evaluating the base model: 44 %")
    assert line.endswith("0:01:07")


LONG = {
    **START,
    "config": {
        "federation": {"rounds": 1000, "cohort": 1000},
        "evaluation": {"base": True, "every": 5, "truncated": True},
    },
    "clients": 12_000,
}


@pytest.mark.parametrize("width", [80, WIDE, 200])
@pytest.mark.parametrize("start", [START, LONG], ids=["short", "long"])
@pytest.mark.parametrize("elapsed", [0, 59, 3600, 400_000])
def test_the_live_line_fits_and_always_says_what_is_going_on(width, start, elapsed):
    seconds = elapsed / 7
    events = timed((event, seconds) for event in [start, BASE, *a_round(1), SPECTRUM, *a_round(2)])
    for n in range(1, len(events) + 1):
        tally = tallied(events[:n])
        line = live_line(tally, Meter(), elapsed, events[n - 1]["time"], width)
        assert line.cell_len < width
        assert line.plain.startswith(tally.doing)
        assert "…" not in line.plain and "-" not in line.plain.removeprefix(tally.doing)
        assert width == 80 or "0:00:" in line.plain or elapsed >= 60


def test_where_there_is_no_room_the_bar_goes_first_and_what_is_going_on_stays():
    events = timed((event, 30) for event in whole_run()[:4])
    tally, now = tallied(events), events[-1]["time"]

    def line(width):
        return live_line(tally, Meter(), 67, now, width).plain

    widths, parts = [80], ["━", "0:01:07", "left", tally.doing]
    for place in range(4):
        assert [part in line(widths[-1]) for part in parts] == [n >= place for n in range(4)]
        widths.append(len(line(widths[-1])))
    assert len(line(20)) < 20


def test_a_terminal_without_unicode_gets_a_bar_of_its_own_characters():
    line = live_line(tallied(whole_run()[:5]), Meter(), 1, 0.0, 80, ascii_only=True).plain
    assert line.isascii() and "##" in line


def test_a_round_short_of_its_quorum_says_so():
    short = {"event": "short", "round": 1, "attempt": 1, "received": 1, "quorum": 2}
    tally = tallied([START, upload(1, "a"), short])
    assert tally.doing == "round 1/3: waiting for more clients"
    (text,) = sentences(short, tally)
    assert " ".join(text.split()) == "round 1: 1 upload after attempt 1, 2 needed"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("not_needed", "round 1: upload of y not used (enough uploads had arrived)"),
        ("unreachable", "round 1: client y failed (unreachable): It did not answer."),
        (None, "round 1: client y failed: It did not answer."),
    ],
)
def test_a_loss_is_described_by_its_kind(kind, text):
    event = LOST if kind is None else {**LOST, "kind": kind}
    assert [line.strip() for line in sentences(event, Tally())] == [text]


def test_a_truncated_adapter_is_called_by_its_type():
    lines = sentences({**EVALUATION, "adapter": "small"}, Tally())
    assert lines[0] == "evaluation of the global adapter truncated to type small after round 3:"
    assert sentences(BASE, Tally())[0] == "evaluation of the base model before training:"


def test_the_notices_of_a_run_follow_its_start():
    texts = sentences({**START, "notices": ["Layer 3 is not adapted."]}, Tally())
    assert texts[1:] == ["note: Layer 3 is not adapted."]
    assert len(sentences(START, Tally())) == 1
