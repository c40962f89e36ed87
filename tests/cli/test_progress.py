import io

import pytest
from rich.console import Console

from flexlora.cli.progress import show
from flexlora.journal.units import duration, size

CLIENT = {
    "event": "client",
    "round": 1,
    "client": "<b>x</b>",
    "rank_type": "small",
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
    "round": 1,
    "clients": [{**SCORED, "loss_total": 3.0, "loss_tokens": 2}],
}
LOST = {"event": "lost", "round": 1, "client": "y", "reason": "It did not answer."}


def printed(terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200)
    events = [CLIENT, LOST, ROUND, EVALUATION]
    assert show(iter(events), console, turns=2) == events
    return out.getvalue()


def test_plain_lines_where_there_is_no_terminal():
    said = printed(terminal=False)
    assert "\x1b" not in said
    assert "client <b>x</b> (small): loss 1.500, 300 tokens in 2.0 s (1/2" in said
    assert "lost client y: It did not answer." in said
    assert "round 1: loss 1.500, 150 tokens/s overall, up 2.0 KiB, down 1.0 KiB" in said
    assert "unseen clients Rouge-L 25.0, exact 50.0 %, loss 1.500" in said


def test_a_terminal_gets_one_line_that_moves():
    said = printed(terminal=True)
    assert "2/2 turns" in said and "up 2.0 KiB" in said
    assert "client <b>x</b>" not in said


@pytest.mark.parametrize(
    ("count", "text"), [(3, "3 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 30, "3.00 GiB")]
)
def test_sizes(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.9, "7 s"), (61, "1 min 01 s"), (7260, "2 h 01 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
