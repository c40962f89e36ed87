"""Reading a PEFT directory: first the configuration and the header, the values on look-up."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexlora.errors import AdapterError
from flexlora.lowrank import Adapter, Factors
from flexlora.peft_format.config import (
    Settings,
    config_notes,
    read_config,
    refuse_variants,
    settings_of,
)
from flexlora.peft_format.layouts import CONFIG, locate
from flexlora.peft_format.patterns import matched
from flexlora.peft_format.targets import Targets
from flexlora.peft_format.weights import Contents, Pair, Weights, contents, open_weights
from flexlora.storage.tensors import StoredTensor
from flexlora.storage.untrusted import short


@dataclass(frozen=True)
class Layer:
    """The adapter of one module as header and configuration describe it, without its values.

    ``scale`` is alpha / rank, or alpha / sqrt(rank) for rsLoRA. ``pair`` are the names of the
    factors. Of an embedding, whose weight is (vocabulary, width), the update ``B @ A`` is the
    transpose: (width, vocabulary).
    """

    A: StoredTensor
    B: StoredTensor
    alpha: float
    scale: float
    pair: Pair

    @property
    def embedding(self) -> bool:
        """Whether the module is an embedding."""
        return self.pair.embedding

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

    weights: Weights
    layers: Mapping[str, Layer]
    dtype: torch.dtype | None

    def __getitem__(self, module: str) -> Factors:
        layer, path = self.layers[module], self.weights.path
        A, B = self.weights.read(layer.pair.A, layer.pair.B)
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
    ``adapter_config.json``. ``parts`` are the names of all tensors, by what they are. ``notes``
    are sentences about what was left out or
    read leniently.
    """

    directory: Path
    adapter: Adapter
    layers: Mapping[str, Layer]
    settings: Settings
    config: dict[str, Any]
    weights: Weights
    targets: Targets
    parts: Contents
    notes: tuple[str, ...] = ()

    @property
    def base_model(self) -> str | None:
        """The name or folder of the base model, if the configuration gives one."""
        return self.settings.base_model_name_or_path

    @property
    def task_type(self) -> str | None:
        """PEFT's name of the task, such as ``CAUSAL_LM``, if the configuration gives one."""
        return self.settings.task_type

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

    ``directory`` may be the folder of a run; its last round's adapter is read.

    Raises:
        Unsupported: the adapter is not a plain ``B @ A`` for each module (DoRA, biases,
            retrained modules, initialisations that change the base model, ...).
        AdapterError: anything is missing, malformed or inconsistent, or PEFT would leave a module
            out because ``target_modules`` does not choose it.
    """
    directory = locate(Path(directory))
    refuse_variants(read_config(directory), directory / CONFIG)
    adapter = open_adapter(directory, dtype)
    refuse_dropped(adapter)
    return adapter


def refuse_dropped(adapter: PeftAdapter) -> None:
    """Refuse an adapter of which PEFT would leave a module out.

    Raises:
        AdapterError: ``target_modules`` does not choose a module that has tensors.
    """
    chosen = adapter.targets.chosen(adapter.layers)
    for module in adapter.layers:
        if chosen is not None and module not in chosen:
            raise AdapterError(
                f"{adapter.weights.path} adapts {module!r}, which target_modules in "
                f"{adapter.directory / CONFIG} does not choose, so that PEFT would leave it out; "
                f"add it there or remove its tensors."
            )


def open_adapter(
    directory: str | os.PathLike[str], dtype: torch.dtype | None = torch.float32
) -> PeftAdapter:
    """Open an adapter as ``read`` does, but with modules that were trained as a whole.

    Whatever ``target_modules`` chooses is accepted too: see ``refuse_dropped``.

    Raises:
        Unsupported: as in ``read``, except for ``modules_to_save``.
        AdapterError: as in ``read``, except for ``target_modules``.
    """
    directory = locate(Path(directory))
    path = directory / CONFIG
    config = read_config(directory)
    refuse_variants(config, path, allowed=["modules_to_save"])
    settings, targets = settings_of(config, path), Targets.of(config, str(path))
    weights = open_weights(directory)
    parts = contents(weights, targets.saved)
    layers = _layers(parts.pairs, settings, weights, path)
    unused = [module for module in parts.pairs if module not in layers]
    return PeftAdapter(
        directory=directory,
        adapter=Adapter(StoredFactors(weights, layers, dtype)),
        layers=layers,
        settings=settings,
        config=config,
        weights=weights,
        targets=targets,
        parts=parts,
        notes=(*config_notes(config), *weights.names.notes, *_notes(parts.copies, unused)),
    )


def _notes(copies: Mapping[str, str], unused: list[str]) -> Iterator[str]:
    if copies:
        yield (
            f"The base model's own weights of {', '.join(copies)}, which PEFT saved beside the "
            f"factors, are not part of the update and are left out."
        )
    if unused:
        yield (
            f"rank_pattern gives {len(unused)} modules the rank 0, such as {unused[0]}; they have "
            f"no update and are left out."
        )


def _layers(
    pairs: Mapping[str, Pair], settings: Settings, weights: Weights, path: Path
) -> dict[str, Layer]:
    """The layers by module, without those of rank 0."""
    modules = list(pairs)
    ranks = matched(settings.rank_pattern or {}, modules, f"{path}: rank_pattern")
    alphas = matched(settings.alpha_pattern or {}, modules, f"{path}: alpha_pattern")
    layers = {}
    for module, pair in pairs.items():
        A, B = weights.tensors[pair.A], weights.tensors[pair.B]
        rank = next(iter(ranks[module]), settings.r)
        if A.shape[0] != rank:
            raise AdapterError(
                f"{weights.path}: {short(pair.A)} has rank {A.shape[0]}, but {path} says {rank} "
                f"(r and rank_pattern); correct the one that is wrong."
            )
        if rank == 0:
            continue
        if rank < 0 or 0 in (B.shape[0], A.shape[1]):
            raise AdapterError(
                f"{weights.path}: the factors of {module!r} have the shapes {list(B.shape)} and "
                f"{list(A.shape)}, which are empty; save the adapter again with PEFT."
            )
        alpha = next(iter(alphas[module]), settings.lora_alpha)
        scale = alpha / (math.sqrt(rank) if settings.use_rslora else rank)
        layers[module] = Layer(A, B, alpha, scale, pair)
    if not layers:
        raise AdapterError(
            f"{weights.path} has no factors of a rank above 0; save the trained adapter again with "
            f"PEFT."
        )
    return layers
