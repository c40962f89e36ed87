"""Documents and pages as HTML: one skeleton, one stylesheet, and templates that escape all text."""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from flexlora.reporting.document import Figure, Header, Section, figures_in, order_of, without_empty

POLICY = Markup(
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; form-action 'none'; base-uri 'none'"
)
"""The Content-Security-Policy of a document: the browser may open no connection."""

_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
"""Codes that control a terminal or the direction of a text, and halves of characters; not the
joiners that some scripts are written with."""

_CONFIG = {
    "displaylogo": False,
    "responsive": True,
    # A list of our own: the default one has a button that uploads the figure.
    "modeBarButtons": [["toImage", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
}


def source(name: str) -> str:
    """The text of a stylesheet or a script of the templates."""
    return (files("flexlora.reporting") / "templates" / name).read_text(encoding="utf-8")


def render(template: str, **values: Any) -> str:
    """A page from a template; equal values give equal text."""
    page = _environment().get_template(template)
    return page.render(style=Markup(source("style.css")), **values)


def render_document(title: str, header: Header, sections: Sequence[Section]) -> str:
    """One self-contained page, offline; with figures about 2 MB, nearly all of it plotly's.

    Empty sections are left out; what they say is one paragraph at the end. Equal documents give
    equal text.
    """
    drawn = any(True for _ in figures_in(sections))
    filled, left_out = without_empty(sections)
    return render(
        "document.html",
        title=title,
        header=header,
        sections=filled,
        left_out=left_out,
        policy=POLICY,
        plotly=Markup(_packed_plotly()) if drawn else "",
        script=Markup(source("document.js")),
    )


@cache
def _packed_plotly() -> str:
    """Plotly's JavaScript compressed, as text: less than half as long."""
    from plotly.offline import get_plotlyjs  # takes a second, which other pages need not wait

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("flexlora.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_shown,
    )
    environment.filters["plotted"] = _plotted
    environment.filters["order"] = order_of
    return environment


def _shown(value: Any) -> Any:
    """Text of a journal, in which names may be strangers'; markup is ours."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _HIDDEN.sub("\N{REPLACEMENT CHARACTER}", value)


@dataclass(frozen=True)
class _Plotted:
    """A figure for the page: the name and the height in pixels of its element, and its JSON."""

    name: str
    height: int
    json: Markup


def _plotted(figure: Figure) -> _Plotted:
    """A figure under a name made of its content, so that equal figures have equal names."""
    from plotly.io.json import to_json_plotly

    content = figure.plot.to_plotly_json() | {"config": _CONFIG}
    # Plotly escapes what could end the script; names in it were escaped by ``canvas.shown``.
    text = to_json_plotly(content)
    named = f"{figure.title}\0{figure.caption}\0{text}".encode(errors="replace")
    name = f"figure-{hashlib.sha256(named).hexdigest()[:12]}"
    return _Plotted(name, figure.plot.layout.height, Markup(text))
