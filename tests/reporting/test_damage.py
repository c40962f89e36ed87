"""The tables of damage: from outcomes to text, JSON and a page."""

import json
from pathlib import Path

from flexlora.federation.attacks import Cell, Outcome, Scores
from flexlora.reporting.damage import FILES, Damage, markdown, write


def outcome(attack, defence, loss, distance=0.5, target=None, seed=1, ranks="assigned", **end):
    cell = Cell(attack, defence, ranks, seed, Path("x"))
    if end:
        return Outcome(cell, end["state"], None, end["reason"])
    return Outcome(cell, "finished", Scores(loss, distance, target))


OUTCOMES = [
    outcome("none", "none", 2.0, None),
    outcome("none", "clip", 2.02, 0.01),
    outcome("scale", "none", None, 1e300),
    outcome("scale", "clip", 2.1, 0.1),
    outcome("backdoor", "none", 2.0, 0.2, 0.75),
    outcome("backdoor", "clip", 1.9, 0.1, 0.25),
    outcome("noise", "none", 0, state="stopped", reason="It <diverged>."),
    outcome("none", "none", 4.0, None, seed=2),
    outcome("none", "clip", 4.0, 0.03, seed=2),
    outcome("scale", "clip", 4.4, 0.3, seed=2),
]


def rows(title):
    damage = Damage(OUTCOMES, "none")
    (listing,) = [each for each in damage.listings() if each.title == title]
    assert listing.head == ["attack", "none", "clip"]
    return {row[0]: row[1:] for row in listing.rows}


def test_losses_are_relative_to_the_honest_run_of_their_seed_with_the_worst_in_brackets():
    table = rows("Held-out loss")
    assert table["none"] == ["+0.0 % (+0.0 %)", "+0.5 % (+1.0 %)"]
    assert table["scale"] == ["no number", "+7.5 % (+10.0 %)"]
    assert table["backdoor"] == ["+0.0 %", "-5.0 %"]
    assert table["noise"][0] == "stopped"


def test_distances_and_targets_stand_where_there_are_any():
    assert rows("Distance of the global adapter")["scale"] == ["1e+300", "0.2 (0.3)"]
    table = rows("Probability of the target")
    assert table["backdoor"] == ["0.75", "0.25"]
    assert set(table) == {"backdoor", "noise"}


def test_ranks_of_malicious_clients_are_rows_of_their_own():
    each = [
        outcome(attack, "none", loss, ranks=ranks)
        for ranks, attack, loss in (("small", "none", 2.0), ("small", "scale", 3.0))
    ]
    (listing, _) = Damage([*OUTCOMES[:1], *each], "none").listings()
    assert listing.rows[-1] == ["scale, small rank", "+50.0 %"]


def test_the_files_are_complete_and_escape_what_strangers_wrote(tmp_path):
    damage = Damage(OUTCOMES, "none")
    write(tmp_path / "out", damage)
    text, data, page = ((tmp_path / "out" / name).read_text() for name in FILES)
    assert text == markdown(damage) and "| scale | no number | +7.5 % (+10.0 %) |" in text
    cells = json.loads(data)["cells"]
    assert len(cells) == len(OUTCOMES)
    assert cells[3]["loss_change"] == 2.1 / 2.0 - 1 and cells[2]["loss_change"] is None
    assert "It <diverged>." in text and "It &lt;diverged&gt;." in page and "<diverged>" not in page
    assert "noise against none, seed 1: stopped" in page
