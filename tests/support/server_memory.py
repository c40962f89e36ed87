"""A server in a process of its own: rounds of many clients, and the memory that they take.

Usage: server_memory.py FOLDER CLIENTS ROUNDS WIDTH. Prints the memory that is taken after each
round and the most that was taken, in bytes, both beyond what it was before the first round. The
clients' uploads are made up, one at a time; each is taken before the next.
"""

import gc
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from flexlora.data.corpus import Corpus
from flexlora.federation import rounds, setup
from flexlora.federation.client_turn import TurnRequest
from flexlora.federation.prepared import PreparedRun
from flexlora.federation.transport import Reply, WaitPolicy
from support import models
from support.unreliable import data, upload

MODULES = 8


@dataclass(frozen=True)
class MadeUp:
    """A transport whose clients answer at once, one after the other."""

    prepared: PreparedRun
    clients_at_once: int = 1
    present = staticmethod(list)

    def exchange(self, jobs: Iterable[TurnRequest], patience: WaitPolicy) -> Iterator[Reply]:
        for job in jobs:
            yield Reply(job.client, data(self.prepared, upload(self.prepared, job)))


def memory(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def corpus(clients: int) -> Corpus:
    columns: dict[str, list[str]] = {
        name: [] for name in ("client", "category", "split", "instruction", "input", "output")
    }
    for client in range(clients):
        for split in ("train", "train", "test"):
            row = (f"client{client}", "all", split, "the cat", "sees", "a dog")
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
    return Corpus.build(columns)


def save_model(folder: Path, width: int) -> None:
    """Two layers with four square matrices each in attention, and next to nothing beside."""
    config = transformers.LlamaConfig(
        vocab_size=len(models.SPECIAL) + len(models.WORDS),
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=96,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    models.words_tokenizer().save_pretrained(folder)


def main(folder: Path, clients: int, number: int, width: int) -> None:
    torch.set_num_threads(1)
    save_model(folder / "model", width)
    settings = models.settings(
        folder,
        model={"targets": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        ranks={"rank": 32, "types": None, "distribution": None},
        method={"name": "flexlora", "weights": "uniform"},
        federation={"rounds": number, "cohort": clients},
        data={"unseen_clients": 0},
        evaluation={"seen_clients": 0, "unseen_clients": 0, "base": False, "truncated": False},
    )
    ready = setup.prepare(settings, corpus(clients))
    shapes = [factors.shape for factors in ready.fresh().values()]
    assert shapes == [(width, width)] * MODULES and len(ready.clients) == clients
    os.fsync = lambda descriptor: None  # a disk's speed is not what is measured
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, after = memory("VmRSS"), []
    for event in rounds.run(ready, folder / "run", MadeUp(ready)):
        if event["event"] == "round":
            gc.collect()
            after.append(memory("VmRSS") - before)
    print(json.dumps({"after": after, "peak": memory("VmHWM") - before}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
