"""Every family of models against PEFT on the stock model, one example at a time.

The models are tiny and random; windows and chunks are shorter than the examples.
"""

import copy
import re
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flexlora import peft_format
from flexlora.data.packing import join, pack
from flexlora.evaluation import decoding, held_out_loss, padded
from flexlora.lowrank.factors import Adapter
from flexlora.model import proof
from flexlora.model.base import Base, Rows
from flexlora.model.trainable import FlatAdapter
from flexlora.training.loop import label_losses
from support import families
from support.factors import random_adapter
from support.rows import sharing_store

peft = pytest.importorskip("peft")

FAMILIES = {**families.PACKED, **families.SINGLE}
ALIKE = (
    *("arcee", "seed_oss", "ernie4_5", "hunyuan_v1_dense", "apertus", "helium", "glm", "granite"),
    *("olmo", "olmo2", "cohere", "ministral", "exaone4", "persimmon", "gpt_bigcode", "dbrx"),
    *("qwen3_moe", "olmoe", "granitemoe", "codegen", "xglm", "stablelm", "nemotron"),
    *("falcon_mamba", "zamba", "jamba", "bamba", "granitemoehybrid"),
)
"""Families whose layers are, for these tests, those of another one."""

PARAMETERS = [
    pytest.param(family, marks=pytest.mark.slow) if family in ALIKE else family
    for family in FAMILIES
]
NEW = 5
RANK = 3
CLOSE = 2e-5
"""Relative to the norm: the models are in float32 and two to six layers deep."""


@dataclass(frozen=True, eq=False)
class Family:
    """A proved base model, the same model as transformers has it, and rows for both."""

    base: Base
    stock: Any
    folder: Path
    seed: int = 0

    @cached_property
    def store(self):
        return sharing_store(families.VOCABULARY)

    @cached_property
    def adapters(self) -> list[Adapter]:
        return [random_adapter(self.base.shapes, rank, rank) for rank in (RANK, RANK - 1)]

    @cached_property
    def with_peft(self) -> list[Any]:
        """The stock model with each adapter, as PEFT loads what this library writes."""
        models = []
        for number, adapter in enumerate(self.adapters):
            peft_format.write(adapter, self.folder / str(number))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                models.append(
                    peft.PeftModel.from_pretrained(
                        copy.deepcopy(self.stock), self.folder / str(number), is_trainable=True
                    ).eval()
                )
            missing = [str(w.message) for w in caught if "adapter keys" in str(w.message)]
            # PEFT adapts 3-D experts beside linear layers of the same names, by zero.
            keys = re.findall(r"'(.*?)'", "".join(missing))
            assert all(".experts." in key for key in keys)
        return models

    def alone(self, model: Any, index: int) -> torch.Tensor:
        """The logits at one example's response, computed by itself."""
        tokens = self.store[index]
        ids = torch.from_numpy(tokens.ids.astype(np.int64))[None]
        return model(input_ids=ids, use_cache=False).logits[0, tokens.prompt_tokens - 1 : -1]

    def loss(self, model: Any, index: int) -> torch.Tensor:
        """The summed loss of one example's response."""
        labels = torch.from_numpy(self.store[index].response.astype(np.int64))
        return F.cross_entropy(self.alone(model, index), labels, reduction="sum")


@pytest.fixture(scope="module", params=PARAMETERS)
def family(request, tmp_path_factory) -> Family:
    model = families.build(request.param, FAMILIES[request.param])
    stock = copy.deepcopy(model)
    base = proof.proven(model, None, request.param)
    return Family(base, stock, tmp_path_factory.mktemp(request.param))


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert float((got - want).norm() / want.norm()) < CLOSE


def test_rows_are_packed_where_that_is_right(family):
    packed = family.base.name in families.PACKED
    assert family.base.rows is (Rows.SHARED if packed else Rows.PADDED)
    slower = [notice for notice in family.base.notices if "One example per row" in notice]
    assert len(slower) == (not packed)


def test_logits_are_those_of_each_example_alone(family):
    rows = range(len(family.store))
    row = pack(family.store, rows, share=family.base.shares_prefixes)
    with torch.no_grad():
        plain = family.base.logits(row)
        with family.base.attached(family.adapters[0]):
            adapted = family.base.logits(row)
        for index in rows:
            assert_close(plain[row.owners == index], family.alone(family.stock, index))
            want = family.alone(family.with_peft[0], index)
            assert_close(adapted[row.owners == index], want)


def test_gradients_of_two_clients_at_once_are_those_of_peft(family):
    halves = [range(4), range(4, len(family.store))]
    rows = [pack(family.store, half, share=family.base.shares_prefixes) for half in halves]
    flats = [FlatAdapter.of(each, lambda rank: 1.0, family.base.device) for each in family.adapters]
    with family.base.training(*flats):
        edges = np.cumsum([0, *(row.tokens for row in rows)]).tolist()
        label_losses(family.base, join(rows), edges).sum().backward()
    for flat, half, model in zip(flats, halves, family.with_peft, strict=True):
        model.zero_grad()
        sum(family.loss(model, index) for index in half).backward()
        for module, factors in flat.factors.items():
            layer = model.base_model.model.get_submodule(module)
            for got, linear in ((factors.A, layer.lora_A), (factors.B, layer.lora_B)):
                want = linear["default"].weight.grad
                if want is None:
                    assert not got.grad.any()
                    continue
                scale = max(float(want.norm()), 1e-3 * float(flat.values.grad.norm()))
                assert float((got.grad - want).norm()) < 10 * CLOSE * scale


def test_held_out_losses_are_those_of_each_example_alone(family):
    examples = [family.store[index] for index in range(len(family.store))]
    with family.base.attached(family.adapters[1]):
        losses = held_out_loss.losses(family.base, examples, 64)
    with torch.no_grad():
        want = [float(family.loss(family.with_peft[1], i)) for i in range(len(examples))]
    assert [loss.total for loss in losses] == pytest.approx(want, rel=1e-4)


def test_answers_are_those_of_each_prompt_alone(family):
    """The most likely token is at each place the one that the stock model has there."""
    most = getattr(family.stock.config, "max_position_embeddings", 1000) - NEW
    prompts = [family.store[index].ids for index in (0, 1, 2, 3, 4)]
    prompts = [ids for ids in prompts if len(ids) <= most]
    assert max(map(len, prompts)) > families.WINDOW
    decode = decoding.decode if family.base.decodes(20) else padded.decode
    with family.base.attached(*family.adapters):
        answers = decode(family.base, prompts, NEW, [families.VOCABULARY], 4096, 2)
    for model, own in zip(family.with_peft, answers, strict=True):
        for prompt, answer in zip(prompts, own, strict=True):
            assert len(answer) == NEW
            ids = torch.tensor([[*prompt.tolist(), *answer]])
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            chosen = logits[torch.arange(NEW), torch.tensor(answer)]
            assert (chosen >= logits.max(dim=-1).values - 1e-3).all()
