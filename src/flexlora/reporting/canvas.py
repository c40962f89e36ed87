"""Blank plotly figures in the style of all pages, their colours, and names as plotly text.

Backgrounds are transparent and the colours of medium lightness, so that a figure can stand on a
light or a dark page. Names come from the journal and are not trusted: plotly reads a little HTML
in every text, so ``shown`` escapes them first.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import plotly.colors
import plotly.graph_objects as go

BLUE, ORANGE, GREY = "#4a7fc1", "#d2722a", "#8b929c"
GROUPS = {"seen": BLUE, "unseen": ORANGE}
SYMBOL_BY_GROUP = {"seen": "circle", "unseen": "diamond"}
TYPES = (
    "#3f9c8c",
    "#a06cc4",
    "#c2578a",
    "#8f8a2c",
    "#5f8f3e",
    "#b5673c",
    "#5a86d0",
    "#7d7f86",
)
RAMP = ("#4a7fc1", "#8a6cc8", "#cf5f94", "#de7a35")
HEIGHT = 340
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"


def shown(text: str, longest: int = 60) -> str:
    """A name as plotly text: escaped, on one line, and cut in the middle if it is long."""
    line = " ".join(text.split())
    if len(line) > longest:
        tail = (longest - 1) // 2
        line = f"{line[: longest - 1 - tail]}…{line[len(line) - tail :]}"
    return html.escape(line, quote=False)


def blank(x_title: str, y_title: str, height: int = HEIGHT) -> go.Figure:
    """A figure without traces, with titles on both axes and its legend above."""
    axis = {
        "automargin": True,
        "gridcolor": "#dfe3e8",
        "zeroline": False,
        "title": {"standoff": 8, "font": {"size": 12.5}},
    }
    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=height,
        autosize=True,
        margin={"l": 8, "r": 12, "t": 12, "b": 8},
        font={"family": FONT, "size": 12, "color": "#2a2f36"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        showlegend=True,
        legend={
            "orientation": "h",
            "x": 0,
            "y": 1 + 7 / height,
            "yanchor": "bottom",
            "bgcolor": "rgba(0,0,0,0)",
            "traceorder": "normal",
        },
        hoverlabel={"bgcolor": "#ffffff", "font": {"color": "#2a2f36"}},
        hovermode="x unified" if x_title == "Round" else "closest",
        # Without it a finger that wants to scroll the page would zoom the figure.
        dragmode=False,
        modebar={"bgcolor": "rgba(0,0,0,0)"},
        xaxis=axis,
        yaxis=axis,
    )
    figure.update_xaxes(title_text=x_title)
    return figure.update_yaxes(title_text=y_title)


def by_round(rounds: set[int], y_title: str) -> go.Figure:
    """A blank figure whose horizontal axis is the round."""
    figure = blank("Round", y_title)
    few = len(rounds) <= 12 and max(rounds) - min(rounds) <= 12
    figure.update_xaxes(tickformat="d", unifiedhovertitle={"text": "Round %{x}"})
    return figure.update_xaxes(**({"dtick": 1} if few else {"nticks": 10}))


def counted_y(figure: go.Figure, most: int) -> go.Figure:
    """Whole numbers on the vertical axis, which counts something, at most this number."""
    return figure.update_yaxes(tickformat="d", rangemode="tozero", **_whole_ticks(most))


def counted_x(figure: go.Figure, most: int) -> go.Figure:
    """Whole numbers on the horizontal axis, at most this number."""
    return figure.update_xaxes(tickformat="d", **_whole_ticks(most))


def _whole_ticks(most: int) -> dict[str, int]:
    return {"dtick": 1} if most <= 10 else {"nticks": 8}


def ramp(count: int) -> list[str]:
    """That many colours in the order of ``RAMP``."""
    places = [place / max(count - 1, 1) for place in range(count)]
    scale = plotly.colors.make_colorscale(RAMP)
    return list(plotly.colors.sample_colorscale(scale, places))


def round_scale(figure: go.Figure, rounds: Sequence[int]) -> None:
    """Replace a legend that would be too long with a colour scale of rounds."""
    scale = {
        "colorscale": plotly.colors.make_colorscale(RAMP),
        "cmin": min(rounds),
        "cmax": max(rounds),
        "color": [min(rounds)],
        "showscale": True,
        "colorbar": {"title": {"text": "Round"}, "thickness": 12, "tickformat": "d"},
    }
    figure.add_scatter(x=[None], y=[None], mode="markers", marker=scale, showlegend=False)
    figure.update_layout(showlegend=False)
