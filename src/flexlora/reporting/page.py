"""One self-contained HTML page of a run, from its journal and the answers saved beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flexlora.errors import ConfigError
from flexlora.journal import JOURNAL, Event, Record
from flexlora.reporting import html, sections, tables
from flexlora.reporting.run_files import REPORT, RunFiles, run_files
from flexlora.storage import write_atomically

PAGE = REPORT


def write(run_folder: Path) -> Path:
    """Write ``report.html`` into the folder of a run, over an older one, and return its path.

    The page takes about 2 MB, nearly all of it plotly's JavaScript. What the journal does not
    contain, because the run was short or was stopped, the page leaves out, and says so.

    Raises:
        ConfigError: the folder has no journal.
        ProtocolError: a line of the journal is not an event, or one of the sample answers none.
    """
    record = Record(Path(run_folder))
    if not record.path.exists():
        raise ConfigError(
            f"There is no {JOURNAL} in {run_folder}, so nothing can be reported; give the "
            "folder of a run."
        )
    path = record.folder / PAGE
    events = list(record.events())
    files = run_files(record.folder, tables.run_facts(events))
    text = render(events, record.folder.resolve().name, files)
    # A name in the journal may contain half a surrogate pair, which has no bytes.
    write_atomically(path, text.encode(errors="replace"))
    return path


def render(events: Sequence[Event], name: str = "", files: RunFiles | None = None) -> str:
    """The page of these events of the run called ``name``. Equal events give equal text."""
    facts = tables.run_facts(events)
    rows = tables.evaluation_table(events)
    files = files or RunFiles()
    return html.render_document(
        title=sections.title(name),
        header=sections.header(name, facts, events, rows, files),
        sections=[
            sections.scores(rows),
            sections.fairness(rows),
            sections.samples(files.samples),
            *sections.client_scores(events),
            sections.learning(events, rows),
            sections.ranks(events, rows),
            sections.spectrum(events),
            sections.categories(events, rows),
            sections.rounds(events),
            sections.clients(events, facts),
            sections.reproduce(facts),
        ],
    )
