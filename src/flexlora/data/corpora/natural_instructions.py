"""Natural Instructions v2 (Wang et al. 2022, arXiv 2204.07705) from its task files."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from flexlora.data.corpus import Corpus, split_rows
from flexlora.errors import DataError
from flexlora.seeds import rng


def read(
    folder: str | Path,
    *,
    share: float = 0.1,
    most: int = 650,
    seed: int = 0,
    tasks: Collection[str] | None = None,
) -> Corpus:
    """The tasks of ``folder`` as one client each: all files ``task*.json``, or only ``tasks``.

    The client's name is the file's stem; its category is the first of the task's
    ``Categories``. From each task a random ``share`` of the instances is drawn, at least one
    and at most ``most``, in the file's order, and split 80 / 10 / 10. The defaults are those
    of the FlexLoRA paper (arXiv 2402.11505). If an instance has several outputs, only the
    first is used. The files are in github.com/allenai/natural-instructions under ``tasks``.

    Raises:
        DataError: there is no task file, or one does not have that form.
    """
    if not 0 < share <= 1 or most < 1:
        raise DataError(
            f"A share of {share} with at most {most} instances per task selects nothing; give a "
            "share in (0, 1] and at least 1 instance."
        )
    columns: dict[str, list[str]] = {
        name: [] for name in ("client", "category", "instruction", "input", "output")
    }
    folder = Path(folder)
    for path in _files(folder, tasks):
        task = _parsed(path)
        instances = _instances(task, path)
        count = max(1, min(most, round(share * len(instances))))
        draw = rng(seed, "natural-instructions", path.stem)
        for row in sorted(draw.choice(len(instances), count, replace=False).tolist()):
            text, outputs = instances[row]["input"], instances[row]["output"]
            columns["input"].append(text)
            columns["output"].append(outputs if isinstance(outputs, str) else outputs[0])
        columns["client"] += [path.stem] * count
        columns["category"] += [_first_category(task, path)] * count
        columns["instruction"] += [_definition(task, path)] * count
    return split_rows(Corpus.build(columns, f"'{folder}'"), seed)


def _files(folder: Path, tasks: Collection[str] | None) -> list[Path]:
    paths = {path.stem: path for path in sorted(folder.glob("task*.json"))}
    if not paths:
        raise DataError(
            f"There are no files task*.json in '{folder}'; set data.path to the folder 'tasks' of "
            "a copy of github.com/allenai/natural-instructions."
        )
    selected = set(tasks or ())
    absent = selected - set(paths)
    if absent:
        raise DataError(
            f"'{folder}' has no file '{min(absent)}.json' ({len(absent)} of {len(selected)} "
            f"selected tasks are missing); it has {len(paths)}, such as '{min(paths)}.json'."
        )
    return [path for name, path in paths.items() if tasks is None or name in tasks]


def _parsed(path: Path) -> dict[str, Any]:
    try:
        task: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"'{path}' is not JSON: {error}; download the file again.") from error
    for key in ("Definition", "Categories", "Instances"):
        if not isinstance(task, dict) or not task.get(key):
            raise DataError(
                f"'{path}' is not a task of Natural Instructions: '{key}' is missing or empty. "
                "Remove the file from the folder or correct it."
            )
    return task


def _definition(task: dict[str, Any], path: Path) -> str:
    definition = task["Definition"]
    parts = [definition] if isinstance(definition, str) else definition
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise DataError(
            f"'{path}': 'Definition' is {definition!r:.60}; it must be text or a list of texts."
        )
    return "\n".join(parts)


def _first_category(task: dict[str, Any], path: Path) -> str:
    categories = task["Categories"]
    first = categories[0] if isinstance(categories, list) else categories
    if not isinstance(first, str):
        raise DataError(
            f"'{path}': 'Categories' is {categories!r:.60}; it must be text or a list of texts."
        )
    return first


def _instances(task: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    instances = task["Instances"]
    for number, instance in enumerate(instances, 1):
        outputs = instance.get("output") if isinstance(instance, dict) else None
        first = outputs[0] if isinstance(outputs, list) and outputs else outputs
        if not isinstance(first, str) or not isinstance(instance.get("input"), str):
            raise DataError(
                f"'{path}': instance {number} needs an 'input' (text) and an 'output' (text "
                f"or a list of texts), not {instance!r:.80}."
            )
    return list(instances)
