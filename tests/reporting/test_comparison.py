"""Comparisons of invented journals: what is best, how sure that is, and how it is shown."""

import html
import json
import re
import tomllib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from flexlora import methods
from flexlora.federation import compose
from flexlora.federation.compare import Cell, Outcome
from flexlora.journal.record import Record
from flexlora.method import Feature
from flexlora.reporting import comparison
from flexlora.reporting.comparison import curves, numbers, texts, values
from flexlora.reporting.comparison.values import Spread
from flexlora.reporting.method_style import LIBRARY, method_style
from flexlora.reporting.tables import ClientScore
from support import models

METHODS = methods.names()
ROUNDS = (1, 2, 3)


def scored(loss, rouge, seen):
    return {
        "client": f"client-{seen}",
        "category": None,
        "seen": seen,
        "examples": 5,
        "rouge_l": 5 * rouge / 100,
        "exact_match": 1,
        "loss_total": 17 * loss,
        "loss_tokens": 17,
    }


def evaluation(number, adapter, loss, rouge):
    rows = [scored(loss, rouge, False), scored(loss - 0.25, rouge + 3, True)]
    return {
        "event": "evaluation",
        "round": number,
        "adapter": adapter,
        "seconds": 1.0,
        "clients": rows,
    }


def journal(losses, rouge=20.0, base=None, seed=3):
    """A run whose loss on unseen clients is ``losses``, round by round."""
    yield {
        "event": "start",
        "version": "0.1.0",
        "config": {"seed": seed, "model": {"name": "tiny/base"}, "method": {"name": "any"}},
        "hardware": "2 cores",
        "versions": {},
        "clients": 13,
        "unseen_clients": 7,
        "modules": 2,
        "rank_types": {"small": 8, "large": 5},
        "ranks": {"small": [2], "large": [5]},
        "trainable": {"small": 36, "large": 90},
        "clients_at_once": 1,
        "resumed": False,
    }
    if base is not None:
        yield evaluation(0, "base", base, 10.0)
    for number, loss in enumerate(losses, 1):
        yield {
            "event": "round",
            "round": number,
            "cohort": ["a", "b"],
            "received": 2,
            "examples": 29,
            "tokens": 300,
            "loss_total": 11 * (loss - 0.5),
            "loss_tokens": 11,
            "bytes_up": 2048,
            "bytes_down": 1024,
            "seconds": 3.0,
            "aggregate_seconds": 0.25,
            "update_norm": 1.0,
        }
        yield {
            "event": "spectrum",
            "round": number,
            "rank_levels": [2, 5],
            "energy": {"q": [0.75, 0.15, 0.1], "up": [0.5, 0.25 + number / 100, 0.25]},
            "values": {"q": [3.0, 1.0]},
        }
        yield evaluation(number, "global", loss, rouge + number)
    yield {"event": "finish", "rounds": len(losses), "seconds": 9.0, "adapter": "a"}


@pytest.fixture
def outcome(tmp_path):
    """Writes a cell's journal and says that it finished; without losses, that it did not."""
    settings = models.settings(tmp_path)

    def outcome(method, seed, losses=None, state="finished", reason="", lacks=None, **given):
        folder = tmp_path / "cells" / method / f"seed-{seed}"
        section = {"method": {"name": method}, "seed": seed}
        cell = Cell(method, seed, folder, settings.model_copy(update=section))
        if losses is not None:
            folder.mkdir(parents=True)
            for event in journal(losses, seed=seed, **given):
                Record(folder).append(**event)
        return Outcome(cell, state, reason, lacks)

    return outcome


@pytest.fixture
def three(outcome):
    """Three methods and a refused one over three seeds.

    hetlora is behind flexlora with every seed, but by less than the seeds differ; flora is
    far behind.
    """
    found = []
    for seed, shift in ((3, 0.0), (4, 0.25), (5, 0.5)):
        base = 3 + shift
        found += [
            outcome("hetlora", seed, [2.5 + shift, 2.25 + shift, 2.125 + shift], rouge=30.0),
            outcome("fedit", seed, state="refused", reason=f"FedIT needs | one rank ({seed})."),
            outcome("flexlora", seed, [2.5 + shift, 1.75 + shift, 2.0 + shift], base=base),
            outcome("flora", seed, [2.5 + shift, 3.0 + shift, 4.0 + shift]),
        ]
    return found


class Words(HTMLParser):
    """Collects the words of a page outside of scripts and styles."""

    def __init__(self, markup):
        super().__init__()
        self.found = []
        self.feed(markup)

    def handle_data(self, data):
        if self.cdata_elem is None:
            self.found.append(data)


def words(markup):
    return " ".join(" ".join(Words(markup).found).split())


def test_a_spread_is_the_mean_and_the_sample_standard_deviation():
    assert Spread.of([1.0, 2.0, 6.0]) == Spread(3.0, pytest.approx(7**0.5), (1.0, 2.0, 6.0))
    assert Spread.of([2.0]).deviation is None
    assert values.text_of(Spread.of([1.0, 2.0]), 2) == "1.50 ± 0.71"
    assert values.text_of(Spread.of([0.25]), 2, "+") == "+0.25"
    assert values.text_of(None, 2) == "–"


def test_methods_stand_by_their_loss_on_unseen_clients_after_the_last_round(three):
    found = values.compared(three)
    assert [row.method for row in found.rows] == ["flexlora", "hetlora", "flora", "fedit"]
    assert found.group == "unseen" and found.seeds == (3, 4, 5)
    best = found.rows[0]
    assert found.best is best
    assert best.spread(found.loss).values == pytest.approx((2.0, 2.25, 2.5))
    assert best.spread(values.score("seen", "loss")).mean == pytest.approx(2.0)
    assert best.spread(values.score("unseen", "loss", best=True)).mean == pytest.approx(2.0)
    assert best.spread(values.score("unseen", "rouge_l", best=True)).mean == pytest.approx(22)
    assert {run.best("unseen").round for run in best.runs} == {2}
    assert best.spread(values.score("unseen", "exact_match")).mean == pytest.approx(20)


def test_costs_are_totals_over_the_rounds(three):
    (run, *_) = values.compared(three).rows[0].runs
    assert (run.bytes_up, run.bytes_down, run.server_seconds) == (3 * 2048, 3 * 1024, 0.75)
    assert run.training == pytest.approx({1: 2.0, 2: 1.25, 3: 1.5})
    assert values.last_training(run) == pytest.approx(1.5)


def test_energy_is_the_mean_over_modules_by_block_and_round(three):
    found = values.compared(three)
    (run, *_) = found.rows[0].runs
    assert values.blocks_of(found) == ["1–2", "3–5", "6 and beyond"]
    assert list(run.energy[2].values()) == pytest.approx([62.5, 21, 17.5])
    assert values.highest_block(run) == pytest.approx({1: 20.5, 2: 21, 3: 21.5})


def test_the_base_model_s_score_of_a_seed_is_every_method_s(three):
    found = values.compared(three)
    for row in found.rows[:3]:
        assert [run.before("unseen").loss for run in row.runs] == pytest.approx([3, 3.25, 3.5])
        assert [list(run.scores["seen"]) for run in row.runs] == [[0, *ROUNDS]] * 3


def test_a_difference_is_held_against_the_spread_of_the_seeds_and_taken_by_seed(three):
    found = values.compared(three)
    near, far = (found.standing(row) for row in found.rows[1:3])
    assert near.behind.values == pytest.approx((0.125, 0.125, 0.125))
    assert near.level and near.always
    assert not far.level and far.always
    assert found.standing(found.rows[3]) is None
    said = " ".join(comparison.verdict(found))
    assert "lowest loss on unseen clients after the last round: 2.250 ± 0.250" in said
    assert "Behind flexlora on every seed, but by no more than" in said
    assert "standard deviation over seeds: hetlora." in said
    assert "Not distinguishable" not in said
    assert "Each of the remaining methods is behind flexlora by more than" in said
    assert "hetlora has the highest Rouge-L: 33.0 ± 0.0 % (flexlora: 23.0 ± 0.0 %)." in said


def test_no_rival_within_the_spread(outcome):
    found = [outcome("flexlora", s, [2.0 + s / 100]) for s in (3, 4)]
    found += [outcome("flora", s, [3.0 + s / 100]) for s in (3, 4)]
    said = " ".join(comparison.verdict(values.compared(found)))
    assert (
        "Every other method is behind flexlora by more than the standard deviation over seeds."
        in said
    )
    assert "All methods have the same Rouge-L: 21.0 ± 0.0 %." in said


def test_one_seed_has_no_spread(outcome):
    found = values.compared([outcome("flexlora", 3, [2.0]), outcome("flora", 3, [2.1])])
    assert found.standing(found.rows[1]).level is None
    assert "One seed does not show how much the results vary" in " ".join(comparison.verdict(found))
    assert "±" not in texts.markdown(found).split("## Scores")[1].split("|", 1)[1]


def test_a_method_that_lacks_a_seed_is_not_the_best(outcome):
    found = values.compared(
        [
            outcome("flora", 3, [1.0]),
            outcome("flora", 4, state="failed", reason="The loss is nan."),
            outcome("flexlora", 3, [2.0]),
            outcome("flexlora", 4, [2.5]),
            outcome("hetlora", 3, state="open"),
            outcome("hetlora", 4, state="open"),
        ]
    )
    assert [row.method for row in found.rows] == ["flexlora", "flora", "hetlora"]
    assert found.rows[1].state == "seed 4 failed: The loss is nan."
    assert found.rows[2].state == "seed 3, 4 not completed"
    assert "Too few seeds were completed to judge: flora." in " ".join(comparison.verdict(found))


def test_nothing_finished(outcome, tmp_path):
    found = comparison.write(tmp_path, [outcome("flexlora", 3, state="failed", reason="No.")])
    assert found.best is None
    assert comparison.verdict(found) == ["No method completed a run, so there is no best method."]
    page = (tmp_path / "comparison.html").read_text()
    assert "failed: No." in page and 'id="plotly"' not in page


def test_without_evaluation_the_training_loss_decides(outcome):
    found = [outcome("flora", 3, [2.5]), outcome("flexlora", 3, [2.0])]
    for one in found:
        record = Record(one.cell.folder)
        events = [event for event in record.events() if event["event"] != "evaluation"]
        record.path.unlink()
        for event in events:
            record.append(**event)
    compared = values.compared(found)
    assert compared.group is None and compared.best.method == "flexlora"
    assert "lowest training loss after the last round: 1.500" in comparison.verdict(compared)[0]
    assert "Training loss" in texts.listings(compared)[0].head
    assert "Nothing was evaluated" in words(comparison.render(compared))


def test_the_markdown_has_every_method_and_says_who_refused(three):
    text = texts.markdown(values.compared(three))
    lines = [line for line in text.splitlines() if line.startswith("| ★")]
    assert lines == [
        "| ★ | flexlora | 3 of 3 | 2.250 ± 0.250 | – | 23.0 ± 0.0 | 20.0 ± 0.0 "
        "| 2.000 ± 0.250 | 26.0 ± 0.0 | 20.0 ± 0.0 |"
    ]
    assert "| ≈ | hetlora | 3 of 3 | 2.375 ± 0.250 | +0.125 ± 0.000 | 33.0" in text
    assert r"| fedit | skipped: FedIT needs \| one rank (3) |" in text
    assert "| fedit |" not in text.replace("| fedit | skipped", "")
    assert "| (before training) | 3 of 3 | 3.250 ± 0.250 | – | 10.0 ± 0.0 |" in text
    assert "| flexlora | 2, 2, 2 | 2.000 ± 0.250 | 22.0 ± 0.0 |" in text
    assert "| flexlora | 1.750 ± 0.250 | 6.0 KiB | 3.0 KiB | 9.0 ± 0.0 | 0.75 ± 0.00 | 0 |" in text
    assert "| arXiv 2402.11505 | yes | yes | one |" in text
    assert "| flexlora | 62.50 ± 0.00 | 21.50 ± 0.00 | 17.50 ± 0.00 |" in text
    for line in (line for line in text.splitlines() if line.startswith("|")):
        assert len(re.findall(r"(?<!\\)\|", line)) >= 3


def test_the_tables_are_whole(three):
    for listing in texts.listings(values.compared(three)):
        assert {len(line) for line in listing.lines} == {len(listing.head)}
        if listing.spans:
            assert sum(width for _, width in listing.spans) == len(listing.head)


def test_the_json_holds_every_number(three):
    found = json.loads(json.dumps(numbers.content(values.compared(three), three), allow_nan=False))
    assert found["best"] == "flexlora" and found["seeds"] == [3, 4, 5]
    best, second, _, refused = found["methods"]
    assert best["last"]["unseen"]["loss"] == {
        "mean": pytest.approx(2.25),
        "deviation": pytest.approx(0.25),
        "values": pytest.approx([2.0, 2.25, 2.5]),
    }
    assert best["best"]["unseen"]["loss"]["mean"] == pytest.approx(2.0)
    assert best["costs"]["bytes_up"]["mean"] == 6144 and best["costs"]["seconds"]["mean"] == 9
    assert best["by_round"]["energy of ranks 3–5"]["2"]["mean"] == pytest.approx(21)
    assert best["by_round"]["loss (unseen)"]["0"]["mean"] == pytest.approx(3.25)
    assert second["standing"]["level"] and second["standing"]["always"]
    assert refused["cells"][1] == {
        "seed": 4,
        "state": "refused",
        "reason": "FedIT needs | one rank (4).",
    }
    assert refused["last"]["unseen"]["loss"] is None
    assert (best["exact"], best["mixed_ranks"]) == (True, True)
    assert (refused["exact"], refused["mixed_ranks"]) == (False, False)


def test_the_page_is_whole_and_opens_no_connection(three, tmp_path):
    for one in three[1:]:
        if one.state == "finished":
            (one.cell.folder / "report.html").touch()
    comparison.write(tmp_path, three)
    assert "flexlora run report" in (three[0].cell.folder / "report.html").read_text()
    page = (tmp_path / "comparison.html").read_text()
    titles = re.findall("<figure[^>]*><h3>(.*?)</h3>", page)
    assert titles == [
        "Loss on unseen clients",
        "Behind flexlora in loss on unseen clients",
        "Rouge-L on unseen clients",
        "Loss on unseen clients against all bytes",
        "Loss on unseen clients against the bytes sent so far",
        "Training loss by round",
        "Loss on unseen clients by round",
        "Rouge-L on unseen clients by round",
        "Energy in the highest block of ranks in use",
    ]
    assert page.count('<script id="plotly"') == 1
    assert not re.search(r"<(link|iframe|img|object|form|base)\b|<script[^>]* src", page)
    assert "default-src 'none'" in page
    said = words(page)
    for text in ("3 methods compared", "tiny/base", "small (8 clients of rank 2)", "skipped: "):
        assert text in said
    assert all(sentence in said for sentence in comparison.verdict(values.compared(three)))
    links = re.findall('href="(./[^"]*)"', page)
    assert links[:2] == ["./comparison.md", "./comparison.json"] and len(links) == 2 + 9
    assert all((tmp_path / link).is_file() for link in links)
    assert said.startswith(f"{tmp_path.name} — flexlora comparison")
    again = comparison.render(
        values.compared(three), tmp_path.name, comparison.reports(tmp_path, three)
    )
    assert again == page


def test_what_a_cell_said_is_no_markup(outcome):
    found = values.compared(
        [
            outcome("flexlora", 3, [2.0]),
            outcome("flora", 3, state="failed", reason="</td><script>alert(1)</script>"),
        ]
    )
    page = comparison.render(found)
    assert "<script>alert" not in page
    assert html.escape("</td><script>alert(1)</script>") in page


def test_many_methods_are_told_apart(outcome):
    names = METHODS[:25]
    many = values.Comparison(
        rows=tuple(
            values.Row(
                name,
                tuple(
                    values.measured(seed, list(journal([2.0 + place / 50, 1.5 + place / 50])))
                    for seed in (3, 4)
                ),
                (),
            )
            for place, name in enumerate(names)
        ),
        group="unseen",
        seeds=(3, 4),
    )
    series = values.curve("unseen", "loss")
    figure = curves.by_round(many, series, "Loss (nats per token)", 3)
    thick = [trace for trace in figure.data if trace.showlegend is not False]
    assert len(thick) == len(names)
    assert len({(t.line.color, t.line.dash) for t in thick}) == len(names)
    assert len({(t.line.color, t.marker.symbol) for t in thick}) == len(names)
    # The legend: all of it beside the figure, in the table's order, the best on top.
    by_rank = sorted(thick, key=lambda trace: trace.legendrank)
    assert [trace.name for trace in by_rank] == [f"★ {names[0]}", *names[1:]]
    assert figure.layout.legend.orientation == "v" and figure.layout.legend.x > 1
    assert figure.layout.height >= 20 * len(names)
    assert figure.data[-1].name == f"★ {names[0]}"
    assert names[3] in by_rank[3].hovertemplate
    # The seeds go with their method.
    thin = [trace for trace in figure.data if trace.showlegend is False]
    assert len(thin) == 2 * len(names)
    assert {trace.legendgroup for trace in thin} == set(names)


def test_few_methods_have_their_legend_above(three):
    found = values.compared(three)
    figure = curves.by_round(found, values.highest_block, "Energy (%)", 2)
    assert figure.layout.legend.orientation == "h"
    assert list(figure.data[-1].y) == pytest.approx([20.5, 21, 21.5])
    ranking = curves.ranking(found, values.score("unseen", "loss"), "Loss (nats per token)", 3)
    seeds, means = ranking.data
    assert list(means.x) == pytest.approx([2.25, 2.375, 4.25])
    assert list(means.error_x.array) == pytest.approx([0.25] * 3)
    assert len(seeds.x) == 9
    assert list(ranking.layout.yaxis.ticktext) == ["flexlora", "hetlora", "flora"]


def test_the_terminal_sees_the_scores_that_decide(three):
    table, *said = comparison.printed(values.compared(three))
    assert table.row_count == 4
    assert said[-1] == "Skipped, FedIT needs | one rank (3): fedit"


def test_the_best_method_may_have_the_highest_rouge_too(outcome):
    pairs = [outcome("flexlora", 3, [2.0], rouge=30.0), outcome("flora", 3, [3.0])]
    said = " ".join(comparison.verdict(values.compared(pairs)))
    assert "It also has the highest Rouge-L: 31.0 %." in said


def test_methods_that_are_skipped_for_the_same_reason_share_a_line(outcome):
    names = ["ffalora", "fedit", "rolora", "raflora"]
    refused = [
        outcome(name, seed, state="refused", reason=f"{name} of {seed}", lacks=Feature.MIXED_RANKS)
        for seed in (3, 4)
        for name in names
    ]
    other = [outcome("fedsvd", seed, state="refused", reason="No layers.") for seed in (3, 4)]
    failed = outcome("flora", 3, state="failed", reason="The loss is nan.")
    runs = [outcome("flexlora", seed, [2.0]) for seed in (3, 4)]
    found = values.compared([*runs, failed, *refused, *other])
    assert texts.unfinished(found) == [
        "Skipped, they need the same rank for all clients: fedit, ffalora, raflora, rolora",
        "Skipped, No layers: fedsvd",
        "flora: seed 3 failed: The loss is nan.",
    ]
    assert texts.title(found) == "flexlora and flora compared"
    listed = [line for listing in texts.listings(found) for line in listing.lines]
    assert sum("fedit" in cell for line in listed for cell in line) == 1


def test_a_single_skipped_method_is_one(outcome):
    refused = outcome("fedit", 3, state="refused", reason="?", lacks=Feature.PRODUCT_STATE)
    found = values.compared([outcome("flexlora", 3, [2.0]), refused])
    assert texts.unfinished(found) == ["Skipped, it needs no server optimizer: fedit"]


def test_a_single_method_is_not_called_the_best(outcome):
    found = values.compared([outcome("flexlora", 3, [2.0], rouge=-1.0)])
    assert comparison.verdict(found) == [
        "flexlora reaches a loss on unseen clients after the last round of 2.000 nats per token.",
        "Its Rouge-L is 0.0 %.",
    ]


@pytest.mark.parametrize(
    ("rouges", "sentence"),
    [
        ((20.0, 20.0, 20.04), "All methods have the same Rouge-L: 21.0 %."),
        ((20.0, 20.02, 10.0), "It also has the highest Rouge-L: 21.0 %, as flora."),
        ((10.0, 20.0, 20.01), "flora and fedit have the highest Rouge-L: 21.0 % (flexlora: 11."),
        ((-1.0, -1.0, -1.0), "All methods have the same Rouge-L: 0.0 %."),
    ],
)
def test_a_rouge_that_is_shown_alike_is_alike(outcome, rouges, sentence):
    names = ["flexlora", "flora", "fedit"]
    found = [
        outcome(n, 3, [2.0 + k], rouge=r)
        for k, (n, r) in enumerate(zip(names, rouges, strict=True))
    ]
    said = comparison.verdict(values.compared(found))[1]
    assert said.startswith(sentence)


def test_of_one_seed_no_table_speaks_of_means(outcome):
    found = values.compared([outcome("flexlora", 3, [2.0]), outcome("flora", 3, [2.1])])
    notes = " ".join(listing.note for listing in texts.listings(found))
    assert "over seeds" not in notes and "±" not in notes and "and seeds" not in notes


def test_captions_of_one_seed_speak_of_no_band(outcome):
    one = values.compared([outcome("flexlora", 3, [2.0]), outcome("flora", 3, [2.1])])
    said = words(comparison.render(one))
    assert "of one seed" in said and "band" not in said and "thin" not in said


def test_a_method_looks_the_same_wherever_it_stands(three, outcome):
    """Its colour, dash and marker depend on its name alone, and those of all methods differ."""
    whole = values.compared(three)
    alone = values.compared([o for o in three if o.cell.method in ("flora", "hetlora")])
    places = [[row.method for row in found.rows].index("flora") for found in (whole, alone)]
    assert places[0] != places[1]

    def looks(found):
        series, rank = values.curve("unseen", "loss"), found.loss
        line = curves.by_round(found, series, "y", 3).data
        looks = {(t.line.color, t.line.dash, t.marker.symbol) for t in line
                 if t.legendgroup == "flora" and t.showlegend is not False}  # fmt: skip
        means = curves.ranking(found, rank, "x", 3).data[1].marker
        place = [row.method for row in found.rows if row.spread(rank)].index("flora")
        points = curves.quality_by_bytes(found, "y", 3).data
        own = {(t.marker.color, t.marker.symbol) for t in points if t.legendgroup == "flora"}
        return looks, (means.color[place], means.symbol[place]), own

    assert looks(whole) == looks(alone)
    styles = [method_style(name) for name in METHODS]
    assert len(set(styles)) == len(METHODS)
    assert {name for row in LIBRARY for name in row} == set(METHODS)
    assert method_style("my_own") == method_style("my_own")
    assert method_style("my_own").dash not in {style.dash for style in styles}


def test_variants_have_their_method_s_colour_and_a_look_of_their_own(three):
    found = values.compared(three)

    def with_variants(rows):
        return replace(found, rows=tuple(
            replace(row, method=f"{row.kind}, rank={rank}", variant=f"rank={rank}")
            for row in rows for rank in (10, 8, 9)))  # fmt: skip

    styles = curves.styles_of(with_variants(found.rows[:2]))
    assert len(set(styles.values())) == 6
    for name, style in styles.items():
        assert style.colour == method_style(name.split(",")[0]).colour
    dashes = [styles[f"flexlora, rank={n}"].dash for n in (8, 9, 10)]
    assert dashes == ["solid", "dash", "dot"]
    alone = curves.styles_of(with_variants(found.rows[:1]))
    assert len({style.colour for style in alone.values()}) == 3


def test_quality_stands_against_all_bytes_sent(three):
    found = values.compared(three)
    assert {values.sent(run) for row in found.rows for run in row.runs} == {3 * 3072}
    ends = curves.quality_by_bytes(found, "Loss", 3)
    assert ends.layout.xaxis.title.text == "Bytes up and down, all rounds (KiB)"
    (best,) = (t for t in ends.data if t.name == "flexlora")
    assert (best.x[0], best.y[0]) == (9, pytest.approx(2.25))
    (seeds,) = (t for t in ends.data if t.name == "flexlora, one seed")
    assert list(seeds.y) == pytest.approx([2.0, 2.25, 2.5])
    course = curves.by_bytes(found, values.curve("unseen", "loss"), "Loss", 3)
    (best,) = (t for t in course.data if t.name == "flexlora")
    # The base model has cost nothing.
    assert list(best.x) == [0, 3, 6, 9] and best.y[0] == pytest.approx(3.25)


def test_differences_are_drawn_by_seed_with_their_interval(outcome):
    found = [outcome("flexlora", s, [2.0 + s / 100]) for s in (3, 4, 5)]
    gaps = {3: 0.5, 4: 0.75, 5: 0.625}
    found += [outcome("flora", s, [2.0 + s / 100 + gap]) for s, gap in gaps.items()]
    figure = curves.differences(values.compared(found), "Behind")
    seeds, means = figure.data
    assert sorted(seeds.x) == pytest.approx(sorted(gaps.values()))
    assert means.x[0] == pytest.approx(0.625)
    # Student's t with two degrees of freedom, over a standard deviation of 1/8.
    assert means.error_x.array[0] == pytest.approx(4.303 * 0.125 / 3**0.5)
    low, high = figure.layout.xaxis.range
    assert low < 0 < 0.75 < high
    assert list(figure.layout.yaxis.ticktext) == ["flora"]


def test_a_value_that_all_methods_share_is_said_and_not_drawn(outcome):
    found = [outcome(name, s, [2.0 + s / 10 + len(name)], rouge=-1.0)
             for name in ("flexlora", "flora") for s in (3, 4)]  # fmt: skip
    page = comparison.render(values.compared(found))
    assert "Rouge-L on unseen clients is 0.0 % for all methods and seeds; not drawn." in words(page)
    assert "<h3>Rouge-L on unseen clients</h3>" not in page


def test_the_worst_client_and_who_got_worse_stand_by_method(outcome):
    found = values.compared([outcome("flexlora", 3, [2.5], base=3.0), outcome("flora", 3, [3.5])])
    for row in found.rows:
        for run in row.runs:
            for rows in run.scores.values():
                for number, one in rows.items():
                    rows[number] = replace(one, by_client=_two_clients(one))
    said = words(comparison.render(found))
    assert "Method Worst client Worst tenth Mean over clients Std. deviation Worse off (%)" in said
    assert "flexlora 3.000 3.000 2.500 0.707 0.0" in said
    assert "flora 4.000 4.000 3.500 0.707 100.0" in said
    assert "Loss of the worst unseen client" in said


def _two_clients(row):
    sums = [(row.loss - 0.5, "a"), (row.loss + 0.5, "b")]
    return tuple(
        ClientScore(name, 3, {"loss_total": 7 * loss, "loss_tokens": 7}) for loss, name in sums
    )


def test_the_comparison_can_be_repeated_from_its_page(outcome):
    settings = models.settings(Path("runs"), data={"columns": {"category": ""}}, seed=3)
    found = values.compared([outcome("flora", 3, [2.5]), outcome("flexlora", 3, [2.0])])
    recorded = settings.model_dump(mode="json")
    options = {"flexlora": {"accuracy": "exact"}, "flora": {}}

    def configured(row):
        config = recorded | {"method": {"name": row.method, **options[row.method]}}
        runs = [replace(run, facts=replace(run.facts, config=config)) for run in row.runs]
        return replace(row, runs=tuple(runs))

    page = comparison.render(replace(found, rows=tuple(map(configured, found.rows))))
    command, config = map(html.unescape, re.findall("<pre>(.*?)</pre>", page, re.DOTALL))
    assert command == (
        "flexlora compare config.toml --methods flexlora,flora --seeds 1 "
        "--option flexlora.accuracy=exact"
    )
    assert compose.parse(tomllib.loads(config), "config.toml") == settings


def test_a_hint_that_needs_a_mouse_is_said_once(three):
    page = comparison.render(values.compared(three))
    assert page.count("double-click") == 1
    assert '<p class="pointer">' in page and "(hover: none)" in page
