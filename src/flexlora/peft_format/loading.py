"""What PEFT does when it loads an adapter: which tensors it drops, and which modules it adds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from flexlora.peft_format.base_model import BaseModules
from flexlora.peft_format.config import not_numbers
from flexlora.peft_format.consumers import rewrite
from flexlora.peft_format.paths import common
from flexlora.peft_format.patterns import matched
from flexlora.peft_format.reading import PeftAdapter
from flexlora.peft_format.report import Verdict
from flexlora.peft_format.whole import saved_names
from flexlora.storage.untrusted import short

_FRESH = (
    "PEFT adds new adapters there: of zero, or without values if loaded with low_cpu_mem_usage=True"
)
_TARGETS = "add them to target_modules, or remove their tensors"


@dataclass(frozen=True)
class Loading:
    """PEFT's verdict, and by module what it drops and what it adds.

    ``added`` are names in ``target_modules`` if the base model is not known, and otherwise modules.
    """

    verdict: Verdict
    dropped: tuple[str, ...] = ()
    added: tuple[str, ...] = ()


def loading(adapter: PeftAdapter, base: BaseModules | None = None) -> Loading:
    """Whether PEFT applies exactly the tensors of this adapter.

    Without ``base``, the modules of the base model, only what the files themselves show is known.
    """
    command = rewrite(adapter.directory)
    refusal = _refusal(adapter)
    if refusal:
        return Loading(Verdict("PEFT", "refuses", refusal, command))
    if base is not None:
        return _with_base(adapter, base)
    if adapter.weights.names.dropped:
        why = adapter.weights.names.dropped
        return Loading(Verdict("PEFT", "misreads", why, command), tuple(adapter.layers))
    return _by_files(adapter)


def warnings(adapter: PeftAdapter) -> list[str]:
    """Sentences about settings that have no effect on any module of the adapter."""
    found = []
    # Modules of rank 0 have no layer, but their patterns have an effect.
    modules = list(adapter.parts.pairs)
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = {pattern: pattern for pattern in getattr(adapter.settings, name) or {}}
        used = {pattern for each in matched(patterns, modules, name).values() for pattern in each}
        unused = [short(pattern) for pattern in patterns if pattern not in used]
        if unused:
            found.append(
                f"{name} has entries that match no module of the adapter, and so no effect: "
                f"{', '.join(unused)}."
            )
    layers = adapter.targets.absent_layers(modules)
    if layers:
        numbers = ", ".join(map(str, layers))
        found.append(f"layers_to_transform names layers of which there are no tensors: {numbers}.")
    return found


def notes(adapter: PeftAdapter, base: BaseModules | None) -> list[str]:
    """Sentences about what could not be judged."""
    found = []
    if base is None and adapter.targets.chosen(adapter.layers) is None:
        found.append(
            "Which modules target_modules chooses cannot be said from the files alone; give the "
            "folder of the base model with --base to see what PEFT would drop or add."
        )
    if base is not None and _fused(adapter, base):
        found.append(
            f"The base model has the experts of {len(_fused(adapter, base))} modules in fused "
            f"tensors; PEFT converts the adapter's tensors, which is not checked here."
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
    lost = [name for name in adapter.targets.saved if name not in saved_names(adapter)]
    if lost and not saved_names(adapter):
        return f"it finds no tensors of {', '.join(lost)}, which modules_to_save names"
    restricted = adapter.config.get("layers_to_transform") is not None
    if restricted and isinstance(adapter.targets.modules, str):
        return "it takes no layers_to_transform where target_modules is a regular expression"
    if adapter.targets.layers_pattern and not restricted:
        return "it takes no layers_pattern without layers_to_transform"
    return ""


def _by_files(adapter: PeftAdapter) -> Loading:
    """What the files alone show."""
    chosen = adapter.targets.chosen(adapter.layers)
    dropped = [m for m in adapter.layers if chosen is not None and m not in chosen]
    if dropped:
        return _untargeted(dropped, len(adapter.layers))
    absent = adapter.targets.absent(adapter.layers)
    if not absent:
        return Loading(Verdict("PEFT", "reads"))
    why = (
        f"target_modules names {_list(absent)}, and there are no tensors of them; if the base "
        f"model has them, {_FRESH}"
    )
    verdict = Verdict("PEFT", "misreads", why, rewrite(adapter.directory))
    return Loading(verdict, added=tuple(absent))


def _with_base(adapter: PeftAdapter, base: BaseModules) -> Loading:
    """What PEFT does with a base model whose modules are known."""
    fused = _fused(adapter, base)
    paths = {module: base.path(module) for module in adapter.layers if module not in fused}
    chosen = base.chosen(adapter.targets)
    present = {module: path for module, path in paths.items() if path in base.shapes}
    refusal = _refused_modules(adapter, base, present, chosen)
    if refusal:
        return Loading(refusal)
    by_name = not adapter.weights.names.dropped
    applied = {m for m, path in present.items() if by_name and (chosen is None or path in chosen)}
    dropped = tuple(module for module in paths if module not in applied)
    added = tuple(sorted((chosen or set()) - {paths[module] for module in applied}))
    command = rewrite(adapter.directory)
    if not by_name:
        verdict = Verdict("PEFT", "misreads", adapter.weights.names.dropped, command)
    elif len(present) < len(paths):
        missing = [module for module in paths if module not in present]
        why = (
            f"it drops the tensors of {_list(missing, len(adapter.layers))}, which the base model "
            f"does not have{_other_paths(missing, base)}"
        )
        verdict = Verdict("PEFT", "misreads", why)
    elif dropped:
        verdict = _untargeted(dropped, len(adapter.layers)).verdict
    elif added:
        why = (
            f"target_modules also chooses {_list(added, len(chosen or ()))}, of which there are no "
            f"tensors; {_FRESH}"
        )
        verdict = Verdict("PEFT", "misreads", why, command)
    else:
        why = "" if chosen is not None else "as far as target_modules is evaluated here"
        verdict = Verdict("PEFT", "reads", why)
    return Loading(verdict, dropped, added)


def _refused_modules(
    adapter: PeftAdapter,
    base: BaseModules,
    present: Mapping[str, str],
    chosen: Collection[str] | None,
) -> Verdict | None:
    """PEFT's refusal of factors of another shape, or of a chosen module that it cannot adapt."""
    for module, path in present.items():
        if base.shapes[path] not in (None, adapter.layers[module].shape):
            why = (
                f"the factors of {module} are for the shape {adapter.layers[module].shape} (out, "
                f"in), and the base model has {base.shapes[path]}"
            )
            remedy = "give the base model that the adapter was trained on"
            return Verdict("PEFT", "refuses", why, remedy)
    for module in sorted(chosen or ()):
        if base.shapes[module] is None:
            why = f"target_modules chooses {module}, whose class {base.classes[module]} it "
            return Verdict("PEFT", "refuses", f"{why}cannot adapt", rewrite(adapter.directory))
    if chosen is not None and not chosen:
        why = "target_modules chooses no module of the base model"
        return Verdict("PEFT", "refuses", why, rewrite(adapter.directory))
    return None


def _untargeted(modules: Sequence[str], count: int) -> Loading:
    why = f"it drops the tensors of {_list(modules, count)}, which target_modules does not choose"
    return Loading(Verdict("PEFT", "misreads", why, _TARGETS), tuple(modules))


def _fused(adapter: PeftAdapter, base: BaseModules) -> set[str]:
    """Modules of single experts, where the base model has them in one tensor."""
    return {
        module
        for module in adapter.layers
        if ".experts." in module and base.path(module) not in base.shapes
    }


def _other_paths(missing: Sequence[str], base: BaseModules) -> str:
    """The path of the same layer in the base model, if it has it."""
    by_key = {common(module): module for module in base.shapes}
    other = by_key.get(common(missing[0]))
    return f" (it has {other} in place of {missing[0]})" if other else ""


def _list(modules: Sequence[str], count: int = 0) -> str:
    if len(modules) <= 3:
        return ", ".join(modules)
    of = f" of {count} modules" if count else " modules"
    return f"{len(modules)}{of}, such as {modules[0]}"
