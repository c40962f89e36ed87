"""Which base model, and how it is loaded."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import transformers

from flexlora.errors import ConfigError
from flexlora.model import proof, smollm2
from flexlora.model.base import Base
from flexlora.model.layers import attention

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Source:
    """Which base model, and its precision, device and attention.

    ``name`` is a folder, a model of the hub or ``smollm2-135m-instruct``. ``targets`` are the
    last parts of the adapted modules' paths, by default every linear layer except the head.
    ``quantize`` loads the weights in 4 bits (bitsandbytes, CUDA).
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    name: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    quantize: Literal["none", "4bit"] = "none"
    attention: str = proof.AUTO
    targets: tuple[str, ...] | None = None

    def load(self) -> Base:
        """Load the model into memory.

        Raises:
            ConfigError: the model cannot be loaded, or this machine does not support the device
                or the quantisation.
        """
        _check_device(self.device, self.quantize)
        if self.dtype not in DTYPES:
            raise ConfigError(f"model.dtype is {self.dtype!r}; give one of {', '.join(DTYPES)}.")
        path = smollm2.folder() if self.name == smollm2.NAME else self.name
        options: dict[str, Any] = {
            "dtype": getattr(torch, self.dtype),
            "attn_implementation": None
            if self.attention in (proof.AUTO, attention.NAME)
            else self.attention,
        }
        if self.quantize == "4bit":
            options["quantization_config"] = transformers.BitsAndBytesConfig(  # type: ignore[no-untyped-call]
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=options["dtype"],
            )
            options["device_map"] = {"": self.device}
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path, use_safetensors=True, **options
            )
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"The base model {self.name!r} could not be loaded: {reason} Set model.name to a "
                f"folder with config.json and safetensors, or to a model of the Hugging Face hub."
            ) from error
        if self.quantize == "none":
            model = cast(Any, model).to(self.device)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return proof.proven(model, tokenizer, self.name, self.targets, self.attention)


def _check_device(device: str, quantize: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = "none"
    if kind not in ("cpu", "cuda", "mps", "xpu"):
        raise ConfigError(f"model.device is {device!r}; give 'cpu', 'cuda' or 'cuda:0'.")
    if quantize not in ("none", "4bit"):
        raise ConfigError(f"model.quantize is {quantize!r}; give 'none' or '4bit'.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"model.device is {device!r}, but this machine has no CUDA device; set model.device "
            "to 'cpu'."
        )
    if quantize == "4bit":
        if not device.startswith("cuda"):
            raise ConfigError(
                "model.quantize is '4bit', which bitsandbytes supports only on CUDA; set "
                f"model.device to 'cuda' or model.quantize to 'none' (device is {device!r})."
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                "model.quantize is '4bit', which needs the package 'bitsandbytes'; install it "
                "with: pip install 'flexlora[gpu]'"
            )
