"""From which length on text of strangers is cut, to the character."""

import pytest

from flexlora.storage.untrusted import one_line, printable, short


def test_a_value_is_short_up_to_160_characters():
    assert short("x" * 158) == repr("x" * 158)
    assert short("x" * 159) == "'" + "x" * 79 + "..." + "x" * 59 + "'"
    assert short(ValueError("x" * 160)) == "x" * 160
    assert short(ValueError("x" * 161)) == "x" * 80 + "..." + "x" * 60


def test_a_letter_has_up_to_three_accents_and_each_letter_its_own():
    assert (
        printable("a\u0301\u0301\u0301b\u0301\u0301\u0301")
        == "a\u0301\u0301\u0301b\u0301\u0301\u0301"
    )
    assert printable("a\u0301\u0301\u0301\u0301") == "a\u0301\u0301\u0301?"
    assert printable("é\u20dd\u20dd\u20dd\u20dd") == "é\u20dd\u20dd\u20dd?"


@pytest.mark.parametrize("most", [20, 60])
def test_blanks_are_joined_within_twice_the_length_and_twenty(most):
    inside = "a" + " " * (2 * most + 18) + "b"
    assert one_line(inside, most) == "a b"
    assert one_line(inside + "c", most) == "a b..."
    assert one_line("x" * most, most) == "x" * most
    assert one_line("x" * (most + 1), most) == "x" * (most - 3) + "..."


def test_a_list_of_up_to_forty_plain_values_is_shown_whole():
    plain = [None, 1.5, "a", 2, True, None, "b", 0.5, 10**6]
    assert one_line(plain) == str(plain)
    assert one_line([0] * 40, 500) == str([0] * 40)
    assert one_line([0] * 41, 500) == "[0, 0, 0, 0, 0, 0, ...]"
    assert one_line({"a": None, "b": 1, "c": 2, "d": 3, "e": 4, "f": 5}) == (
        "{'a': None, 'b': 1, 'c': 2, 'd': 3, 'e': 4, 'f': 5}"
    )
    assert one_line([[1]] * 7) == "[[1], [1], [1], [1], [1], [1], ...]"


def test_a_text_in_a_list_is_shown_whole_up_to_200_characters():
    assert one_line(["x" * 200]) == str(["x" * 200])
    assert "..." in one_line(["x" * 201]) and len(one_line(["x" * 201])) < 210


def test_an_integer_is_spelt_out_up_to_14000_bits():
    assert one_line(2**13_999) == str(2**13_999)[:497] + "..."
    assert one_line(2**14_000) == "an integer of 14001 bits"
    assert one_line([2**13_999], 5000) == str([2**13_999])
    assert len(one_line([2**14_000], 5000)) < 300


def test_bytes_are_shown_up_to_400():
    assert one_line(b"x" * 400) == repr(b"x" * 400)
    assert one_line(b"x" * 401) == repr(b"x" * 200) + "..."
