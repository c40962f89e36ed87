"""Greedy decoding of many prompts at once: what they share is read once, ended rows leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from flexlora.data import Int32s
from flexlora.evaluation.kv_cache import Family, Prefill, Reading, Step
from flexlora.evaluation.prefix_tree import Node, families, tree
from flexlora.model import Base

READING: Final = "flexlora_reading"
"""Our attention over trees of prompts, and over what was kept of them."""

Ways = list[list[int]]
"""A family to be: of each member the nodes from a root to its prompt."""


def decode(
    base: Base,
    prompts: Sequence[Int32s],
    max_new_tokens: int,
    stops: Sequence[int],
    batch_tokens: int,
    parts: int = 1,
) -> list[list[list[int]]]:
    """The ids that follow each prompt, ``found[part][prompt]``, the stop included.

    ``base`` has ``parts`` adapters attached, and each of them answers every prompt. The
    prompts lie in one row as a tree, so that a token which several begin with is computed
    once; after that every answer is one row. Ended answers leave the batch, and where they
    make room the next prompts come in. ``batch_tokens`` bounds the tokens of which keys and
    values are held, room for the answers included, over all adapters.

    Raises:
        ValueError: the model does not attend as ours does; see ``_attend``.
    """
    room = batch_tokens // parts
    nodes = tree(prompts)
    waiting = families(nodes, max_new_tokens, room)
    found: list[list[list[int]]] = [[[] for _ in prompts] for _ in range(parts)]
    live: list[Family] = []
    with _attention(base), torch.inference_mode():
        while waiting or live:
            coming = _admitted(waiting, nodes, live, max_new_tokens, room)
            del waiting[: len(coming)]
            if coming:
                new = _prefill(base, prompts, nodes, coming, max_new_tokens, parts)
                live += new
            else:
                new = live
                _step(base, live, parts)
            for family in new:
                family.leave(stops, max_new_tokens)
            for family in (family for family in new if not family.alive):
                for prompt, answer in zip(family.prompts, family.answers, strict=True):
                    found[family.part][prompt] = answer
            live = [family for family in live if family.alive]
    return found


def _admitted(
    waiting: Sequence[Ways], nodes: Sequence[Node], live: Sequence[Family], new: int, room: int
) -> list[Ways]:
    """The families for which there is room beside those that go on; one if there are none."""
    taken: dict[int, int] = {}
    for family in live:
        taken[family.part] = taken.get(family.part, 0) + family.places
    most = max(taken.values(), default=0)
    coming: list[Ways] = []
    for ways in waiting:
        most += sum(nodes[n].tokens for n in set().union(*ways)) + new * len(ways)
        if most > room and (live or coming):
            break
        coming.append(ways)
    return coming


def _prefill(
    base: Base,
    prompts: Sequence[Int32s],
    nodes: Sequence[Node],
    coming: Sequence[Ways],
    new: int,
    parts: int,
) -> list[Family]:
    """Read the prompts of some families, once for each adapter; their answers begin."""
    ways = {way[end]: way[: end + 1] for f in coming for way in f for end in range(len(way))}
    edges = np.cumsum([0, *(nodes[n].tokens for n in ways)]).tolist()
    spans = {n: slice(a, b) for n, a, b in zip(ways, edges[:-1], edges[1:], strict=True)}
    held = [nodes[n] for n in ways]
    ids = np.concatenate([prompts[node.prompt][node.start : node.end] for node in held])
    positions = np.concatenate([np.arange(node.start, node.end) for node in held])
    began = [
        Family.of(part, family, nodes, new, base.device)
        for part in range(parts)
        for family in coming
    ]
    tokens = _next_tokens(
        base,
        torch.from_numpy(ids.astype(np.int64)).expand(parts, -1),
        torch.from_numpy(positions).expand(parts, -1),
        torch.tensor([spans[way[-1]].stop - 1 for family in coming for way in family]),
        Prefill.of(began, spans, ways, nodes, base.device),
    )
    _check_layers(base, began[0])
    first = iter(tokens)
    for family in began:
        family.answers = [[next(first)] for _ in family.prompts]
    return began


def _step(base: Base, live: Sequence[Family], parts: int) -> None:
    """One more token for every member alive.

    Each part of the batch is as long as the longest, because the adapters share it equally.
    """
    sizes = [sum(len(f.alive) for f in live if f.part == part) for part in range(parts)]
    ids, positions = torch.zeros(2, parts * max(sizes), dtype=torch.int64)
    free = [part * max(sizes) for part in range(parts)]
    rows = []
    for family in live:
        start = free[family.part]
        free[family.part] = end = start + len(family.alive)
        ids[start:end] = torch.tensor([family.answers[m][-1] for m in family.alive])
        positions[start:end] = torch.tensor([family.position(m) for m in family.alive])
        rows.append(slice(start, end))
    masks = [family.opened() for family in live]
    at = torch.zeros(1, dtype=torch.int64)
    reading = Step(live, rows, masks)
    tokens = _next_tokens(base, ids[:, None], positions[:, None], at, reading)
    for family, mine in zip(live, rows, strict=True):
        family.filled += len(family.alive)
        for member, token in zip(family.alive, tokens[mine], strict=True):
            family.answers[member].append(token)


def _next_tokens(
    base: Base, ids: Tensor, positions: Tensor, at: Tensor, reading: Reading
) -> list[int]:
    """The likeliest token after each place ``at`` of each row (rows, tokens), row by row."""
    device = base.device
    out = base.model(
        input_ids=ids.to(device),
        position_ids=positions.to(device),
        # transformers takes a 4-D mask as it is, and our attention does without.
        attention_mask=torch.empty(1, 1, 0, 0),
        logits_to_keep=at.to(device),
        use_cache=False,
        reading=reading,
    )
    tokens: list[int] = out.logits.argmax(-1).flatten().tolist()
    return tokens


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    reading: Reading,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer.

    Raises:
        ValueError: the layer caps its scores, has sinks, or a window narrower than a prompt.
    """
    window = options.get("sliding_window")
    other = [name for name in ("softcap", "s_aux") if options.get(name) is not None]
    if other or (window and reading.longest > window):
        raise ValueError(
            f"This model's attention uses {other or 'a sliding window'}, which the default "
            "attention cannot do; set model.attention to 'eager'."
        )
    layer: Any = module.layer_idx
    return reading.attend(layer, query, key, value, scaling), None


def _check_layers(base: Base, family: Family) -> None:
    config: Any = base.model.config
    layers = config.get_text_config().num_hidden_layers
    if len(family.keys) != layers:
        raise ValueError(
            f"Only {len(family.keys)} of the {layers} layers of {base.name} attend in a way that "
            "the default attention knows; set model.attention to 'sdpa' or 'eager'."
        )


@contextmanager
def _attention(base: Base) -> Iterator[None]:
    """The model with our attention, and with its own again afterwards."""
    transformers.AttentionInterface.register(READING, _attend)
    config = base.model.config
    own = config._attn_implementation
    config._attn_implementation = READING
    try:
        yield
    finally:
        config._attn_implementation = own
