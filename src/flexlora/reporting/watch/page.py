"""The status page: one HTML file that is whole as it is served, and renews itself.

All text of the journal is escaped here, and put in as text by the script. The policy allows the
browser this style, this script, and requests to the server that served it; nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence
from typing import Any

from flexlora.reporting.watch.words import Words

SCORES = ("Adapter", "Round", "Clients", "Examples", "Rouge-L, %", "Exact match, %", "Loss")
CLIENTS = (
    "Client",
    "Rank type (ranks)",
    "Examples",
    "State",
    "Tokens/s",
    "Up",
    "Down",
    "Turns",
    "Lost",
    "Last seen",
)


def render(shown: Words) -> str:
    """The page of a run as it stands. Equal words give equal text."""
    state, progress = shown["state"], shown["progress"]
    facts = "".join(
        f"<div><dt>{_text(label)}</dt><dd>{_text(value)}</dd><dd>{_text(note)}</dd></div>"
        for label, value, note in shown["facts"]
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{_text(shown["title"])}</title>'
        f"<style>{STYLE}</style></head>\n<body><main><header>"
        f'<h1>{_text(shown["name"])}</h1><span id="state" data-state="{_text(state["kind"])}">'
        f'{_text(state["text"])}</span><p id="about">{_text(shown["about"])}</p></header>'
        f'<p id="course">{_text(progress["text"])}</p>'
        f'<progress id="progress" aria-labelledby="course" value="{progress["share"]}"></progress>'
        f'<p id="fault" role="alert" hidden></p><dl id="facts">{facts}</dl>'
        f"<h2>Evaluation</h2>{_table('scores', SCORES, shown['scores'])}"
        f"<h2>Clients</h2>"
        f'<p id="count">{_text(shown["count"])}</p>'
        f"{_table('clients', CLIENTS, shown['clients'])}"
        f'<p id="more">{_text(shown["more"])}</p>'
        f'<footer><span id="updated">{_text(shown["updated"])}</span> '
        "<noscript>Reload the page for news.</noscript> "
        '<a href="status.json">status.json</a> <a href="metrics">metrics</a></footer>'
        f"</main><script>{SCRIPT}</script></body></html>\n"
    )


def _table(name: str, head: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    top = "".join(f'<th scope="col">{_text(h)}</th>' for h in head)
    body = "".join(
        f'<tr data-state="{_text(row["state"])}">'
        + "".join(f"<td>{_text(cell)}</td>" for cell in row["cells"])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="table"><table id="{name}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_LABELS = "".join(
    f"  #clients td:nth-child({place})::before {{ content: '{head.partition(' (')[0]}'; }}\n"
    for place, head in enumerate(CLIENTS, 1)
    if head not in ("Client", "State")
)

STYLE = """
:root { color-scheme: light dark; --ink: #22272e; --soft: #5d6672; --line: #dfe3e8;
  --ground: #ffffff; --band: #f5f7f9; --blue: #2f66a8; --orange: #b3560f; --green: #26796a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e7ec; --soft: #a3acb8; --line: #3a414b; --ground: #16191e;
    --band: #1f242b; --blue: #7fb0ea; --orange: #eb9a58; --green: #62c3b0; }
}
* { box-sizing: border-box; }
html { overflow-y: scroll; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 24px 20px 48px; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 14px; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 1.8em 0 .5em; padding-top: .8em;
  border-top: 1px solid var(--line); }
p { margin: 0; }
#state { font-size: .88rem; font-weight: 600; padding: 1px 12px; border-radius: 16px;
  border: 1.5px solid currentColor; color: var(--soft); }
#state[data-state=running] { color: var(--blue); }
#state:is([data-state=short], [data-state=stopped]) { color: var(--orange); }
#state[data-state=finished] { color: var(--green); }
#about { flex-basis: 100%; color: var(--soft); overflow-wrap: anywhere; }
#course { margin-top: 1.1em; font-weight: 600; }
#course::first-letter { text-transform: uppercase; }
progress { appearance: none; display: block; width: 100%; height: 8px; margin-top: 6px;
  border: 0; border-radius: 99px; overflow: hidden; background: var(--line); color: var(--blue); }
progress::-webkit-progress-bar { background: var(--line); }
progress::-webkit-progress-value { background: var(--blue); }
progress::-moz-progress-bar { background: var(--blue); }
#fault { margin-top: 1em; padding: 8px 14px; border-left: 4px solid var(--orange);
  background: var(--band); overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(46%, 230px), 1fr));
  gap: 18px 24px; margin: 1.6em 0 0; }
dt { font-size: .8rem; color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
dt + dd { font-size: 1.3rem; line-height: 1.35; }
dd + dd { font-size: .8rem; color: var(--soft); }
#count, #more, footer { font-size: .88rem; color: var(--soft); }
.table { overflow-x: auto; margin: .6em 0; }
table { border-collapse: separate; border-spacing: 0; font-size: .88rem; min-width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px; text-align: right; white-space: nowrap; vertical-align: top;
  border-bottom: 1px solid var(--line); background: var(--ground); }
th { font-weight: 600; border-bottom-width: 2px; }
tbody tr:nth-child(even) td { background: var(--band); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; z-index: 1; }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 7em; max-width: 18em;
  unicode-bidi: isolate; }
#clients td:first-child { min-width: 12em; }
#clients :is(th, td):is(:nth-child(2), :nth-child(4)), #scores :is(th, td):nth-child(3) {
  text-align: left; }
#clients td:nth-child(4) { white-space: normal; min-width: 14em; overflow-wrap: anywhere; }
#clients tr[data-state=training] td:nth-child(4) { color: var(--blue); }
#clients tr[data-state=answered] td:nth-child(4) { color: var(--green); }
#clients tr[data-state=lost] td:nth-child(4) { color: var(--orange); }
#clients tr[data-state=idle] td:nth-child(4) { color: var(--soft); }
table:not(:has(tbody td))::after { content: "Nothing yet."; display: table-caption;
  caption-side: bottom; padding: 5px 12px; color: var(--soft); font-style: italic;
  white-space: nowrap; }
@media (max-width: 640px) {
  #scores { font-size: .82rem; }
  #scores th { white-space: normal; vertical-align: bottom; }
  #scores :is(th, td) { padding: 5px 4px; min-width: 0; }
  #scores :is(th, td):nth-child(4) { display: none; }
  #clients thead { display: none; }
  #clients, #clients tbody { display: block; }
  #clients tr { display: grid; grid-template-columns: 1.3fr .8fr .8fr 1.1fr; gap: 4px 6px;
    padding: 10px 8px; border-top: 1px solid var(--line); }
  #clients tr:nth-child(even) { background: var(--band); }
  #clients :is(td, td:first-child, td:nth-child(4)) { padding: 0; border: 0; text-align: left;
    position: static; min-width: 0; max-width: none; white-space: normal; background: none; }
  #clients td:is(:first-child, :nth-child(4)) { grid-column: 1 / -1; order: -1; }
  #clients td:first-child { font-weight: 600; }
  #clients td:not(:first-child, :nth-child(4))::before { display: block; font-size: .72rem;
    color: var(--soft); }
LABELS}
footer { margin-top: 2em; padding-top: .8em; border-top: 1px solid var(--line); }
a, #updated { color: inherit; margin-right: .7em; }
""".replace("LABELS", _LABELS)

SCRIPT = """
"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  // What is as it was is left alone, so that a selection stays.
  const say = (node, text) => { if (node.textContent !== text) node.textContent = text; };
  const mark = (node, state) => {
    if (node.dataset.state !== state) node.dataset.state = state;
  };
  const fill = (table, rows) => {
    const body = table.tBodies[0];
    while (body.rows.length > rows.length) body.deleteRow(-1);
    rows.forEach(({state, cells}, i) => {
      const row = i < body.rows.length ? body.rows[i] : body.insertRow();
      mark(row, state);
      cells.forEach((text, k) => say(k < row.cells.length ? row.cells[k] : row.insertCell(), text));
    });
  };
  const show = (page) => {
    document.title = page.title;
    mark(at("state"), page.state.kind);
    say(at("state"), page.state.text);
    say(at("course"), page.progress.text);
    at("progress").value = page.progress.share;
    for (const name of ["about", "count", "more", "updated"]) say(at(name), page[name]);
    page.facts.forEach((fact, i) =>
      fact.forEach((text, k) => say(at("facts").children[i].children[k], text)));
    fill(at("scores"), page.scores);
    fill(at("clients"), page.clients);
  };
  const answer = async () => {
    const got = await fetch("status.json", {signal: AbortSignal.timeout(10000)});
    if (!got.ok) throw new Error(await got.text());
    return (await got.json()).shown;
  };
  const poll = async () => {
    let fault = "";
    try {
      show(await answer());
    } catch (error) {
      fault = `No news: ${error.message} What is shown is as it last stood.`;
    }
    say(at("fault"), fault);
    at("fault").hidden = !fault;
    setTimeout(poll, 2000);
  };
  poll();
})();
"""

POLICY = (
    f"default-src 'none'; script-src {_hash(SCRIPT)}; style-src {_hash(STYLE)}; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
"""The Content-Security-Policy of the page, to be sent as a header."""
