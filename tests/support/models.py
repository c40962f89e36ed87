"""A tiny random model with a tokenizer of words, in a folder as any model is, and a federation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from flexlora.config.experiment import Experiment
from flexlora.data.corpus import Corpus
from flexlora.federation import compose
from flexlora.model.base import Base
from flexlora.model.source import Source

WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "the",
    "a",
    "cat",
    "dog",
    "sees",
    "and",
]
SPECIAL = ["<unk>", "<s>", "</s>"]


def words_tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def save(path: Path) -> Path:
    """A model whose published decoding settings would change what it writes."""
    config = transformers.LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = transformers.LlamaForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(
        repetition_penalty=3.0,
        do_sample=True,
        temperature=0.7,
        max_length=7,
        eos_token_id=[2, 3],
    )
    model.save_pretrained(path)
    words_tokenizer().save_pretrained(path)
    return path


def load_once(monkeypatch: pytest.MonkeyPatch, loaded: dict[str, Base]) -> None:
    """Let the same model be read from the disk once: ``loaded`` holds those that were."""
    load = Source.load

    def once(source: Source) -> Base:
        if repr(source) not in loaded:
            loaded[repr(source)] = load(source)
        return loaded[repr(source)]

    monkeypatch.setattr(Source, "load", once)


def corpus(clients: int = 6, rows: int = 10) -> Corpus:
    """Rows of words, in sizes that differ from client to client; the answer can be learnt."""
    draw = np.random.default_rng(11)
    columns: dict[str, list[str]] = {
        name: [] for name in ("client", "category", "split", "instruction", "input", "output")
    }
    for client in range(clients):
        for row in range(rows + client):
            text = " ".join(draw.choice(WORDS, 2 + (row + client) % 5))
            columns["client"].append(f"client{client}")
            columns["category"].append("odd" if client % 2 else "even")
            columns["split"].append("test" if row % 5 == 4 else "train")
            columns["instruction"].append(f"the {WORDS[client]} sees")
            columns["input"].append(text)
            columns["output"].append(f"{WORDS[client]} {text.split()[0]}")
    return Corpus.build(columns)


def content(folder: Path, **changes: Any) -> dict[str, Any]:
    """A config of the tiny model, as TOML holds it: six clients of ranks 2, 3 and 5, three rounds.

    ``folder`` holds the model and the tokens; ``changes`` replace fields of a section, and a
    field or section that is None is left out.
    """
    sections: dict[str, Any] = {
        "seed": 3,
        "model": {"name": str(folder / "model")},
        "data": {
            "path": "-",
            "prompt": "plain",
            "max_tokens": 32,
            "cache": str(folder / "tokens"),
            "unseen_clients": 0,
        },
        "ranks": {
            "types": {
                "small": {"attention": 2, "feed_forward": 2},
                "wide": {"attention": 2, "feed_forward": 5},
                "large": {"attention": 3, "feed_forward": 3},
            },
            "distribution": {"small": 0.5, "wide": 0.2, "large": 0.3},
        },
        "method": {"name": "flexlora"},
        "training": {"learning_rate": 0.02, "batch_examples": 4, "pack_tokens": 24},
        "federation": {"rounds": 3, "cohort": 4},
        "evaluation": {
            "max_new_tokens": 3,
            "max_prompt_tokens": 16,
            "seen_clients": 2,
            "unseen_clients": 2,
            "rows_per_client": 1,
            "truncated": True,
        },
        "run": {"threads": 1, "clients_at_once": 1},
    }
    for section, fields in changes.items():
        if isinstance(fields, dict):
            merged = {**sections.get(section, {}), **fields}
            fields = {name: value for name, value in merged.items() if value is not None}
        sections[section] = fields
    return {name: value for name, value in sections.items() if value is not None}


def settings(folder: Path, **changes: Any) -> Experiment:
    """The same, parsed."""
    return compose.parse(content(folder, **changes), "tiny")


def write_config(path: Path, folder: Path, **changes: Any) -> Path:
    """The same as a TOML file at ``path``."""
    lines = [f"{name} = {_toml(value)}" for name, value in content(folder, **changes).items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _toml(value: Any) -> str:
    """A value on one line; of numbers, texts and lists JSON's spelling is TOML's."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(each)}" for name, each in value.items()) + " }"
    return json.dumps(value)
