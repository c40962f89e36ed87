"""An adapter of a base model as a PEFT directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flexlora import peft_format
from flexlora.lowrank import Factors
from flexlora.model.base import Base


def export(
    base: Base, adapter: Mapping[str, Factors], directory: Path, replace: bool = False
) -> None:
    """Write an adapter of ``base``, with which PEFT adapts exactly its modules.

    Raises:
        AdapterError: the adapter or the directory cannot be used; see ``peft_format.write``.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    peft_format.write(
        adapter,
        directory,
        base_model=base.published,
        task_type="CAUSAL_LM",
        target_modules=peft_format.targets(adapter, base.paths),
        settings={"fan_in_fan_out": base.fan_in_fan_out},
        replace=replace,
    )
