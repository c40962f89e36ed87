"""The upload that a client has to send, and the check of an upload's header against it.

Everything follows from what the server knows before it asks: the method's ``UploadSpec``, the
client, the round and the wire's dtype. So does the largest message that can be such an upload, to
the byte: a transport need not take more.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from flexlora.method import ModuleSpec, UploadSpec
from flexlora.storage.tensors import FLOAT_DTYPES
from flexlora.storage.untrusted import RefusalCode, short
from flexlora.wire.fields import header_text, is_count
from flexlora.wire.header import HeaderLimits, MessageHeader, ModuleShape
from flexlora.wire.refused import RefusedMessage


@dataclass(frozen=True)
class FactLimit:
    """What a fact about a client's training can be: from 0 to ``most``, whole if it counts.

    With ``per``, ``most`` is for each one of the fact of that name.
    """

    most: float
    whole: bool = True
    per: str | None = None


@dataclass(frozen=True)
class ExpectedUpload:
    """The upload that ``client`` has to send in ``round``.

    ``examples`` is the largest number of examples that it may count. The adapters must be those
    of ``spec``, every value of ``dtype``; with ``sparse`` they may travel without their zeros. Its
    facts must have exactly the names in ``facts``; None does not look at facts.
    """

    client: str
    round: int
    examples: int
    spec: UploadSpec = field(repr=False)
    dtype: torch.dtype = torch.float32
    sparse: bool = False
    facts: Mapping[str, FactLimit] | None = field(default=None, repr=False)

    @cached_property
    def limits(self) -> HeaderLimits:
        """What the header may claim; the bounds are those of the largest upload expected."""
        header, dense = _most_header_bytes(self), _most_dense_bytes(self)
        return HeaderLimits(
            kind="upload",
            dtypes=(self.dtype,),
            sparse=self.sparse,
            header_bytes=header,
            message_bytes=8 + header + dense,
            dense_bytes=dense,
        )

    @property
    def place(self) -> str:
        """How sentences name the upload."""
        return f"The upload of client {self.client!r} for round {self.round}"

    def check(self, header: MessageHeader) -> None:
        """Refuse an upload whose header is not the one expected.

        Raises:
            RefusedMessage: with the field or module that is wrong.
        """
        place, fields = self.place, header.fields
        check_origin(fields["client"], fields["round"], fields["examples"], self, place)
        _check_facts(fields["facts"], self.facts, place)
        check_modules(header.sections, self.spec, place)
        ids = fields.get("component_ids", {})
        check_components(ids, header.sections.get("", {}), self.spec.modules, place)


def most_upload_bytes(expected: ExpectedUpload) -> int:
    """The largest number of bytes that the expected upload can have, as a message."""
    most = expected.limits.message_bytes
    assert most is not None
    return most


def check_origin(
    client: str, round: int, examples: int, expected: ExpectedUpload, place: str
) -> None:
    """Refuse an upload of another client or round, or of an impossible number of examples."""
    if client != expected.client:
        raise RefusedMessage(
            RefusalCode.WRONG_CLIENT, f"{place} names client {short(client)}, round {short(round)}."
        )
    if round != expected.round:
        raise RefusedMessage(
            RefusalCode.WRONG_ROUND, f"{place} names client {short(client)}, round {short(round)}."
        )
    if not is_count(examples, 1, expected.examples):
        raise RefusedMessage(
            RefusalCode.WRONG_EXAMPLES,
            f"{place} counts {short(examples)} examples, not 1 to {expected.examples}.",
        )


def check_modules(
    sections: Mapping[str, Mapping[str, ModuleShape]], spec: UploadSpec, place: str
) -> None:
    """Refuse adapters of other sections, modules, shapes or ranks than the expected ones."""
    expected = {f"aux {name}": specs for name, specs in spec.aux.items()}
    expected = {"": spec.modules, **expected}
    # An adapter without modules leaves no trace in a message.
    _same_names({n for n in sections if sections[n]}, {n for n in expected if expected[n]}, place)
    for section, specs in expected.items():
        where = f"{place}, {section!r}" if section else place
        modules = sections.get(section, {})
        _same_names(modules.keys(), specs.keys(), where)
        for module, stored in modules.items():
            _check_module(module, stored, specs[module], where)


def _same_names(got: Collection[str], wanted: Collection[str], place: str) -> None:
    unexpected, missing = sorted(set(got) - set(wanted)), sorted(set(wanted) - set(got))
    if unexpected or missing:
        raise RefusedMessage(
            RefusalCode.UNKNOWN_TENSOR if unexpected else RefusalCode.MISSING_TENSOR,
            f"{place} lacks {short(missing[:3])} and has unexpected {short(unexpected[:3])}.",
        )


def _check_module(module: str, stored: ModuleShape, spec: ModuleSpec, place: str) -> None:
    if stored.shape != tuple(spec.shape):
        raise RefusedMessage(
            RefusalCode.WRONG_SHAPE,
            f"{place}: module {module!r} is {stored.shape} (out, in), not {tuple(spec.shape)}.",
        )
    if not spec.min_rank <= stored.rank <= spec.max_rank:
        raise RefusedMessage(
            RefusalCode.WRONG_RANK,
            f"{place}: module {module!r} has rank {stored.rank}; this client's rank is "
            f"{spec.max_rank}.",
        )


def check_components(
    ids: Mapping[str, Sequence[int]],
    modules: Mapping[str, ModuleShape],
    specs: Mapping[str, ModuleSpec],
    place: str,
) -> None:
    """Components must be numbered just where the method numbers them: distinct, in range."""
    numbered = {module for module, spec in specs.items() if spec.components is not None}
    if ids.keys() != numbered:
        raise RefusedMessage(
            RefusalCode.WRONG_COMPONENTS,
            f"{place} numbers the components of {len(ids)} modules, not of the {len(numbered)} for "
            f"which the method needs it.",
        )
    for module in sorted(numbered):
        numbers, count = ids[module], specs[module].components or 0
        in_range = all(is_count(number, 0, count - 1) for number in numbers)
        if not in_range or not len(set(numbers)) == len(numbers) == modules[module].rank:
            raise RefusedMessage(
                RefusalCode.WRONG_COMPONENTS,
                f"{place}: module {module!r} numbers its components {short(list(numbers))}, which "
                f"are not {modules[module].rank} different numbers below {count}.",
            )


def _check_facts(
    facts: Mapping[str, float], limits: Mapping[str, FactLimit] | None, place: str
) -> None:
    """Refuse facts of other names than the expected ones, or that cannot be true."""
    if limits is None:
        return
    if unknown := facts.keys() - limits.keys():
        raise RefusedMessage(
            RefusalCode.UNKNOWN_KEY, f"{place} has an unknown fact {short(min(unknown))}."
        )
    if missing := limits.keys() - facts.keys():
        raise RefusedMessage(
            RefusalCode.MISSING_KEY, f"{place} lacks the facts {short(sorted(missing))}."
        )
    for name, limit in limits.items():
        value, most = facts[name], limit.most * (facts[limit.per] if limit.per else 1)
        if (limit.whole and type(value) is not int) or not 0 <= value <= most:
            raise RefusedMessage(
                RefusalCode.IMPOSSIBLE_FACT,
                f"{place} says {name} = {short(value)}; it can be {'a whole number ' * limit.whole}"
                f"from 0 to {most:g}.",
            )


def _tensors(expected: ExpectedUpload) -> dict[str, tuple[int, int]]:
    """The shapes of all tensors of the largest upload, by their names in the message."""
    spec, tensors = expected.spec, {}
    sections = {"": spec.modules, **{f"aux {n}/": specs for n, specs in spec.aux.items()}}
    for section, specs in sections.items():
        for module, each in specs.items():
            tensors[f"{section}{module}.A"] = (each.max_rank, each.shape[1])
            tensors[f"{section}{module}.B"] = (each.shape[0], each.max_rank)
    return tensors


def _most_dense_bytes(expected: ExpectedUpload) -> int:
    size = expected.dtype.itemsize
    return sum(rows * columns * size for rows, columns in _tensors(expected).values())


def _most_header_bytes(expected: ExpectedUpload) -> int:
    """The length of the longest header that ``encode`` writes for the expected upload.

    It is as long as the names make it, some 130 bytes for a tensor: a model of 200 modules needs
    53 KB, and one of 500 gets 130 KB.
    """
    tensors, dense = _tensors(expected), _most_dense_bytes(expected)
    dtype = next(name for name, each in FLOAT_DTYPES.items() if each == expected.dtype)
    fields: dict[str, object] = {
        "kind": "upload",
        "client": expected.client,
        "round": expected.round,
        "examples": expected.examples,
        "facts": dict.fromkeys(expected.facts or {}, 0),
    }
    numbered = {m: s for m, s in expected.spec.modules.items() if s.components is not None}
    if numbered:
        fields["component_ids"] = {m: [s.components] * s.max_rank for m, s in numbered.items()}
    if expected.sparse:
        shapes = {name: list(shape) for name, shape in tensors.items()}
        fields["sparse"] = {"dtype": dtype, "shapes": shapes}
    header: dict[str, object] = {"__metadata__": {"flexlora": header_text(fields)}}
    for name, shape in tensors.items():
        # A sparse tensor has one side, of fewer digits than these two and their comma.
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [dense, dense]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return length + -length % 8
