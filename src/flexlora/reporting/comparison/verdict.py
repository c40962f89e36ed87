"""The result of a comparison in sentences, with how certain it is."""

from __future__ import annotations

from collections.abc import Mapping

from flexlora.reporting.comparison.values import Comparison, Row, Standing, score, text_of


def verdict(comparison: Comparison) -> list[str]:
    """The sentences, the most important first; at least one."""
    best = comparison.best
    loss = best.spread(comparison.loss) if best else None
    if best is None or loss is None:
        return ["No method completed a run, so there is no best method."]
    where = f"loss on {comparison.group} clients" if comparison.group else "training loss"
    sentences = [
        f"{best.method} has the lowest {where} after the last round: {text_of(loss, 3)} nats per "
        "token."
    ]
    if comparison.group:
        sentences += _by_rouge(comparison, best)
    if best.others:
        sentences.append(
            "No method completed every seed, so the means compared are over different seeds."
        )
    rivals = {row.method: comparison.standing(row) for row in comparison.rows[1:] if row.runs}
    return sentences + (_around(best.method, rivals, len(comparison.seeds)) if rivals else [])


def _by_rouge(comparison: Comparison, best: Row) -> list[str]:
    """The method with the highest Rouge-L, which need not have the lowest loss."""
    value = score(str(comparison.group), "rouge_l")
    spreads = {row.method: row.spread(value) for row in comparison.rows if not row.others}
    by_method = {name: rouge for name, rouge in spreads.items() if rouge is not None}
    if not by_method:
        return []
    name = max(by_method, key=lambda name: by_method[name].mean)
    if len(by_method) > 1 and len({rouge.mean for rouge in by_method.values()}) == 1:
        return [f"All methods have the same Rouge-L: {text_of(by_method[name], 1)} %."]
    if name == best.method:
        return [f"It also has the highest Rouge-L: {text_of(by_method[name], 1)} %."]
    highest, other = text_of(by_method[name], 1), text_of(by_method.get(best.method), 1)
    return [f"{name} has the highest Rouge-L: {highest} % ({best.method}: {other} %)."]


def _around(best: str, rivals: Mapping[str, Standing | None], seeds: int) -> list[str]:
    """Which methods can be distinguished from the best, given the variation between seeds."""
    if seeds == 1:
        return [
            "One seed does not show how much the results vary, so small differences are not "
            "evidence; use --seeds 3 or more."
        ]
    level = [name for name, standing in rivals.items() if standing and standing.level]
    unclear = [n for n, standing in rivals.items() if standing is None or standing.level is None]
    sentences = []
    if level:
        sentences.append(
            f"Not distinguishable from {best} on mean loss (the gap is at most the larger of the "
            f"two standard deviations): {', '.join(level)}."
        )
        always = [name for name in level if (standing := rivals[name]) and standing.always]
        if always:
            sentences.append(
                f"On every seed {best} was nevertheless better than: {', '.join(always)}."
            )
    if len(level) + len(unclear) < len(rivals):
        who = "Every other method" if not level and not unclear else "Each of the remaining methods"
        sentences.append(f"{who} is behind {best} by more than the standard deviation over seeds.")
    if unclear:
        sentences.append(f"Too few seeds were completed to judge: {', '.join(unclear)}.")
    return sentences
