"""One self-contained HTML page of a run, written from its journal and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flexlora.errors import ConfigError
from flexlora.journal import JOURNAL, Event, Record
from flexlora.reporting import html, sections, tables

PAGE = "report.html"


def write(run_folder: Path) -> Path:
    """Write ``report.html`` into the folder of a run, over an older one, and return its path.

    The page takes about 5 MB, nearly all of it plotly's JavaScript. What the journal does not
    contain, because the run was short or was stopped, the page says in words.

    Raises:
        ConfigError: the folder has no journal.
        ProtocolError: a line of the journal is not an event.
    """
    record = Record(Path(run_folder))
    if not record.path.exists():
        raise ConfigError(
            f"There is no {JOURNAL} in {run_folder}, so nothing can be reported; give the "
            "folder of a run."
        )
    path = record.folder / PAGE
    text = render(list(record.events()), record.folder.resolve().name)
    # A name in the journal may contain half a surrogate pair, which has no bytes.
    path.write_text(text, encoding="utf-8", errors="replace")
    return path


def render(events: Sequence[Event], name: str = "") -> str:
    """The page of these events of the run called ``name``. Equal events give equal text."""
    facts = tables.run_facts(events)
    rows = tables.evaluation_table(events)
    return html.render_document(
        title=f"{name or facts.method or 'Federated'} run report",
        header=sections.header(name, facts, events, rows),
        sections=[
            sections.scores(rows),
            sections.learning(events, rows),
            sections.ranks(events, rows),
            sections.spectrum(events),
            sections.categories(events, rows),
            sections.cost(events),
            sections.clients(events, facts),
            sections.reproduce(facts),
        ],
    )
