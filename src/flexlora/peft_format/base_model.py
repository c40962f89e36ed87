"""The modules of a base model, from its ``config.json`` alone: no weights are read."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora.errors import AdapterError
from flexlora.peft_format.names import is_part
from flexlora.peft_format.targets import Targets
from flexlora.storage.untrusted import short

_CAUSAL = ("AutoModelForCausalLM", "AutoModelForImageTextToText")

_CLASSES = {
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq"),
    "SEQ_CLS": ("AutoModelForSequenceClassification",),
    "TOKEN_CLS": ("AutoModelForTokenClassification",),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering",),
    "FEATURE_EXTRACTION": ("AutoModel",),
}
"""The classes of transformers by PEFT's task type; of the others ``_CAUSAL``."""


@dataclass(frozen=True)
class BaseModules:
    """All modules of a base model by their paths.

    ``shapes`` is the shape (out, in) of the update that an adapter of the module has, or None for
    a module that PEFT cannot adapt; ``classes`` the name of its class. ``head`` is the path of the
    output layer, if there is one. ``renamed`` are the paths, in this model, of modules of an
    adapter that transformers has renamed since, as PEFT converts them.
    """

    shapes: Mapping[str, tuple[int, int] | None]
    classes: Mapping[str, str]
    head: str | None
    renamed: Mapping[str, str]

    def path(self, module: str) -> str:
        """The path in this model of a module of an adapter."""
        return self.renamed.get(module, module)

    def chosen(self, targets: Targets) -> set[str] | None:
        """The modules that PEFT would choose; None if its regular expression is not evaluated."""
        if targets.every_linear_layer:
            linear = ("Linear", "Conv1D")
            every = {m for m, c in self.classes.items() if c in linear and m != self.head}
            return {module for module in every if not is_part(module, targets.saved)}
        return targets.chosen([module for module in self.shapes if module])


def base_modules(
    folder: str | os.PathLike[str], modules: Collection[str], task_type: str | None = None
) -> BaseModules:
    """The modules of the model in a folder, made without memory for its weights.

    ``task_type`` is PEFT's, and says which class of the model an adapter is for; a causal language
    model by default. Of a multimodal model with two such classes, it is the one that has more of
    the adapter's ``modules``. Code in the folder is not run.

    Raises:
        AdapterError: the folder has no ``config.json``, or transformers does not know the model.
    """
    import transformers

    path = Path(folder) / "config.json"
    if not path.is_file():
        raise AdapterError(
            f"{path} is missing; give --base a folder with the base model's config.json (of a "
            f"model of the hub: hf download NAME config.json --local-dir FOLDER)."
        )
    names = _CLASSES.get(task_type or "", _CAUSAL)
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        classes = [getattr(transformers, name) for name in names]
        models = [
            _modules(each, config, modules)
            for each in classes
            if type(config) in each._model_mapping
        ]
    except Exception as error:
        # The file is foreign, and each model class of transformers fails on it in its own way.
        raise AdapterError(
            f"{path} is not the config of a model that transformers knows ({short(error)}); give "
            f"another folder, or check without --base."
        ) from error
    if not models:
        raise AdapterError(
            f"{path}: transformers has no model of the type {short(config.model_type)} for the "
            f"task {task_type or 'CAUSAL_LM'}; check without --base."
        )
    return max(models, key=lambda model: sum(model.path(each) in model.shapes for each in modules))


def _modules(auto: Any, config: Any, adapted: Collection[str]) -> BaseModules:
    """The modules of a model of this class, on the meta device."""
    import torch

    with torch.device("meta"):
        model = auto.from_config(config)
    modules = {path: module for path, module in model.named_modules() if path}
    head = model.get_output_embeddings()
    return BaseModules(
        shapes={path: _shape(module) for path, module in modules.items()},
        classes={path: type(module).__name__ for path, module in modules.items()},
        head=next((path for path, module in modules.items() if module is head), None),
        renamed=_renamed(model, [module for module in adapted if module not in modules]),
    )


def _renamed(model: Any, modules: Sequence[str]) -> dict[str, str]:
    """The present paths of modules, by transformers' own table of renamings."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    paths = {m: rename_source_key(f"{m}.weight", renamings, [])[0] for m in modules}
    return {module: path.removesuffix(".weight") for module, path in paths.items()}


def _shape(module: Any) -> tuple[int, int] | None:
    """The shape (out, in) of an adapter's ``B @ A``; None if PEFT has no LoRA for the class."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if type(module) is torch.nn.Linear:
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    if type(module) is torch.nn.Embedding:
        return module.embedding_dim, module.num_embeddings
    return None
