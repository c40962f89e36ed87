"""Reading a PEFT directory: first the configuration and the header, the values on look-up."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexlora.errors import AdapterError
from flexlora.lowrank import Adapter, Factors
from flexlora.peft_format.config import (
    CONFIG,
    Settings,
    read_config,
    refuse_variants,
    settings_of,
)
from flexlora.peft_format.patterns import matched
from flexlora.peft_format.weights import WEIGHTS, factor_pairs, open_weights
from flexlora.storage.tensors import StoredTensor, TensorFile
from flexlora.storage.untrusted import short


@dataclass(frozen=True)
class Layer:
    """The adapter of one module as header and configuration describe it, without its values.

    ``scale`` is alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    """

    A: StoredTensor
    B: StoredTensor
    alpha: float
    scale: float

    @property
    def rank(self) -> int:
        """The rank of the stored factors."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (out, in) of the update."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def parameters(self) -> int:
        """The number of stored parameters."""
        return self.rank * sum(self.shape)


@dataclass(frozen=True, eq=False)
class StoredFactors(Mapping[str, Factors]):
    """Factors that stay in their file; each look-up reads one module and caches nothing.

    The scale is folded into ``B`` in float32, or in float64 if the stored or the requested
    dtype is float64. ``dtype`` is that of the result; None leaves it as stored.

    Raises:
        AdapterError: on look-up, a value is NaN or infinite, or the file has changed.
    """

    file: TensorFile
    layers: Mapping[str, Layer]
    dtype: torch.dtype | None

    def __getitem__(self, module: str) -> Factors:
        layer, path = self.layers[module], self.file.path
        try:
            A, B = self.file.read(layer.A.name, layer.B.name)
        except OSError as error:
            raise AdapterError(
                f"{path} can no longer be read ({error.strerror}); restore the file."
            ) from error
        for tensor, values in ((layer.A, A), (layer.B, B)):
            if not values.isfinite().all():
                raise AdapterError(
                    f"{path}: {short(tensor.name)} contains NaN or infinite values; the training "
                    f"diverged, so take an earlier checkpoint."
                )
        stored = torch.promote_types(A.dtype, B.dtype)
        dtype = self.dtype or stored
        exact = torch.promote_types(torch.promote_types(stored, dtype), torch.float32)
        factors = Factors((B.to(exact) * layer.scale).to(dtype), A.to(dtype))
        if not (factors.B.isfinite().all() and factors.A.isfinite().all()):
            raise AdapterError(
                f"{path}: {module!r} overflows {dtype} once its scale {layer.scale:g} is folded "
                f"in; read it as torch.float32 or torch.float64."
            )
        return factors

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __contains__(self, module: object) -> bool:
        return module in self.layers


@dataclass(frozen=True, eq=False)
class PeftAdapter:
    """A LoRA adapter as read from ``directory``; its ``adapter`` has the scale folded in.

    ``layers`` describes each module without its values; ``config`` is the raw
    ``adapter_config.json``.
    """

    directory: Path
    adapter: Adapter
    layers: Mapping[str, Layer]
    base_model: str | None
    task_type: str | None
    config: dict[str, Any]

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each module, from the header only."""
        return {module: layer.rank for module, layer in self.layers.items()}

    def loaded(self) -> PeftAdapter:
        """The same adapter with all values in memory, and therefore checked.

        Raises:
            AdapterError: as for a look-up in `StoredFactors`.
        """
        return dataclasses.replace(self, adapter=Adapter(dict(self.adapter)))


def read(
    directory: str | os.PathLike[str], dtype: torch.dtype | None = torch.float32
) -> PeftAdapter:
    """Open a PEFT LoRA directory; everything except the values is checked now.

    The values are read module by module on look-up and converted to ``dtype``, or left as
    stored if it is None, so that merging many adapters needs one module of each in memory.
    Costs one pass over the header. Nothing is ever unpickled.

    Raises:
        Unsupported: the adapter is not a plain ``B @ A`` for each module (DoRA, biases,
            retrained modules, initialisations that change the base model, ...).
        AdapterError: anything is missing, malformed or inconsistent.
    """
    directory = Path(directory)
    config = read_config(directory)
    refuse_variants(config, directory / CONFIG)
    settings = settings_of(config, directory / CONFIG)
    file = open_weights(directory)
    layers = _layers(factor_pairs(file), settings, directory)
    return PeftAdapter(
        directory=directory,
        adapter=Adapter(StoredFactors(file, layers, dtype)),
        layers=layers,
        base_model=settings.base_model_name_or_path,
        task_type=settings.task_type,
        config=config,
    )


def _layers(
    pairs: Mapping[str, tuple[StoredTensor, StoredTensor]], settings: Settings, directory: Path
) -> dict[str, Layer]:
    path = directory / CONFIG
    modules = list(pairs)
    _refuse_untargeted(modules, settings.target_modules, directory)
    ranks = matched(settings.rank_pattern or {}, modules, f"{path}: rank_pattern")
    alphas = matched(settings.alpha_pattern or {}, modules, f"{path}: alpha_pattern")
    layers = {}
    for module, (A, B) in pairs.items():
        rank = next(iter(ranks[module]), settings.r)
        if A.shape[0] != rank:
            raise AdapterError(
                f"{directory / WEIGHTS}: {short(A.name)} has rank {A.shape[0]}, but {path} "
                f"says {rank} (r and rank_pattern); correct the one that is wrong."
            )
        alpha = next(iter(alphas[module]), settings.lora_alpha)
        scale = alpha / (math.sqrt(rank) if settings.use_rslora else rank)
        layers[module] = Layer(A, B, alpha, scale)
    return layers


def _refuse_untargeted(
    modules: Sequence[str], targets: list[str] | str | None, directory: Path
) -> None:
    """Refuse modules that PEFT would leave out, as ``target_modules`` does not name them."""
    # The program that trained the adapter evaluated a regular expression, and the tensors
    # show what it matched. A list is cheap to check.
    if not isinstance(targets, list):
        return
    names = set(targets)
    for module in modules:
        parts = module.split(".")
        if not any(".".join(parts[start:]) in names for start in range(len(parts))):
            raise AdapterError(
                f"{directory / WEIGHTS} adapts {module!r}, which target_modules in "
                f"{directory / CONFIG} does not name, so that PEFT would leave it out; add it "
                f"there or remove its tensors."
            )
