"""The reader of journals: whole, from an offset, and while they grow."""

import json

import pytest

from flexlora.journal import JOURNAL, Journal, Record, events_after


def asked(name):
    return {"event": "asked", "time": 102.0, "round": 1, "client": name}


def write(folder, *events):
    with (folder / JOURNAL).open("a", encoding="utf-8") as journal:
        journal.writelines(json.dumps(event) + "\n" for event in events)


def test_reading_goes_on_at_an_offset(tmp_path):
    path = tmp_path / JOURNAL
    assert list(events_after(path)) == []
    write(tmp_path, asked("ä"), asked("b"))
    (first, after), (second, end) = events_after(path)
    assert (first, second) == (asked("ä"), asked("b"))
    assert end == path.stat().st_size
    assert list(events_after(path, after)) == [(asked("b"), end)]
    with path.open("a") as journal:
        journal.write('{"event": "cli')
    assert list(events_after(path, end)) == []


def test_a_faulty_line_is_refused_by_number_from_any_offset(tmp_path):
    write(tmp_path, asked("a"), asked("b"))
    path = tmp_path / JOURNAL
    offset = path.stat().st_size
    with path.open("a") as journal:
        journal.write('{"round": 1}\n')
    for start in (0, offset):
        with pytest.raises(ValueError, match=r"Line 3 of .*metrics\.jsonl is not an event"):
            list(events_after(path, start))


def test_each_reading_brings_what_is_new(tmp_path):
    journal = Journal(tmp_path)
    assert list(journal.news()) == []
    write(tmp_path, asked("a"), asked("b"))
    assert list(journal.news()) == [asked("a"), asked("b")]
    assert list(journal.news()) == []
    with (tmp_path / JOURNAL).open("a") as file:
        text = json.dumps(asked("ä"))
        file.write(text[:20])
        file.flush()
        assert list(journal.news()) == []
        file.write(text[20:] + "\n")
    assert list(journal.news()) == [asked("ä")]


def test_a_reading_does_not_read_again_what_is_old(tmp_path):
    journal = Journal(tmp_path)
    write(tmp_path, *(asked(f"client-{i}") for i in range(200)))
    assert len(list(journal.news())) == 200
    with (tmp_path / JOURNAL).open("r+b") as file:
        file.write(b"X" * 9000)
    write(tmp_path, asked("new"))
    assert list(journal.news()) == [asked("new")]


@pytest.mark.parametrize("more", [[], [asked("c"), asked("d"), asked("e"), asked("f")]])
def test_a_journal_that_was_cut_is_read_from_its_beginning(tmp_path, more):
    """Also where it is longer by now than it was before."""
    journal, record = Journal(tmp_path), Record(tmp_path)
    write(tmp_path, asked("first"))
    length = record.bytes
    write(tmp_path, asked("a"), asked("b"))
    assert len(list(journal.news())) == 3
    record.rewind(length)
    write(tmp_path, *more)
    assert list(journal.news()) == [None, asked("first"), *more]


def test_a_journal_that_is_removed_is_void(tmp_path):
    journal = Journal(tmp_path)
    write(tmp_path, asked("a"))
    list(journal.news())
    (tmp_path / JOURNAL).unlink()
    assert list(journal.news()) == [None]
    assert list(journal.news()) == []


@pytest.mark.parametrize("line", ["{", "[1]", '{"round": 1}', "\0\0\0"])
def test_a_line_that_is_not_an_event_is_reported_each_time(tmp_path, line):
    journal = Journal(tmp_path)
    write(tmp_path, asked("a"))
    with (tmp_path / JOURNAL).open("a") as file:
        file.write(f"{line}\n")
    news = journal.news()
    assert next(news) == asked("a")
    for reading in (news, journal.news()):
        with pytest.raises(ValueError, match=r"Line 2 of .*metrics\.jsonl is not an event"):
            list(reading)
