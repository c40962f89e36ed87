"""The rows of ``tables`` as plotly figures: pure functions, no titles, units on every axis.

Backgrounds are transparent and the colours of middling lightness, so that a figure can stand
on a light or a dark page. Names come from the journal and are not trusted: plotly reads a
little HTML in every text, so ``shown`` escapes them first.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import plotly.colors
import plotly.graph_objects as go

from flexlora.reporting.tables import (
    CategoryRow,
    EnergyRow,
    EvaluationRow,
    KeptRow,
    Metric,
    RankTypeRow,
    SpectrumRow,
    TimeRow,
    TrafficRow,
    TrainingRow,
)

GROUPS = {"seen": "#4a7fc1", "unseen": "#d2722a"}
BLUE, ORANGE, GREY = "#4a7fc1", "#d2722a", "#8b929c"
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


def training_loss(rows: Sequence[TrainingRow]) -> go.Figure:
    """Training loss by round: all clients as a thick line, each rank type as a thin one."""
    figure = _by_round({r.round for r in rows}, "Training loss (nats per token)")
    names = list(dict.fromkeys(r.rank_type for r in rows))
    for name in sorted(names, key=lambda n: n is None):
        mine = [r for r in rows if r.rank_type == name]
        colour = BLUE if name is None else TYPES[(names.index(name) - 1) % len(TYPES)]
        figure.add_scatter(
            x=[r.round for r in mine],
            y=[r.loss for r in mine],
            name="all clients" if name is None else shown(name, 24),
            mode="lines+markers",
            line={"color": colour, "width": 3 if name is None else 1.3},
            marker={"size": 7 if name is None else 4},
        )
    return figure


def learning_curve(rows: Sequence[EvaluationRow], metric: Metric) -> go.Figure:
    """One metric by round, seen against unseen clients."""
    figure = _by_round({r.round for r in rows}, f"{metric.title} ({metric.unit})")
    for group, colour in GROUPS.items():
        mine = [r for r in rows if r.group == group]
        if mine:
            figure.add_scatter(
                x=[r.round for r in mine],
                y=[r.score(metric) for r in mine],
                name=f"{group} clients",
                mode="lines+markers",
                line={"color": colour, "width": 2.5},
                marker={"size": 7, "symbol": "circle" if group == "seen" else "diamond"},
            )
    return figure


def rank_clients(rows: Sequence[RankTypeRow]) -> go.Figure:
    """How many clients train at each rank type."""
    figure = _figure("Rank type", "Clients", HEIGHT - 40)
    figure.add_bar(
        x=list(range(len(rows))),
        y=[r.clients for r in rows],
        text=[f"{r.clients:,}" for r in rows],
        name="clients",
        marker={"color": BLUE},
    )
    return _named_x(figure, [r.name for r in rows])


def rank_parameters(rows: Sequence[RankTypeRow]) -> go.Figure:
    """How many parameters a client of each rank type trains."""
    figure = _figure("Rank type", "Trainable parameters", HEIGHT - 40)
    figure.add_bar(
        x=list(range(len(rows))),
        y=[r.trainable for r in rows],
        text=[_short(r.trainable) for r in rows],
        name="trainable parameters of one client",
        marker={"color": ORANGE},
    )
    return _named_x(figure, [r.name for r in rows]).update_yaxes(tickformat="~s")


def spectrum(rows: Sequence[SpectrumRow]) -> go.Figure:
    """The singular values of one module, a line per round, coloured by round.

    Values that are zero cannot be drawn on the logarithmic axis and are left out.
    """
    figure = _figure("Index of the singular value", "Singular value")
    rounds = [r.round for r in rows]
    for row, colour in zip(rows, _ramp(len(rows)), strict=True):
        kept = [(index, v) for index, v in enumerate(row.values, 1) if v > 0]
        figure.add_scatter(
            x=[index for index, _ in kept],
            y=[v for _, v in kept],
            name=f"round {row.round}",
            mode="lines",
            line={"color": colour, "width": 1.8},
        )
    if len(rows) > 8:
        _round_scale(figure, rounds)
    return figure.update_yaxes(type="log", exponentformat="power", dtick=1, tickfont={"size": 10})


def energy(rows: Sequence[EnergyRow]) -> go.Figure:
    """The share of the energy in each block of ranks, stacked to 100 %, by round."""
    figure = _by_round({r.round for r in rows}, "Share of the energy (%)")
    blocks = list(dict.fromkeys(r.block for r in rows))
    for block, colour in zip(blocks, _ramp(len(blocks)), strict=True):
        mine = [r for r in rows if r.block == block]
        figure.add_bar(
            x=[r.round for r in mine],
            y=[r.share for r in mine],
            name=f"ranks {block}",
            marker={"color": colour},
            hovertemplate="%{y:.2f} %",
        )
    return figure.update_layout(barmode="stack")


def kept(rows: Sequence[KeptRow]) -> go.Figure:
    """The energy kept at each rank level: the mean over modules, with the extremes."""
    figure = _figure("Truncated to rank", "Energy kept (%)")
    figure.add_bar(
        x=[str(r.rank) for r in rows],
        y=[r.mean for r in rows],
        text=[f"{r.mean:.1f}" for r in rows],
        textposition="inside",
        insidetextanchor="start",
        name="mean over modules",
        marker={"color": BLUE},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [r.highest - r.mean for r in rows],
            "arrayminus": [r.mean - r.lowest for r in rows],
            "color": GREY,
        },
    )
    return figure.update_xaxes(type="category", showgrid=False).update_yaxes(range=[0, 105])


def truncated(rows: Sequence[EvaluationRow], metric: Metric) -> go.Figure:
    """One metric of the global adapter and of its truncations, seen against unseen."""
    figure = _figure("Adapter", f"{metric.title} ({metric.unit})")
    names = list(dict.fromkeys(r.adapter for r in rows))
    for group, colour in GROUPS.items():
        mine = [r for r in rows if r.group == group and r.score(metric) is not None]
        if mine:
            scores = [r.score(metric) for r in mine]
            figure.add_bar(
                x=[names.index(r.adapter) for r in mine],
                y=scores,
                text=[f"{score:.{_digits(metric)}f}" for score in scores],
                textangle=0,
                name=f"{group} clients",
                marker={"color": colour},
            )
    return _named_x(figure, names)


def categories(rows: Sequence[CategoryRow], metric: Metric) -> go.Figure:
    """Bars of each category before and after training, in the order given, from the top.

    The height grows with the rows; each keeps 24 pixels.
    """
    figure = _figure(f"{metric.title} ({metric.unit})", "Category", 110 + 24 * len(rows))
    places = list(range(len(rows)))
    sides = (
        ("before training", GREY, [r.before for r in rows]),
        ("after training (gain beside it)", BLUE, [r.after for r in rows]),
    )
    for name, colour, values in sides:
        figure.add_bar(
            x=values,
            y=places,
            orientation="h",
            name=name,
            marker={"color": colour},
            text=None if colour == GREY else [f"{r.gain:+.{_digits(metric)}f}" for r in rows],
            constraintext="none",
            textfont={"size": 10.5},
            textposition="outside",
            cliponaxis=False,
            customdata=[[shown(r.category, 80)] for r in rows],
            hovertemplate="%{customdata[0]}: %{x:.3g}",
        )
    figure.update_yaxes(
        tickvals=places,
        ticktext=[shown(r.category, 26) for r in rows],
        tickfont={"size": 11},
        range=[len(rows) - 0.4, -0.6],
        showgrid=False,
    )
    highest = max(max(r.before, r.after) for r in rows)
    figure.update_xaxes(range=[0, 1.3 * highest if highest else 1], side="bottom")
    return figure.update_layout(bargap=0.2, hovermode="closest")


def traffic(rows: Sequence[TrafficRow]) -> go.Figure:
    """The bytes of each round, to the server (up) and to the clients (down)."""
    divisor, unit = byte_unit(max(max(r.up, r.down) for r in rows))
    figure = _by_round({r.round for r in rows}, f"Sent in the round ({unit})")
    sides = (("up", BLUE, [r.up for r in rows]), ("down", ORANGE, [r.down for r in rows]))
    for name, colour, values in sides:
        figure.add_bar(
            x=[r.round for r in rows],
            y=[value / divisor for value in values],
            name=name,
            marker={"color": colour},
            hovertemplate="%{y:.4g} " + unit,
        )
    return figure


def traffic_total(rows: Sequence[TrafficRow]) -> go.Figure:
    """The bytes since the start, up and down."""
    divisor, unit = byte_unit(max(rows[-1].total_up, rows[-1].total_down))
    figure = _by_round({r.round for r in rows}, f"Sent since the start ({unit})")
    sides = (
        ("up", BLUE, "solid", [r.total_up for r in rows]),
        ("down", ORANGE, "dash", [r.total_down for r in rows]),
    )
    for name, colour, dash, values in sides:
        figure.add_scatter(
            x=[r.round for r in rows],
            y=[value / divisor for value in values],
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": 2.5, "dash": dash},
            hovertemplate="%{y:.4g} " + unit,
        )
    return figure.update_yaxes(rangemode="tozero")


def times(rows: Sequence[TimeRow]) -> go.Figure:
    """The seconds of each round, training and exchange below, aggregation on top."""
    figure = _by_round({r.round for r in rows}, "Time (seconds)")
    sides = (
        ("training and exchange", BLUE, [r.training for r in rows]),
        ("aggregation", ORANGE, [r.aggregation for r in rows]),
    )
    for name, colour, values in sides:
        figure.add_bar(
            x=[r.round for r in rows],
            y=values,
            name=name,
            marker={"color": colour},
            hovertemplate="%{y:.3g} s",
        )
    return figure.update_layout(barmode="stack")


def byte_unit(largest: float) -> tuple[int, str]:
    """The divisor and the name of the unit in which ``largest`` bytes read well."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if largest >= 1024**power:
            return 1024**power, unit
    return 1, "bytes"


def _figure(x_title: str, y_title: str, height: int = HEIGHT) -> go.Figure:
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


def _named_x(figure: go.Figure, names: Sequence[str]) -> go.Figure:
    """Name the places 0, 1, 2, ...: names as places would merge those that are cut alike."""
    labels = [shown(name, 24) for name in names]
    return figure.update_xaxes(tickvals=list(range(len(names))), ticktext=labels, showgrid=False)


def _by_round(rounds: set[int], y_title: str) -> go.Figure:
    figure = _figure("Round", y_title)
    few = len(rounds) <= 12 and max(rounds) - min(rounds) <= 12
    return figure.update_xaxes(tickformat="d", **({"dtick": 1} if few else {"nticks": 10}))


def _ramp(count: int) -> list[str]:
    """So many colours in the order of ``RAMP``."""
    places = [place / max(count - 1, 1) for place in range(count)]
    scale = plotly.colors.make_colorscale(RAMP)
    return list(plotly.colors.sample_colorscale(scale, places))


def _round_scale(figure: go.Figure, rounds: Sequence[int]) -> None:
    """Replace a legend that would be too long by a scale of colours."""
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


def _digits(metric: Metric) -> int:
    return 1 if metric.unit == "%" else 2


def _short(number: int | None) -> str:
    if number is None:
        return ""
    for divisor, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= divisor:
            return f"{number / divisor:.3g} {unit}"
    return str(number)
