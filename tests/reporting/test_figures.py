from collections.abc import Callable

import plotly.graph_objects as go
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.journal import LossKind
from flexlora.journal.record import Event
from flexlora.reporting import canvas, figures, tables

Make = Callable[..., list[Event]]


def every_figure(events: list[Event]) -> dict[str, go.Figure]:
    rows = tables.evaluation_table(events)
    metric = tables.METRICS[0]
    first, last = tables.before_and_after(rows, "unseen")
    assert last is not None
    changes = tables.client_changes(first, last, metric)
    return {
        "training": figures.training_loss(tables.training_table(events)),
        "curve": figures.learning_curve(tables.trajectory(rows), metric),
        "sorted clients": figures.sorted_clients(changes, metric),
        "changes": figures.client_changes(changes, metric),
        "spectrum": figures.spectrum(tables.spectrum_table(events)[:6]),
        "energy": figures.energy(tables.energy_table(events)),
        "kept": figures.kept(tables.kept_table(events)),
        "categories": figures.categories(tables.category_table(events, "unseen"), metric),
        "traffic": figures.traffic(tables.traffic_table(events)),
        "times": figures.times(tables.time_table(events)),
        "uploads": figures.uploads(tables.round_table(events)),
    }


def test_every_figure_has_axis_titles_a_legend_and_no_title(make_journal: Make):
    for name, figure in every_figure(make_journal()).items():
        assert figure.layout.xaxis.title.text, name
        assert figure.layout.yaxis.title.text, name
        assert figure.layout.showlegend, name
        assert all(trace.name for trace in figure.data), name
        assert figure.layout.title.text is None, name


def test_training_draws_all_clients_last_and_so_on_top(make_journal: Make):
    names = [t.name for t in every_figure(make_journal(clients=60))["training"].data]
    assert names == ["type1", "type2", "type3", "type4", "all clients"]


def test_spectrum_is_logarithmic_and_leaves_out_zeros():
    rows = [
        tables.SpectrumRow(1, "q", (2.0, 1.0, 0.0)),
        tables.SpectrumRow(2, "q", (3.0, 0.5, 0.1)),
    ]
    figure = figures.spectrum(rows)
    assert figure.layout.yaxis.type == "log"
    assert [len(t.y) for t in figure.data] == [2, 3]
    assert figure.data[0].line.color != figure.data[1].line.color


def test_many_rounds_have_a_colour_scale_instead_of_a_legend():
    rows = [tables.SpectrumRow(n, "q", (2.0, 1.0)) for n in range(3, 20)]
    figure = figures.spectrum(rows)
    scale = figure.data[-1].marker
    assert scale.showscale and (scale.cmin, scale.cmax) == (3, 19)
    assert not figure.layout.showlegend


def test_stacked_energy_reaches_a_hundred_percent(make_journal: Make):
    figure = every_figure(make_journal())["energy"]
    totals = [sum(shares) for shares in zip(*(t.y for t in figure.data), strict=True)]
    assert totals == pytest.approx([100] * 6)


def test_categories_keep_their_height_and_order():
    def drawn(count: int) -> go.Figure:
        rows = [
            tables.CategoryRow(f"task number {n} of a long name", "seen", 3, 1.0, 9.0 - n / 9, 0)
            for n in range(count)
        ]
        return figures.categories(rows, tables.METRICS[0])

    short, tall = drawn(11), drawn(41)
    assert tall.layout.height - short.layout.height == 30 * 24
    top, bottom = tall.layout.yaxis.range[1], tall.layout.yaxis.range[0]
    assert top < 0 < 40 < bottom
    assert len(tall.layout.yaxis.ticktext) == 41


def test_two_points_have_no_line_that_suggests_a_trend(make_journal: Make):
    few, many = every_figure(make_journal(rounds=1)), every_figure(make_journal(rounds=2))
    assert {trace.mode for trace in few["curve"].data} == {"markers"}
    assert {trace.mode for trace in many["curve"].data} == {"lines+markers"}
    assert {trace.mode for trace in few["training"].data} == {"markers"}


def test_the_curve_of_few_clients_has_its_intervals(make_journal: Make):
    rows = tables.trajectory(tables.evaluation_table(make_journal()))
    for metric in tables.METRICS[:2]:
        for trace in figures.learning_curve(rows, metric).data:
            assert len(trace.error_y.array) == len(trace.y) == 7
            assert min(*trace.error_y.array, *trace.error_y.arrayminus) > 0


def test_counts_have_whole_numbers_on_their_axis(make_journal: Make):
    drawn = every_figure(make_journal(clients=7))
    assert (drawn["uploads"].layout.yaxis.tickformat, drawn["uploads"].layout.yaxis.dtick) == (
        "d",
        1,
    )
    assert drawn["training"].layout.xaxis.dtick == 1
    assert drawn["spectrum"].layout.xaxis.tickformat == "d"


def test_failed_clients_and_unused_uploads_stand_on_the_usable_ones():
    counts = {LossKind.NO_ANSWER: 2, LossKind.CLIENT_ERROR: 1}
    row = tables.RoundRow(1, 5, counts, 4, None, None, None, None, None)
    figure = figures.uploads([row])
    assert [trace.y for trace in figure.data] == [(5,), (3,), (4,)]
    assert figure.layout.barmode == "stack" and figure.layout.yaxis.dtick is None


@settings(deadline=None)
@given(st.text(max_size=90), st.integers(2, 40))
def test_names_are_shown_short_and_without_markup(text: str, longest: int):
    shown = canvas.shown(text, longest)
    assert "<" not in shown and ">" not in shown and "\n" not in shown
    plain = shown.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert len(plain) <= longest
