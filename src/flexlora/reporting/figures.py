"""The rows of ``tables`` as plotly figures: pure functions, no titles, units on every axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from flexlora.journal import byte_unit
from flexlora.reporting import canvas
from flexlora.reporting.tables import (
    CategoryRow,
    ClientChange,
    ClientEvaluationRow,
    EnergyRow,
    EvaluationRow,
    KeptRow,
    Metric,
    RoundRow,
    SpectrumRow,
    TimeRow,
    TrafficRow,
    TrainingRow,
)

FEW_POINTS = 2
"""Up to this number of points has no line between them."""


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
            mode=_mode(len(chosen)),
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
                mode=_mode(len(chosen)),
                line={"color": colour, "width": 2.5},
                marker={"size": 7, "symbol": canvas.SYMBOL_BY_GROUP[group]},
                error_y=_whiskers(chosen, metric, colour),
                hovertemplate=f"%{{y:.{_digits(metric)}f}}",
            )
    return figure.update_yaxes(rangemode="tozero") if metric.unit == "%" else figure


def own_losses(rows: Sequence[ClientEvaluationRow]) -> go.Figure:
    """The loss on the clients' own rows by round: the mean, in a band of all clients."""
    figure = canvas.by_round({r.round for r in rows}, "Loss (nats per token)")
    ends = [
        (r.round, r.lowest, r.highest)
        for r in rows
        if r.lowest is not None and r.highest is not None
    ]
    rounds = [number for number, _, _ in ends]
    figure.add_scatter(
        x=[*rounds, *reversed(rounds)],
        y=[*(high for _, _, high in ends), *(low for _, low, _ in reversed(ends))],
        name="from the best to the worst client",
        fill="toself",
        mode="none",
        fillcolor=canvas.GREY,
        opacity=0.25,
        hoverinfo="skip",
    )
    measured = [r for r in rows if r.loss is not None]
    figure.add_scatter(
        x=[r.round for r in measured],
        y=[r.loss for r in measured],
        name="mean",
        mode=_mode(len(measured)),
        line={"color": canvas.BLUE, "width": 2.5},
        marker={"size": 7},
        hovertemplate="%{y:.3f}",
    )
    return figure


def sorted_clients(rows: Sequence[ClientChange], metric: Metric) -> go.Figure:
    """The score of each client after training, the worst first; a line per group."""
    figure = canvas.blank("Clients, the worst first (%)", f"{metric.title} ({metric.unit})")
    for group, colour in canvas.GROUPS.items():
        chosen = [r for r in rows if r.group == group]
        chosen.sort(key=lambda r: metric.gain(0.0, r.after))
        if chosen:
            figure.add_scatter(
                x=[100 * (place + 0.5) / len(chosen) for place in range(len(chosen))],
                y=[r.after for r in chosen],
                name=f"{group} clients",
                mode=_mode(len(chosen)),
                line={"color": colour, "width": 1},
                marker={"size": 7, "symbol": canvas.SYMBOL_BY_GROUP[group]},
                customdata=[_hover(r) for r in chosen],
                hovertemplate=f"%{{customdata}}: %{{y:.{_digits(metric)}f}}<extra></extra>",
            )
    return figure.update_xaxes(range=[0, 100])


def client_changes(rows: Sequence[ClientChange], metric: Metric) -> go.Figure:
    """The score of each client after training against that before; a line where both are equal."""
    unit = f"{metric.title}, {metric.unit}"
    figure = canvas.blank(f"Before training ({unit})", f"After training ({unit})")
    compared = [r for r in rows if r.before is not None]
    values = [v for r in compared for v in (r.before, r.after) if v is not None]
    ends = [min(values), max(values)]
    figure.add_scatter(
        x=ends,
        y=ends,
        name="no change",
        mode="lines",
        line={"color": canvas.GREY, "width": 1, "dash": "dash"},
        hoverinfo="skip",
    )
    for group, colour in canvas.GROUPS.items():
        chosen = [r for r in compared if r.group == group]
        if chosen:
            figure.add_scatter(
                x=[r.before for r in chosen],
                y=[r.after for r in chosen],
                name=f"{group} clients",
                mode="markers",
                marker={"color": colour, "size": 8, "symbol": canvas.SYMBOL_BY_GROUP[group]},
                customdata=[_hover(r) for r in chosen],
                hovertemplate=(
                    f"%{{customdata}}: %{{x:.{_digits(metric)}f}} → %{{y:.{_digits(metric)}f}}"
                    "<extra></extra>"
                ),
            )
    return figure


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
    canvas.counted_x(figure, max(len(row.values) for row in rows))
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
    """The energy kept at each rank level: the mean over modules, in a band of the extremes."""
    figure = canvas.blank("Truncated to rank", "Energy kept (%)")
    ranks = [r.rank for r in rows]
    figure.add_scatter(
        x=[*ranks, *reversed(ranks)],
        y=[*(r.highest for r in rows), *(r.lowest for r in reversed(rows))],
        name="from the lowest to the highest module",
        fill="toself",
        mode="none",
        fillcolor=canvas.GREY,
        opacity=0.25,
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=ranks,
        y=[r.mean for r in rows],
        name="mean over modules",
        mode="lines+markers",
        line={"color": canvas.BLUE},
        hovertemplate="rank %{x}: %{y:.1f} %<extra></extra>",
    )
    return canvas.counted_x(figure, max(ranks)).update_yaxes(rangemode="tozero")


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


def uploads(rows: Sequence[RoundRow]) -> go.Figure:
    """The clients of each round, stacked: usable uploads, failed clients, uploads not needed."""
    figure = canvas.by_round({r.round for r in rows}, "Clients")
    sides = (
        ("usable uploads", canvas.BLUE, [r.received or 0 for r in rows]),
        ("failed", canvas.ORANGE, [sum(r.failed.values()) for r in rows]),
        ("not needed", canvas.GREY, [r.not_needed for r in rows]),
    )
    for name, colour, values in sides:
        figure.add_bar(
            x=[r.round for r in rows],
            y=values,
            name=name,
            marker={"color": colour},
            hovertemplate="%{y:,d}",
        )
    most = max(sum(counts) for counts in zip(*(values for *_, values in sides), strict=True))
    return canvas.counted_y(figure, most).update_layout(barmode="stack")


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


def _whiskers(rows: Sequence[EvaluationRow], metric: Metric, colour: str) -> dict[str, Any] | None:
    """The 95 % intervals of these rows; None if there are none."""
    ends = [(r.score(metric) or 0.0, r.interval(metric)) for r in rows]
    if all(interval is None for _, interval in ends):
        return None
    return {
        "type": "data",
        "symmetric": False,
        "array": [interval.high - score if interval else 0.0 for score, interval in ends],
        "arrayminus": [score - interval.low if interval else 0.0 for score, interval in ends],
        "color": colour,
        "thickness": 1,
        "width": 3,
    }


def _hover(row: ClientChange) -> str:
    return f"{canvas.shown(row.client, 40)} ({row.examples:,} examples)"


def _mode(points: int) -> str:
    """Few points have no line, which would suggest a trend."""
    return "lines+markers" if points > FEW_POINTS else "markers"
