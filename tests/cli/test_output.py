"""What commands print: readable on 80 columns, and nothing of other libraries."""

import re

import pytest

from support import tiny_config
from support.commands import python

LIBRARIES = ("Loading weights", "it/s]", "s/it]", "Warning", "warn(", "TensorFlow", "HF_TOKEN")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("output")
    tiny_config.write(folder)
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """What a run prints."""
    result = python("-m", "flexlora", "run", "tiny.toml", cwd=folder)
    assert result.code == 0, result.err
    return result


def flexlora(folder, *words):
    result = python("-m", "flexlora", *words, cwd=folder)
    assert result.code == 0, result.err
    return result


def quiet(result):
    """Whether nothing of other libraries is in the output."""
    return result.err == "" and not any(word in result.out for word in LIBRARIES)


def test_a_run_prints_its_own_lines_only(run):
    assert quiet(run)
    assert "adapter: runs/tiny/rounds/00002/adapter" in run.out.splitlines()


def test_lines_of_a_run_fit_80_columns(run):
    assert [line for line in run.out.splitlines() if len(line) > 80] == []


def test_scores_fit_80_columns(run, folder):
    result = flexlora(folder, "eval", "tiny.toml", "--adapter", "runs/tiny/rounds/00002/adapter")
    lines = result.out.splitlines()
    assert quiet(result) and all(len(line) <= 80 for line in lines)
    assert lines[0].split() == ["clients", "rows", "Rouge-L", "exact", "match", "loss"]
    assert re.match(r" seen clients +2 +2 ", lines[1])


def test_a_comparison_fits_80_columns(folder):
    words = ("--methods", "flexlora,hetlora", "--seeds", "1", "--set", "federation.rounds=1")
    result = flexlora(folder, "compare", "tiny.toml", *words)
    assert quiet(result)
    assert [line for line in result.out.splitlines() if len(line) > 80] == []


def test_an_adapter_s_facts(run, folder):
    result = flexlora(folder, "check", "runs/tiny/rounds/00002/adapter")
    assert quiet(result)


def test_the_report_is_named(run, folder):
    assert flexlora(folder, "report", "runs/tiny").out == "runs/tiny/report.html\n"
