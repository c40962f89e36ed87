"""A finished run against PEFT on the stock model, which reads one example at a time."""

import copy
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers

from flexlora import peft_format
from flexlora.data.packing import pack
from flexlora.federation.prepared import PreparedRun


@dataclass(frozen=True)
class Difference:
    """How far logits and loss are from the reference's; ``largest`` and ``scale`` are of logits."""

    largest: float
    scale: float
    loss: float
    reference_loss: float


def differences(ready: PreparedRun, folder: Path) -> tuple[Difference, Difference]:
    """Those of the base model, and of the adapter in ``folder``, on the longest rows."""
    settings = ready.experiment.model
    name = settings.attention if settings.attention in ("sdpa", "eager") else None
    stock = transformers.AutoModelForCausalLM.from_pretrained(
        settings.name, dtype=ready.base.model.dtype, attn_implementation=name
    ).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(stock), folder).eval()
    plain = _difference(ready, stock)
    with ready.base.attached(peft_format.read(folder).adapter):
        return plain, _difference(ready, adapted)


def _difference(ready: PreparedRun, reference: Any) -> Difference:
    store, base = ready.runtime.store, ready.base
    rows = sorted(range(len(store)), key=lambda row: -len(store[row]))[:4]
    row = pack(store, rows, share=base.shares_prefixes)
    with torch.no_grad():
        logits = base.logits(row).float()
        wanted = torch.cat([_alone(reference, store[index]) for index in rows])
    order = torch.argsort(row.owners, stable=True)
    logits, labels = logits[order], row.labels[order]
    return Difference(
        largest=float((logits - wanted).abs().max()),
        scale=float(wanted.abs().max()),
        loss=float(F.cross_entropy(logits, labels)),
        reference_loss=float(F.cross_entropy(wanted, labels)),
    )


def _alone(model: Any, tokens: Any) -> torch.Tensor:
    ids = torch.from_numpy(tokens.ids.astype(np.int64))[None]
    logits = model(input_ids=ids, use_cache=False).logits[0]
    return logits[tokens.prompt_tokens - 1 : -1].float()


def names(differences: Iterable[Difference]) -> str:
    """The differences as text, for people."""
    return "; ".join(f"{each.largest:.2e} of {each.scale:.3g}" for each in differences)
