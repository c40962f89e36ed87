"""Local training: flexlora's loop against transformers.Trainer with PEFT, in real tokens a second.

Both train the same rank of LoRA on every linear layer of the same model in float32, on the
same rows, from the same factors, with AdamW, clipping, an effective batch of 16 and a
linear schedule. The Trainer gets length-grouped sampling and the best micro-batch of those
tried. A token counts once when it is real; padding does not count. One more run of the
Trainer takes the rows in our order, and its losses are compared with ours.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from result import Claim, Table, data_file, finish, setting
from torch import Tensor

from flexlora import smollm2
from flexlora.adapter import Adapter, Factors
from flexlora.data.corpora import table
from flexlora.data.tokens import TokenStore, steps
from flexlora.linalg import LowRankSum, norm
from flexlora.model import Base, Source
from flexlora.seeds import rng
from flexlora.training.loop import train
from flexlora.training.optimizer import Training

IGNORED = -100
"""The label that transformers' losses leave out."""

Feature = dict[str, list[int]]


@dataclass(frozen=True)
class Work:
    """What every contestant is given."""

    store: TokenStore
    rows: Sequence[int]
    settings: Training
    start: Adapter
    seed: int
    threads: int

    def in_our_order(self) -> list[int]:
        """The rows step by step as our loop takes them, the longest of a step first."""
        lengths, how = self.store.lengths, self.settings
        plan = steps(
            lengths, self.rows, how.batch_examples, how.pack_tokens, rng(self.seed, "order")
        )
        return [
            row
            for packs in plan
            for row in sorted(itertools.chain(*packs), key=lambda row: -int(lengths[row]))
        ]

    def features(self, rows: Sequence[int]) -> list[Feature]:
        """The rows as the Trainer takes them, with the loss on the response alone."""
        found = []
        for row in rows:
            ids, prompt = self.store[row].ids.tolist(), self.store[row].prompt_tokens
            labels = [IGNORED] * prompt + ids[prompt:]
            found.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
        return found


@dataclass
class Padding:
    """DataCollatorForSeq2Seq, counting what it makes: real tokens and places in the batch."""

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
    """One contestant's training, start to end."""

    seconds: float
    real_tokens: int
    places: int
    losses: list[float]
    adapter: Adapter

    @property
    def facts(self) -> dict[str, Any]:
        """All of it but the adapter."""
        return {
            "seconds": self.seconds,
            "real_tokens": self.real_tokens,
            "tokens_per_second": self.real_tokens / self.seconds,
            "padding_share": 1 - self.real_tokens / self.places,
            "losses": self.losses,
        }


def ours(base: Base, work: Work) -> Turn:
    """Our loop; its loss is one mean over the loss tokens of all steps."""
    torch.set_num_threads(work.threads)
    started = time.perf_counter()
    done = train(base, work.start, work.store, work.rows, work.settings, rng(work.seed, "order"))
    seconds = time.perf_counter() - started
    loss = done.loss_total / done.loss_tokens
    adapter = Adapter({m: Factors(f.B.detach(), f.A.detach()) for m, f in done.adapter.items()})
    return Turn(seconds, done.tokens, done.tokens, [loss], adapter)


@dataclass(frozen=True)
class Peft:
    """The same model under PEFT, and the recipe of transformers.Trainer around it."""

    model: peft.PeftModel
    tokenizer: transformers.PreTrainedTokenizerBase
    folder: Path

    @classmethod
    def load(cls, name: str, rank: int, alpha: int, folder: Path) -> Peft:
        """The model with fresh factors on every linear layer but the head."""
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
        """Every turn starts from the same factors; those of ``start`` have ``B`` = 0."""
        with torch.no_grad():
            for module, factors in start.items():
                layer = self.layer(module)
                layer.lora_A["default"].weight.copy_(factors.A)
                layer.lora_B["default"].weight.zero_()

    def adapter(self, start: Adapter) -> Adapter:
        """What the factors are now, with PEFT's scale folded in."""
        found = {}
        for module in start:
            layer = self.layer(module)
            B = layer.lora_B["default"].weight.detach() * layer.scaling["default"]
            found[module] = Factors(B.clone(), layer.lora_A["default"].weight.detach().clone())
        return Adapter(found)

    def arguments(self, how: Training, micro: int, order: str, seed: int, log: bool) -> Any:
        """The Trainer's settings that mean the same as ours."""
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
        self.reset(work.start)
        ordered = order == "sequential"
        rows = work.in_our_order() if ordered else work.rows
        how = self.arguments(work.settings, micro, order, work.seed, log=ordered)
        collate = Padding(
            transformers.DataCollatorForSeq2Seq(
                self.tokenizer, padding="longest", label_pad_token_id=IGNORED
            )
        )
        trainer = transformers.Trainer(
            model=self.model,
            args=how,
            train_dataset=work.features(rows),
            data_collator=collate,
            callbacks=[],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return Turn(seconds, collate.real, collate.places, losses, self.adapter(work.start))


def compared(ours_: Callable[[Work], Turn], theirs: Callable[[Work], Turn], work: Work) -> Any:
    """The losses and the trained updates of both on the same rows in the same order.

    The Trainer tells the loss of every step, our loop the mean over all loss tokens; the
    first step alone and that mean are comparable.
    """
    mine, other = ours_(work), theirs(work)
    batch, order = work.settings.batch_examples, work.in_our_order()
    counts = [
        int(work.store.response_tokens[order[start : start + batch]].sum())
        for start in range(0, len(order), batch)
    ]
    weighted = sum(n * loss for n, loss in zip(counts, other.losses, strict=True)) / sum(counts)
    short = replace(work, rows=order[:batch], settings=replace(work.settings, max_steps=1))
    gaps = [
        LowRankSum.of([(1.0, mine.adapter[m]), (-1.0, other.adapter[m])]).norm()
        / norm(other.adapter[m])
        for m in work.start
    ]
    return {
        "first_step_loss": {"ours": ours_(short).losses[0], "trainer": other.losses[0]},
        "mean_loss": {"ours": mine.losses[0], "trainer": weighted},
        "trainer_step_losses": other.losses,
        "median_gap_of_updates": statistics.median(gaps),
        "trainer_facts": other.facts,
    }


def contest(
    contestants: Mapping[str, Callable[[Work], Turn]], work: Work, repeats: int
) -> dict[str, Any]:
    """Turns of all contestants, alternating, after a warm-up of one step each."""
    batch = work.settings.batch_examples
    warm = replace(work, rows=work.rows[:batch])
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    for turn in contestants.values():
        turn(warm)
    for _ in range(repeats):
        for name, turn in contestants.items():
            found = turn(work).facts
            turns[name].append(found)
            print(f"{name}: {found['tokens_per_second']:.1f} tokens/s", file=sys.stderr)
    speeds = {
        name: statistics.median(t["tokens_per_second"] for t in found)
        for name, found in turns.items()
    }
    return {"median_tokens_per_second": speeds, "turns": turns}


def work_of(base: Base, options: argparse.Namespace) -> Work:
    """The rows, the first factors and the terms of training.

    Raises:
        ValueError: the data has too few training rows.
    """
    corpus = table.read(data_file(options.data, "sample.parquet"), table.Columns())
    training = corpus.select(corpus.keys("split") == "train")
    count = options.steps * options.batch
    if len(training) < count:
        raise ValueError(f"{count} rows are needed, but the data has {len(training)} to train on.")
    chosen = rng(options.seed, "rows").permutation(len(training))[:count]
    store = TokenStore.build(
        training.select(chosen), base.tokenizer, "alpaca", options.max_tokens, None
    )
    draw = rng(options.seed, "start")
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
    return Work(store, list(range(count)), settings, start, options.seed, options.threads)


def tables_of(found: Mapping[str, Any], pairs: Mapping[str, Any]) -> list[Table]:
    """Speeds, then losses."""
    best = found["median_tokens_per_second"]["ours"]
    speeds = [
        [
            name,
            found["median_tokens_per_second"][name],
            best / found["median_tokens_per_second"][name],
            statistics.median(t["seconds"] for t in turns),
            turns[0]["real_tokens"],
            f"{100 * turns[0]['padding_share']:.1f} %",
        ]
        for name, turns in found["turns"].items()
    ]
    head = ["contestant", "real tokens/s (median)", "ours / it", "median s", "real tokens"]
    losses = [
        [name, pairs[key]["ours"], pairs[key]["trainer"]]
        for name, key in (("first step", "first_step_loss"), ("all steps", "mean_loss"))
    ]
    return [
        Table("Speed", [*head, "padding"], speeds),
        Table("Mean loss of the same rows in the same order", ["", "ours", "Trainer"], losses),
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="rows; default: sample.parquet")
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps of a turn")
    parser.add_argument("--batch", type=int, default=16, help="the effective batch")
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--pack-tokens", type=int, default=Training().pack_tokens)
    parser.add_argument("--rank", type=int, default=30)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="2 steps, once; no claim on speed")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.repeats = min(options.steps, 2), 1
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
    with tempfile.TemporaryDirectory() as folder:
        other = Peft.load(smollm2.folder(), options.rank, options.alpha, Path(folder))
        contestants: dict[str, Callable[[Work], Turn]] = {"ours": lambda w: ours(base, w)}
        for micro in options.micro_batch:
            contestants[f"Trainer, micro-batch {micro}"] = lambda w, m=micro: other.turn(  # type: ignore[misc]
                w, m, "group_by_length"
            )
        found = contest(contestants, work, options.repeats)
        micro = options.micro_batch[0]
        pairs = compared(contestants["ours"], lambda w: other.turn(w, micro, "sequential"), work)
    speeds = found["median_tokens_per_second"]
    ratio = speeds["ours"] / max(v for name, v in speeds.items() if name != "ours")
    first = pairs["first_step_loss"]
    tokens = {turn["real_tokens"] for turns in found["turns"].values() for turn in turns}
    claims = [
        Claim(
            "real tokens/s of ours / the fastest Trainer's",
            ratio,
            1.4,
            at_least=True,
            asserted=not options.quick,
        ),
        Claim(
            "difference of the first step's losses",
            abs(first["ours"] - first["trainer"]),
            1e-4,
            at_least=False,
        ),
        Claim("different counts of real tokens", float(len(tokens)), 1, at_least=False),
    ]
    measurements = {
        "options": {k: v for k, v in vars(options).items() if k != "data"},
        "contest": found,
        "same_order": pairs,
    }
    name = Path(__file__).stem + ("-quick" if options.quick else "")
    return finish(name, place, measurements, tables_of(found, pairs), claims)


if __name__ == "__main__":
    sys.exit(main())
