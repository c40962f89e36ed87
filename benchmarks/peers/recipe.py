"""The common parts of a peer's client: the task from a folder, the PEFT model, padded batches.

It runs in the peers' environments and does not import flexlora. Both peers get their rows as
token ids, so that tokenising is not measured.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

IGNORED = -100
"""The label that transformers' losses leave out."""

Feature = dict[str, list[int]]


@dataclass(frozen=True)
class Work:
    """The task of every contestant.

    ``facts`` is ``work.json``: the model's folder, the hyperparameters, the rows as token ids,
    and for each round and client the rows in the order of its steps. The initial factors are in
    ``start.safetensors``, under PEFT's keys.
    """

    folder: Path
    facts: dict[str, Any]

    @property
    def clients(self) -> int:
        """The number of clients, all of which take part in every round."""
        return len(self.facts["plan"][0])

    @property
    def rounds(self) -> int:
        """The number of rounds."""
        return len(self.facts["plan"])

    def start(self) -> dict[str, Tensor]:
        """The factors before the first round."""
        return load_file(self.folder / "start.safetensors")

    def features(self, round: int, client: int) -> list[Feature]:
        """A client's rows in a round (from 0), with the loss only on the response."""
        found = []
        for row in self.facts["plan"][round][client]:
            ids, prompt = self.facts["rows"][row]["ids"], self.facts["rows"][row]["prompt"]
            labels = [IGNORED] * prompt + ids[prompt:]
            found.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
        return found


@functools.cache
def read(folder: str) -> Work:
    """The task in a folder, read once in each process."""
    path = Path(folder)
    return Work(path, json.loads((path / "work.json").read_text(encoding="utf-8")))


def adapted(work: Work) -> PeftModel:
    """The base model in float32, with LoRA on every linear layer except the head."""
    facts = work.facts
    base = transformers.AutoModelForCausalLM.from_pretrained(facts["model"], dtype=torch.float32)
    base.config.use_cache = False  # keys and values are kept for generation, else for nothing
    how = LoraConfig(
        r=facts["rank"],
        lora_alpha=facts["alpha"],
        lora_dropout=0.0,
        target_modules="all-linear",
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, how)
    assert isinstance(model, PeftModel)
    return model


def collate(features: Sequence[Feature]) -> dict[str, Tensor]:
    """A batch of rows, padded on the right to the longest of them."""
    longest = max(len(feature["input_ids"]) for feature in features)
    fills = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    return {
        name: torch.tensor([f[name] + [fill] * (longest - len(f[name])) for f in features])
        for name, fill in fills.items()
    }


def loss_tokens(features: Sequence[Feature]) -> int:
    """The number of tokens of these rows that have a loss."""
    return sum(label != IGNORED for feature in features for label in feature["labels"])


def finish(out: Path, round_seconds: Sequence[float], totals: dict[str, float]) -> None:
    """Write the result beside ``adapter.safetensors``; ``totals`` are over all rounds."""
    result = {"round_seconds": list(round_seconds), **totals}
    (out / "result.json").write_text(json.dumps(result), encoding="utf-8")
