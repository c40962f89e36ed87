import time

import pytest

from flexlora.errors import AdapterError
from flexlora.storage.untrusted import one_line, parse_json, printable, printable_lines, short


def test_json_is_parsed_strictly():
    assert parse_json('{"é": [1, 2.5, null]}'.encode()) == {"é": [1, 2.5, None]}
    with pytest.raises(AdapterError, match="the key 'a' appears twice"):
        parse_json(b'{"x": {"a": 1, "b": 2, "a": 3}}')
    for constant in (b"NaN", b"-Infinity"):
        with pytest.raises(AdapterError, match="is not JSON"):
            parse_json(b'{"a": ' + constant + b"}")
    for data in (b"", b"{", b'"\xff"', b'{"a": 1} 2'):
        with pytest.raises(ValueError):
            parse_json(data)


def test_values_in_messages_are_short_and_printable():
    assert short("a\nb") == "'a\\nb'"
    assert short(ValueError("two\nlines")) == "two?lines"
    text = short("x" * 10_000)
    assert len(text) == 143 and text.startswith("'xxx") and text.endswith("xxx'")
    assert printable("a\x1b[2Jb") == "a?[2Jb"


HOSTILE = {
    "an escape code": "\x1b[31mred",
    "NUL": "a\0b",
    "a forged line": "lost\nround 9: loss 0.001",
    "a carriage return": "lost\rround 9: loss 0.001",
    "a line separator": "lost\u2028round 9",
    "a next-line code": "lost\x85round 9",
    "half a surrogate": "\ud800",
    "the other half": "\udfff and \ud83d",
    "a reversed direction": "\u202egnp.exe",
    "an isolate": "\u2066x\u2069",
    "zero width": "a\u200bb\u200dc\ufeffd",
    "tags": "a\U000e0041b",
    "piled accents": "a" + "\u0301" * 1000,
    "letters that show nothing": "\u3164\u115f\u1160\u2800\uffa0",
    "private use": "\ue000\U000f0000",
    "a backspace": "abc\b\b\bxyz",
    "a bell": "\a\x7f\x9b31m",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_text_of_strangers_is_one_printable_line(text):
    line = one_line(text)
    assert line.isprintable() and len(line.splitlines()) <= 1
    line.encode()
    assert "\u0301" * 4 not in line and not set(line) & set("\u3164\u115f\u1160\u2800\uffa0")
    assert one_line(line) == line
    assert short(text).isprintable() and printable(text).isprintable()


def test_text_of_strangers_in_any_language_stays():
    for text in (
        "Zürich 東京 עברית",
        "हिन्दी में",
        "tiếng Việt",
        "a\u0323\u0302b",
        "e\u0301",
        "it's 3 %",
    ):
        assert one_line(text) == text
    assert one_line(" two\n\n  lines\tand more ") == "two lines and more"


def test_long_text_and_values_cost_no_more_than_what_is_shown():
    assert one_line("x" * 10**7) == "x" * 497 + "..."
    assert one_line("x" * 500) == "x" * 500 and one_line("x" * 501, 500)[-4:] == "x..."
    assert len(one_line("a" + " " * 10**7 + "b", 20)) <= 20
    deep = nested = []
    for _ in range(5000):
        nested.append([])
        nested = nested[0]
    values = (10**5000, deep, [[]] * 3_000_000, {str(n): n for n in range(10**5)}, b"x" * 10**7)
    before = time.perf_counter()
    for value in (*values, [10**5000], {"a": [[deep]]}, float("nan"), None, True):
        assert 0 < len(one_line(value, 60)) <= 60
        assert len(short(value)) <= 145
    assert time.perf_counter() - before < 0.5


def test_lines_stay_apart_where_they_are_ours():
    assert printable_lines("one\ntwo\x1b[2J\r\nthree") == "one\ntwo?[2J?\nthree"
