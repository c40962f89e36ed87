"""A meter: its words and its share at every point of a stage."""

from flexlora.journal.meter import Meter


def test_a_stage_without_an_end_is_named_only():
    meter = Meter()
    assert (meter.text, meter.share) == ("", None)
    meter.begin("loading the model")
    meter.advance()
    assert (meter.text, meter.share) == ("loading the model", None)


def test_a_stage_is_counted_and_never_more_than_whole():
    meter = Meter()
    meter.begin("tokenising", 12_000, "rows")
    meter.advance(4096)
    assert meter.text == "tokenising: 4,096 of 12,000 rows"
    meter.advance(9000)
    assert (meter.text, meter.share) == ("tokenising: 12,000 of 12,000 rows", 1.0)
    meter.begin("evaluating", 7, "answers")
    assert (meter.done, meter.share) == (0, 0.0)
    meter.end()
    assert meter.text == ""


def test_a_stage_without_a_unit_is_in_percent_and_is_whole_at_its_end_only():
    meter = Meter()
    meter.begin("evaluating the base model", 7)
    meter.advance(6.96)
    assert meter.text == "evaluating the base model: 99 %"
    meter.advance(0.04)
    assert meter.text == "evaluating the base model: 100 %"
