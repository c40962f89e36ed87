"""SECURITY.md and docs/trust.md: every row is there, and all that they name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECURITY, TRUST = ROOT / "SECURITY.md", ROOT / "docs" / "trust.md"
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in (SECURITY, TRUST)}

ROWS = [
    f"{letter}{n}" for letter, last in (("B", 8), ("R", 11), ("P", 3)) for n in range(1, last + 1)
]


def cells(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|") and not line.startswith("| ---")
    ]


def test_every_row_has_a_figure_and_a_target():
    rows = {row[0]: row for row in cells(TEXTS["trust.md"]) if row[0] in ROWS}
    assert [*rows] == ROWS
    assert all(len(row) == 5 and row[1] and row[2] and row[3] for row in rows.values())


@pytest.mark.parametrize("name", TEXTS)
def test_tests_and_scripts_that_are_named_exist(name):
    named = re.findall(r"`((?:tests|benchmarks)/[\w/]+\.py)(?:::(\w+))?`", TEXTS[name])
    for path, function in named:
        assert (ROOT / path).is_file(), path
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not function or f"def {function}(" in text, f"{path}::{function}"
    assert len(named) > 5 or name != "trust.md"


@pytest.mark.parametrize("name", TEXTS)
def test_targets_of_make_that_are_named_exist(name):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    lines = re.findall(r"(?:^|`)make ([a-z- ]+?)(?:`|  |$)", TEXTS[name], re.MULTILINE)
    targets = [target for line in lines for target in line.split()]
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_threat_model_is_one_page_about_everybody():
    text = TEXTS["SECURITY.md"]
    model = text[text.index("## Threat model") : text.index("## Releases")]
    assert len(model.split()) < 900
    first = [row[0].lower() for row in cells(model)]
    for who in ("server's owner", "client", "outsider", "local user", "disk"):
        assert any(who in cell for cell in first), who
    assert "not defended" in model and "not available yet" in model
