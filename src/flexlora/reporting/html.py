"""Documents and pages as HTML: one skeleton, one stylesheet, and templates that escape all text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import plotly.io
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from flexlora.reporting.document import Figure, Header, Section, figures_in

POLICY = Markup(
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; form-action 'none'; base-uri 'none'"
)
"""The Content-Security-Policy of a document: the browser may open no connection."""


def source(name: str) -> str:
    """The text of a stylesheet or a script of the templates."""
    return (files("flexlora.reporting") / "templates" / name).read_text(encoding="utf-8")


def render(template: str, **values: Any) -> str:
    """A page from a template; equal values give equal text."""
    page = _environment().get_template(template)
    return page.render(style=Markup(source("style.css")), **values)


def render_document(title: str, header: Header, sections: Sequence[Section]) -> str:
    """One self-contained page, offline; with figures about 5 MB, nearly all of it plotly's.

    Equal documents give equal text.
    """
    drawn = any(True for _ in figures_in(sections))
    scripts = Markup(f"{get_plotlyjs()}\n{source('figures.js')}") if drawn else ""
    return render(
        "document.html",
        title=title,
        header=header,
        sections=sections,
        policy=POLICY,
        plotly=scripts,
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("flexlora.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plot"] = _plot
    return environment


def _plot(figure: Figure) -> Markup:
    """A figure under an id made of its content: plotly would draw one at random."""
    content = f"{figure.caption}\0{figure.plot.to_json()}".encode(errors="replace")
    drawn = plotly.io.to_html(
        figure.plot,
        full_html=False,
        include_plotlyjs=False,
        div_id=f"figure-{hashlib.sha256(content).hexdigest()[:12]}",
        config={
            "displaylogo": False,
            "responsive": True,
            # A list of our own: the default one has a button that uploads the figure.
            "modeBarButtons": [["toImage", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
        },
    )
    # Plotly escapes what could end the script; names in it were escaped by ``canvas.shown``.
    return Markup(drawn)
