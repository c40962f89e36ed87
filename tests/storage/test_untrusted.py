import pytest

from flexlora.errors import AdapterError
from flexlora.storage.untrusted import parse_json, printable, short


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
