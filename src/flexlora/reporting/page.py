"""One self-contained HTML page of a run, written from its journal and nothing else.

All text that comes from the journal is escaped, and a content policy in the page forbids the
browser any connection.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io
from plotly.offline import get_plotlyjs

from flexlora.errors import ConfigError
from flexlora.journal import JOURNAL, Event, Record
from flexlora.reporting import figures, tables
from flexlora.reporting.tables import EvaluationRow, Metric, RunFacts

PAGE = "report.html"
LONGEST_TABLE = 20
MOST_CATEGORIES = 60


def write(run_folder: Path) -> Path:
    """Write ``report.html`` into the folder of a run, over an older one, and return its path.

    The page takes about 5 MB, nearly all of it plotly's JavaScript. What the journal does not
    hold, because the run was short or was stopped, the page says in words.

    Raises:
        ConfigError: the folder holds no journal, or a line of it is not JSON.
    """
    record = Record(Path(run_folder))
    if not record.path.exists():
        raise ConfigError(
            f"There is no {JOURNAL} in {run_folder}, so nothing can be reported; give the "
            "folder of a run."
        )
    try:
        events = list(record.events())
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"A line of {record.path} is not JSON ({error}); mend it or remove it, then "
            "report again."
        ) from error
    path = record.folder / PAGE
    # A name in the journal may hold half a surrogate pair, which has no bytes.
    path.write_text(render(events), encoding="utf-8", errors="replace")
    return path


def render(events: Sequence[Event]) -> str:
    """The page of these events. Equal events give equal text."""
    facts = tables.run_facts(events)
    rows = tables.evaluation_table(events)
    body = "".join(
        (
            _header(facts, events, rows),
            _scores(rows),
            _learning(events, rows),
            _ranks(events, rows),
            _spectra(events),
            _categories(events, rows),
            _cost(events),
            _clients(events, facts),
            _footer(facts),
        )
    )
    script = f"<script>{get_plotlyjs()}</script>" if "<figure>" in body else ""
    title = f"{facts.method or 'Federated'} run report"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{POLICY}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style>{script}</head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )


def outcome(facts: RunFacts, events: Sequence[Event], rows: Sequence[EvaluationRow]) -> str:
    """The main outcome in one sentence of plain text, with its numbers.

    Scores are those of the global adapter on unseen clients, or on seen ones where there are
    no others; without any evaluation the training loss speaks.
    """
    metric = tables.main_metric(rows)
    group = "unseen" if any(r.group == "unseen" for r in tables.trajectory(rows)) else "seen"
    first, last = tables.before_and_after(rows, group)
    if metric and last and last.score(metric) is not None:
        return _gained(metric, first, last)
    losses = [
        r for r in tables.training_table(events) if r.rank_type is None and r.loss is not None
    ]
    if losses:
        return (
            f"Training loss went from {losses[0].loss:.3f} nats per token in round "
            f"{losses[0].round} to {losses[-1].loss:.3f} in round {losses[-1].round}; the "
            "trained adapter was not evaluated."
        )
    if facts.rounds_done:
        return f"{_many(facts.rounds_done, 'round')} finished; nothing was evaluated."
    return "No round was finished, so there is no outcome."


def toml(config: Mapping[str, Any]) -> str:
    """A config as TOML text. Keys without a value are left out, as TOML cannot say null."""
    return "".join(f"{line}\n" for line in _toml_lines(config, ())).strip("\n") + "\n"


def _gained(metric: Metric, first: EvaluationRow | None, last: EvaluationRow) -> str:
    after = last.score(metric)
    before = first.score(metric) if first else None
    where = f"on {_many(last.clients, f'{last.group} client')} ({_many(last.examples, 'example')})"
    unit = " %" if metric.unit == "%" else f" {metric.unit}"
    if after is None or before is None:
        return (
            f"{metric.title} {where} is {_number(after)}{unit} after round {last.round}; "
            "it was not measured before training."
        )
    points = "points" if metric.unit == "%" else metric.unit
    rounds = _many(last.round, "round")
    if after == before:
        return f"{metric.title} {where} stayed at {_number(after)}{unit} in {rounds}."
    return (
        f"{metric.title} {where} {'rose' if after > before else 'fell'} from "
        f"{_number(before)} to {_number(after)}{unit} ({after - before:+.2f} {points}) in "
        f"{rounds}."
    )


def _header(facts: RunFacts, events: Sequence[Event], rows: Sequence[EvaluationRow]) -> str:
    types = tables.rank_type_table(events)
    rounds = f"{facts.rounds_done:,}"
    if facts.rounds_planned is not None:
        rounds += f" of {facts.rounds_planned:,}"
    entries = {
        "Method": facts.method,
        "Base model": facts.base_model,
        "Rank types": ", ".join(_type_name(t) for t in types),
        "Clients": _client_count(facts),
        "Rounds finished": rounds,
        "Adapted modules": facts.modules,
        "Seed": facts.seed,
        "flexlora": facts.version,
        "Hardware": _plain(facts.hardware),
        "Time": _duration(facts.seconds),
        "Global adapter": facts.adapter or "not written: the run is not finished",
    }
    facts_list = "".join(
        f"<div><dt>{_text(name)}</dt><dd>"
        f"{_text('not recorded' if value in (None, '') else value)}</dd></div>"
        for name, value in entries.items()
    )
    return (
        "<header><h1>Run report</h1>"
        f'<p class="outcome">{_text(outcome(facts, events, rows))}</p>'
        f"{_course(facts, events)}<dl>{facts_list}</dl></header>"
    )


def _type_name(row: tables.RankTypeRow) -> str:
    ranks = f" of rank {' and '.join(map(str, row.ranks))}" if row.ranks else ""
    return f"{row.name} ({_many(row.clients, 'client')}{ranks})"


def _course(facts: RunFacts, events: Sequence[Event]) -> str:
    """What was out of the ordinary: an early stop, a resume, lost clients."""
    said = []
    if not facts.finished:
        said.append(f"The run is not finished: {_many(facts.rounds_done, 'round')} are complete.")
    if facts.resumed:
        said.append(f"It was resumed {_many(facts.resumed, 'time')}.")
    if facts.lost:
        reasons = "; ".join(f"{reason} ({n})" for reason, n in tables.lost_reasons(events)[:5])
        said.append(f"Lost turns of clients: {facts.lost:,}, namely {reasons}.")
    return f"<p>{_text(' '.join(said))}</p>" if said else ""


def _scores(rows: Sequence[EvaluationRow]) -> str:
    if not rows:
        return _section("Scores", _absent("No evaluation was recorded, so there are no scores."))
    by_adapter: dict[tuple[int, str], dict[str, EvaluationRow]] = {}
    for row in rows:
        by_adapter.setdefault((row.round, row.adapter), {})[row.group] = row
    groups = [g for g in ("seen", "unseen") if any(r.group == g for r in rows)]
    ends = (rows[0].round, rows[-1].round)
    lines = {key: _score_cells(key, by_adapter[key], groups) for key in by_adapter}
    short = [cells for key, cells in lines.items() if key[0] in ends]
    head = [
        "Round",
        "Adapter",
        *("Examples", *(m.title for m in tables.METRICS)) * len(groups),
    ]
    spans = [("", 2), *((f"{group.capitalize()} clients", 4) for group in groups)]
    note = (
        "<p>Rouge-L and exact match in percent, loss in nats per token; every mean is "
        "weighted by examples (tokens for the loss). Round 0 is before training.</p>"
    )
    missing = {"seen", "unseen"} - set(groups)
    if missing:
        note += _absent(f"No {missing.pop()} clients were evaluated.")
    every = _table(head, lines.values(), {1}, spans)
    if len(lines) > LONGEST_TABLE:
        every = (
            f"<p>First and last round:</p>{_table(head, short, {1}, spans)}"
            f"{_details(f'All {len(lines)} evaluations', every)}"
        )
    return _section("Scores", note + every)


def _score_cells(
    key: tuple[int, str], groups: Mapping[str, EvaluationRow], wanted: Sequence[str]
) -> list[str]:
    cells = [f"{key[0]:,}", key[1]]
    for group in wanted:
        row = groups.get(group)
        cells.append(f"{row.examples:,}" if row else "–")
        cells += [_number(row.score(m) if row else None) for m in tables.METRICS]
    return cells


def _learning(events: Sequence[Event], rows: Sequence[EvaluationRow]) -> str:
    drawn = []
    training = [r for r in tables.training_table(events) if r.loss is not None]
    if training:
        drawn.append(
            _figure(
                figures.training_loss(training),
                "Mean over the tokens trained on, of all clients of the round and of each "
                "rank type.",
            )
        )
    curve = tables.trajectory(rows)
    for metric in tables.METRICS:
        measured = [r for r in curve if r.score(metric) is not None]
        if measured:
            caption = f"{metric.title} of the global adapter; round 0 is before training."
            drawn.append(_figure(figures.learning_curve(measured, metric), caption))
    absent = "" if training else _absent("No round was finished: there is no training loss.")
    if not curve:
        absent += _absent("The global adapter was not evaluated.")
    return _section("Learning", absent + _grid(drawn))


def _ranks(events: Sequence[Event], rows: Sequence[EvaluationRow]) -> str:
    types = tables.rank_type_table(events)
    drawn, absent = [], ""
    if types:
        drawn.append(_figure(figures.rank_clients(types), "Clients of each rank type."))
    else:
        absent += _absent("The rank types were not recorded.")
    if any(t.trainable is not None for t in types):
        caption = "Parameters that one client of each rank type trains."
        drawn.append(_figure(figures.rank_parameters(types), caption))
    kept = tables.kept_table(events)
    if kept:
        caption = (
            "Share of the squared singular values of the global update after round "
            f"{kept[0].round} that stays when it is cut to a rank; the whiskers reach to the "
            "lowest and the highest module."
        )
        drawn.append(_figure(figures.kept(kept), caption))
    cut = tables.truncated_table(rows)
    metric = tables.main_metric(cut)
    if metric:
        caption = (
            f"{metric.title} of the global adapter and of what each rank type receives of it, "
            f"after round {cut[0].round}."
        )
        drawn.append(_figure(figures.truncated(cut, metric), caption))
    else:
        absent += _absent("No truncated adapter was evaluated.")
    return _section("Ranks and truncation", absent + _grid(drawn))


def _spectra(events: Sequence[Event]) -> str:
    energy, values = tables.energy_table(events), tables.spectrum_table(events)
    if not energy and not values:
        return _section("Spectrum", _absent("No spectrum of the global update was recorded."))
    drawn = []
    if energy:
        caption = (
            "Energy (squared singular values) of the global update by block of ranks, mean "
            "over modules."
        )
        drawn.append(_figure(figures.energy(energy), caption))
    for module in dict.fromkeys(r.module for r in values):
        mine = [r for r in values if r.module == module]
        caption = f"Singular values of {module}, a line per round."
        drawn.append(_figure(figures.spectrum(mine), caption))
    absent = "" if values else _absent("No module's singular values were recorded.")
    return _section("Spectrum", absent + _grid(drawn))


def _categories(events: Sequence[Event], rows: Sequence[EvaluationRow]) -> str:
    metric = tables.main_metric(rows)
    drawn, listed, cut = [], "", ""
    for group in ("unseen", "seen"):
        found = tables.category_table(events, group)
        if not found or metric is None:
            continue
        most = MOST_CATEGORIES // 2
        chosen = found if len(found) <= MOST_CATEGORIES else found[:most] + found[-most:]
        if len(chosen) < len(found):
            cut = (
                f"<p>Of many categories the {most} with the greatest and the {most} with the "
                "smallest gain are drawn; the tables hold all.</p>"
            )
        caption = f"{metric.title} by category on {group} clients, the greatest gain first."
        drawn.append(_figure(figures.categories(chosen, metric), caption))
        head = ["Category", "Examples", "Before", "After", "Gain"]
        cells = [
            [
                r.category,
                f"{r.examples:,}",
                *map(_number, (r.before, r.after)),
                f"{r.gain:+.2f}",
            ]
            for r in found
        ]
        summary = f"{_many(len(found), 'category', 'categories')} of {group} clients as a table"
        listed += _details(summary, _table(head, cells, names={0}))
    if not drawn:
        absent = "There are no scores by category from before and after training."
        return _section("Categories", _absent(absent))
    return _section("Categories", cut + _grid(drawn) + listed)


def _cost(events: Sequence[Event]) -> str:
    traffic, times = tables.traffic_table(events), tables.time_table(events)
    drawn, absent = [], ""
    if traffic:
        caption = "From the clients (up) and to the clients (down), of all clients of a round."
        drawn.append(_figure(figures.traffic(traffic), caption))
        drawn.append(_figure(figures.traffic_total(traffic), "The same since the start."))
    else:
        absent += _absent("No finished round counted its bytes.")
    if times:
        caption = "Wall-clock time of a round, split into training and aggregation."
        drawn.append(_figure(figures.times(times), caption))
    else:
        absent += _absent("No finished round measured its time.")
    return _section("Cost", absent + _grid(drawn))


def _clients(events: Sequence[Event], facts: RunFacts) -> str:
    rows = tables.client_table(events)
    if not rows:
        return _section("Clients", _absent("No client has finished a turn."))
    head = ["Client", "Rank type", "Rounds", "Lost", "Examples", "Up", "Down", "Last loss"]
    cells = [
        [
            r.client,
            ", ".join(r.rank_types) or "–",
            f"{r.rounds:,}",
            f"{r.lost:,} ({r.last_reason})" if r.lost else "0",
            f"{r.examples:,}",
            _bytes(r.bytes_up),
            _bytes(r.bytes_down),
            _number(r.last_loss),
        ]
        for r in rows
    ]
    took = f"{len(rows):,}" + (f" of {facts.clients:,}" if facts.clients else "")
    note = (
        "<p>Examples and bytes are summed over the rounds; the last loss is the mean training "
        "loss, in nats per token, of the client's last turn.</p>"
    )
    table = _table(head, cells, names={0, 1, 3})
    return _section("Clients", note + _details(f"{took} clients took part", table))


def _footer(facts: RunFacts) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in facts.versions.items())
    config = (
        _details("Config of the run", f"<pre>{_text(toml(facts.config))}</pre>")
        if facts.config
        else _absent("The config was not recorded.")
    )
    seed = f" Its seed, {facts.seed}, fixes every draw." if facts.seed is not None else ""
    version = facts.version or "(version not recorded)"
    return (
        "<footer><h2>Reproduce</h2><p>Save the config below as <code>config.toml</code> and "
        f"run it with flexlora {_text(version)}.{_text(seed)}</p>{config}"
        f"<p>Versions: {_text(versions or 'not recorded')}.</p></footer>"
    )


def _figure(figure: go.Figure, caption: str) -> str:
    """A figure under an id made of its content: plotly would draw one at random."""
    name = hashlib.sha256(f"{caption}\0{figure.to_json()}".encode(errors="replace")).hexdigest()[
        :12
    ]
    drawn = plotly.io.to_html(
        figure,
        full_html=False,
        include_plotlyjs=False,
        div_id=f"figure-{name}",
        config={
            "displaylogo": False,
            "responsive": True,
            # A list of our own: the default one has a button that uploads the figure.
            "modeBarButtons": [["toImage", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
        },
    )
    return f"<figure>{drawn}<figcaption>{_text(caption)}</figcaption></figure>"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{body}</section>"


def _grid(drawn: Sequence[str]) -> str:
    return f'<div class="grid">{"".join(drawn)}</div>' if drawn else ""


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{_text(summary)}</summary>{body}</details>"


def _absent(sentence: str) -> str:
    return f'<p class="absent">{_text(sentence)}</p>'


def _table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    names: set[int],
    spans: Sequence[tuple[str, int]] = (),
) -> str:
    """A table of plain text; the columns ``names`` hold words, the others numbers.

    ``spans`` names groups of columns, each with its width, in a row above the head.
    """
    kinds = [' class="name"' if place in names else "" for place in range(len(head))]
    over = "".join(f'<th class="span" colspan="{n}">{_text(name)}</th>' for name, n in spans)
    top = "".join(f"<th{k}>{_text(h)}</th>" for k, h in zip(kinds, head, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f"<td{k}>{_text(c)}</td>" for k, c in zip(kinds, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="table"><table><thead>{f"<tr>{over}</tr>" if over else ""}'
        f"<tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _plain(value: Any) -> str:
    """A nested value on one line of words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return "" if value is None else str(value)


def _client_count(facts: RunFacts) -> str:
    if facts.clients is None:
        return ""
    unseen = facts.unseen_clients
    return f"{facts.clients:,}" + (f" and {unseen:,} unseen" if unseen is not None else "")


def _many(count: int, one: str, more: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _bytes(count: int) -> str:
    divisor, unit = figures.byte_unit(count)
    return f"{count:,} bytes" if divisor == 1 else f"{count / divisor:,.1f} {unit}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {left:02} s"


def _toml_lines(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    """Plain keys first, then a section for each inner table."""
    plain = [
        f"{_toml_key(key)} = {_toml_value(value)}"
        for key, value in table.items()
        if value is not None and not isinstance(value, Mapping)
    ]
    head = [f"[{'.'.join(map(_toml_key, path))}]"] if path else []
    lines = [*head, *plain, ""]
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += _toml_lines(value, (*path, key))
    return lines


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_toml_value(v) for v in value if v is not None)}]"
    if isinstance(value, Mapping):
        pairs = (f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items() if v is not None)
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, float):
        return repr(value)
    # A JSON string is a TOML string but for the delete character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "form-action 'none'; base-uri 'none'\">"
)

STYLE = """
:root { color-scheme: light dark; --ink: #22272e; --soft: #5d6672; --line: #dfe3e8;
  --ground: #ffffff; --band: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e7ec; --soft: #a3acb8; --line: #3a414b; --ground: #16191e;
    --band: #1f242b; }
  .main-svg .legendtext, .main-svg .xtick text, .main-svg .ytick text,
  .main-svg .g-xtitle text, .main-svg .g-ytitle text, .main-svg .colorbar text,
  .main-svg .bartext-outside { fill: var(--ink) !important; }
  .main-svg .gridlayer path { stroke: var(--line) !important; }
}
* { box-sizing: border-box; }
html { overflow-y: scroll; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1140px; margin: 0 auto; padding: 24px 20px 48px; }
h1 { font-size: 1.7rem; margin: 0 0 .4em; }
h2 { font-size: 1.2rem; margin: 2.2em 0 .6em; padding-top: .8em;
  border-top: 1px solid var(--line); }
p { max-width: 75ch; margin: .5em 0; }
.outcome { font-size: 1.15rem; }
.absent { color: var(--soft); font-style: italic; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr));
  gap: 12px 28px; margin: 1.4em 0 0; }
dt { font-size: .8rem; color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.grid { display: grid; gap: 28px 32px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; min-width: 0; }
.js-plotly-plot .modebar-container { top: -20px !important; }
figcaption { font-size: .85rem; color: var(--soft); margin-top: 4px; overflow-wrap: anywhere; }
.table { overflow-x: auto; margin: .8em 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; border-bottom: 2px solid var(--line); }
tbody tr:nth-child(even) { background: var(--band); }
th.span { text-align: center; border-bottom: 1px solid var(--line); }
.name { text-align: left; min-width: 6em; max-width: 26em; }
td.name { white-space: normal; overflow-wrap: anywhere; }
details { margin: 1em 0; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; background: var(--band); padding: 12px; font-size: .82rem;
  line-height: 1.45; }
"""
