"""Which base model, and how it is loaded."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
import transformers

from flexlora.errors import ConfigError
from flexlora.model import loading, precision, proof, smollm2
from flexlora.model.base import Base
from flexlora.model.layers import attention

ATTENTIONS = (proof.AUTO, *attention.KERNELS, "flash_attention_2", "flash_attention_3")
"""The values of ``attention``: this library's, or those of transformers that rows can be packed
for."""

DTYPES = (precision.AUTO, "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Source:
    """Which base model, and its precision, device and attention.

    ``name`` is a folder, a model of the hub or ``smollm2-135m-instruct``. ``targets`` are the
    last parts of the adapted modules' paths, by default every linear layer except the head.
    ``dtype`` "auto" is bfloat16 where the device computes it natively and faster, else float32.
    ``quantize`` loads the weights in 4 bits (bitsandbytes, CUDA).
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    name: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    quantize: Literal["none", "4bit"] = "none"
    attention: str = proof.AUTO
    targets: tuple[str, ...] | None = None

    def chosen(self) -> tuple[Source, tuple[str, ...]]:
        """The same with a precision in place of "auto", and what there is to say of the choice.

        Raises:
            ConfigError: this machine does not support the device.
        """
        if self.dtype != precision.AUTO:
            return self, ()
        _check_device(self.device, self.quantize)
        fastest = precision.fastest(torch.device(self.device).type)
        return replace(self, dtype=fastest.dtype), (fastest.notice,)  # type: ignore[arg-type]

    def load(self) -> Base:
        """Load the model into memory.

        Raises:
            ConfigError: the model cannot be loaded, or this machine does not support the device
                or the quantisation.
        """
        if self.dtype == precision.AUTO:
            return self.chosen()[0].load()
        _check_device(self.device, self.quantize)
        if self.dtype not in DTYPES:
            raise ConfigError(f"model.dtype is {self.dtype!r}; give one of {', '.join(DTYPES)}.")
        if self.attention not in ATTENTIONS:
            raise ConfigError(
                f"model.attention is {self.attention!r}; give one of {', '.join(ATTENTIONS)}."
            )
        path = smollm2.folder() if self.name == smollm2.NAME else self.name
        own = self.attention in (proof.AUTO, attention.NAME)
        options: dict[str, Any] = {
            "dtype": getattr(torch, self.dtype),
            "attn_implementation": None if own else self.attention,
        }
        if self.quantize == "4bit":
            options["quantization_config"] = transformers.BitsAndBytesConfig(  # type: ignore[no-untyped-call]
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=options["dtype"],
            )
            options["device_map"] = {"": self.device}
        model, tokenizer = loading.load(self.name, path, options)
        if self.quantize == "none":
            model = cast(Any, model).to(self.device)
        return proof.proven(model, tokenizer, self.name, self.targets, self.attention)


def _check_device(device: str, quantize: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = "none"
    if kind not in ("cpu", "cuda", "mps", "xpu"):
        raise ConfigError(f"model.device is {device!r}; give 'cpu', 'cuda' or 'cuda:0'.")
    if kind in ("mps", "xpu") and not getattr(torch, kind).is_available():
        raise ConfigError(
            f"model.device is {device!r}, but this machine has no such device; set model.device to "
            "'cpu'."
        )
    if quantize not in ("none", "4bit"):
        raise ConfigError(f"model.quantize is {quantize!r}; give 'none' or '4bit'.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"model.device is {device!r}, but this machine has no CUDA device; set model.device "
            "to 'cpu'."
        )
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"model.device is {device!r}, but this machine has {torch.cuda.device_count()} CUDA "
            "devices, from 'cuda:0'; set model.device to one of them."
        )
    if quantize == "4bit":
        if not device.startswith("cuda"):
            raise ConfigError(
                "model.quantize is '4bit', which bitsandbytes supports only on CUDA; set "
                f"model.device to 'cuda' or model.quantize to 'none' (device is {device!r})."
            )
        for package in ("bitsandbytes", "accelerate"):
            if importlib.util.find_spec(package) is None:
                raise ConfigError(
                    f"model.quantize is '4bit', which needs the package {package!r}; install it "
                    "with: pip install 'flexlora[gpu]'"
                )
