"""The names of an adapter's tensors: those that PEFT writes, and what wrappers add to them.

PEFT writes ``base_model.model.MODULE.lora_A.weight`` and ``lora_B``, and for an embedding
``base_model.model.MODULE.lora_embedding_A``. torch.compile, FSDP, activation checkpointing,
DDP and DeepSpeed add parts of their own, and a state dict saved from memory has the adapter's
name in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexlora.errors import AdapterError
from flexlora.peft_format.config import Unsupported
from flexlora.storage.untrusted import short

PREFIX = "base_model.model."
"""What PEFT puts before the path of every module."""

MODULE = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")

MODULE_CHARACTERS = 512

FACTOR = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>.+)\."
    r"(lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))"
)
"""The name of a factor as PEFT writes it."""

BASE_COPY = ".base_layer.weight"
"""The end of the name of a base weight that PEFT saves beside an adapted head or embedding."""

PLAIN = "merge it into its base model with PEFT, or train a plain LoRA"

_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning",
}
"""Parts that wrappers put anywhere into a name, and no model has."""

_IN_MEMORY = re.compile(
    r"(?P<start>.+\.lora_(?P<embedding>embedding_)?[AB])\.(?P<name>[^.]+)(?P<weight>\.weight)?"
)


@dataclass(frozen=True)
class Names:
    """The names in a file by those that PEFT writes.

    ``adapter`` is the adapter's name in them, if any. ``notes`` say what was added or left out.
    ``dropped`` is why PEFT itself would drop the tensors, and empty where it reads them.
    """

    stored: Mapping[str, str]
    adapter: str = ""
    notes: tuple[str, ...] = ()
    dropped: str = ""


def peft_names(names: Sequence[str], path: Path) -> Names:
    """The names under which PEFT would have saved these tensors.

    What wrappers add is taken off where that leaves no doubt.

    Raises:
        AdapterError: the names belong to several adapters, some have PEFT's prefix and some not,
            or two become the same.
    """
    plain, wrappers = {name: _without_wrappers(name) for name in names}, set()
    for name in names:
        wrappers |= {part for part in name.split(".") if part in _WRAPPERS}
    plain, outer = _without_module(plain)
    plain, prefix = _with_prefix(plain, path)
    plain, adapter = _without_adapter(plain, path)
    stored: dict[str, str] = {}
    for name, better in plain.items():
        if better in stored:
            raise AdapterError(
                f"{path}: {short(name)} and {short(stored[better])} are both {short(better)} "
                f"without what wrappers add; save the adapter again with PEFT's save_pretrained."
            )
        stored[better] = name
    dropped = [f"'{wrapper}.' of {_WRAPPERS[wrapper]}" for wrapper in sorted(wrappers)]
    dropped += [f"{short(part)}, as of DDP, DeepSpeed or Lightning" for part in outer]
    notes = [f"The tensors' names contain {what}, which is left out." for what in dropped]
    if prefix:
        dropped.append(prefix)
        notes.append(f"The tensors' names are read as if saved by PEFT: they {prefix}.")
    if adapter:
        notes.append(f"The tensors' names contain the adapter's name {short(adapter)}, left out.")
        dropped += [] if adapter == "default" else [f"the adapter's name {short(adapter)}"]
    return Names(stored, adapter, tuple(notes), _sentence(dropped))


def check_module_name(module: str, place: str = "") -> None:
    """Refuse a name that is not a module path, such as ``model.layers.0.self_attn.q_proj``.

    Raises:
        AdapterError: with ``place`` before the name.
    """
    if len(module) > MODULE_CHARACTERS or not MODULE.fullmatch(module):
        raise AdapterError(
            f"{place}{short(module)} is not a module path; use letters, digits, _ and -, joined "
            f"by dots, at most {MODULE_CHARACTERS} characters."
        )


def is_part(path: str, modules: Iterable[str]) -> bool:
    """Whether a path is one of these modules or lies in one, as PEFT's ``modules_to_save`` says."""
    return any(f".{module}." in f".{path}." for module in modules)


def unexpected(name: str, path: Path) -> AdapterError:
    """Why a tensor is refused that is neither a factor nor a copy of a base weight."""
    if "lora_magnitude_vector" in name:
        return Unsupported(f"{path}: {short(name)} belongs to DoRA, not to B @ A; {PLAIN}.")
    if "trainable_tokens_delta" in name:
        return Unsupported(
            f"{path}: {short(name)} has trained rows of an embedding (trainable_token_indices), "
            f"not B @ A; {PLAIN}."
        )
    if name.endswith(".bias"):
        return Unsupported(f"{path}: {short(name)} is a trained bias, not B @ A; {PLAIN}.")
    if name.startswith(PREFIX) and ".lora_" not in name:
        return Unsupported(
            f"{path}: {short(name)} is a whole tensor (modules_to_save, or an embedding saved "
            f"because its vocabulary was resized), not B @ A; {PLAIN}."
        )
    return AdapterError(
        f"{path}: {short(name)} is not of the form {PREFIX}MODULE.lora_A.weight (or lora_B) "
        f"that PEFT writes; save the adapter with PEFT."
    )


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _without_module(names: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The names without what stands before PEFT's prefix, and DDP's ``module.`` after it.

    Both only if every name has it.
    """
    plain, removed = dict(names), []
    starts = {name.partition(PREFIX)[0] if PREFIX in name else None for name in plain.values()}
    start = starts.pop() if len(starts) == 1 else None
    if start:
        plain = {name: better.removeprefix(start) for name, better in plain.items()}
        removed.append(start)
    for wrapper in ("module.", f"{PREFIX}module."):
        while plain and all(name.startswith(wrapper) for name in plain.values()):
            rest = wrapper.removesuffix("module.")
            plain = {name: rest + better[len(wrapper) :] for name, better in plain.items()}
            removed.append("module.")
    return plain, removed


def _with_prefix(names: Mapping[str, str], path: Path) -> tuple[dict[str, str], str]:
    """The names with PEFT's prefix once, and what was wrong with it."""
    plain, twice = dict(names), PREFIX * 2
    doubled = False
    while plain and all(name.startswith(twice) for name in plain.values()):
        plain = {name: better.removeprefix(PREFIX) for name, better in plain.items()}
        doubled = True
    if doubled:
        return plain, f"begin with {PREFIX} more than once"
    missing = [name for name, better in plain.items() if not better.startswith(PREFIX)]
    if not missing or not any(".lora_" in name for name in missing):
        return plain, ""
    if len(missing) < len(plain) or missing[0].startswith("base_model."):
        raise AdapterError(
            f"{path}: {short(missing[0])} does not begin with {PREFIX} as PEFT writes it; save the "
            f"adapter again with PEFT's save_pretrained."
        )
    return {name: PREFIX + better for name, better in plain.items()}, f"lack {PREFIX}"


def _without_adapter(names: Mapping[str, str], path: Path) -> tuple[dict[str, str], str]:
    """The names without the adapter's name, if all have the same one."""
    plain, adapters, bare = dict(names), set(), ""
    for name, better in names.items():
        match = _IN_MEMORY.fullmatch(better)
        if (
            match
            and match["name"] != "weight"
            and bool(match["weight"]) != bool(match["embedding"])
        ):
            adapters.add(match["name"])
            plain[name] = match["start"] + (match["weight"] or "")
        elif ".lora_" in better:
            bare = bare or name
    if len(adapters) > 1 or (adapters and bare):
        shown = ", ".join(short(adapter) for adapter in sorted(adapters))
        raise AdapterError(
            f"{path} contains several adapters ({shown}{' and one without a name' if bare else ''})"
            f"; save one with PEFT, save_pretrained(..., selected_adapters=[NAME])."
        )
    return plain, next(iter(adapters), "")


def _sentence(parts: Iterable[str]) -> str:
    """Why PEFT would drop the tensors, or nothing."""
    text = ", ".join(parts)
    return f"it would drop the tensors by their names ({text})" if text else ""
