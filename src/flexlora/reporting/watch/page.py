"""The status page: one HTML file that is complete as it is served, and refreshes itself.

The template escapes all text of the journal, and the script inserts it as text. The policy allows
the browser this style, this script, and requests to the server that served it; nothing else.
"""

from __future__ import annotations

import base64
import hashlib

from markupsafe import Markup

from flexlora.reporting import html
from flexlora.reporting.watch.curve import HEIGHT, WIDTH
from flexlora.reporting.watch.words import Words

SCORES = ("Adapter", "Round", "Clients", "Examples", "Rouge-L, %", "Exact match, %", "Loss")
CLIENTS = (
    "Client",
    "Ranks",
    "Examples",
    "State",
    "Tokens/s",
    "Up",
    "Down",
    "Rounds",
    "Failed",
    "Last seen",
)
EVENTS = ("Time", "Round", "Event")
STYLE, SCRIPT = html.source("style.css"), html.source("watch.js")


def render(shown: Words) -> str:
    """The page of a run in its current state. Equal words give equal text."""
    return html.render(
        "watch.html",
        script=Markup(SCRIPT),
        score_head=SCORES,
        client_head=CLIENTS,
        event_head=EVENTS,
        size=(WIDTH, HEIGHT),
        **shown,
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY = (
    f"default-src 'none'; script-src {_hash(SCRIPT)}; style-src {_hash(STYLE)}; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
"""The Content-Security-Policy of the page, to be sent as a header."""
