"""The task of every contestant: written to a folder for the peers, and run with flexlora."""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from result import data_file
from safetensors.torch import load_file, save_file

from flexlora import config, peft_format
from flexlora.data.corpora import table
from flexlora.data.corpus import Corpus
from flexlora.federation import rounds
from flexlora.federation.prepared import PreparedRun
from flexlora.federation.setup import prepare
from flexlora.lowrank.factors import Adapter, Factors
from flexlora.model import smollm2
from flexlora.seeds import rng

PREFIX = "base_model.model."
"""PEFT's prefix of a module's path."""


def experiment(options: argparse.Namespace, cache: Path) -> config.Experiment:
    """Our federation: every client in every round, nothing evaluated."""
    return config.parse(
        {
            "seed": options.seed,
            "model": {"name": "smollm2-135m-instruct"},
            "data": {
                "path": str(data_file(options.data, "sample.parquet")),
                "prompt": options.prompt,
                "max_tokens": options.max_tokens,
                "cache": str(cache),
            },
            "ranks": {"rank": options.rank},
            "method": {"name": "fedit"},
            "training": {
                "optimizer": "adamw",
                "learning_rate": 5e-4,
                "schedule": "constant",
                "clip_norm": 1.0,
                "alpha": options.alpha,
                "batch_examples": options.batch,
            },
            "federation": {"rounds": options.rounds, "cohort": options.clients},
            "evaluation": {"base": False, "seen_clients": 0, "unseen_clients": 0},
            "run": {"threads": options.threads},
        },
        "benchmarks/simulation.py",
    )


def corpus_of(options: argparse.Namespace) -> Corpus:
    """The small clients: those whose longest row is shortest, in characters.

    Each has its first training rows, as many as its steps need.

    Raises:
        ValueError: there are too few clients with that many rows.
    """
    whole = table.read(data_file(options.data, "sample.parquet"), table.Columns())
    owners, training = whole.keys("client"), whole.keys("split") == "train"
    need, found = options.steps * options.batch, []
    for client in sorted(set(owners)):
        rows = np.flatnonzero((owners == client) & training)[:need]
        if len(rows) == need:
            texts = [f"{e.instruction}{e.input}{e.output}" for e in whole.examples(rows.tolist())]
            found.append((max(map(len, texts)), client, rows))
    if len(found) < options.clients:
        raise ValueError(
            f"Only {len(found)} clients have {need} training rows; lower --clients, --steps "
            "or --batch."
        )
    found.sort(key=lambda one: one[:2])
    return whole.select(np.concatenate([rows for _, _, rows in found[: options.clients]]))


def order(ready: PreparedRun, client: str, number: int) -> list[int]:
    """A client's rows in a round (from 1), in the order in which our loop draws its steps.

    In another order the trained products would differ.
    """
    here = ready.runtime
    held = np.asarray(here.rows[client], np.int64)
    found: list[int] = rng(here.seed, "client", client, number).permutation(held).tolist()
    return found


def write(ready: PreparedRun, options: argparse.Namespace, folder: Path, clients: int) -> None:
    """Write the task for the peers (``recipe.Work``), for the first ``clients`` clients."""
    store, how = ready.runtime.store, ready.runtime.training
    ids = list(ready.clients)[:clients]
    facts = {
        "model": smollm2.folder(),
        "rank": options.rank,
        "alpha": options.alpha,
        "learning_rate": how.learning_rate,
        "clip_norm": how.clip_norm,
        "batch_examples": how.batch_examples,
        "rows": [
            {"ids": store[row].ids.tolist(), "prompt": store[row].prompt_tokens}
            for row in range(len(store))
        ],
        "plan": [
            [order(ready, id, number) for id in ids] for number in range(1, options.rounds + 1)
        ],
    }
    folder.mkdir()
    (folder / "work.json").write_text(json.dumps(facts), encoding="utf-8")
    tensors = {
        f"{PREFIX}{module}.lora_{half}.weight": getattr(factors, half).contiguous()
        for module, factors in ready.fresh().items()
        for half in ("A", "B")
    }
    save_file(tensors, folder / "start.safetensors")


def ours(options: argparse.Namespace) -> None:
    """The job of our own process: prepare, run the rounds, write the result.

    A round ends with its event; files written after it count towards the next round, or
    towards the last one.

    Raises:
        RuntimeError: a client was lost.
    """
    ready = prepare(experiment(options, options.work / "tokens"), corpus_of(options))
    events = rounds.run(ready, options.out / "run")
    next(events)  # the start; what follows is the first round
    marks = [time.perf_counter()]
    totals = dict.fromkeys(("loss_total", "loss_tokens", "tokens"), 0.0)
    for event in events:
        if event["event"] == "lost":
            raise RuntimeError(f"Client {event['client']} was lost: {event['reason']}")
        if event["event"] == "round":
            marks.append(time.perf_counter())
            totals = {name: total + event[name] for name, total in totals.items()}
    marks[-1] = time.perf_counter()
    seconds = [end - start for start, end in itertools.pairwise(marks)]
    (options.out / "result.json").write_text(
        json.dumps({"round_seconds": seconds, **totals}), encoding="utf-8"
    )


def our_adapter(options: argparse.Namespace, out: Path) -> Adapter:
    """The global adapter that ``ours`` has written."""
    folder = rounds.adapter_folder(out / "run", options.rounds)
    return peft_format.read(folder).loaded().adapter


def peer_adapter(options: argparse.Namespace, out: Path, modules: Sequence[str]) -> Adapter:
    """The global adapter of a peer, with PEFT's scale folded in."""
    stored = load_file(out / "adapter.safetensors")
    scale, found = options.alpha / options.rank, {}
    for module in modules:
        A, B = (stored[f"{PREFIX}{module}.lora_{half}.weight"] for half in ("A", "B"))
        found[module] = Factors(B * scale, A)
    return Adapter(found)
