"""Every adapter of a state, and whether two states are the same."""

from collections.abc import Mapping

import torch

from flexlora.lowrank.factors import Factors
from flexlora.method.interface import State


def adapters_of(state: State) -> dict[str, Mapping[str, Factors]]:
    """The model, what is remembered beside it, and the base updates."""
    updates = {f"update {round}": each for round, each in state.merge_log.updates.items()}
    return {"model": state.model, **state.memory, **updates}


def assert_same_factors(got: Mapping[str, Factors], want: Mapping[str, Factors]) -> None:
    """The same modules in the same order, to the bit."""
    assert list(got) == list(want)
    for module, f in want.items():
        assert torch.equal(got[module].B, f.B) and torch.equal(got[module].A, f.A)


def assert_same_values(got: State, want: State) -> None:
    """The same in all that is no adapter."""
    assert got.per_module == want.per_module
    assert got.per_client == want.per_client
    assert got.merge_log.merged_until == want.merge_log.merged_until


def assert_same_state(got: State, want: State) -> None:
    """The same, to the bit."""
    assert_same_values(got, want)
    assert list(adapters_of(got)) == list(adapters_of(want))
    for name, adapter in adapters_of(want).items():
        assert_same_factors(adapters_of(got)[name], adapter)
