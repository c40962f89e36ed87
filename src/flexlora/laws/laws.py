"""The laws that every method must obey, whatever it does.

Each law is a function of a ``Case`` that raises ``Violation`` where the method breaks it. All
sizes differ pairwise, so that no transpose can hide, and all numbers are in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flexlora.laws import aggregation, clients, messages
from flexlora.laws.case import Case
from flexlora.method import Feature


@dataclass(frozen=True)
class Law:
    """A law by name; ``applies`` says whether it means anything for a method.

    A method that a law exempts by design names it, with the reason, in ``Info.exempt``.
    """

    name: str
    statement: str
    check: Callable[[Case], None]
    applies: Callable[[Case], bool] = lambda case: True


def _has(feature: Feature) -> Callable[[Case], bool]:
    return lambda case: feature in case.method.features


def _has_global_model(case: Case) -> bool:
    return Feature.PERSONAL not in case.method.features


def _trains_factors(case: Case) -> bool:
    return not case.has_parameters_of_its_own


def _law(
    name: str, check: Callable[[Case], None], applies: Callable[[Case], bool] = lambda case: True
) -> Law:
    return Law(name, (check.__doc__ or "").partition("\n")[0], check, applies)


LAWS: tuple[Law, ...] = (
    _law("order", aggregation.order_is_irrelevant),
    _law("weights", aggregation.weights_are_relative),
    _law("fixed point", aggregation.equal_clients_are_a_fixed_point, _has_global_model),
    _law("exactness", aggregation.exactness_is_as_declared, _has_global_model),
    _law("start", clients.a_start_is_trainable),
    _law("rank bound", clients.ranks_bound_the_training, _trains_factors),
    _law("gauge", aggregation.the_gauge_is_irrelevant, _has_global_model),
    _law("purity", clients.inputs_are_not_changed),
    _law("resume", clients.a_state_survives_saving),
    _law("bytes", messages.bytes_are_parameters),
    _law("validation", messages.only_the_expected_is_accepted),
    _law(
        "missed rounds",
        clients.missed_rounds_are_made_up_for,
        lambda case: bool(case.state.merge_log.updates),
    ),
    _law("scale", aggregation.the_scale_is_folded, _trains_factors),
    _law("wire", messages.an_upload_survives_the_wire),
    _law("parts", aggregation.parts_are_the_whole, _has(Feature.PER_MODULE)),
    _law("untrained", clients.an_untrained_upload_is_known),
    _law("equal ranks", clients.equal_ranks_get_the_same, _has(Feature.SAME_FOR_EQUAL_RANKS)),
)
