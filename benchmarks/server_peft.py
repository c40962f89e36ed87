"""PEFT's merging of adapters, as a contestant of ``server_step.py``."""

from __future__ import annotations

from collections.abc import Sequence

import peft
import torch
from server_contestants import Cuts, Weighted

from flexlora.lowrank.factors import Factors


def merged(
    model: peft.PeftModel, shares: Sequence[float], ranks: Sequence[int], dtype: torch.dtype
) -> Cuts:
    """``add_weighted_adapter`` at the largest rank with a reduced SVD, truncated to the others.

    In the float32 of its layers; ``dtype`` is ignored. PEFT's default, a full SVD, with one call
    per rank would be even slower.
    """
    names = [f"c{i}" for i in range(len(shares))]
    model.add_weighted_adapter(
        names, list(shares), "merged", "svd", svd_rank=max(ranks), svd_full_matrices=False
    )
    layer = model.base_model.model[0]
    B, A = layer.lora_B["merged"].weight.detach(), layer.lora_A["merged"].weight.detach()
    return Cuts({rank: Factors(B[:, :rank], A[:rank]) for rank in ranks}, "PEFT")


def prepared(weighted: Weighted) -> tuple[peft.PeftModel, list[float]]:
    """A model of one linear layer with every client's adapter, at a scale of 1."""
    out, in_ = weighted[0][1].shape
    model: peft.PeftModel | None = None
    for i, (_, factors) in enumerate(weighted):
        config = peft.LoraConfig(r=factors.rank, lora_alpha=factors.rank, target_modules=["0"])
        if model is None:
            base = torch.nn.Sequential(torch.nn.Linear(in_, out, bias=False))
            model = peft.get_peft_model(base, config, adapter_name="c0")
        else:
            model.add_adapter(f"c{i}", config)
        layer = model.base_model.model[0]
        layer.lora_B[f"c{i}"].weight.data = factors.B
        layer.lora_A[f"c{i}"].weight.data = factors.A
    assert model is not None
    return model, [share for share, _ in weighted]
