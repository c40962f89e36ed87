"""What a comparison shows in sentences, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping

from flexlora.reporting.comparison.values import Comparison, Row, Standing, score, text_of


def verdict(comparison: Comparison) -> list[str]:
    """The sentences, the most important first; at least one."""
    best = comparison.best
    loss = best.spread(comparison.loss) if best else None
    if best is None or loss is None:
        return ["No method has come to its end, so none is the best."]
    where = f"loss on {comparison.group} clients" if comparison.group else "training loss"
    said = [
        f"{best.method} has the lowest {where} after the last round: {text_of(loss, 3)} nats per "
        "token."
    ]
    if comparison.group:
        said += _by_rouge(comparison, best)
    if best.others:
        said.append("No method finished with every seed, so means over unlike seeds are compared.")
    rivals = {row.method: comparison.standing(row) for row in comparison.rows[1:] if row.runs}
    return said + (_around(best.method, rivals, len(comparison.seeds)) if rivals else [])


def _by_rouge(comparison: Comparison, best: Row) -> list[str]:
    """Who has the highest Rouge-L, which need not be who has the lowest loss."""
    value = score(str(comparison.group), "rouge_l")
    found = {row.method: row.spread(value) for row in comparison.rows if not row.others}
    known = {name: rouge for name, rouge in found.items() if rouge is not None}
    if not known:
        return []
    name = max(known, key=lambda name: known[name].mean)
    if name == best.method:
        return [f"It also has the highest Rouge-L: {text_of(known[name], 1)} %."]
    theirs = text_of(known.get(best.method), 1)
    return [f"The highest Rouge-L has {name}: {text_of(known[name], 1)} %, against {theirs} %."]


def _around(best: str, rivals: Mapping[str, Standing | None], seeds: int) -> list[str]:
    """Whose distance from the best is within the spread of the seeds."""
    if seeds == 1:
        return ["With one seed the spread is not known, so small differences say nothing."]
    level = [name for name, found in rivals.items() if found and found.level]
    unknown = [name for name, found in rivals.items() if found is None or found.level is None]
    said = []
    if level:
        said.append(
            f"Within the spread of the seeds, so not told apart from {best} by their means (behind "
            f"by no more than the larger of the two standard deviations): {', '.join(level)}."
        )
        always = [name for name in level if (found := rivals[name]) and found.always]
        if always:
            said.append(f"Of these, behind {best} with every single seed: {', '.join(always)}.")
    if len(level) + len(unknown) < len(rivals):
        who = "Every other method" if not level and not unknown else "The rest"
        said.append(f"{who} is behind {best} by more than the spread of the seeds.")
    if unknown:
        said.append(f"Too few seeds finished to tell: {', '.join(unknown)}.")
    return said
