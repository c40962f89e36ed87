"""Evaluations by the clients in tables, the report, the terminal and trackers."""

import pytest

from flexlora.cli.sentences import sentences
from flexlora.cli.tally import Tally
from flexlora.journal import EVENTS
from flexlora.reporting import page, tables
from flexlora.reporting.tracker import scalars


def row(client: str, loss_total: float, loss_tokens: int, examples: int) -> dict:
    return {
        "client": client,
        "examples": examples,
        "loss_total": loss_total,
        "loss_tokens": loss_tokens,
    }


def event(round: int, *rows: dict, **changes) -> dict:
    means = {r["client"]: r["loss_total"] / r["loss_tokens"] for r in rows}
    facts = {
        "event": "client_evaluation",
        "time": 1000.0,
        "round": round,
        "clients": list(rows),
        "missing": {},
        "loss": sum(r["loss_total"] for r in rows) / sum(r["loss_tokens"] for r in rows),
        "loss_min": min(means.values()),
        "loss_max": max(means.values()),
        "loss_std": 0.25,
        "worst": max(means, key=lambda id: means[id]),
        "seconds": 3.0,
        "bytes_down": 77,
    }
    return {**facts, **changes}


BEFORE = event(0, row("lake", 12.0, 3, 2), row("mary", 30.0, 5, 4))
AFTER = event(2, row("lake", 9.0, 3, 2), row("mary", 10.0, 5, 4), missing={"north": "It is away."})
NOBODY = {
    **event(1, row("lake", 1.0, 1, 1)),
    **{"clients": [], "missing": {"lake": "Disk full."}},
    **dict.fromkeys(("loss", "loss_min", "loss_max", "loss_std", "worst")),
}


@pytest.mark.parametrize("each", [BEFORE, AFTER, NOBODY])
def test_the_events_are_those_of_the_schema(each):
    assert each.keys() - {"event", "time"} == EVENTS["client_evaluation"].fields.keys()


def test_rounds_ascend_and_the_last_of_one_counts():
    first, last = tables.client_evaluation_table(
        [AFTER, BEFORE, event(2, *AFTER["clients"]), AFTER]
    )
    assert (first.round, first.clients, first.examples, first.loss) == (0, 2, 6, 42 / 8)
    assert (last.round, last.missing, last.loss) == (2, 1, 19 / 8)
    assert (last.lowest, last.highest, last.deviation, last.worst) == (2.0, 3.0, 0.25, "lake")


def test_clients_are_listed_with_the_worst_first_and_their_change():
    assert tables.client_loss_table([BEFORE, AFTER]) == [
        tables.ClientLossRow("lake", 2, 4.0, 3.0),
        tables.ClientLossRow("mary", 4, 6.0, 2.0),
    ]
    assert tables.client_loss_table([AFTER])[0].before is None
    assert tables.client_loss_table([NOBODY]) == tables.client_loss_table([]) == []


def test_the_report_has_them_by_round_and_by_client():
    text = page.render([BEFORE, NOBODY, AFTER])
    part = text[text.index("Scores on the clients") :]
    for cell in ("5.250", "2.375", "2 (1 missing)", "-1.000", "-4.000", "lake", "mary"):
        assert cell in part
    assert "Scores on the clients" not in page.render([])


def lines(each: dict) -> list[str]:
    return [text.replace("\N{NO-BREAK SPACE}", " ") for text in sentences(each, Tally())]


def test_the_terminal_has_the_mean_the_spread_and_who_is_missing():
    assert lines(BEFORE) == [
        "evaluation by the clients before training (2 clients, 6 held-out rows): loss 5.250, "
        "by client 4.000 to 6.000, worst mary"
    ]
    assert lines(AFTER)[1:] == ["  north did not evaluate: It is away."]
    assert lines(NOBODY) == ["  lake did not evaluate: Disk full."]
    one = event(3, row("lake", 3.0, 2, 1))
    assert lines(one)[0].endswith("(1 client, 1 held-out row): loss 1.500")


def test_trackers_are_told_numbers_only():
    assert scalars(AFTER) == {
        "client_evaluation/loss": 19 / 8,
        "client_evaluation/loss_min": 2.0,
        "client_evaluation/loss_max": 3.0,
        "client_evaluation/loss_std": 0.25,
    }
    assert scalars(NOBODY) == {}
