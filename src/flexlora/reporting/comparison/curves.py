"""Figures of many methods at once, distinguished by colour and dash, the best drawn last.

A method has the same colour and dash in every figure; the legend is in the order of the table, and
a double click on a name isolates that method.
"""

from __future__ import annotations

import plotly.graph_objects as go

from flexlora.reporting import canvas
from flexlora.reporting.comparison.values import Comparison, Row, Series, Spread, Value, text_of

COLOURS = (canvas.BLUE, canvas.ORANGE, *canvas.TYPES[:5], canvas.TYPES[-1])
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "diamond", "square", "triangle-up")
FEW = 4
"""Up to this number of methods the legend stands above the figure, with more beside it."""

LINE = 21
"""Pixels that a method takes in a legend or on an axis."""


def ranking(comparison: Comparison, value: Value, x_title: str, digits: int) -> go.Figure:
    """A value of each method, the best on top: the mean, its standard deviation, each seed.

    The grey band is the mean of the best method and its standard deviation to either side.
    """
    spreads = [(row, row.spread(value)) for row in comparison.rows]
    measured = [(row, spread) for row, spread in spreads if spread is not None]
    figure = canvas.blank(x_title, "", 110 + LINE * len(measured))
    seeds = [(v, place) for place, (_, spread) in enumerate(measured) for v in spread.values]
    figure.add_scatter(
        x=[v for v, _ in seeds],
        y=[place for _, place in seeds],
        name="one seed",
        mode="markers",
        marker={"color": canvas.GREY, "size": 6, "opacity": 0.6},
        hovertemplate="%{x:.4g}<extra>one seed</extra>",
    )
    figure.add_scatter(
        x=[spread.mean for _, spread in measured],
        y=list(range(len(measured))),
        name="mean and standard deviation",
        mode="markers",
        marker={
            "size": 10,
            "color": [COLOURS[place % len(COLOURS)] for place in range(len(measured))],
            "symbol": [_symbol(place) for place in range(len(measured))],
        },
        error_x={
            "type": "data",
            "array": [spread.deviation or 0.0 for _, spread in measured],
            "color": canvas.GREY,
            "thickness": 1.2,
            "width": 3,
        },
        customdata=[[canvas.shown(row.method), text_of(s, digits)] for row, s in measured],
        hovertemplate="<b>%{customdata[0]}</b> %{customdata[1]}<extra></extra>",
    )
    figure.update_xaxes(rangemode="nonnegative")
    if measured and (deviation := measured[0][1].deviation):
        best = measured[0][1].mean
        figure.add_vrect(
            best - deviation, best + deviation, fillcolor=canvas.GREY, opacity=0.16, line_width=0
        )
    return figure.update_yaxes(
        tickvals=list(range(len(measured))),
        ticktext=[canvas.shown(row.method, 24) for row, _ in measured],
        range=[len(measured) - 0.4, -0.6],
        showgrid=False,
    )


def by_round(comparison: Comparison, series: Series, y_title: str, digits: int) -> go.Figure:
    """A series of each method by round: its mean as a thick line, each seed as a thin one."""
    drawn = {
        place: averages
        for place, row in enumerate(comparison.rows)
        if (averages := row.by_round(series))
    }
    figure = canvas.by_round({n for averages in drawn.values() for n in averages}, y_title)
    many = len(drawn) > FEW
    # In reverse, so that the best lie on top; the legend has an order of its own.
    for place in reversed(drawn):
        row = comparison.rows[place]
        if len(row.runs) > 1:
            _thin(figure, row, place, series, 0.18 if many else 0.45)
        _thick(figure, row, place, drawn[place], digits)
    figure.update_layout(hovermode="closest").update_yaxes(rangemode="nonnegative")
    if many:
        beside = {"orientation": "v", "x": 1.01, "y": 1, "yanchor": "top", "font": {"size": 12}}
        height = max(canvas.HEIGHT + 80, 60 + LINE * len(drawn))
        figure.update_layout(height=height, legend=beside)
    return figure


def _thick(
    figure: go.Figure, row: Row, place: int, averages: dict[int, Spread], digits: int
) -> None:
    name = canvas.shown(row.method, 24)
    figure.add_scatter(
        x=list(averages),
        y=[spread.mean for spread in averages.values()],
        name=f"★ {name}" if place == 0 else name,
        legendgroup=row.method,
        legendrank=place + 1,
        mode="lines+markers",
        line={**_line(place), "width": 3.4 if place == 0 else 2},
        marker={"size": 8 if place == 0 else 6, "symbol": _symbol(place)},
        customdata=[text_of(spread, digits) for spread in averages.values()],
        hovertemplate=f"<b>{name}</b> round %{{x}}: %{{customdata}}<extra></extra>",
    )


def _thin(figure: go.Figure, row: Row, place: int, series: Series, opacity: float) -> None:
    for run in row.runs:
        values = series(run)
        figure.add_scatter(
            x=list(values),
            y=list(values.values()),
            name=f"{canvas.shown(row.method, 24)}, seed {run.seed}",
            legendgroup=row.method,
            showlegend=False,
            hoverinfo="skip",
            mode="lines",
            opacity=opacity,
            line={**_line(place), "width": 1},
        )


def _line(place: int) -> dict[str, str]:
    """The colour and the dash of the method in this place; 32 differ."""
    turn = place // len(COLOURS) % len(DASHES)
    return {"color": COLOURS[place % len(COLOURS)], "dash": DASHES[turn]}


def _symbol(place: int) -> str:
    return SYMBOLS[place // len(COLOURS) % len(SYMBOLS)]
