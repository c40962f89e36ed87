from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.journal import Event, LossKind
from flexlora.reporting import tables

Make = Callable[..., list[Event]]


def scored(client: str, seen: bool, examples: int, rouge: float, tokens: int, loss: float):
    return {
        "client": client,
        "category": "maths",
        "seen": seen,
        "examples": examples,
        "rouge_l": rouge,
        "exact_match": rouge / 2,
        "loss_total": loss,
        "loss_tokens": tokens,
    }


def evaluation(round_: int, adapter: str, *clients: dict) -> Event:
    return {
        "event": "evaluation",
        "round": round_,
        "adapter": adapter,
        "seconds": 3.0,
        "clients": list(clients),
    }


def test_scores_are_totals_divided_once():
    events = [
        evaluation(
            2,
            "global",
            scored("a", True, 13, 5.0, 100, 30.0),
            scored("b", True, 17, 1.0, 300, 10.0),
            scored("c", False, 29, 7.0, 500, 70.0),
        )
    ]
    seen, unseen = tables.evaluation_table(events)
    assert (seen.group, seen.clients, seen.examples) == ("seen", 2, 30)
    assert seen.rouge_l == pytest.approx(100 * 6 / 30)
    assert seen.exact_match == pytest.approx(100 * 3 / 30)
    assert seen.loss == pytest.approx(40 / 400)
    assert unseen.rouge_l == pytest.approx(100 * 7 / 29)


def test_a_metric_not_measured_is_none_and_the_next_one_leads():
    row = scored("a", True, 13, 5.0, 100, 30.0)
    del row["rouge_l"], row["exact_match"]
    rows = tables.evaluation_table([evaluation(1, "global", row)])
    assert rows[0].rouge_l is None
    assert rows[0].loss == pytest.approx(0.3)
    metric = tables.main_metric(rows)
    assert metric is not None and metric.key == "loss"
    assert metric.gain(2.0, 1.5) == 0.5


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=6),
    st.integers(0, 5),
)
def test_moving_a_client_into_two_rows_changes_no_mean(sizes: list[tuple[int, float]], place: int):
    clients = [scored(str(i), True, n, n * share, 7 * n, n) for i, (n, share) in enumerate(sizes)]
    place %= len(clients)
    half = {
        k: v / 2 if isinstance(v, int | float) and k != "seen" else v
        for k, v in clients[place].items()
    }
    parted = [*clients[:place], half, half, *clients[place + 1 :]]
    whole = tables.evaluation_table([evaluation(1, "global", *clients)])[0]
    split = tables.evaluation_table([evaluation(1, "global", *parted)])[0]
    assert split.rouge_l == pytest.approx(whole.rouge_l)
    assert split.loss == pytest.approx(whole.loss)


def test_the_last_of_repeated_events_counts(make_journal: Make):
    events = make_journal(rounds=3)
    again = [dict(e) for e in events if e.get("round") == 3]
    doubled = [*events, *again]
    assert tables.evaluation_table(doubled) == tables.evaluation_table(events)
    assert tables.traffic_table(doubled) == tables.traffic_table(events)
    twice, once = tables.client_table(doubled), tables.client_table(events)
    assert [r.examples for r in twice] == [r.examples for r in once]
    better = [*events, evaluation(3, "global", scored("a", True, 13, 13.0, 100, 30.0))]
    last = [r for r in tables.evaluation_table(better) if r.adapter == "global"][-1]
    assert last.rouge_l == 100


def test_the_curve_starts_at_the_base_model_and_follows_the_global_adapter(make_journal: Make):
    rows = tables.evaluation_table(make_journal())
    curve = [(r.round, r.adapter) for r in tables.trajectory(rows) if r.group == "unseen"]
    assert curve == [(0, "base"), *((n, "global") for n in range(1, 7))]
    first, last = tables.before_and_after(rows, "unseen")
    assert first is not None and last is not None
    assert (first.round, last.round) == (0, 6)
    assert tables.before_and_after(rows[:1], "seen") == (rows[0], None)
    assert {r.adapter for r in tables.truncated_table(rows)} == {
        "global",
        "type1",
        "type2",
        "type3",
        "type4",
    }
    assert tables.truncated_table(tables.trajectory(rows)) == []


def test_training_loss_of_all_is_the_token_weighted_mean_of_the_types(make_journal: Make):
    events = make_journal(rounds=2)
    rows = tables.training_table(events)
    tokens: dict[str, int] = {}
    for turn in events:
        if turn["event"] == "client" and turn["round"] == 2:
            name = turn["rank_type"]
            tokens[name] = tokens.get(name, 0) + turn["loss_tokens"]
    losses = {r.rank_type: r.loss for r in rows if r.round == 2}
    mean = sum(losses[name] * n for name, n in tokens.items()) / sum(tokens.values())
    assert len(tokens) > 1
    assert losses[None] == pytest.approx(mean)


def test_a_round_in_which_nobody_answered_has_no_loss():
    empty = {"event": "round", "round": 1, "loss_total": 0, "loss_tokens": 0}
    assert tables.training_table([empty]) == [tables.TrainingRow(1, None, None)]
    assert tables.traffic_table([empty]) == []
    assert tables.time_table([empty]) == []


def test_energy_is_meaned_over_modules_and_cumulated_over_blocks():
    event = {
        "event": "spectrum",
        "round": 4,
        "rank_levels": [1, 8, 30],
        "energy": {"q": [0.5, 0.3, 0.15, 0.05], "up": [0.7, 0.1, 0.1, 0.1]},
    }
    rows = tables.energy_table([event])
    assert [r.block for r in rows] == ["1", "2–8", "9–30", "31 and beyond"]
    assert [r.share for r in rows] == pytest.approx([60, 20, 12.5, 7.5])
    kept = tables.kept_table([event])
    assert [r.rank for r in kept] == [1, 8, 30]
    assert [r.mean for r in kept] == pytest.approx([60, 80, 92.5])
    assert [r.lowest for r in kept] == pytest.approx([50, 80, 90])
    assert [r.highest for r in kept] == pytest.approx([70, 80, 95])
    assert tables.spectrum_table([event]) == []


def test_spectra_stand_by_module_and_then_by_round(make_journal: Make):
    rows = tables.spectrum_table(make_journal(rounds=3))
    modules = ["model.layers.1.attn.q_proj"] * 3 + ["model.layers.1.mlp.up"] * 3
    assert [(r.module, r.round) for r in rows] == list(zip(modules, [1, 2, 3] * 2, strict=True))


def test_categories_are_sorted_by_gain_and_leave_out_what_one_side_lacks():
    def row(category: str, rouge: float) -> dict:
        return scored("x", False, 20, rouge, 100, 50.0) | {"category": category}

    events = [
        evaluation(0, "base", row("a", 4), row("b", 6), row("gone", 1)),
        evaluation(5, "global", row("a", 5), row("b", 12), row("new", 2)),
    ]
    found = tables.category_table(events, "unseen")
    assert [r.category for r in found] == ["b", "a"]
    assert [r.gain for r in found] == pytest.approx([30, 5])
    assert tables.category_table(events, "seen") == []
    assert tables.category_table(events[1:], "unseen") == []


def test_traffic_sums_up(make_journal: Make):
    events = make_journal()
    rows = tables.traffic_table(events)
    turns = [e for e in events if e["event"] == "client"]
    assert rows[-1].total_up == sum(t["bytes_up"] for t in turns)
    assert rows[-1].total_down == sum(t["bytes_down"] for t in turns)
    assert rows[-1].total_up > rows[-1].total_down > 0


def test_time_is_split_and_adds_up():
    event = {"event": "round", "round": 1, "seconds": 17.0, "aggregate_seconds": 5.0}
    assert tables.time_table([event]) == [tables.TimeRow(1, 12.0, 5.0)]


def test_clients_in_natural_order_with_their_lost_turns(make_journal: Make):
    events = make_journal(clients=23)
    rows = tables.client_table(events)
    names = [r.client for r in rows]
    assert names.index("client-9") < names.index("client-10")
    assert sum(r.rounds for r in rows) == sum(e["event"] == "client" for e in events)
    assert sum(r.lost for r in rows) == 2
    assert tables.loss_counts(events) == [(LossKind.NO_ANSWER, 2)]
    only_lost = tables.client_table([e for e in events if e["event"] == "lost"])
    assert {(r.rounds, r.last_loss) for r in only_lost} == {(0, None)}


def test_facts_of_a_whole_and_of_an_empty_journal(make_journal: Make):
    facts = tables.run_facts(make_journal(clients=11))
    assert (facts.method, facts.base_model, facts.seed) == ("flexlora", "tiny/llama-135m", 5)
    assert (facts.clients, facts.modules, facts.rounds_done, facts.lost) == (11, 6, 6, 2)
    assert facts.finished and facts.adapter == "runs/a/adapter"
    empty = tables.run_facts([])
    assert not empty.finished
    assert replace(empty, resumed=0).method is None
    assert tables.rank_type_table([]) == []


def test_a_resumed_run_is_told_by_its_last_start(make_journal: Make):
    events = make_journal()
    events.append(events[0] | {"resumed": True, "version": "0.2.0"})
    facts = tables.run_facts(events)
    assert (facts.version, facts.resumed) == ("0.2.0", 1)


def test_an_upload_that_was_not_needed_is_no_failure(make_journal: Make):
    events = make_journal()
    unused = {"event": "lost", "round": 2, "client": "client-0", "reason": "", "kind": "not_needed"}
    more = [*events[:-1], unused, events[-1]]
    facts, before = tables.run_facts(more), tables.run_facts(events)
    assert (facts.lost, facts.not_needed) == (before.lost, 1)
    assert tables.client_table(more) == tables.client_table(events)
    assert dict(tables.loss_counts(more)) == {LossKind.NO_ANSWER: 2, LossKind.NOT_NEEDED: 1}


def test_a_loss_without_a_kind_is_a_failure_of_another_kind():
    old = {"event": "lost", "round": 2, "client": "a", "reason": "It was not needed any more."}
    assert tables.run_facts([old]).lost == 1
    assert tables.loss_counts([old]) == [(LossKind.OTHER, 1)]
