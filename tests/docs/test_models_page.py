"""The lists of models in docs/models.md are those that the tests compare with PEFT."""

import re
from pathlib import Path

import pytest

from support import families

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def listed(name: str) -> set[str]:
    """The model types in the second column of the table after this mark."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    table = rest.partition("\n\n")[0].splitlines()[2:]
    return {kind for row in table for kind in re.findall(r"`(\w+)`", row.split("|")[2])}


@pytest.mark.parametrize(
    ("name", "tested"), [("packed", families.PACKED), ("single", families.SINGLE)]
)
def test_the_lists_of_models_are_those_of_the_tests(name, tested):
    assert listed(name) == {family.partition("-")[0] for family in tested}
