"""Tests in two sizes: a short one for every run, and the full one of ``make trust``."""

import pytest


def trials(short: int, full: int) -> pytest.MarkDecorator:
    """Run a test with the argument ``trials`` at ``short`` and, under the mark ``trust``, ``full``.

    The short form belongs to the quick tests, or to the slow ones if the test has the mark
    ``slow`` too. The full one runs in ``make trust`` alone::

        @sizes.trials(200, 200_000)
        def test_mutated_uploads_are_refused(trials): ...
    """
    return pytest.mark.parametrize(
        "trials", [short, pytest.param(full, marks=pytest.mark.trust)], ids=["short", "full"]
    )
