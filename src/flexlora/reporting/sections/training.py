"""What training did: losses by round, ranks and truncation, singular values."""

from __future__ import annotations

from collections.abc import Sequence

from flexlora.journal import Event
from flexlora.reporting import figures, tables
from flexlora.reporting.document import Details, Figure, Figures, Part, Section, grid, missing
from flexlora.reporting.tables import EvaluationRow, SpectrumRow


def learning(events: Sequence[Event], rows: Sequence[EvaluationRow]) -> Section:
    """The training loss and the scores of the global adapter by round."""
    drawn, parts = [], list[Part]()
    training = [r for r in tables.training_table(events) if r.loss is not None]
    if training:
        drawn.append(
            Figure(
                "Training loss",
                figures.training_loss(training),
                "Mean over the tokens trained on, of all clients of the round and of each rank "
                "type. Each round trains other clients, so the loss of a rank type also changes "
                "with the clients that were drawn.",
            )
        )
    else:
        parts.append(missing("No round was completed: there is no training loss."))
    curve = tables.trajectory(rows)
    for metric in tables.METRICS:
        measured = [r for r in curve if r.score(metric) is not None]
        if measured:
            caption = f"{metric.title} of the global adapter; round 0 is before training."
            plot = figures.learning_curve(measured, metric)
            drawn.append(Figure(f"{metric.title} of the global adapter", plot, caption))
    if not curve:
        parts.append(missing("The global adapter was not evaluated."))
    return Section("Learning", [*parts, *grid(drawn)])


def ranks(events: Sequence[Event], rows: Sequence[EvaluationRow]) -> Section:
    """The rank types, and what truncation to a rank costs."""
    types = tables.rank_type_table(events)
    drawn, parts = [], list[Part]()
    if types:
        plot = figures.rank_clients(types)
        drawn.append(Figure("Clients by rank type", plot, "Number of clients of each rank type."))
    else:
        parts.append(missing("The rank types were not recorded."))
    if any(t.trainable is not None for t in types):
        caption = "Number of parameters that one client of each rank type trains."
        plot = figures.rank_parameters(types)
        drawn.append(Figure("Trainable parameters", plot, caption))
    drawn += _kept(events)
    cut = tables.truncated_table(rows)
    metric = tables.main_metric(cut)
    if metric:
        caption = (
            f"{metric.title} of the global adapter and of its truncation to each rank type, "
            f"after round {cut[0].round}."
        )
        plot = figures.truncated(cut, metric)
        drawn.append(Figure(f"{metric.title} after truncation", plot, caption))
    else:
        parts.append(missing("No truncated adapter was evaluated."))
    return Section("Ranks and truncation", [*parts, *grid(drawn)])


def spectrum(events: Sequence[Event]) -> Section:
    """The energy by block of ranks, and the singular values of a few modules."""
    energy, values = tables.energy_table(events), tables.spectrum_table(events)
    if not energy and not values:
        sentence = "No spectrum of the global update was recorded."
        return Section("Spectrum", [missing(sentence)])
    parts = list[Part]()
    if energy:
        caption = (
            "Energy (the sum of the squared singular values) of the global update by block of "
            "ranks, mean over modules. What lies beyond the largest rank in use reaches no client."
        )
        plot = figures.energy(energy)
        parts.append(Figures([Figure("Energy by block of ranks", plot, caption)]))
    modules = list(dict.fromkeys(r.module for r in values))
    if modules:
        drawn = [_singular_values(values, module) for module in modules]
        summary = f"Singular values of {len(modules)} of the adapted modules"
        parts.append(Details(summary, grid(drawn)))
    else:
        parts.append(missing("No module's singular values were recorded."))
    return Section("Spectrum", parts)


def _kept(events: Sequence[Event]) -> list[Figure]:
    rows = tables.kept_table(events)
    if not rows:
        return []
    caption = (
        "Share of the squared singular values of the global update after round "
        f"{rows[0].round} that remains when it is truncated to a rank; the whiskers reach to the "
        "lowest and the highest module."
    )
    return [Figure("Energy kept by truncation", figures.kept(rows), caption)]


def _singular_values(values: Sequence[SpectrumRow], module: str) -> Figure:
    rows = [r for r in values if r.module == module]
    caption = (
        "Singular values of the module's global update, one line per round. The steeper the "
        "descent, the lower the rank that is enough."
    )
    return Figure(module, figures.spectrum(rows), caption)
