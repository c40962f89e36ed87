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
    folder: Path,
    *,
    share: float = 0.1,
    most: int = 650,
    seed: int = 0,
    tasks: Collection[str] | None = None,
) -> Corpus:
    """One task is one client: the files ``task*.json`` of ``folder``, or those of ``tasks``.

    The client's name is the file's, without suffix; its category is the first of the
    task's ``Categories``. Of each task's instances a share is drawn at random, at least one
    and at most ``most``, in the file's order, and split 80 / 10 / 10. The defaults are those
    of the FlexLoRA paper (arXiv 2402.11505). Where an instance has several outputs only the
    first is taken. The files are in github.com/allenai/natural-instructions under ``tasks``.

    Raises:
        DataError: there is no task file, or one is not of that form.
    """
    if not 0 < share <= 1 or most < 1:
        raise DataError(
            f"A share of {share} and at most {most} instances leave nothing to read; share "
            "is in (0, 1] and most is at least 1."
        )
    columns: dict[str, list[str]] = {
        name: [] for name in ("client", "category", "instruction", "input", "output")
    }
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
            f"There are no files task*.json in '{folder}'; give the folder 'tasks' of a copy "
            "of github.com/allenai/natural-instructions."
        )
    asked = set(tasks or ())
    absent = asked - set(paths)
    if absent:
        raise DataError(
            f"'{folder}' has no file '{min(absent)}.json' ({len(absent)} of {len(asked)} "
            f"tasks asked for missing); it holds {len(paths)}, such as '{min(paths)}.json'."
        )
    return [path for name, path in paths.items() if tasks is None or name in tasks]


def _parsed(path: Path) -> dict[str, Any]:
    try:
        task: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"'{path}' is no JSON: {error}.") from error
    for key in ("Definition", "Categories", "Instances"):
        if not isinstance(task, dict) or not task.get(key):
            raise DataError(
                f"'{path}' is no task of Natural Instructions: '{key}' is missing or empty."
            )
    return task


def _definition(task: dict[str, Any], path: Path) -> str:
    definition = task["Definition"]
    parts = [definition] if isinstance(definition, str) else definition
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise DataError(f"'{path}': 'Definition' is {definition!r:.60}, no text or list of it.")
    return "\n".join(parts)


def _first_category(task: dict[str, Any], path: Path) -> str:
    categories = task["Categories"]
    first = categories[0] if isinstance(categories, list) else categories
    if not isinstance(first, str):
        raise DataError(f"'{path}': 'Categories' is {categories!r:.60}, no list of text.")
    return first


def _instances(task: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    instances = task["Instances"]
    for number, instance in enumerate(instances, 1):
        outputs = instance.get("output") if isinstance(instance, dict) else None
        first = outputs[0] if isinstance(outputs, list) and outputs else outputs
        if not isinstance(first, str) or not isinstance(instance.get("input"), str):
            raise DataError(
                f"'{path}': instance {number} needs an 'input' (text) and an 'output' (text "
                f"or a list of it), not {instance!r:.80}."
            )
    return list(instances)
