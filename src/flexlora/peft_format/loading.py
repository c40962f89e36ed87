"""What PEFT does when it loads an adapter: which tensors it drops, and which modules it adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexlora.peft_format.base_model import BaseModules
from flexlora.peft_format.config import not_numbers
from flexlora.peft_format.consumers import rewrite
from flexlora.peft_format.paths import common
from flexlora.peft_format.patterns import matched
from flexlora.peft_format.reading import PeftAdapter
from flexlora.peft_format.report import Verdict
from flexlora.storage.untrusted import short

_FRESH = (
    "PEFT adds new adapters there: of zero, or without values if loaded with low_cpu_mem_usage=True"
)


def verdict(adapter: PeftAdapter, base: BaseModules | None = None) -> Verdict:
    """Whether PEFT applies exactly the tensors of this adapter.

    Without ``base``, the modules of the base model, only what the files themselves show is known.
    """
    command = rewrite(adapter.directory)
    refusal = _refusal(adapter)
    if refusal:
        return Verdict("PEFT", "refuses", refusal, command)
    if adapter.weights.names.dropped:
        return Verdict("PEFT", "misreads", adapter.weights.names.dropped, command)
    if base is not None:
        return _with_base(adapter, base)
    chosen = adapter.targets.chosen(adapter.layers)
    dropped = [m for m in adapter.layers if chosen is not None and m not in chosen]
    if dropped:
        return Verdict(
            "PEFT",
            "misreads",
            f"it drops the tensors of {_list(dropped, len(adapter.layers))}, which target_modules "
            f"does not choose",
            "add them to target_modules, or remove their tensors",
        )
    absent = adapter.targets.absent(adapter.layers)
    if absent:
        return Verdict(
            "PEFT",
            "misreads",
            f"target_modules names {', '.join(absent)}, and there are no tensors of them; if the "
            f"base model has them, {_FRESH}",
            command,
        )
    return Verdict("PEFT", "reads")


def warnings(adapter: PeftAdapter) -> list[str]:
    """Settings that have no effect on any module of the adapter."""
    found = []
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = {pattern: pattern for pattern in getattr(adapter.settings, name) or {}}
        matches = matched(patterns, list(adapter.layers), name)
        used = {pattern for each in matches.values() for pattern in each}
        unused = [short(pattern) for pattern in patterns if pattern not in used]
        if unused:
            found.append(f"{name} has entries that match no module: {', '.join(unused)}.")
    layers = adapter.targets.absent_layers(adapter.layers)
    if layers:
        numbers = ", ".join(map(str, layers))
        found.append(f"layers_to_transform names layers without tensors: {numbers}.")
    return found


def notes(adapter: PeftAdapter, base: BaseModules | None) -> list[str]:
    """What could not be judged."""
    found = []
    if base is None and adapter.targets.chosen(adapter.layers) is None:
        found.append(
            "Which modules target_modules chooses depends on the base model; give its folder with "
            "--base to check that."
        )
    if base is not None and _fused(adapter, base):
        found.append(
            f"The base model has the experts of {len(_fused(adapter, base))} modules fused; PEFT "
            f"converts their tensors, which is not checked here."
        )
    return found


def _refusal(adapter: PeftAdapter) -> str:
    if adapter.weights.sharded:
        return "it looks for one adapter_model.safetensors, and this adapter is in shards"
    texts = not_numbers(adapter.config)
    if texts:
        return f"it takes only numbers for {', '.join(texts)}"
    if 0 in (adapter.settings.rank_pattern or {}).values():
        return "it takes no rank of 0, which rank_pattern gives"
    return ""


def _with_base(adapter: PeftAdapter, base: BaseModules) -> Verdict:
    """The verdict for a base model whose modules are known."""
    command = rewrite(adapter.directory)
    fused = _fused(adapter, base)
    modules = [module for module in adapter.layers if module not in fused]
    missing = [module for module in modules if module not in base.shapes]
    if missing:
        return Verdict(
            "PEFT",
            "misreads",
            f"it drops the tensors of {_list(missing, len(adapter.layers))}, which the base model "
            f"does not have{_other_paths(missing, base)}",
        )
    wrong = [
        module
        for module in modules
        if base.shapes[module] not in (None, adapter.layers[module].shape)
    ]
    if wrong:
        return Verdict(
            "PEFT",
            "refuses",
            f"the factors of {wrong[0]} are for the shape {adapter.layers[wrong[0]].shape} (out, "
            f"in), and the base model has {base.shapes[wrong[0]]}",
            "give the base model that the adapter was trained on",
        )
    chosen = base.chosen(adapter.targets)
    if chosen is None:
        return Verdict("PEFT", "reads", "as far as target_modules can be evaluated")
    dropped = [module for module in modules if module not in chosen]
    if dropped:
        return Verdict(
            "PEFT",
            "misreads",
            f"it drops the tensors of {_list(dropped, len(adapter.layers))}, which target_modules "
            f"does not choose",
            "add them to target_modules, or remove their tensors",
        )
    added = sorted(chosen - set(modules))
    unsupported = [module for module in added if base.shapes[module] is None]
    if unsupported:
        return Verdict(
            "PEFT",
            "refuses",
            f"target_modules also chooses {unsupported[0]}, whose class "
            f"{base.classes[unsupported[0]]} it cannot adapt",
            command,
        )
    if added:
        return Verdict(
            "PEFT",
            "misreads",
            f"target_modules also chooses {_list(added, len(chosen))}, of which there are no "
            f"tensors; {_FRESH}",
            command,
        )
    return Verdict("PEFT", "reads")


def _fused(adapter: PeftAdapter, base: BaseModules) -> set[str]:
    """Modules of single experts, where the base model has them in one tensor."""
    return {
        module for module in adapter.layers if ".experts." in module and module not in base.shapes
    }


def _other_paths(missing: Sequence[str], base: BaseModules) -> str:
    """The paths of the same layers in the base model, if it has them."""
    by_key: Mapping[str, str] = {common(module): module for module in base.shapes}
    other = by_key.get(common(missing[0]))
    return f" (it has {other} in place of {missing[0]})" if other else ""


def _list(modules: Sequence[str], count: int) -> str:
    if len(modules) <= 3:
        return ", ".join(modules)
    return f"{len(modules)} of {count} modules, such as {modules[0]}"
