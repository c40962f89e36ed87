"""Figures of many methods at once, the best drawn last.

A method looks the same in every figure of every page (``method_style``); the legend is in the order
of the table, and a double click on a name isolates that method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from flexlora.journal import byte_unit
from flexlora.reporting import canvas, tables
from flexlora.reporting.comparison.values import (
    Comparison,
    Row,
    Series,
    Spread,
    Value,
    sent,
    text_of,
)
from flexlora.reporting.method_style import MethodStyle, method_style, variant_style
from flexlora.reporting.names import natural

FEW = 4
"""Up to this number of methods the legend stands above the figure, with more beside it."""

LONGEST_NAME = 36
LINE = 21
"""Pixels that a method takes in a legend or on an axis."""


def styles_of(comparison: Comparison) -> dict[str, MethodStyle]:
    """The look of each row by its name: by its method, and by its variant if there are several."""
    rows = comparison.rows
    variants = sorted({row.variant for row in rows}, key=natural)
    alone = len({row.kind for row in rows}) == 1
    if len(variants) < 2:
        return {row.method: method_style(row.kind or row.method) for row in rows}
    return {row.method: variant_style(row.kind, variants.index(row.variant), alone) for row in rows}


def ranking(comparison: Comparison, value: Value, x_title: str, digits: int) -> go.Figure:
    """A value of each method, the best on top: the mean, its standard deviation, each seed.

    The grey band is the mean of the best method and its standard deviation to either side.
    """
    spreads = [(row, row.spread(value)) for row in comparison.rows]
    measured = [(row, spread) for row, spread in spreads if spread is not None]
    figure = canvas.blank(x_title, "", 110 + LINE * len(measured))
    _seeds(figure, [spread.values for _, spread in measured])
    _means(
        figure,
        styles_of(comparison),
        [row.method for row, _ in measured],
        [spread.mean for _, spread in measured],
        [spread.deviation or 0.0 for _, spread in measured],
        [text_of(spread, digits) for _, spread in measured],
        "mean and standard deviation" if len(comparison.seeds) > 1 else "value",
    )
    if measured and (deviation := measured[0][1].deviation):
        best = measured[0][1].mean
        figure.add_vrect(
            best - deviation, best + deviation, fillcolor=canvas.GREY, opacity=0.16, line_width=0
        )
    return _by_name(figure, [row.method for row, _ in measured])


def differences(comparison: Comparison, x_title: str) -> go.Figure:
    """How far each method is behind the best, seed by seed, with the 95 % interval of the mean.

    The axis shows all seeds; an interval may reach beyond it.
    """
    behind = [
        (row.method, standing.behind)
        for row in comparison.rows[1:]
        if (standing := comparison.standing(row))
    ]
    figure = canvas.blank(x_title, "", 110 + LINE * len(behind))
    _seeds(figure, [spread.values for _, spread in behind])
    intervals = [tables.mean_interval(spread.values) for _, spread in behind]
    _means(
        figure,
        styles_of(comparison),
        [name for name, _ in behind],
        [spread.mean for _, spread in behind],
        [interval.high - s.mean if interval else 0.0
         for interval, (_, s) in zip(intervals, behind, strict=True)],
        [f"{spread.mean:+.3f}" for _, spread in behind],
        "mean and 95 % interval",
    )  # fmt: skip
    figure.add_vline(0, line={"color": canvas.GREY, "width": 1, "dash": "dash"})
    values = [value for _, spread in behind for value in spread.values]
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.35 * (high - low or 1.0)
    figure.update_xaxes(range=[low - room, high + room])
    return _by_name(figure, [name for name, _ in behind])


def quality_by_bytes(comparison: Comparison, y_title: str, digits: int) -> go.Figure:
    """The loss that decides against all bytes of a run: a mean per method, and each seed."""
    measured = [
        (row, loss, total)
        for row in comparison.rows
        if (loss := row.spread(comparison.loss)) and (total := row.spread(sent))
    ]
    divisor, unit = byte_unit(max((t.mean for _, _, t in measured), default=1))
    figure = canvas.blank(f"Bytes up and down, all rounds ({unit})", y_title)
    styles = styles_of(comparison)
    for row, loss, total in reversed(measured):
        style = styles[row.method]
        name = canvas.shown(row.method, LONGEST_NAME)
        figure.add_scatter(
            x=[value / divisor for value in total.values],
            y=list(loss.values),
            mode="markers",
            name=f"{name}, one seed",
            legendgroup=row.method,
            showlegend=False,
            opacity=0.45,
            marker={"color": style.colour, "symbol": style.symbol, "size": 6},
            hoverinfo="skip",
        )
        figure.add_scatter(
            x=[total.mean / divisor],
            y=[loss.mean],
            mode="markers",
            name=name,
            legendgroup=row.method,
            legendrank=comparison.rows.index(row) + 1,
            marker={"color": style.colour, "symbol": style.symbol, "size": 12},
            error_y={"type": "data", "array": [loss.deviation or 0.0], "color": style.colour,
                     "thickness": 1.2, "width": 3},
            customdata=[text_of(loss, digits)],
            hovertemplate=f"<b>{name}</b> %{{x:.3g}} {unit}: %{{customdata}}<extra></extra>",
        )  # fmt: skip
    totals = [total.mean for _, _, total in measured]
    if totals and max(totals) > 20 * max(min(totals), 1):
        figure.update_xaxes(type="log")
    else:
        figure.update_xaxes(rangemode="tozero")
    return _with_legend(figure, len(measured))


def by_bytes(comparison: Comparison, series: Series, y_title: str, digits: int) -> go.Figure:
    """A series of each method against the bytes sent until then: the mean over seeds."""
    drawn = []
    for row in comparison.rows:
        spent = {0: 0.0} | {
            number: spread.mean
            for number, spread in row.by_round(lambda run: run.bytes_so_far).items()
        }
        points = [(n, spent[n], s) for n, s in row.by_round(series).items() if n in spent]
        if points:
            drawn.append((row, points))
    divisor, unit = byte_unit(max((points[-1][1] for _, points in drawn), default=1))
    figure = canvas.blank(f"Bytes sent so far, up and down ({unit})", y_title)
    styles = styles_of(comparison)
    for row, points in reversed(drawn):
        style = styles[row.method]
        name = canvas.shown(row.method, LONGEST_NAME)
        figure.add_scatter(
            x=[spent / divisor for _, spent, _ in points],
            y=[spread.mean for *_, spread in points],
            name=name,
            legendrank=comparison.rows.index(row) + 1,
            mode="lines+markers" if len(points) > 2 else "markers",
            line={"color": style.colour, "dash": style.dash, "width": 2},
            marker={"size": 6, "symbol": style.symbol},
            customdata=[[n, text_of(spread, digits)] for n, _, spread in points],
            hovertemplate=f"<b>{name}</b> round %{{customdata[0]}}, %{{x:.3g}} {unit}: "
            "%{customdata[1]}<extra></extra>",
        )
    return _with_legend(figure.update_xaxes(rangemode="tozero"), len(drawn))


def by_round(comparison: Comparison, series: Series, y_title: str, digits: int) -> go.Figure:
    """A series of each method by round: its mean as a thick line, each seed as a thin one."""
    drawn = {
        place: averages
        for place, row in enumerate(comparison.rows)
        if (averages := row.by_round(series))
    }
    figure = canvas.by_round({n for averages in drawn.values() for n in averages}, y_title)
    many, styles = len(drawn) > FEW, styles_of(comparison)
    # In reverse, so that the best lie on top; the legend has an order of its own.
    for place in reversed(drawn):
        row = comparison.rows[place]
        if len(row.runs) > 1:
            _thin(figure, row, styles[row.method], series, 0.18 if many else 0.45)
        _thick(figure, row, styles[row.method], place, drawn[place], digits)
    figure.update_layout(hovermode="closest").update_yaxes(rangemode="nonnegative")
    return _with_legend(figure, len(drawn))


def _with_legend(figure: go.Figure, methods: int) -> go.Figure:
    """The figure with the legend of many methods beside it, not above it."""
    if methods > FEW:
        beside = {"orientation": "v", "x": 1.01, "y": 1, "yanchor": "top", "font": {"size": 12}}
        height = max(canvas.HEIGHT + 80, 60 + LINE * methods)
        figure.update_layout(height=height, legend=beside)
    return figure


def _seeds(figure: go.Figure, values: Sequence[Sequence[float]]) -> None:
    """Each seed of the methods as a small grey point, a line of the figure per method."""
    points = [(value, place) for place, line in enumerate(values) for value in line]
    figure.add_scatter(
        x=[value for value, _ in points],
        y=[place for _, place in points],
        name="one seed",
        mode="markers",
        marker={"color": canvas.GREY, "size": 6, "opacity": 0.6},
        hovertemplate="%{x:.4g}<extra>one seed</extra>",
    )


def _means(
    figure: go.Figure,
    styles_by_name: Mapping[str, MethodStyle],
    names: Sequence[str],
    means: Sequence[float],
    whiskers: Sequence[float],
    texts: Sequence[str],
    label: str,
) -> None:
    styles = [styles_by_name[name] for name in names]
    figure.add_scatter(
        x=means,
        y=list(range(len(names))),
        name=label,
        mode="markers",
        marker={
            "size": 10,
            "color": [style.colour for style in styles],
            "symbol": [style.symbol for style in styles],
        },
        error_x={
            "type": "data",
            "array": whiskers,
            "color": canvas.GREY,
            "thickness": 1.2,
            "width": 3,
        },
        customdata=[[canvas.shown(n), text] for n, text in zip(names, texts, strict=True)],
        hovertemplate="<b>%{customdata[0]}</b> %{customdata[1]}<extra></extra>",
    )


def _by_name(figure: go.Figure, names: Sequence[str]) -> go.Figure:
    """The figure with the methods down its vertical axis, the first on top."""
    # Without a legend: its symbols would have the colour of the first method.
    return figure.update_layout(showlegend=False).update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=[canvas.shown(name, LONGEST_NAME) for name in names],
        range=[len(names) - 0.4, -0.6],
        showgrid=False,
    )


def _thick(
    figure: go.Figure,
    row: Row,
    style: MethodStyle,
    place: int,
    averages: dict[int, Spread],
    digits: int,
) -> None:
    name = canvas.shown(row.method, LONGEST_NAME)
    figure.add_scatter(
        x=list(averages),
        y=[spread.mean for spread in averages.values()],
        name=f"★ {name}" if place == 0 else name,
        legendgroup=row.method,
        legendrank=place + 1,
        mode="lines+markers" if len(averages) > 2 else "markers",
        line={"color": style.colour, "dash": style.dash, "width": 3.4 if place == 0 else 2},
        marker={"size": 8 if place == 0 else 6, "symbol": style.symbol},
        customdata=[text_of(spread, digits) for spread in averages.values()],
        hovertemplate=f"<b>{name}</b> round %{{x}}: %{{customdata}}<extra></extra>",
    )


def _thin(figure: go.Figure, row: Row, style: MethodStyle, series: Series, opacity: float) -> None:
    for run in row.runs:
        values = series(run)
        figure.add_scatter(
            x=list(values),
            y=list(values.values()),
            name=f"{canvas.shown(row.method, LONGEST_NAME)}, seed {run.seed}",
            legendgroup=row.method,
            showlegend=False,
            hoverinfo="skip",
            mode="lines",
            opacity=opacity,
            line={"color": style.colour, "dash": style.dash, "width": 1},
        )
