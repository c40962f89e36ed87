"""What a server sends with a request, checked before any of it is kept, trained or evaluated.

First the header alone: sizes, modules, shapes and ranks, against the base model and the owner's
limits. Then the values, one module at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from flexlora import wire
from flexlora.deployment.node.limits import Limits
from flexlora.errors import ProtocolError
from flexlora.lowrank import Adapter
from flexlora.storage.untrusted import short
from flexlora.wire import HeaderLimits, MessageHeader, ModuleShape
from flexlora.wire.validate import LARGEST_NORM

MOST_ROUNDS: Final = 99_999
"""Files of a client are named and sorted by rounds of five digits."""
MOST_PARTS: Final = 16
"""What is not trained, such as an update of the base model made of many clients' factors, may have
this many times the rank of a full matrix: some 16 to 32 times the memory of the layer itself."""
_KEPT_BYTES: Final = 4
"""Of a value on the client's disk, which is in float32."""

Shapes = Mapping[str, tuple[int, int]]
"""The shape (out, in) of every adapted module of the base model."""


@dataclass(frozen=True)
class Allowed:
    """What a download may ask of this client.

    ``ranks`` are the largest ranks that it trains, by module; modules that its owner excludes are
    not in it. ``largest_rank`` is the largest rank in the whole federation. ``trains_parts`` is set
    for a method that sends more components than are trained. ``kept`` has the bytes of the updates
    that are on the client's disk already, by their round.
    """

    shapes: Shapes
    ranks: Mapping[str, int]
    largest_rank: int
    limits: Limits
    trains_parts: bool = False
    kept: Mapping[int, int] = field(default_factory=dict)


def read(payload: bytes, kind: str, limits: Limits) -> MessageHeader:
    """The header of what the server sent, within the owner's limits.

    Raises:
        ProtocolError: it is no such message, or takes more than the owner allows.
    """
    if len(payload) > limits.message_bytes:
        raise ProtocolError(_too_large(len(payload), limits))
    header = wire.read_header(payload, HeaderLimits(kind=kind))
    if header.dense_bytes > limits.message_bytes:
        raise ProtocolError(_too_large(header.dense_bytes, limits))
    return header


def check_download(header: MessageHeader, round: int, allowed: Allowed) -> None:
    """Refuse a download by its header.

    Raises:
        ProtocolError: with the module and the value that is wrong, or the limit that is exceeded.
    """
    for section, modules in header.sections.items():
        for module, stored in modules.items():
            _check_module(section, module, stored, header.sections.get("", {}), allowed)
    _check_ranks(header, allowed)
    updates = {
        int(section.removeprefix("update ")): modules
        for section, modules in header.sections.items()
        if section.startswith("update ")
    }
    _check_rounds([*updates, *header.fields.get("base_rounds", [])], round)
    sent = {
        number: sum(s.bytes // s.dtype.itemsize * _KEPT_BYTES for s in modules.values())
        for number, modules in updates.items()
    }
    kept = sum({**allowed.kept, **sent}.values())
    if sent and kept > allowed.limits.kept_bytes:
        raise ProtocolError(
            f"The server's updates of the base model would take {_mib(kept)} on this client's "
            f"disk; its limit is {_mib(allowed.limits.kept_bytes)}. To take more, join with a "
            "larger --disk."
        )


def check_adapter(header: MessageHeader, shapes: Shapes) -> None:
    """Refuse an adapter to evaluate or to keep, by its header.

    Raises:
        ProtocolError: with the module and the value that is wrong.
    """
    if strange := header.sections.keys() - {""}:
        raise ProtocolError(f"The server's adapter has an unknown section {short(min(strange))}.")
    for module, stored in header.sections.get("", {}).items():
        if stored.shape != shapes.get(module):
            raise ProtocolError(
                f"The server's adapter has a module {short(module)} of shape {stored.shape}; in "
                f"the base model of this client it is {shapes.get(module)}."
            )
        _check_rank("The server's adapter", module, stored, shapes)


def check_values(file: Path) -> None:
    """Refuse a message with NaN, infinity or a factor of a norm beyond all use.

    Reads every tensor once, and so finds a sparse one that is not what its header says.

    Raises:
        ProtocolError: with the module.
    """
    try:
        _check_values(wire.open_file(file)[0])
    except ProtocolError as error:
        raise ProtocolError(str(error).replace(str(file), "The message")) from error


def _check_values(adapter: Adapter) -> None:
    for module, factors in adapter.items():
        for factor in (factors.B, factors.A):
            size = float(factor.double().norm())
            if not size <= LARGEST_NORM:  # NaN is not
                raise ProtocolError(
                    f"The server sends values in {short(module)} that are not finite, or whose "
                    f"norm is above {LARGEST_NORM:g}."
                )


def _check_module(
    section: str,
    module: str,
    stored: ModuleShape,
    trained: Mapping[str, ModuleShape],
    allowed: Allowed,
) -> None:
    place, shapes = f"The server's download{_named(section)}", allowed.shapes
    if module not in shapes:
        raise ProtocolError(
            f"{place} has a module {short(module)}; the base model of this client has no adapted "
            "layer of that name."
        )
    shape = shapes[module]
    if stored.shape == shape:
        if section:
            _check_rank(place, module, stored, shapes)
        return
    # A method's own values: one factor of a module, or fewer numbers in another form.
    longest, most_rank = MOST_PARTS * shape[0] * shape[1], max(allowed.largest_rank, *shape)
    is_own = max(stored.shape) <= longest and stored.rank <= most_rank
    if section.startswith("update ") or not is_own:
        raise ProtocolError(_wrong_shape(place, module, stored, shape))


def _check_ranks(header: MessageHeader, allowed: Allowed) -> None:
    """Refuse to train at more than the owner's rank, or modules that the owner excludes."""
    ranks: dict[str, Any] = dict(header.fields.get("ranks", {}))
    trained = header.sections.get("", {})
    if not ranks and not allowed.trains_parts:
        shapes = allowed.shapes
        ranks = {m: s.rank for m, s in trained.items() if s.shape == shapes.get(m)}
    for module in {**trained, **ranks}:
        if module not in allowed.shapes:
            raise ProtocolError(
                f"The server's download names a module {short(module)}; the base model of this "
                "client has no adapted layer of that name."
            )
        if module not in allowed.ranks:
            raise ProtocolError(
                f"The server requests that this client train {module!r}, which its --modules "
                "exclude."
            )
        if ranks.get(module, 0) > allowed.ranks[module]:
            raise ProtocolError(
                f"The server requests that this client train rank {ranks[module]} in {module!r}; "
                f"its limit is rank {allowed.ranks[module]}."
            )


def _check_rounds(rounds: list[int], round: int) -> None:
    if late := [number for number in rounds if not 1 <= number < round]:
        raise ProtocolError(
            f"The server's download for round {round} has updates of round {late[0]}, which is not "
            "before it."
        )


def _check_rank(place: str, module: str, stored: ModuleShape, shapes: Shapes) -> None:
    most = MOST_PARTS * min(shapes[module])
    if stored.rank > most:
        raise ProtocolError(
            f"{place} has rank {stored.rank} in {module!r}, whose layer is {shapes[module]} (out, "
            f"in); this client takes at most {most}."
        )


def _wrong_shape(place: str, module: str, stored: ModuleShape, shape: tuple[int, int]) -> str:
    return (
        f"{place} has {module!r} of shape {stored.shape} (out, in) and rank {stored.rank}, which "
        f"do not fit the layer's shape {shape}."
    )


def _named(section: str) -> str:
    return f", {section!r}," if section else ""


def _too_large(count: int, limits: Limits) -> str:
    return (
        f"The server sends what takes {_mib(count)} in memory; this client takes at most "
        f"{_mib(limits.message_bytes)} at once. To take more, join with a larger --memory."
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
