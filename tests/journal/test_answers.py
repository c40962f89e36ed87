"""Sample answers: what is kept after a stop, and lines that a crash cut off."""

import pytest

from flexlora.errors import ProtocolError
from flexlora.journal.answers import FIELDS, SampleAnswers


def lines(*rounds):
    return [{"round": number, "answer": f"après {number}"} for number in rounds]


def test_answers_are_appended_and_read_in_order(tmp_path):
    answers = SampleAnswers(tmp_path)
    assert list(answers.all()) == []
    answers.append([])
    assert not answers.path.exists()
    answers.append(lines(0, 2))
    answers.append(lines(5))
    assert list(answers.all()) == lines(0, 2, 5)


def test_a_stopped_run_keeps_the_answers_up_to_its_checkpoint(tmp_path):
    answers = SampleAnswers(tmp_path)
    answers.rewind(3)
    answers.append(lines(0, 2, 3, 5))
    with answers.path.open("a") as file:
        file.write('{"round": 5, "ans')
    answers.rewind(3)
    assert list(answers.all()) == lines(0, 2, 3)


def test_before_the_first_checkpoint_the_base_is_evaluated_again(tmp_path):
    answers = SampleAnswers(tmp_path)
    answers.append(lines(0))
    answers.rewind(0)
    assert list(answers.all()) == []


@pytest.mark.parametrize("line", ["{", "[1]", "{}", '{"round": "2"}'])
def test_a_line_that_is_no_answer_is_named(tmp_path, line):
    answers = SampleAnswers(tmp_path)
    answers.append(lines(0))
    with answers.path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ProtocolError, match=r"Line 2 of .*answers\.jsonl is not a sample answer"):
        list(answers.all())


def test_the_fields_are_documented():
    assert list(FIELDS)[:3] == ["round", "adapter", "population"]
