"""What the configurations of several adapters agree on: base model, revision and task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexlora.errors import AdapterError
from flexlora.peft_format.reading import PeftAdapter
from flexlora.peft_format.weights import same_values
from flexlora.storage.untrusted import short

TASK_TYPES = tuple(
    ["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
)
"""PEFT's names of tasks, which choose the class that it wraps a model in."""


@dataclass(frozen=True)
class Agreement:
    """What the result of a merge says of its base model; None is what no adapter names.

    ``settings`` are further entries of its ``adapter_config.json``, and ``notes`` sentences about
    adapters that leave out what others name.
    """

    base_model: str | None
    task_type: str | None
    settings: dict[str, Any]
    notes: tuple[str, ...]


def agreement(
    adapters: Sequence[PeftAdapter],
    base: str | None = None,
    revision: str | None = None,
    task_type: str | None = None,
) -> Agreement:
    """What the adapters agree on; ``base``, ``revision`` and ``task_type`` decide for them.

    Raises:
        AdapterError: they differ in something that is not given, or in copies of base weights.
    """
    if task_type is not None and task_type not in TASK_TYPES:
        raise AdapterError(
            f"The task type is {short(task_type)}; give one of {', '.join(TASK_TYPES)}."
        )
    bases = {str(each.directory): each.base_model for each in adapters}
    tasks = {str(each.directory): each.task_type for each in adapters}
    revisions = {str(each.directory): each.settings.revision or "" for each in adapters}
    base_model = base or _common(bases, "name different base models", "model", "--base")
    task = task_type or _common(tasks, "have different task types", "task type", "--task-type")
    if revision is None:
        # No revision means the default one, and not one that is unknown.
        revision = _same_revision(revisions)
    _refuse_other_copies(adapters)
    return Agreement(
        base_model=base_model,
        task_type=task,
        settings={
            "revision": revision or None,
            "fan_in_fan_out": all(each.config.get("fan_in_fan_out") is True for each in adapters),
            "auto_mapping": _same_mapping(adapters),
        },
        notes=(
            *_unnamed(bases, base_model, "base model", base),
            *_unnamed(tasks, task, "task type", task_type),
        ),
    )


def _common(values: Mapping[str, str | None], differ: str, what: str, option: str) -> str | None:
    """The only value that is named, or None."""
    folders = {value: folder for folder, value in values.items() if value}
    if len(folders) > 1:
        shown = ", ".join(f"{folder}: {short(value)}" for value, folder in folders.items())
        raise AdapterError(
            f"The adapters {differ} ({shown}); if they belong to the same {what}, give it with "
            f"{option}."
        )
    return next(iter(folders), None)


def _same_revision(values: Mapping[str, str]) -> str:
    folders = {value: folder for folder, value in values.items()}
    if len(folders) > 1:
        shown = ", ".join(
            f"{folder}: {short(value) if value else 'none'}" for value, folder in folders.items()
        )
        raise AdapterError(
            f"The adapters name different revisions of the base model ({shown}); if these have the "
            f"same weights, give one with --revision."
        )
    return next(iter(folders))


def _unnamed(
    values: Mapping[str, str | None], value: str | None, what: str, given: str | None
) -> list[str]:
    """A sentence if only some of the adapters name a value that the result takes over."""
    missing = [folder for folder, named in values.items() if not named]
    if not value or not missing or given:
        return []
    return [
        f"{len(missing)} of {len(values)} adapters name no {what}, such as {missing[0]}; the "
        f"result has the one of the others, {short(value)}."
    ]


def _same_mapping(adapters: Sequence[PeftAdapter]) -> Any:
    """The class that ``AutoPeftModel`` loads, if it is the same and one of transformers."""
    first = adapters[0].config.get("auto_mapping")
    if any(each.config.get("auto_mapping") != first for each in adapters):
        return None
    # PEFT imports this module by its name, so that an untrusted one would run.
    library = first.get("parent_library") if isinstance(first, dict) else None
    known = isinstance(library, str) and f"{library}.".startswith("transformers.")
    return first if known else None


def _refuse_other_copies(adapters: Sequence[PeftAdapter]) -> None:
    """Refuse base weights saved beside the factors that differ: the base models differ too."""
    first: dict[str, PeftAdapter] = {}
    for adapter in adapters:
        for module, name in adapter.parts.copies.items():
            other = first.setdefault(module, adapter)
            if other is adapter:
                continue
            (one,) = other.weights.read(other.parts.copies[module])
            (two,) = adapter.weights.read(name)
            if not same_values(one, two):
                raise AdapterError(
                    f"{other.directory} and {adapter.directory} contain different base weights of "
                    f"{module!r}, so that their base models differ; merge only adapters of the "
                    f"same base model."
                )
