"""Whether a base model fits into this machine, from its files' headers and sizes alone.

A server names the model. What it takes is computed before it is loaded, and before it is
downloaded where the hub says how large it is.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open

from flexlora.errors import ConfigError
from flexlora.journal import counted, size
from flexlora.model import Source, smollm2
from flexlora.storage.untrusted import short
from flexlora.training import free_bytes

_SHARE_OF_MEMORY: Final = 0.9
_BYTES: Final = {"auto": 4.0, "float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_QUANTISED_BYTES: Final = 0.6
"""Of a weight in 4 bits, with its scales."""
_SECONDS: Final = 15.0
_LARGEST_OTHER: Final = 2**29
"""Of the files of a model beside its weights; large tokenizers have some 40 MB."""


@dataclass(frozen=True)
class Weights:
    """The weights of a model: how many numbers, and the bytes to download (0: they are here)."""

    count: int
    download_bytes: int = 0


def check(source: Source) -> None:
    """Refuse a model that does not fit into memory, or whose files are not as they should be.

    Nothing is known of a model that is neither here nor on a hub that can be reached; loading it
    says so.

    Raises:
        ConfigError: with the numbers.
    """
    if source.name == smollm2.NAME:
        return
    folder = _folder(source.name)
    weights = _on_hub(source.name) if folder is None else _in_folder(source.name, folder)
    if weights is None:
        return
    each = _QUANTISED_BYTES if source.quantize == "4bit" else _BYTES[source.dtype]
    needed, free = weights.count * each, free_bytes(torch.device(source.device))
    if needed > _SHARE_OF_MEMORY * free:
        raise ConfigError(
            f"The base model {short(source.name)} has {weights.count:,} weights, which take "
            f"{size(int(needed))} in {source.dtype}; this client's device {source.device} has "
            f"{size(int(free))} free. Join a federation of a smaller model, or on another machine."
        )
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    disk = shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.exists())).free
    if weights.download_bytes > _SHARE_OF_MEMORY * disk:
        raise ConfigError(
            f"The base model {short(source.name)} takes {size(weights.download_bytes)} to "
            f"download; the disk of {cache} has {size(disk)} free. Free some space, or set HF_HOME "
            "to a folder on a larger disk."
        )


def _folder(name: str) -> Path | None:
    """The folder of a model's files on this machine, if they are here."""
    if (folder := Path(name).expanduser()).is_dir():
        return folder
    try:
        config = huggingface_hub.try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    folder = Path(config).parent if isinstance(config, str) else Path()
    return folder if isinstance(config, str) and any(folder.glob("*.safetensors")) else None


def _in_folder(name: str, folder: Path) -> Weights | None:
    """The weights in a folder's safetensors, by their headers."""
    count, largest, tensors = 0, 0, 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    shape = file.get_slice(key).get_shape()
                    tensors += 1
                    largest = max(largest, *shape, 0)
                    count += int(torch.Size(shape).numel())
        except (OSError, SafetensorError):
            return None  # loading says so
    if not tensors:
        return None
    _check_config(name, folder / "config.json", tensors, largest)
    return Weights(count)


def _check_config(name: str, path: Path, tensors: int, largest: int) -> None:
    """Refuse a config that describes a larger model than its weights: it would be made in memory.

    Raises:
        ConfigError: with the number that does not fit.
    """
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # loading says so
    for key, value in (config if isinstance(config, dict) else {}).items():
        if type(value) is not int:
            continue
        is_count = key.endswith("layers") or key in ("n_layer", "num_layers", "n_layers")
        is_side = key in ("vocab_size", "hidden_size", "intermediate_size", "n_embd", "n_inner")
        if (is_count and value > tensors) or (is_side and value > largest):
            raise ConfigError(
                f"The base model {short(name)} cannot be loaded: its config.json has {short(key)} "
                f"= {short(value)}, and its weights are {counted(tensors, 'tensor')} whose longest "
                f"side is {largest}."
            )


def _on_hub(name: str) -> Weights | None:
    """The weights of a model on the hub, as it reports them; None if it does not."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return None
    try:
        info = huggingface_hub.HfApi().model_info(name, files_metadata=True, timeout=_SECONDS)
    except (OSError, ValueError, HfHubHTTPError):
        return None
    sizes = {each.rfilename: each.size or 0 for each in info.siblings or []}
    weights = {n: s for n, s in sizes.items() if n.endswith(".safetensors") and "/" not in n}
    if not weights:
        raise ConfigError(
            f"The base model {short(name)} cannot be loaded: the hub has no safetensors of it, and "
            "other files of weights can run code."
        )
    for file, bytes_ in sizes.items():
        kind = file.rpartition(".")[2]
        if (
            "/" not in file
            and kind in ("json", "txt", "model", "jinja")
            and bytes_ > _LARGEST_OTHER
        ):
            raise ConfigError(
                f"The base model {short(name)} cannot be loaded: its {short(file)} has "
                f"{size(bytes_)}; at most {size(_LARGEST_OTHER)} are read."
            )
    total = sum(weights.values())
    reported = info.safetensors.total if info.safetensors else 0
    # A weight takes at least a byte in these formats, and mostly two.
    return Weights(max(reported, total // 4), total)
