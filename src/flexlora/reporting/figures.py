"""The rows of ``tables`` as plotly figures: pure functions, no titles, units on every axis."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from flexlora.journal import byte_unit
from flexlora.reporting import canvas
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


def training_loss(rows: Sequence[TrainingRow]) -> go.Figure:
    """Training loss by round: all clients as a thick line, each rank type as a thin one."""
    figure = canvas.by_round({r.round for r in rows}, "Training loss (nats per token)")
    names = list(dict.fromkeys(r.rank_type for r in rows))
    for name in sorted(names, key=lambda n: n is None):
        chosen = [r for r in rows if r.rank_type == name]
        number = (names.index(name) - 1) % len(canvas.TYPES)
        colour = canvas.BLUE if name is None else canvas.TYPES[number]
        figure.add_scatter(
            x=[r.round for r in chosen],
            y=[r.loss for r in chosen],
            name="all clients" if name is None else canvas.shown(name, 24),
            mode="lines+markers",
            line={"color": colour, "width": 3 if name is None else 1.3},
            marker={"size": 7 if name is None else 4},
            hovertemplate="%{y:.3f}",
        )
    return figure


def learning_curve(rows: Sequence[EvaluationRow], metric: Metric) -> go.Figure:
    """One metric by round, seen against unseen clients."""
    figure = canvas.by_round({r.round for r in rows}, f"{metric.title} ({metric.unit})")
    for group, colour in canvas.GROUPS.items():
        chosen = [r for r in rows if r.group == group]
        if chosen:
            figure.add_scatter(
                x=[r.round for r in chosen],
                y=[r.score(metric) for r in chosen],
                name=f"{group} clients",
                mode="lines+markers",
                line={"color": colour, "width": 2.5},
                marker={"size": 7, "symbol": "circle" if group == "seen" else "diamond"},
                hovertemplate=f"%{{y:.{_digits(metric) + 1}f}}",
            )
    return figure


def rank_clients(rows: Sequence[RankTypeRow]) -> go.Figure:
    """How many clients train at each rank type."""
    figure = canvas.blank("Rank type", "Clients", canvas.HEIGHT - 40)
    figure.add_bar(
        x=list(range(len(rows))),
        y=[r.clients for r in rows],
        text=[f"{r.clients:,}" for r in rows],
        name="clients",
        marker={"color": canvas.BLUE},
    )
    few = max((r.clients for r in rows), default=0) <= 10
    figure.update_yaxes(tickformat="d", **({"dtick": 1} if few else {}))
    return canvas.named_x(figure, [r.name for r in rows])


def rank_parameters(rows: Sequence[RankTypeRow]) -> go.Figure:
    """How many parameters a client of each rank type trains."""
    figure = canvas.blank("Rank type", "Trainable parameters", canvas.HEIGHT - 40)
    figure.add_bar(
        x=list(range(len(rows))),
        y=[r.trainable for r in rows],
        text=[_short(r.trainable) for r in rows],
        name="trainable parameters of one client",
        marker={"color": canvas.ORANGE},
    )
    return canvas.named_x(figure, [r.name for r in rows]).update_yaxes(tickformat="~s")


def spectrum(rows: Sequence[SpectrumRow]) -> go.Figure:
    """The singular values of one module, a line per round, coloured by round.

    Values that are zero cannot be drawn on the logarithmic axis and are left out.
    """
    figure = canvas.blank("Index of the singular value", "Singular value")
    rounds = [r.round for r in rows]
    for row, colour in zip(rows, canvas.ramp(len(rows)), strict=True):
        positive = [(index, v) for index, v in enumerate(row.values, 1) if v > 0]
        figure.add_scatter(
            x=[index for index, _ in positive],
            y=[v for _, v in positive],
            name=f"round {row.round}",
            mode="lines",
            line={"color": colour, "width": 1.8},
            hovertemplate="value %{x}: %{y:.3g}",
        )
    if len(rows) > 8:
        canvas.round_scale(figure, rounds)
    return figure.update_yaxes(type="log", exponentformat="power", dtick=1, tickfont={"size": 10})


def energy(rows: Sequence[EnergyRow]) -> go.Figure:
    """The share of the energy in each block of ranks, stacked to 100 %, by round."""
    figure = canvas.by_round({r.round for r in rows}, "Share of the energy (%)")
    blocks = list(dict.fromkeys(r.block for r in rows))
    for block, colour in zip(blocks, canvas.ramp(len(blocks)), strict=True):
        chosen = [r for r in rows if r.block == block]
        figure.add_bar(
            x=[r.round for r in chosen],
            y=[r.share for r in chosen],
            name=f"ranks {block}",
            marker={"color": colour},
            hovertemplate="%{y:.2f} %",
        )
    return figure.update_layout(barmode="stack")


def kept(rows: Sequence[KeptRow]) -> go.Figure:
    """The energy kept at each rank level: the mean over modules, with the extremes."""
    figure = canvas.blank("Truncated to rank", "Energy kept (%)")
    figure.add_bar(
        x=[str(r.rank) for r in rows],
        y=[r.mean for r in rows],
        text=[f"{r.mean:.1f}" for r in rows],
        textposition="inside",
        insidetextanchor="start",
        name="mean over modules",
        marker={"color": canvas.BLUE},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [r.highest - r.mean for r in rows],
            "arrayminus": [r.mean - r.lowest for r in rows],
            "color": canvas.GREY,
        },
    )
    return figure.update_xaxes(type="category", showgrid=False).update_yaxes(range=[0, 105])


def truncated(rows: Sequence[EvaluationRow], metric: Metric) -> go.Figure:
    """One metric of the global adapter and of its truncations, seen against unseen."""
    figure = canvas.blank("Adapter", f"{metric.title} ({metric.unit})")
    names = list(dict.fromkeys(r.adapter for r in rows))
    for group, colour in canvas.GROUPS.items():
        chosen = [r for r in rows if r.group == group and r.score(metric) is not None]
        if chosen:
            scores = [r.score(metric) for r in chosen]
            figure.add_bar(
                x=[names.index(r.adapter) for r in chosen],
                y=scores,
                text=[f"{score:.{_digits(metric)}f}" for score in scores],
                textangle=0,
                name=f"{group} clients",
                marker={"color": colour},
            )
    return canvas.named_x(figure, names)


def categories(rows: Sequence[CategoryRow], metric: Metric) -> go.Figure:
    """Bars of each category before and after training, in the order given, from the top.

    The height grows with the rows; each keeps 24 pixels.
    """
    figure = canvas.blank(f"{metric.title} ({metric.unit})", "Category", 110 + 24 * len(rows))
    places = list(range(len(rows)))
    sides = (
        ("before training", canvas.GREY, [r.before for r in rows]),
        ("after training, with the gain", canvas.BLUE, [r.after for r in rows]),
    )
    for name, colour, values in sides:
        figure.add_bar(
            x=values,
            y=places,
            orientation="h",
            name=name,
            marker={"color": colour},
            text=None
            if colour == canvas.GREY
            else [f"{r.gain:+.{_digits(metric)}f}" for r in rows],
            constraintext="none",
            textfont={"size": 10.5},
            textposition="outside",
            cliponaxis=False,
            customdata=[[canvas.shown(r.category, 80)] for r in rows],
            hovertemplate="%{customdata[0]}: %{x:.3g}",
        )
    figure.update_yaxes(
        tickvals=places,
        ticktext=[canvas.shown(r.category, 26) for r in rows],
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
    figure = canvas.by_round({r.round for r in rows}, f"Sent in the round ({unit})")
    sides = (
        ("up", canvas.BLUE, [r.up for r in rows]),
        ("down", canvas.ORANGE, [r.down for r in rows]),
    )
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
    figure = canvas.by_round({r.round for r in rows}, f"Sent since the start ({unit})")
    sides = (
        ("up", canvas.BLUE, "solid", [r.total_up for r in rows]),
        ("down", canvas.ORANGE, "dash", [r.total_down for r in rows]),
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
    figure = canvas.by_round({r.round for r in rows}, "Time (seconds)")
    sides = (
        ("training and exchange", canvas.BLUE, [r.training for r in rows]),
        ("aggregation", canvas.ORANGE, [r.aggregation for r in rows]),
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


def _digits(metric: Metric) -> int:
    return 1 if metric.unit == "%" else 2


def _short(number: int | None) -> str:
    if number is None:
        return ""
    for divisor, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= divisor:
            return f"{number / divisor:.3g} {unit}"
    return str(number)
