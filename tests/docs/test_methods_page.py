"""The page of methods is true: its formulas are measured, its text is up to date."""

import statistics

import pytest

from flexlora import methods
from flexlora.cli.methods import LISTED
from support.methods_page import PAGE, code_lines, listed, measured, page, predicted


@pytest.mark.parametrize("name", methods.shipped())
def test_formulas_are_the_bytes_measured(name):
    measurement = measured(name)
    formulas = predicted(name, measurement)
    assert measurement["up"] == formulas["up"] and measurement["down"] == formulas["down"]


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: make docs"


def test_the_list_of_the_command_line_is_up_to_date():
    assert LISTED.read_text(encoding="utf-8") == listed(), "run: make docs"


def test_a_method_is_a_small_file():
    assert statistics.median(code_lines(name) for name in methods.shipped()) < 60
