"""One layer under two paths: the language model by itself, and within a multimodal model.

The layers of a language model are ``model.layers`` in its own class, ``layers`` without a head,
and ``model.language_model.layers`` or ``language_model.model.layers`` in multimodal classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

_PARTS = frozenset({"model", "language_model", "text_model", "transformer"})
"""Parts of paths that only say in which class the language model lies."""


_RENAMED = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head", "lm_head"),
    ("vision_tower.vision_model.", "vision_tower."),
)
"""Beginnings of paths before and after transformers 4.52, which PEFT converts in tensors' names."""


def renamed(module: str) -> str | None:
    """The path that transformers gives a module of an older multimodal model; None if the same."""
    for old, new in _RENAMED:
        if module.startswith(old):
            return new + module[len(old) :]
    return None


def common(module: str) -> str:
    """The path without the parts that depend on the class of the model."""
    parts = [part for part in module.split(".") if part not in _PARTS]
    return ".".join(parts) or module


def same_layers(
    adapters: Sequence[Collection[str]], names: Sequence[str]
) -> tuple[list[dict[str, str]], list[str]]:
    """For each adapter its modules by their path in the result, and sentences about changed paths.

    A layer has the path that the first adapter with it gives. Paths that only one adapter tells
    apart are different layers and stay as they are. ``names`` are the adapters' names, for the
    sentences.
    """
    counts = [Counter(map(common, modules)) for modules in adapters]
    different = {key for count in counts for key, number in count.items() if number > 1}
    first: dict[str, str] = {}
    results, notes = [], []
    for modules, name in zip(adapters, names, strict=True):
        paths = {
            module: module
            if common(module) in different
            else first.setdefault(common(module), module)
            for module in modules
        }
        results.append({path: module for module, path in paths.items()})
        changed = [module for module, path in paths.items() if path != module]
        if changed:
            notes.append(
                f"{len(changed)} of {len(paths)} modules of {name} are the same layers under other "
                f"paths, such as {changed[0]}, which counts and is written as {paths[changed[0]]}. "
                f"To write the other paths, name {name} first."
            )
    return results, notes
