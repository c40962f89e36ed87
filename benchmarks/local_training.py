"""Local training: flexlora's loop against transformers.Trainer with PEFT, in samples per second.

Both train one client after another, with the same rank of LoRA on every linear layer of the same
model in float32, on the same rows, from the same factors, with AdamW, clipping, an effective
batch of 16 and a linear schedule. The Trainer uses length-grouped sampling and the best
micro-batch of those tried. Padding tokens do not count. One more run of the Trainer takes a
client's rows in our order, and its losses and updates are compared with ours.

The share of the machine's matrix-product peak counts only necessary operations, those that any
exact method needs for the distinct tokens of a step (see ``necessary_flops``), divided by the
seconds of the whole training including the optimiser, relative to torch's float32 product of two
2048 x 2048 matrices in the same run.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from result import Claim, Table, data_file, finish, setting
from torch import Tensor

from flexlora.data.corpora import table
from flexlora.data.packing import Pack, pack, steps
from flexlora.data.tokens import TokenStore
from flexlora.lowrank.factors import Adapter, Factors
from flexlora.lowrank.sums import LowRankSum, norm
from flexlora.model import smollm2
from flexlora.model.base import Base
from flexlora.model.source import Source
from flexlora.seeds import rng
from flexlora.training.concurrency import clients_at_once
from flexlora.training.loop import ClientTask, train_together
from flexlora.training.optimizer import Training

KEYS = ("k_proj", "v_proj")
"""The projections that every token needs in the last layer too."""

IGNORED = -100
"""The label that transformers' losses leave out."""

Feature = dict[str, list[int]]


@dataclass(frozen=True)
class Work:
    """The input of every contestant: some clients' rows and the training settings."""

    store: TokenStore
    clients: Sequence[Sequence[int]]
    settings: Training
    start: Adapter
    seed: int
    threads: int

    def in_our_order(self, rows: Sequence[int]) -> list[list[int]]:
        """One client's rows by step, in the order of our loop."""
        return steps(rows, self.settings.batch_examples, rng(self.seed, "order"))

    def features(self, rows: Sequence[int]) -> list[Feature]:
        """The rows in the Trainer's format, with the loss only on the response."""
        found = []
        for row in rows:
            ids, prompt = self.store[row].ids.tolist(), self.store[row].prompt_tokens
            labels = [IGNORED] * prompt + ids[prompt:]
            found.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
        return found


@dataclass
class Padding:
    """DataCollatorForSeq2Seq that counts real tokens and positions of its batches."""

    collate: transformers.DataCollatorForSeq2Seq
    real: int = field(default=0)
    places: int = field(default=0)

    def __call__(self, features: list[Feature]) -> dict[str, Tensor]:
        """One micro-batch, padded to its longest row."""
        batch: dict[str, Tensor] = self.collate(features)
        self.real += int(batch["attention_mask"].sum())
        self.places += batch["input_ids"].numel()
        return batch


@dataclass(frozen=True)
class Turn:
    """One contestant's training of all clients; the adapter is that of the last client."""

    seconds: float
    samples: int
    real_tokens: int
    places: int
    losses: list[float]
    adapter: Adapter

    @property
    def facts(self) -> dict[str, Any]:
        """All fields except the adapter."""
        return {
            "seconds": self.seconds,
            "samples": self.samples,
            "real_tokens": self.real_tokens,
            "places": self.places,
            "samples_per_second": self.samples / self.seconds,
            "tokens_per_second": self.real_tokens / self.seconds,
            "losses": self.losses,
        }


def ours(base: Base, work: Work, together: int) -> Turn:
    """Our loop; its loss is the mean over the loss tokens of all steps of all clients."""
    torch.set_num_threads(work.threads)
    started, found = time.perf_counter(), []
    for first in range(0, len(work.clients), together):
        learners = [
            ClientTask(f"client {first + i}", work.start, rows, rng(work.seed, "order"))
            for i, rows in enumerate(work.clients[first : first + together])
        ]
        found += train_together(base, learners, work.store, work.settings)
    seconds = time.perf_counter() - started
    loss = sum(t.loss_total for t in found) / sum(t.loss_tokens for t in found)
    return Turn(
        seconds=seconds,
        samples=sum(t.examples for t in found),
        real_tokens=sum(t.tokens for t in found),
        places=sum(t.computed for t in found),
        losses=[loss],
        adapter=found[-1].adapter,
    )


def necessary_flops(base: Base, work: Work) -> float:
    """The operations that every exact training of these steps needs, for distinct tokens.

    A product of (n, k) by (k, m) is 2 n k m. Frozen layers: forward, and backward to their
    inputs except where these need no gradient (the first layer's query, key and value);
    factors: forward and backward to all inputs. After the last layer's attention, and in the
    head, only positions of the loss count. Attention: causal pairs, with 2 products forward and
    4 backward. Element-wise and recomputed operations do not count.
    """
    shapes, ranks = base.shapes, work.start.ranks
    layers = len({module.split(".")[2] for module in shapes})
    first = [m for m in shapes if ".0.self_attn." in m and not m.endswith("o_proj")]
    last = [m for m in shapes if f".{layers - 1}." in m and m.rpartition(".")[2] not in KEYS]
    config: Any = base.model.config
    width = config.num_attention_heads * config.head_dim
    total = 0.0
    for rows in work.clients:
        for step in work.in_our_order(rows):
            laid = pack(work.store, step)
            places = len(laid.loss_positions.unique())
            for module, (out, in_) in shapes.items():
                n = places if module in last else laid.tokens
                back = 0 if module in first else 1
                total += 2 * n * out * in_ * (1 + back)
                total += 2 * n * ranks[module] * ((out + in_) * 2 + out + in_ * back)
            total += 4 * places * config.hidden_size * config.vocab_size
            total += layers * 12 * width * _pairs(laid)
    return total


def _pairs(row: Pack) -> float:
    """The number of (query, key) pairs of the attention in a row."""
    found = 0.0
    for (a, b), *rest in row.forest.trees:
        found += (b - a) * (b - a + 1) / 2
        found += sum((d - c) * (d - c + 1) / 2 + (d - c) * (b - a) for c, d in rest)
    return found


def peak_flops(repeats: int = 5) -> float:
    """Operations per second of torch's float32 product of 2048 x 2048 matrices, best of several."""
    n = 2048
    x, y = torch.randn(n, n), torch.randn(n, n)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(x, y)
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / min(seconds)


@dataclass(frozen=True)
class Peft:
    """The same model under PEFT, and the recipe of transformers.Trainer around it."""

    model: peft.PeftModel
    tokenizer: transformers.PreTrainedTokenizerBase
    folder: Path

    @classmethod
    def load(cls, name: str, rank: int, alpha: int, folder: Path) -> Peft:
        """The model with new factors on every linear layer except the head."""
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        how = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=0.0,
            target_modules="all-linear",
            bias="none",
            task_type="CAUSAL_LM",
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        adapted = peft.get_peft_model(model, how)
        assert isinstance(adapted, peft.PeftModel)
        return cls(adapted, tokenizer, folder)

    def layer(self, module: str) -> Any:
        """The LoRA layer of one module path."""
        return self.model.get_base_model().get_submodule(module)

    def reset(self, start: Adapter) -> None:
        """Reset the factors to those of ``start``, with which every turn begins (``B`` = 0)."""
        with torch.no_grad():
            for module, factors in start.items():
                layer = self.layer(module)
                layer.lora_A["default"].weight.copy_(factors.A)
                layer.lora_B["default"].weight.zero_()

    def adapter(self, start: Adapter) -> Adapter:
        """The current factors, with PEFT's scale folded in."""
        found = {}
        for module in start:
            layer = self.layer(module)
            B = layer.lora_B["default"].weight.detach() * layer.scaling["default"]
            found[module] = Factors(B.clone(), layer.lora_A["default"].weight.detach().clone())
        return Adapter(found)

    def arguments(self, how: Training, micro: int, order: str, seed: int, log: bool) -> Any:
        """The Trainer's settings that correspond to ours."""
        return transformers.TrainingArguments(
            output_dir=str(self.folder),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=how.batch_examples // micro,
            num_train_epochs=1,
            max_steps=-1 if how.max_steps is None else how.max_steps,
            learning_rate=how.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=0,
            weight_decay=how.weight_decay,
            max_grad_norm=how.clip_norm,
            train_sampling_strategy=order,
            use_cpu=True,
            bf16=False,
            fp16=False,
            eval_strategy="no",
            save_strategy="no",
            logging_strategy="steps" if log else "no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=seed,
        )

    def turn(self, work: Work, micro: int, order: str) -> Turn:
        """One training. The order is the Trainer's ``group_by_length``, or ours as given."""
        torch.set_num_threads(work.threads)
        seconds, losses = 0.0, []
        collate = Padding(
            transformers.DataCollatorForSeq2Seq(
                self.tokenizer, padding="longest", label_pad_token_id=IGNORED
            )
        )
        for rows in work.clients:
            self.reset(work.start)
            ordered = order == "sequential"
            chosen = [row for step in work.in_our_order(rows) for row in step]
            trainer = transformers.Trainer(
                model=self.model,
                args=self.arguments(work.settings, micro, order, work.seed, log=ordered),
                train_dataset=work.features(chosen if ordered else rows),
                data_collator=collate,
                callbacks=[],
            )
            trainer.remove_callback(transformers.PrinterCallback)
            started = time.perf_counter()
            trainer.train()
            seconds += time.perf_counter() - started
            losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return Turn(
            seconds=seconds,
            samples=sum(len(rows) for rows in work.clients),
            real_tokens=collate.real,
            places=collate.places,
            losses=losses,
            adapter=self.adapter(work.start),
        )


def compared(ours_: Callable[[Work], Turn], theirs: Callable[[Work], Turn], work: Work) -> Any:
    """The losses and the trained updates of both on one client's rows in the same order."""
    batch = work.settings.batch_examples
    one = replace(work, clients=[work.clients[0][:batch]])
    mine, other = ours_(one), theirs(one)
    gaps = [
        LowRankSum.of([(1.0, mine.adapter[m]), (-1.0, other.adapter[m])]).norm()
        / norm(other.adapter[m])
        for m in work.start
    ]
    return {
        "first_step_loss": {"ours": mine.losses[0], "trainer": other.losses[0]},
        "median_gap_of_updates": statistics.median(gaps),
    }


def contest(
    contestants: Mapping[str, Callable[[Work], Turn]], work: Work, repeats: Mapping[str, int]
) -> dict[str, Any]:
    """Alternating turns of all contestants after a warm-up on one client, and the peak."""
    warm = replace(work, clients=work.clients[:1])
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    peaks = []
    for turn in contestants.values():
        turn(warm)
    for repeat in range(max(repeats.values())):
        for name, turn in contestants.items():
            if repeat >= repeats[name]:
                continue
            peaks.append(peak_flops())
            found = turn(work).facts
            turns[name].append(found)
            print(f"{name}: {found['samples_per_second']:.2f} samples/s", file=sys.stderr)
    return {"peak_flops": statistics.median(peaks), "turns": turns}


def median(turns: Sequence[Mapping[str, Any]], field: str) -> float:
    return statistics.median(turn[field] for turn in turns)


def work_of(base: Base, options: argparse.Namespace) -> Work:
    """The rows of some clients, the initial factors and the training settings.

    Raises:
        ValueError: the data has too few clients with as many training rows.
    """
    corpus = table.read(data_file(options.data, "sample.parquet"), table.Columns())
    training = corpus.select(corpus.keys("split") == "train")
    owners = np.array([str(owner) for owner in training.keys("client")])
    count = options.steps * options.batch
    names, sizes = np.unique(owners, return_counts=True)
    able = names[sizes >= count]
    if len(able) < options.clients:
        raise ValueError(f"{len(able)} clients have {count} training rows; lower --steps.")
    draw = rng(options.seed, "clients")
    chosen = draw.permutation(able)[: options.clients]
    rows = [draw.permutation(np.flatnonzero(owners == name))[:count] for name in chosen]
    store = TokenStore.build(
        training.select(np.concatenate(rows)), base.tokenizer, "alpaca", options.max_tokens, None
    )
    start = Adapter(
        {
            module: Factors(torch.zeros(out, 0), torch.zeros(0, in_)).widened(options.rank, draw)
            for module, (out, in_) in base.shapes.items()
        }
    )
    settings = Training(
        learning_rate=5e-4,
        schedule="linear",
        batch_examples=options.batch,
        pack_tokens=options.pack_tokens,
        alpha=float(options.alpha),
    )
    held = [list(range(i * count, (i + 1) * count)) for i in range(options.clients)]
    return Work(store, held, settings, start, options.seed, options.threads)


def tables_of(found: Mapping[str, Any], pairs: Mapping[str, Any], flops: float) -> list[Table]:
    """Speeds, then agreement."""
    best = median(found["turns"]["ours"], "samples_per_second")
    speeds = [
        [
            name,
            len(turns),
            median(turns, "samples_per_second"),
            best / median(turns, "samples_per_second"),
            median(turns, "tokens_per_second"),
            median(turns, "seconds"),
            turns[0]["real_tokens"],
            turns[0]["places"],
            f"{100 * flops / median(turns, 'seconds') / found['peak_flops']:.1f} %",
        ]
        for name, turns in found["turns"].items()
    ]
    head = ["contestant", "turns", "samples/s (median)", "ours / it", "real tokens/s", "median s"]
    first = pairs["first_step_loss"]
    return [
        Table("Speed", [*head, "real tokens", "tokens computed", "share of peak"], speeds),
        Table(
            "One client's rows in the same order",
            ["", "ours", "Trainer"],
            [
                ["loss of the first step", first["ours"], first["trainer"]],
                ["median relative distance of the updates", pairs["median_gap_of_updates"], ""],
            ],
        ),
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="rows; default: sample.parquet")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--together", type=int, help="clients at a time; default: measured")
    parser.add_argument("--steps", type=int, default=1, help="optimiser steps of a client")
    parser.add_argument("--batch", type=int, default=16, help="the effective batch")
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--pack-tokens", type=int, default=Training().pack_tokens)
    parser.add_argument("--rank", type=int, default=30)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5, help="turns of our loop")
    parser.add_argument("--peer-repeats", type=int, default=3, help="turns of the Trainer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="2 clients, once; no claim on speed")
    options = parser.parse_args()
    if options.quick:
        options.clients, options.repeats, options.peer_repeats = 2, 1, 1
    for micro in options.micro_batch:
        if options.batch % micro:
            parser.error(f"--batch {options.batch} is no multiple of --micro-batch {micro}.")
    return options


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    place = setting(options.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    base = Source("smollm2-135m-instruct").load()
    work = work_of(base, options)
    together = options.together or clients_at_once(
        base, work.store, work.clients, work.settings, work.start.parameters, len(work.clients)
    )
    with tempfile.TemporaryDirectory() as folder:
        other = Peft.load(smollm2.folder(), options.rank, options.alpha, Path(folder))
        contestants: dict[str, Callable[[Work], Turn]] = {"ours": lambda w: ours(base, w, together)}
        for micro in options.micro_batch:
            contestants[f"Trainer, micro-batch {micro}"] = lambda w, m=micro: other.turn(  # type: ignore[misc]
                w, m, "group_by_length"
            )
        repeats = dict.fromkeys(contestants, options.peer_repeats) | {"ours": options.repeats}
        found = contest(contestants, work, repeats)
        micro = options.micro_batch[0]
        pairs = compared(contestants["ours"], lambda w: other.turn(w, micro, "sequential"), work)
    flops = necessary_flops(base, work)
    measurements = {
        "options": {k: v for k, v in vars(options).items() if k != "data"},
        "clients_at_once": together,
        "necessary_flops": flops,
        "contest": found,
        "same_order": pairs,
    }
    name = Path(__file__).stem + ("-quick" if options.quick else "")
    claims = claims_of(found, pairs, flops, asserted=not options.quick)
    return finish(name, place, measurements, tables_of(found, pairs, flops), claims)


def claims_of(
    found: Mapping[str, Any], pairs: Mapping[str, Any], flops: float, asserted: bool
) -> list[Claim]:
    """The claims about speed, and that the same work was done."""
    speeds = {n: median(turns, "samples_per_second") for n, turns in found["turns"].items()}
    ratio = speeds["ours"] / max(v for name, v in speeds.items() if name != "ours")
    share = flops / median(found["turns"]["ours"], "seconds") / found["peak_flops"]
    first = pairs["first_step_loss"]
    gap = abs(first["ours"] - first["trainer"])
    counts = {turn["real_tokens"] for turns in found["turns"].values() for turn in turns}
    return [
        Claim("samples/s of ours / the fastest Trainer's", ratio, 3.0, True, asserted),
        Claim("necessary operations / the machine's peak", share, 0.8, True, asserted),
        Claim("difference of the first step's losses", gap, 1e-4, at_least=False),
        Claim("different counts of real tokens", float(len(counts)), 1, at_least=False),
    ]


if __name__ == "__main__":
    sys.exit(main())
