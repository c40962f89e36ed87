"""Runs that are killed and resumed end as if nothing had happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexlora.journal.answers import ANSWERS
from flexlora.journal.record import Record
from flexlora.peft_format import WEIGHTS
from support import kills
from support.commands import SOURCE

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

MOST = 500
"""More changes of files than a run makes."""


def of_every_change(step: int) -> list[str]:
    """Every ``step``-th change, up to more than a run makes."""
    return [str(number) for number in range(1, MOST, step)]


def of_every_fault(step: int) -> list[str]:
    """Every ``step``-th change, refused in each way, up to more than a run makes."""
    return [
        f"{number}:{fault}"
        for start, fault in enumerate(kills.FAULTS)
        for number in range(1 + start, MOST, step)
    ]


def run(folder: Path, points: list[str]) -> dict[str, list[str]]:
    tests = Path(__file__).parents[1]
    path = os.pathsep.join((str(tests), str(SOURCE)))
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, str(tests / "support" / "kills.py"), str(folder), *points],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "ends.json").read_text())


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    run(folder, list(kills.POINTS))
    return folder


def untimed(folder: Path) -> list[dict]:
    """The journal without times, and without the starts, of which a resumed run has several.

    Also without the bytes up: see test_wire's test of the clock.
    """
    left_out = ("time", "seconds", "aggregate_seconds", "bytes_up")
    events = [event for event in Record(folder).events() if event["event"] != "start"]
    for event in events:
        if event["event"] == "finish":
            event["adapter"] = Path(event["adapter"]).relative_to(folder).as_posix()
    return [{k: v for k, v in event.items() if k not in left_out} for event in events]


def files(folder: Path) -> dict[str, bytes | None]:
    """Every file of a run but the journal."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {
        name: path.read_bytes()
        for name, path in found.items()
        if path.is_file() and path.name not in ("metrics.jsonl", "checkpoint.json")
    }


def assert_as_if_nothing_had_happened(folder: Path, point: str) -> None:
    whole = folder / "whole"
    name = f"rounds/00003/adapter/{WEIGHTS}"
    assert (folder / point / name).read_bytes() == (whole / name).read_bytes()
    assert untimed(folder / point) == untimed(whole)
    assert (folder / point / ANSWERS).read_bytes() == (whole / ANSWERS).read_bytes()


def ends(folder: Path) -> dict[str, list[str]]:
    return json.loads((folder / "ends.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("point", kills.POINTS)
def test_a_killed_run_ends_with_the_same_bytes_and_journal(killed, point):
    assert ends(killed)["whole"] == ["finished"]
    assert ends(killed)[point] == ["killed", "finished"]
    assert_as_if_nothing_had_happened(killed, point)


@pytest.mark.slow
@pytest.mark.parametrize("point", kills.POINTS)
def test_a_killed_run_leaves_nothing_behind(killed, point):
    """No partial files, no uploads of rounds that are over, no second copies."""
    assert sorted(files(killed / point)) == sorted(files(killed / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("point", kills.POINTS)
def test_uploads_on_the_disk_are_not_trained_again(killed, point):
    before = (killed / f"{point}.notes").read_text().split()
    after = (killed / f"{point}.resumed").read_text().split()
    whole = (killed / "whole.notes").read_text().split()
    assert len(whole) == 12
    # Two clients train at a time. Those of which not both uploads were written whole are the
    # ones that may be trained twice.
    repeated = set(before) & set(after)
    broken = point in (
        "after-2-turns-of-round-2",
        "before-any-turn",
        "half-an-upload",
        "half-a-line-of-the-journal",
    )
    assert len(repeated) == (2 if broken else 0)
    assert repeated <= set(before[-2:])
    assert sorted({*before, *after}) == sorted(whole)


@pytest.mark.slow
def test_the_journal_says_that_it_was_resumed(killed):
    starts = list(Record(killed / "in-aggregate").events("start"))
    assert [start["resumed"] for start in starts] == [False, True]
    (start,) = Record(killed / "before-any-turn").events("start")
    assert start["resumed"]


def assert_all_end_alike(folder: Path, outcome: dict[str, list[str]], first: str) -> None:
    """Whatever happened ``first``.

    Nothing happens beyond a run's last change, or where a change is not needed, as that of the
    file that names who runs.
    """
    assert outcome.pop("whole") == ["finished"]
    others = {point: ends for point, ends in outcome.items() if ends != [first, "finished"]}
    assert [point for point, ends in others.items() if ends != ["finished"]] == []
    assert len(others) <= max(2, len(outcome) // 6)
    print(f"{len(outcome) - len(others)} runs {first} of {len(outcome)}, not {[*others]}")
    for point in outcome:
        assert_as_if_nothing_had_happened(folder, point)


@pytest.mark.parametrize(
    "points",
    [
        pytest.param(of_every_change(16), id="short", marks=pytest.mark.slow),
        pytest.param(of_every_change(1), id="full", marks=pytest.mark.trust),
    ],
)
def test_a_run_may_be_killed_before_any_change_of_a_file(tmp_path, points):
    assert_all_end_alike(tmp_path, run(tmp_path, points), "killed")


@pytest.mark.parametrize(
    "points",
    [
        pytest.param(["5:half", "38:full", "101:ENOSPC", "164:EIO"], id="few"),
        pytest.param(of_every_fault(60), id="short", marks=pytest.mark.slow),
        pytest.param(of_every_fault(4), id="full", marks=pytest.mark.trust),
    ],
)
def test_whatever_the_disk_refuses_is_a_sentence_and_nothing_is_lost(tmp_path, points):
    assert_all_end_alike(tmp_path, run(tmp_path, points), "refused")
