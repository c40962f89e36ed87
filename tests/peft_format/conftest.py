import pytest

from flexlora.lowrank.factors import Adapter
from support.peft_folders import D1, HIDDEN, Q0, V0, VALUES, WIDE, factors


@pytest.fixture
def adapter():
    return Adapter(
        {
            Q0: factors(HIDDEN, HIDDEN, 2, 1),
            V0: factors(VALUES, HIDDEN, 3, 2),
            D1: factors(HIDDEN, WIDE, 5, 3),
        }
    )
