import json
import time

import pytest

from flexlora.journal.record import JOURNAL, Record, mean_scores


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path)


def test_events_come_back_in_order_and_by_kind(record):
    assert list(record.events()) == []
    first = record.append("start", clients=3)
    record.append("client", round=1, client="ä")
    record.append("round", round=1)
    assert first == {"event": "start", "time": first["time"], "clients": 3}
    assert 0 <= time.time() - first["time"] < 60
    assert [event["event"] for event in record.events()] == ["start", "client", "round"]
    assert [event["event"] for event in record.events("round", "start")] == ["start", "round"]
    assert next(record.events("client"))["client"] == "ä"


def test_a_line_cut_off_is_left_out(record):
    record.append("start", clients=3)
    with record.path.open("a") as journal:
        journal.write('{"event": "client", "rou')
    assert [event["event"] for event in record.events()] == ["start"]


def test_rewinding_forgets_what_was_written_since(record):
    record.append("start", clients=3)
    length = record.bytes
    record.append("client", round=1)
    record.rewind(length)
    assert record.bytes == length == record.path.stat().st_size
    record.append("round", round=1)
    assert [event["event"] for event in record.events()] == ["start", "round"]


def test_rewinding_never_makes_the_journal_longer(record):
    """Otherwise a journal that was lost in part would be filled up with NUL bytes."""
    record.append("start", clients=3)
    before = record.path.read_bytes()
    record.rewind(len(before) + 100)
    assert record.path.read_bytes() == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_say_is_refused_and_leaves_no_trace(record, value):
    record.append("start", clients=3)
    with pytest.raises(ValueError, match="JSON"):
        record.append("client", loss_total=value)
    assert len(record.path.read_text().splitlines()) == 1


def test_every_line_is_one_json_object(record):
    record.append("start", config={"text": "two\nlines"})
    record.append("finish", rounds=2)
    lines = (record.folder / JOURNAL).read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["start", "finish"]


def test_means_are_of_totals_not_of_means():
    rows = [
        {"examples": 1, "rouge_l": 1.0, "exact_match": 1, "loss_total": 2.0, "loss_tokens": 2},
        {"examples": 3, "rouge_l": 0.6, "exact_match": 0, "loss_total": 9.0, "loss_tokens": 3},
    ]
    mean = mean_scores(rows)
    assert mean["examples"] == 4
    assert mean["rouge_l"] == pytest.approx(100 * 1.6 / 4)
    assert mean["exact_match"] == 25
    assert mean["loss"] == pytest.approx(11 / 5)
    assert mean_scores([]) == {"examples": 0, "rouge_l": 0, "exact_match": 0, "loss": 0}
