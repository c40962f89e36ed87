"""One adapter to train: its rows, its modules and their ranks, and the settings of its training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from flexlora import peft_format
from flexlora.data import SELECTABLE, Columns, Corpus, check_name, fields_of, template_text
from flexlora.data.corpora import objects, table
from flexlora.errors import ConfigError, DataError
from flexlora.lowrank import Adapter, Factors
from flexlora.model import Base
from flexlora.seeds import rng
from flexlora.training.optimizer import Training

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHOWN: Final = 8


@dataclass(frozen=True, eq=False)
class Job:
    """One adapter to train on a base model.

    ``name`` is the name of the folder that the adapter is written to. ``rows`` are a file's path,
    a list of dicts, a table of pandas, Polars, PyArrow or datasets, or a ``Corpus``; ``columns``
    names their columns. Where they have a column ``split`` only the rows ``train`` are used, and
    with ``where`` only those of a client or a category: ``{"client": "north"}``.

    ``rank`` is the rank of every module, except of those that a pattern of ``rank_pattern``
    matches, as in PEFT: ``{"down_proj": 16}``. ``targets`` are names of modules, each of which
    stands for those whose path it is or ends, or a regular expression for whole paths; None
    stands for every linear layer except the head. ``training`` has the optimiser, its learning
    rate, the steps and the LoRA scale. ``seed`` decides the order of the rows and the first
    factors, which do not depend on the name. ``prompt`` and ``max_tokens`` are as in a config's
    section ``data``.

    Raises:
        ConfigError: a value cannot be used.
    """

    name: str
    rows: Any
    rank: int = 8
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    targets: Sequence[str] | str | None = None
    training: Training = field(default_factory=Training)
    seed: int = 0
    prompt: str = "alpaca"
    max_tokens: int = 512
    columns: Columns = field(default_factory=Columns)
    where: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"A job's name is {self.name!r:.120}; it is the name of a folder: give at most 100 "
                "letters, digits and . _ - that begin with a letter or a digit."
            )
        for key, (fits, given) in self._forms().items():
            if not fits:
                raise ConfigError(
                    f"{self.label}: {key} is {getattr(self, key)!r:.80}; give {given}."
                )
        ranks = {"rank": self.rank}
        ranks |= {f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}
        least = {**dict.fromkeys(ranks, 1), "max_tokens": 8, "seed": 0}
        for key, value in {**ranks, "max_tokens": self.max_tokens, "seed": self.seed}.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < least[key]:
                raise ConfigError(
                    f"{self.label}: {key} is {value!r:.80}; give a whole number of at least "
                    f"{least[key]}."
                )
        if self.training.round_decay != 1:
            raise ConfigError(
                f"{self.label}: training.round_decay is {self.training.round_decay}, and a job has "
                "no rounds; leave it out."
            )
        for column in self.where:
            if column not in SELECTABLE:
                raise ConfigError(
                    f"{self.label}: where names the column {column!r:.80}; give one of "
                    f"{', '.join(SELECTABLE)}."
                )
        check_name(self.template)

    def _forms(self) -> dict[str, tuple[bool, str]]:
        """Whether a field is of the right type, and what that is."""
        names = self.targets is None or isinstance(self.targets, str)
        if isinstance(self.targets, Sequence):
            names = all(isinstance(name, str) for name in self.targets)
        return {
            "training": (isinstance(self.training, Training), "flexlora.Training(...)"),
            "columns": (isinstance(self.columns, Columns), "flexlora.Columns(...)"),
            "rank_pattern": (_is_by_text(self.rank_pattern), 'a dict such as {"down_proj": 16}'),
            "where": (_is_by_text(self.where), 'a dict such as {"client": "north"}'),
            "targets": (names, 'a list of names such as ["q_proj"], or a regular expression'),
            "prompt": (isinstance(self.prompt, str), "a name, a template or its file"),
        }

    @property
    def label(self) -> str:
        """What errors call the job."""
        return f"job {self.name!r}"

    @property
    def template(self) -> str:
        """The name of the prompt format, or the text of the template."""
        return template_text(self.prompt)

    def corpus(self) -> Corpus:
        """The rows to train on.

        Raises:
            DataError: they cannot be read, or there are none.
        """
        needs, fields = list(self.where), fields_of(self.template)
        try:
            if isinstance(self.rows, str | Path):
                corpus = table.read(self.rows, self.columns, needs=needs, fields=fields)
            else:
                corpus = objects.read(self.rows, self.columns, needs=needs, fields=fields)
            if "split" in corpus.columns:
                corpus = corpus.select(corpus.keys("split") == "train")
            for column, value in self.where.items():
                corpus = _selected(corpus, column, value)
        except DataError as error:
            raise DataError(f"{self.label}: {error}") from error
        if not len(corpus):
            raise DataError(
                f"{self.label} has no rows to train on; see its where, and the column split of its "
                "rows: only those marked train are used."
            )
        return corpus

    def ranks(self, base: Base) -> dict[str, int]:
        """The rank of each module that the job trains.

        Raises:
            ConfigError: the targets or a pattern choose no module, or a rank is above the size of
                its module.
            AdapterError: a regular expression cannot be used.
        """
        modules = self._modules(base)
        place = f"{self.label}: rank_pattern"
        found = peft_format.matched(self.rank_pattern, modules, place)
        for pattern in self.rank_pattern:
            if not any(peft_format.matched({pattern: 1}, modules, place).values()):
                raise ConfigError(
                    f"{place} names {pattern!r:.120}, which no module of the job matches; its "
                    f"modules are called {_last_names(modules)}."
                )
        ranks = {module: (found[module] or [self.rank])[0] for module in modules}
        for module, rank in ranks.items():
            out, in_ = base.shapes[module]
            if rank > min(out, in_):
                raise ConfigError(
                    f"{self.label}: the rank {rank} is above {min(out, in_)}, the smaller side of "
                    f"{module} ({out} x {in_}); lower rank, or give this module a rank of its own "
                    "in rank_pattern."
                )
        return ranks

    def start(self, base: Base, ranks: Mapping[str, int]) -> Adapter:
        """The adapter before training: ``B`` zero, ``A`` LoRA's start."""
        modules = {}
        for module, rank in ranks.items():
            out, in_ = base.shapes[module]
            empty = Factors(torch.zeros(out, 0), torch.zeros(0, in_))
            modules[module] = empty.widened(rank, rng(self.seed, "start", module))
        return Adapter(modules)

    def _modules(self, base: Base) -> list[str]:
        """The modules that the targets choose, in the model's order."""
        modules, targets = list(base.shapes), self.targets
        if targets is None or targets == "all-linear":
            return modules
        if isinstance(targets, str):
            matching = peft_format.whole_matches(targets, modules, f"{self.label}: targets")
            absent = [] if matching else [targets]
        else:
            wanted = set(targets)
            ends = {module: set(peft_format.ends_of(module)) for module in modules}
            matching = {module for module, names in ends.items() if not wanted.isdisjoint(names)}
            absent = sorted(wanted.difference(*ends.values()), key=str)
        if absent or not matching:
            raise ConfigError(
                f"{self.label}: targets names {str(absent[0] if absent else 'nothing')[:120]!r}, "
                f"but {base.name} has no such linear layer to adapt; give a list of some of "
                f"{_last_names(modules)}, or leave it out for all."
            )
        return [module for module in modules if module in matching]


def _selected(corpus: Corpus, column: str, value: str) -> Corpus:
    """The rows that have this value in this column.

    Raises:
        DataError: there are none; names some values that there are.
    """
    codes, values = corpus.codes(column)
    if value not in values:
        others = ", ".join(repr(each) for each in values[:_SHOWN])
        more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
        raise DataError(
            f"where asks for rows whose {column} is {value!r:.120}, and there are none; there are "
            f"{others}{more}."
        )
    return corpus.select(np.asarray(codes) == values.index(value))


def _is_by_text(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _last_names(modules: Sequence[str]) -> str:
    return ", ".join(sorted({module.rpartition(".")[2] for module in modules}))
