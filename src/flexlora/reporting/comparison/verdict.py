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
    alone = sum(bool(row.runs) for row in comparison.rows) == 1
    sentences = [
        f"{best.method} {'reaches a' if alone else 'has the lowest'} {where} after the last round"
        f"{' of' if alone else ':'} {text_of(loss, 3)} nats per token."
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
    texts = {name: text_of(rouge, 1) for name, rouge in by_method.items()}
    if len(by_method) == 1 and best.method in by_method:
        return [f"Its Rouge-L is {texts[best.method]} %."]
    # Compared as they are shown: what differs less is no difference to a reader.
    means = {name: round(rouge.mean, 1) for name, rouge in by_method.items()}
    highest = [name for name, mean in means.items() if mean == max(means.values())]
    if len(highest) == len(means):
        return [f"All methods have the same Rouge-L: {texts[highest[0]]} %."]
    if best.method in highest:
        others = [name for name in highest if name != best.method]
        like = f", as {' and '.join(others)}" if others else ""
        return [f"It also has the highest Rouge-L: {texts[best.method]} %{like}."]
    own = texts.get(best.method)
    return [
        f"{' and '.join(highest)} {'has' if len(highest) == 1 else 'have'} the highest Rouge-L: "
        f"{texts[highest[0]]} %" + (f" ({best.method}: {own} %)." if own else ".")
    ]


def _around(best: str, rivals: Mapping[str, Standing | None], seeds: int) -> list[str]:
    """Which methods can be distinguished from the best, given the variation between seeds."""
    if seeds == 1:
        return [
            "One seed does not show how much the results vary, so small differences are not "
            "evidence; use --seeds 3 or more."
        ]
    near = {name: s for name, s in rivals.items() if s and s.level}
    always = [name for name, standing in near.items() if standing.always]
    level = [name for name in near if name not in always]
    unclear = [n for n, standing in rivals.items() if standing is None or standing.level is None]
    sentences = []
    if level:
        sentences.append(
            f"Not distinguishable from {best} on mean loss (the gap is at most the larger of the "
            f"two standard deviations over seeds): {', '.join(level)}."
        )
    if always:
        sentences.append(
            f"Behind {best} on every seed, but by no more than the standard deviation over seeds: "
            f"{', '.join(always)}."
        )
    if len(near) + len(unclear) < len(rivals):
        who = "Every other method" if not near and not unclear else "Each of the remaining methods"
        sentences.append(f"{who} is behind {best} by more than the standard deviation over seeds.")
    if unclear:
        sentences.append(f"Too few seeds were completed to judge: {', '.join(unclear)}.")
    return sentences
