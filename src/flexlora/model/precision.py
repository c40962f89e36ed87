"""The precision in which this machine computes a model's products fastest."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import Final

import torch

AUTO: Final = "auto"
"""The value of ``model.dtype`` that leaves the choice to the machine."""

_LEAST_SPEEDUP: Final = 1.3
"""Products must be so much faster than in float32; all else is not."""
_SIZE: Final = (512, 1024, 1024)
"""Rows, inputs and outputs of the product that is measured, as of a small language model."""
_REPEATS: Final = 5


@dataclass(frozen=True)
class Precision:
    """A data type for a model's weights and activations, and why it was chosen."""

    dtype: str
    reason: str

    @property
    def notice(self) -> str:
        """What a run says of the choice."""
        return f'model.dtype is "{AUTO}": {self.dtype}, as {self.reason}'


@cache
def fastest(kind: str) -> Precision:
    """bfloat16 where devices of this ``kind`` compute it natively and faster, else float32.

    Measured at the first call in a process, in some milliseconds. Another process on the same
    machine chooses the same, unless the two are about equally fast.
    """
    if not _native(kind):
        return Precision("float32", f"this machine's {kind} has no bfloat16 of its own")
    single, half = (_seconds(kind, dtype) for dtype in (torch.float32, torch.bfloat16))
    speedup = f"products in bfloat16 are {single / half:.1f} times as fast as in float32 here"
    return Precision("bfloat16" if single > _LEAST_SPEEDUP * half else "float32", speedup)


def _native(kind: str) -> bool:
    """Whether the hardware multiplies bfloat16 itself, and torch does not convert it."""
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if kind != "cpu":
        return False
    able = torch.cpu.get_capabilities()
    return bool(able.get("amx_bf16") or able.get("avx512_bf16") or able.get("bf16"))


def _seconds(kind: str, dtype: torch.dtype) -> float:
    """The time of a product, the fastest of several."""
    rows, inputs, outputs = _SIZE
    x = torch.ones(rows, inputs, dtype=dtype, device=kind)
    weight = torch.ones(outputs, inputs, dtype=dtype, device=kind)
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        float(torch.nn.functional.linear(x, weight)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - started)
    return min(seconds)
