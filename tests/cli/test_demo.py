import pytest

from flexlora.cli import demo


@pytest.mark.parametrize("arm", demo.ARMS)
def test_both_arms_are_valid_and_differ_in_ranks_alone(arm):
    found = demo.experiment(arm, "folder", evaluate_base=True)
    other = demo.experiment("rank 8 everywhere", "folder", evaluate_base=True)
    assert found.model_copy(update={"ranks": other.ranks}) == other


def test_the_demo_has_the_clients_it_promises():
    from flexlora.data.corpora.procedural import FAMILIES

    found = demo.experiment("mixed ranks 8-64", "folder", evaluate_base=False)
    assert len(FAMILIES) - found.data.unseen_clients >= 24


def test_scores_are_of_the_last_evaluation_and_the_group_asked_for():
    def event(adapter, rouge):
        row = {"examples": 2, "exact_match": 1, "loss_total": 3.0, "loss_tokens": 4}
        rows = [
            {**row, "seen": True, "rouge_l": rouge},
            {**row, "seen": False, "rouge_l": 2 * rouge},
        ]
        return {"event": "evaluation", "adapter": adapter, "clients": rows}

    events = [event("base", 0.1), event("global", 0.2), event("global", 0.5)]
    assert demo.scores(events, "global", True)["rouge_l"] == pytest.approx(25)
    assert demo.scores(events, "global", False)["rouge_l"] == pytest.approx(50)
    assert demo.scores(events, "base", True)["rouge_l"] == pytest.approx(5)
