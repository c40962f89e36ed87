"""What lies beside the journal in the folder of a run, for a report to link and to show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flexlora.journal import JOURNAL, SampleAnswers
from flexlora.reporting.tables import RunFacts, SampleRow, sample_table

REPORT = "report.html"
_CONFIG = "config.json"


@dataclass(frozen=True)
class RunFiles:
    """The files of a run: paths relative to its folder, None for what is not there."""

    journal: str | None = None
    config: str | None = None
    adapter: str | None = None
    samples: tuple[SampleRow, ...] = ()


def run_files(folder: Path, facts: RunFacts) -> RunFiles:
    """The files in this folder; the adapter only if it lies in it.

    Raises:
        ProtocolError: a line of the sample answers is none.
    """
    return RunFiles(
        journal=JOURNAL if (folder / JOURNAL).is_file() else None,
        config=_CONFIG if (folder / _CONFIG).is_file() else None,
        adapter=_inside(folder, facts.adapter) if facts.adapter else None,
        samples=tuple(sample_table(SampleAnswers(folder).all())),
    )


def _inside(folder: Path, adapter: str) -> str | None:
    try:
        path = Path(adapter).resolve().relative_to(folder.resolve())
        return path.as_posix() if (folder / path).is_dir() else None
    except (ValueError, OSError):
        return None
