"""The text of a config for somebody's own rows, from what is known of them."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tomli_w

if TYPE_CHECKING:
    from flexlora.data import Columns, Corpus

LENGTHS = (128, 256, 512, 1024, 2048)
"""Limits of tokens to choose from, for whole examples and for prompts."""

_CHARACTERS_PER_TOKEN = 3
"""English text has about four; other languages and numbers fewer."""

_ROWS_PER_CLIENT = 8
"""Of rows without a client column: enough for a test row of each client."""

_TEMPLATE_TOKENS = 60
"""What the template of a prompt takes."""

_SPLITS = (
    "# Without a split column each client's rows are split 80 / 10 / 10 into training,",
    "# validation and test rows; a client of fewer than five rows has training rows only.",
)

_METHOD = (
    "",
    "[ranks]",
    "# LoRA ranks by the kind of client. Half of the clients are small, half are large.",
    "types.small = { attention = 8, feed_forward = 8 }",
    "types.large = { attention = 32, feed_forward = 32 }",
    "distribution = { small = 0.5, large = 0.5 }",
    "",
    "[method]",
    "# flexlora methods lists them.",
    'name = "flexlora"',
    "",
    "[training]",
    "# Of one client in one round.",
    "learning_rate = 1e-3",
    'schedule = "constant"',
    "batch_examples = 4",
    "max_steps = 4",
)


@dataclass(frozen=True)
class Facts:
    """What the rows are like: ``prompt`` and ``output`` are lengths in characters, of 19 in 20."""

    rows: int
    clients: int
    prompt: int
    output: int


def facts_of(corpus: Corpus, clients: int | None) -> Facts:
    """The facts of a corpus; ``clients`` is how many to make of rows that name none."""
    if "client" in corpus.columns:
        clients = len(corpus.codes("client")[1])
    elif clients is None:
        clients = min(max(len(corpus) // _ROWS_PER_CLIENT, 2), 20, len(corpus))
    sample = corpus.examples(range(0, len(corpus), max(len(corpus) // 1000, 1)))
    if sample and sample[0].messages is not None:
        whole = [sum(len(m["content"]) for m in each.messages or ()) for each in sample]
        prompts = [n - len(each.output) for n, each in zip(whole, sample, strict=True)]
    else:
        prompts = [len(each.instruction) + len(each.input) for each in sample]
    return Facts(len(corpus), clients, _most(prompts), _most([len(e.output) for e in sample]))


def text(file: Path, config: Path, model: str, columns: Columns, facts: Facts) -> str:
    """A commented config, valid as it stands, which trains in minutes on a small model."""
    natural = bool(columns.client)
    unseen = max(facts.clients // 10, 1) if natural and facts.clients >= 5 else 0
    training = facts.clients - unseen
    prompt, output = _tokens(facts.prompt) + _TEMPLATE_TOKENS, _tokens(facts.output)
    longest = _limit(prompt + output)
    lines = [
        f"# Federated LoRA on {file.name}: {facts.rows} rows, {facts.clients} clients.",
        f"#   flexlora run {config} --dry-run     what would happen, and two prompts",
        f"#   flexlora run {config}",
        "# All keys: docs/configuration.md of flexlora. A key is also changed on the command line:",
        f"#   flexlora run {config} --set federation.rounds=10",
        "seed = 0",
        "",
        "[model]",
        "# A name on the Hugging Face hub, or a folder with config.json and safetensors.",
        "# A relative folder is looked for in the working directory.",
        _key("name", model),
        "",
        "[data]",
        "# Relative to this file.",
        _key("path", _relative(file, config)),
        "# How a row becomes a prompt: alpaca, chat (the model's own chat template) or plain.",
        _key("prompt", "alpaca" if columns.messages is None else "chat"),
        "# Longer examples are shortened to this many tokens.",
        _key("max_tokens", longest),
        *_clients(natural, unseen, facts),
        "",
        "[data.columns]",
        '# The names of your columns; "" for what the rows do not have.',
        *_columns(columns),
        *([] if columns.split else _SPLITS),
        *_METHOD,
        _key("pack_tokens", max(512, longest)),
        "",
        "[federation]",
        "rounds = 3",
        "# Clients in each round.",
        _key("cohort", min(training, 6)),
        "",
        "[evaluation]",
        "# Answers to test rows before the first and after the last round; see also every.",
        _key("seen_clients", min(training, 10)),
        _key("unseen_clients", min(unseen, 5)),
        "rows_per_client = 2",
        _key("max_new_tokens", min(max(output, 16), 64)),
        _key("max_prompt_tokens", _limit(prompt)),
        "truncated = false",
        "",
    ]
    return "\n".join(lines)


def _clients(natural: bool, unseen: int, facts: Facts) -> list[str]:
    if natural:
        return [
            "# Clients that never train. The model is evaluated on them as well.",
            _key("unseen_clients", unseen),
        ]
    return [
        "# The rows have no client column, so they are divided at random among this many",
        '# clients. Other kinds: "dirichlet", "shards" and "category" use a category column.',
        f'partition = {{ kind = "iid", clients = {facts.clients} }}',
    ]


def _columns(columns: Columns) -> list[str]:
    """The columns that the rows have, and those that have to be switched off."""
    unread = ("instruction", "input", "output") if columns.messages else ("messages",)
    named = {field.name: getattr(columns, field.name) for field in fields(columns)}
    return [_key(name, source or "") for name, source in named.items() if name not in unread]


def _key(name: str, value: Any) -> str:
    return tomli_w.dumps({name: value}).strip()


def _relative(file: Path, config: Path) -> str:
    try:
        path = os.path.relpath(file.resolve(), config.resolve().parent)
    except ValueError:  # on another drive of Windows
        return str(file.resolve())
    return Path(path).as_posix()


def _most(lengths: list[int]) -> int:
    return int(np.quantile(lengths, 0.95)) if lengths else 0


def _tokens(characters: int) -> int:
    return -(-characters // _CHARACTERS_PER_TOKEN)


def _limit(tokens: int) -> int:
    return next((limit for limit in LENGTHS if limit >= tokens), LENGTHS[-1])
