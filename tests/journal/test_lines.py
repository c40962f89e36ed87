"""A line of a journal tells whether it is as it was written."""

import json

import pytest

from flexlora.journal import JOURNAL, Record
from flexlora.journal.lines import checked_line, is_checked, opened_line
from flexlora.storage import DamagedFile

VALUES = {"event": "client", "loss": 0.1, "who": 'an"na', "nested": {"check": "0123456789abcdef"}}


def test_a_line_is_read_back_and_any_changed_byte_is_noticed():
    line = checked_line(VALUES)
    assert opened_line(line) == VALUES and is_checked(line)
    assert json.loads(line) == VALUES | {"check": json.loads(line)["check"]}
    for place in range(len(line) - 1):
        damaged = line[:place] + bytes([line[place] ^ 1]) + line[place + 1 :]
        try:
            values = opened_line(damaged)
        except ValueError:
            continue
        # Only the name of the check itself may be damaged: nothing is missing then.
        assert {key: values[key] for key in VALUES} == VALUES, damaged


@pytest.mark.parametrize("line", [b"[1]\n", b"{\n", b"\0\0\n", b"\xff\n"])
def test_what_is_no_object_is_refused(line):
    with pytest.raises(ValueError):
        opened_line(line)


def test_two_lines_that_became_one_are_noticed():
    one, two = checked_line(VALUES), checked_line({"event": "round", "round": 7})
    for cut in range(1, len(one)):
        with pytest.raises(ValueError):
            opened_line(one[:-cut] + two)


def test_an_event_without_a_check_needs_its_fields(tmp_path):
    (tmp_path / JOURNAL).write_text('{"event": "short", "round": 1, "attempt": 1, "received": 2}\n')
    with pytest.raises(DamagedFile, match=r"Line 1 of .* is not an event \(it has no 'quorum'\)"):
        list(Record(tmp_path).events())


def test_a_mark_covers_what_came_before_it_and_nothing_else(tmp_path):
    record = Record(tmp_path)
    first = record.mark()
    assert record.agrees(first) and first.bytes == 0
    record.append("short", round=1, attempt=1, received=2, quorum=3)
    second = record.mark(first)
    record.append("short", round=2, attempt=1, received=2, quorum=3)
    third = record.mark(second)
    assert second.bytes < third.bytes == record.bytes
    assert third == record.mark()  # continued or read as a whole
    assert record.agrees(second) and record.agrees(third)
    whole = record.path.read_bytes()
    record.path.write_bytes(whole + b"more")
    assert record.agrees(third)
    record.path.write_bytes(whole[:-1] + b" ")
    assert record.agrees(second) and not record.agrees(third)
    record.path.write_bytes(whole[: second.bytes - 1])
    assert not record.agrees(second)
    record.path.unlink()
    assert record.agrees(first) and not record.agrees(second)


def test_a_damaged_journal_keeps_what_can_be_read(tmp_path):
    record, aside = Record(tmp_path), tmp_path / "aside"
    for number in (1, 2, 3):
        record.append("short", round=number, attempt=1, received=2, quorum=3)
    lines = record.path.read_bytes().splitlines(keepends=True)
    damaged = lines[0] + lines[1].replace(b'"round"', b'"raund"') + lines[2]
    record.path.write_bytes(damaged)
    record.mend(len(damaged), 2, aside)
    assert [event["round"] for event in record.events()] == [1]
    assert aside.read_bytes() == damaged
