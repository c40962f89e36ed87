"""Greedy decoding with shared prefixes and several adapters per batch, against ``generate``.

Prompts are rows of Natural Instructions, several from each of several clients; those of one
client share their instruction. The adapters are one update truncated to several ranks, as in
the evaluation at the end of a run. The comparison is transformers' ``generate``, one adapter
after the other on the same model, in batches padded on the left and sorted by length. Every
contestant has the same memory for keys and values.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from result import Claim, Table, data_file, finish, setting

from flexlora.data.corpora import table
from flexlora.data.encoding import Int32s
from flexlora.data.prompts import alpaca
from flexlora.evaluation import decoding, generation, padded
from flexlora.evaluation.prefix_tree import tree
from flexlora.lowrank.factors import Adapter, Factors
from flexlora.model.base import Base
from flexlora.model.source import Source
from flexlora.seeds import rng

Answers = list[list[list[int]]]
"""The ids written, by adapter and prompt, up to the stop token."""


@dataclass(frozen=True)
class Work:
    """What every contestant is given."""

    base: Base
    adapters: Sequence[Adapter]
    prompts: Sequence[Int32s]
    new: int
    room: int

    def cut(self, ids: Sequence[int]) -> list[int]:
        """An answer without what follows its first stop token."""
        stops = generation.stops(self.base)
        end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
        return list(ids[: end + 1])


def one_by_one(decode: Callable[..., Answers], work: Work) -> Answers:
    """One adapter after the other."""
    stops, found = generation.stops(work.base), []
    for adapter in work.adapters:
        with work.base.attached(adapter):
            found += decode(work.base, work.prompts, work.new, stops, work.room)
    return found


def side_by_side(work: Work) -> Answers:
    """All adapters in every batch, with our decoding."""
    stops, count = generation.stops(work.base), len(work.adapters)
    with work.base.attached(*work.adapters):
        return decoding.decode(work.base, work.prompts, work.new, stops, work.room, count)


CONTESTANTS: dict[str, Callable[[Work], Answers]] = {
    "generate, one adapter at a time": lambda work: one_by_one(padded.decode, work),
    "ours, one adapter at a time": lambda work: one_by_one(decoding.decode, work),
    "ours, adapters side by side": side_by_side,
}
PEER, OURS = "generate, one adapter at a time", "ours, adapters side by side"


def prompts_of(base: Base, options: argparse.Namespace) -> list[Int32s]:
    """The prompts of ``--rows`` rows of each of ``--clients`` clients, drawn by the seed.

    Raises:
        ValueError: the data has too few clients with that many rows.
    """
    corpus = table.read(data_file(options.data, "sample.parquet"), table.Columns())
    keys = corpus.keys("client")
    names, counts = np.unique(keys, return_counts=True)
    able = names[counts >= options.rows]
    if len(able) < options.clients:
        raise ValueError(
            f"{options.clients} clients of {options.rows} rows are needed, but the data has "
            f"{len(able)}; give fewer with --clients or --rows."
        )
    drawn = rng(options.seed, "clients").permutation(able)[: options.clients]
    rows = [row for name in drawn for row in np.flatnonzero(keys == name)[: options.rows]]
    examples = corpus.examples(np.array(rows))
    return generation.prompts(examples, alpaca, base.tokenizer, options.max_prompt_tokens)


def adapters_of(base: Base, ranks: Sequence[int], seed: int) -> list[Adapter]:
    """One random update with terms of decreasing size, truncated to each rank."""
    draw = torch.Generator().manual_seed(seed)
    most = max(ranks)
    sizes = 0.3 / (1 + torch.arange(most) / 8)
    whole = {}
    for module, (out, in_) in base.shapes.items():
        B = torch.randn(out, most, generator=draw) * sizes / out**0.5
        whole[module] = Factors(B, torch.randn(most, in_, generator=draw) / in_**0.5)
    return [Adapter({m: f.first(rank) for m, f in whole.items()}) for rank in ranks]


def contest(work: Work, repeats: int) -> dict[str, Any]:
    """Alternating turns of all contestants after a warm-up, and the answers of the last one."""
    warm = Work(work.base, work.adapters, work.prompts[:2], 2, work.room)
    for turn in CONTESTANTS.values():
        turn(warm)
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    cpu: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    answers: dict[str, Answers] = {}
    for _ in range(repeats):
        for name, turn in CONTESTANTS.items():
            started, before = time.perf_counter(), time.process_time()
            found = turn(work)
            seconds[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - before)
            answers[name] = [[work.cut(ids) for ids in part] for part in found]
            print(f"{name}: {seconds[name][-1]:.2f} s, {cpu[name][-1]:.2f} CPU s", file=sys.stderr)
    median = {name: statistics.median(found) for name, found in seconds.items()}
    flat = {name: [ids for part in found for ids in part] for name, found in answers.items()}
    equal = {
        name: sum(a == b for a, b in zip(flat[PEER], found, strict=True)) / len(found)
        for name, found in flat.items()
    }
    differing = {tuple(map(tuple, part)) for part in answers[PEER]}
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "median_seconds": median,
        "share_equal_to_generate": equal,
        "new_tokens": sum(map(len, flat[PEER])),
        "adapters_that_answer_differently": len(differing),
    }


def tables_of(found: dict[str, Any], read: int) -> list[Table]:
    """Times, and answers."""
    peer = found["median_seconds"][PEER]
    rows = [
        [
            name,
            seconds,
            found["new_tokens"] / seconds,
            (found["new_tokens"] + read) / seconds,
            peer / seconds,
            f"{100 * found['share_equal_to_generate'][name]:.1f} %",
        ]
        for name, seconds in found["median_seconds"].items()
    ]
    head = ["contestant", "median s", "new tokens/s", "tokens read and new/s", "times faster"]
    return [Table("Answers of all adapters to all prompts", [*head, "answers equal"], rows)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="rows; default: sample.parquet")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8, help="of each client")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 30, 64, 200])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--max-prompt-tokens", type=int, default=896)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="8 prompts, 2 ranks; no speed claim")
    options = parser.parse_args()
    if options.quick:
        options.clients, options.rows, options.new_tokens = 2, 4, 8
        options.ranks, options.repeats = options.ranks[:2], 1
    return options


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    place = setting(options.threads)
    base = Source("smollm2-135m-instruct", dtype=options.dtype, device=options.device).load()
    prompts = prompts_of(base, options)
    adapters = adapters_of(base, options.ranks, options.seed)
    work = Work(base, adapters, prompts, options.new_tokens, options.batch_tokens)
    found = contest(work, options.repeats)
    given = sum(map(len, prompts))
    computed = sum(node.tokens for node in tree(prompts))
    claims = [
        Claim(
            "seconds of padded generate / ours",
            found["median_seconds"][PEER] / found["median_seconds"][OURS],
            1.5,
            at_least=True,
            asserted=not options.quick,
        ),
        Claim(
            "share of answers equal to those of generate",
            found["share_equal_to_generate"][OURS],
            0.98,
            at_least=True,
            # In 16 bits the rounding of another summation order is visible.
            asserted=options.dtype == "float32",
        ),
    ]
    measurements = {
        "options": {k: v for k, v in vars(options).items() if k != "data"},
        "prompts": len(prompts),
        "prompt_tokens": given,
        "prompt_tokens_without_those_shared": computed,
        "longest_prompt": max(map(len, prompts)),
        **found,
    }
    name = Path(__file__).stem + ("-cuda" if base.device.type == "cuda" else "")
    name += "-quick" if options.quick else ""
    return finish(name, place, measurements, tables_of(found, given * len(adapters)), claims)


if __name__ == "__main__":
    sys.exit(main())
