"""The finished adapter on a client's disk: what the server sent, checked, then written for PEFT.

Nothing of the server's is written as it came: the tensors are read by the library's own reader,
checked against the base model, and written anew, with a config of the client's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from flexlora import peft_format, wire
from flexlora.errors import ProtocolError
from flexlora.lowrank import Adapter, Factors, LowRankSum
from flexlora.model import Base, export
from flexlora.storage import sha256


def opened(file: Path, base: Base) -> Adapter:
    """An adapter in the wire's format, its modules read on look-up.

    Raises:
        ProtocolError: the file is no such adapter, or the adapter does not fit the base model.
    """
    adapter, header = wire.open_file(file)
    if header.get("kind") != "adapter":
        raise ProtocolError(f"The server sent {str(header.get('kind'))[:30]!r}, not an adapter.")
    shapes = base.shapes
    for module, factors in adapter.items():
        if factors.shape != shapes.get(module):
            raise ProtocolError(
                f"The server's adapter has a module {module[:80]!r} of shape {factors.shape}; in "
                f"the base model of this client it is {shapes.get(module)}."
            )
        if not (factors.B.isfinite().all() and factors.A.isfinite().all()):
            raise ProtocolError(f"The server's adapter has NaN or infinity in {module[:80]!r}.")
    return adapter


def write(
    file: Path, base: Base, target: Path, digest: object, ranks: Mapping[str, int] | None = None
) -> str:
    """Write the adapter in ``file`` to the folder ``target``; the digest of the whole adapter.

    The digest is the SHA-256 of the file of weights, which is the server's to the bit; it must be
    ``digest``, the server's own. With ``ranks`` each module's best approximation of this rank is
    written instead, and modules that are not named are left out. An adapter in the folder is
    replaced.

    Raises:
        ProtocolError: the adapter cannot be used, or the digests differ.
        AdapterError: the folder holds something else than an adapter.
    """
    adapter = opened(file, base)
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as draft:
        whole = Path(draft) / "adapter"
        export(base, adapter, whole)
        computed = sha256(whole / peft_format.WEIGHTS)
    if computed != digest:
        raise ProtocolError(
            f"The adapter that arrived has the SHA-256 {computed}, the server's has "
            f"{str(digest)[:64]!r}; install the same versions of flexlora and safetensors on both "
            "sides."
        )
    chosen = adapter if ranks is None else truncated(adapter, ranks)
    export(base, chosen, target, replace=True)
    return computed


def truncated(adapter: Adapter, ranks: Mapping[str, int]) -> Adapter:
    """The best approximation of each module at its rank; modules without a rank are left out."""
    return Adapter({m: _best(adapter[m], rank) for m, rank in ranks.items() if m in adapter})


def _best(factors: Factors, rank: int) -> Factors:
    return LowRankSum.of([(1.0, factors)]).svd(rank).factors(rank).to(factors.B.dtype)


def loading(base: str, adapter: str) -> str:
    """The Python expression that loads an adapter with PEFT."""
    return f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {adapter!r})"
