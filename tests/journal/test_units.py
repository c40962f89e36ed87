import pytest

from flexlora.journal import age, byte_unit, counted, duration, number, size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (3, "3 B"),
        (1023, "1,023 B"),
        (1536, "1.5 KiB"),
        (5 << 20, "5.0 MiB"),
        (3 << 30, "3.00 GiB"),
        (5000 << 30, "5,000.00 GiB"),
    ],
)
def test_sizes(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("largest", "unit"),
    [(0, "B"), (1023, "B"), (1024, "KiB"), (5 << 20, "MiB"), (7 << 30, "GiB")],
)
def test_byte_units(largest, unit):
    divisor, name = byte_unit(largest)
    assert name == unit
    assert largest == 0 or 1 <= largest / divisor < 1024


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(7.9, "7 s"), (61, "1 min 01 s"), (7260, "2 h 01 min"), (-3, "0 s"), (None, "–")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.94, "7.9 s"), (61.5, "1 min 01 s"), (-3, "0.0 s"), (None, "–")]
)
def test_short_durations_have_decimals_where_they_are_wanted(seconds, text):
    assert duration(seconds, digits=1) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0 s"), (119, "119 s"), (120, "2 min"), (9000, "2 h"), (260000, "3 days")],
)
def test_ages(seconds, text):
    assert age(seconds) == text


def test_numbers_and_counts():
    assert number(1234.5678, 2) == "1,234.57" and number(None, 2) == "–"
    assert number(17, 0, " tokens/s") == "17 tokens/s"
    assert counted(1, "round") == "1 round" and counted(1200, "round") == "1,200 rounds"
    assert counted(2, "category", "categories") == "2 categories"
