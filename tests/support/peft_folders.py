"""PEFT adapter folders as other programs leave them, made without PEFT and without ``write``."""

import json

import numpy as np
import torch
from safetensors.torch import save_file

from flexlora.lowrank.factors import Factors
from flexlora.peft_format import CONFIG, WEIGHTS, read

Q0 = "model.layers.0.self_attn.q_proj"
V0 = "model.layers.0.self_attn.v_proj"
Q1 = "model.layers.1.self_attn.q_proj"
D1 = "model.layers.1.mlp.down_proj"
HIDDEN, WIDE, VALUES = 12, 20, 4


def matrix(rows, columns, seed):
    values = np.random.default_rng(seed).normal(size=(rows, columns))
    return torch.tensor(values, dtype=torch.float32)


def factors(out, width, rank, seed):
    return Factors(matrix(out, rank, seed), matrix(rank, width, seed + 100))


def key(module, half):
    return f"base_model.model.{module}.lora_{half}.weight"


def tensors_of(ranks):
    """A and B of a (11, 7) layer for each module, as stored."""
    tensors = {}
    for seed, (module, rank) in enumerate(ranks.items()):
        tensors[key(module, "A")] = matrix(rank, 7, 10 + seed)
        tensors[key(module, "B")] = matrix(11, rank, 20 + seed)
    return tensors


def store(folder, tensors=None, **config):
    """An adapter directory made without PEFT and without `write`."""
    folder.mkdir(exist_ok=True, parents=True)
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
    merged = {name: value for name, value in (plain | config).items() if value != "absent"}
    (folder / CONFIG).write_text(json.dumps(merged))
    save_file(tensors_of({Q0: 2, Q1: 2}) if tensors is None else tensors, folder / WEIGHTS)
    return folder


def outcome(folder):
    """None if the adapter can be read through, or the sentence of its refusal."""
    try:
        read(folder).loaded()
    except ValueError as error:
        return str(error)
    return None
