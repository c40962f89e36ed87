"""The adapters of jobs on the disk: each in a PEFT directory, with a record of its training."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from flexlora import peft_format
from flexlora.data import TokenStore
from flexlora.errors import AdapterError
from flexlora.lowrank import Adapter
from flexlora.model import Base, export
from flexlora.storage import DamagedFile, read_sealed, sha256, sync_folder, write_sealed
from flexlora.training.job import Job

RECORD: Final = "job.json"
"""The file in the folder of an adapter that says which job it is of, and how its training went."""

SUMMARY: Final = "summary.json"
"""The file in the folder of all that has the results of the jobs."""

FORMAT: Final = 1
"""Raised whenever records change."""

_WITHOUT_EFFECT: Final = ("pack_tokens", "recompute_above", "round_decay")
"""Keys of ``training`` that change results by rounding only, or not at all."""

_FILES: Final = (peft_format.CONFIG, peft_format.WEIGHTS)
_SAMPLED: Final = 64


@dataclass(frozen=True, eq=False)
class JobResult:
    """The trained adapter of a job, and how its training went.

    ``adapter`` has the LoRA scale folded into ``B``; with a ``path``, which is its PEFT directory,
    it is read from there module by module. ``losses`` are the mean losses of the steps, in nats
    per token with a loss, and ``loss`` is that of the whole training. ``tokens`` counts those of
    the examples, in every epoch. ``seconds`` is the job's share of the elapsed time.
    ``is_new`` is false if the adapter was there before this call. If the training failed, as its
    loss was no longer finite, ``failure`` says why and ``adapter`` is None. ``notices`` are
    sentences about the model and rows that are not learnt as they are.
    """

    name: str
    adapter: Adapter | None = field(repr=False)
    path: Path | None
    steps: int
    examples: int
    tokens: int
    loss: float
    losses: Sequence[float]
    seconds: float
    is_new: bool = True
    failure: str | None = None
    notices: tuple[str, ...] = ()


_FACTS: Final = ("steps", "examples", "tokens", "loss", "losses", "seconds")
"""The fields of a result that its record has."""


def identity(job: Job, weights: str, ranks: Mapping[str, int], store: TokenStore) -> dict[str, Any]:
    """All that decides what a job trains, as JSON has it.

    ``weights`` is ``sampled_weights`` of the base. The rows count as their tokens.
    """
    training = {k: v for k, v in asdict(job.training).items() if k not in _WITHOUT_EFFECT}
    tokens = hashlib.blake2b(digest_size=16)
    for array in (store.ids, store.offsets, store.prompt_tokens):
        tokens.update(np.ascontiguousarray(array).tobytes())
    modules = hashlib.blake2b(repr(sorted(ranks.items())).encode(), digest_size=16)
    return {
        "base_model": weights,
        "modules_and_ranks": modules.hexdigest(),
        "training": training,
        "seed": job.seed,
        "rows": tokens.hexdigest(),
    }


def sampled_weights(base: Base) -> str:
    """A hash of some values of every weight of a model: of another model it is another one."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in base.model.named_parameters():
        flat = weight.detach().flatten()
        some = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].contiguous().cpu()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def refuse_others(folder: Path) -> None:
    """Refuse the folder of a job that holds something else than the adapter of one.

    Raises:
        AdapterError: it does, or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"{folder} is a file; give another folder for the adapters.")
    if folder.is_dir() and not (folder / RECORD).is_file() and any(folder.iterdir()):
        raise AdapterError(
            f"{folder} holds something else than the adapter of a job: it has no {RECORD}. Give "
            "another folder for the adapters, or another name for the job."
        )


def stored(folder: Path, name: str, identity: Mapping[str, Any]) -> JobResult | None:
    """The result of a job that has been trained before; None if it has not.

    Raises:
        AdapterError: the folder holds another adapter, or one of other settings or rows.
        DamagedFile: a file of it is not as it was written.
    """
    refuse_others(folder)
    if not (folder / RECORD).is_file():
        return None
    remedy = "remove the folder to train the job again"
    record = read_sealed(folder / RECORD, remedy)
    if record.get("format") != FORMAT:
        raise AdapterError(
            f"{folder / RECORD} was written by another version of flexlora; remove the folder to "
            "train the job again, or give another folder for the adapters."
        )
    if keys := list(_differing(record["identity"], identity)):
        raise AdapterError(
            f"{folder} holds the adapter of another job {name!r} (it differs in "
            f"{', '.join(keys)}); give another folder for the adapters or another name for the "
            "job, or remove this folder to train the job again."
        )
    for file, digest in record["files"].items():
        path = folder / file
        if not path.is_file() or sha256(path) != digest:
            raise DamagedFile(path, "is not as it was written", remedy)
    facts = {key: record["result"][key] for key in _FACTS}
    return JobResult(name, peft_format.read(folder).adapter, folder, **facts, is_new=False)


def write(
    result: JobResult, folder: Path, base: Base, identity: Mapping[str, Any], version: str
) -> None:
    """Write the adapter of a result as a PEFT directory with its record, whole or not at all.

    Raises:
        AdapterError: the adapter cannot be written.
    """
    assert result.adapter is not None
    partial = folder.with_name(f".{folder.name}.partial")
    # What writers that were killed have left.
    for draft in (partial, *folder.parent.glob(f".{partial.name}.*.partial")):
        shutil.rmtree(draft, ignore_errors=True)
    try:
        export(base, result.adapter, partial)
        record = {
            "format": FORMAT,
            "version": version,
            "base_model": base.published,
            "identity": identity,
            "result": {key: getattr(result, key) for key in _FACTS},
            "files": {file: sha256(partial / file) for file in _FILES},
        }
        write_sealed(partial / RECORD, record)
        sync_folder(partial)
        partial.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_summary(folder: Path, results: Sequence[JobResult]) -> None:
    """Write what has become of the jobs so far."""
    facts = [key for key in _FACTS if key != "losses"]
    shown = [
        {"name": result.name, "failure": result.failure}
        | ({} if result.failure else {key: getattr(result, key) for key in facts})
        for result in results
    ]
    write_sealed(folder / SUMMARY, {"format": FORMAT, "jobs": shown})


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any], place: str = "") -> list[str]:
    """The dotted keys of the values that differ."""
    keys = []
    for key in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(key), theirs.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping) and key == "training":
            keys += _differing(one, other, f"{key}.")
        elif one != other:
            keys.append(f"{place}{key}")
    return keys
