"""Greedy decoding of many prompts at once: shared prefixes are computed once, and finished
sequences leave the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from flexlora.data import Forest, Int32s, Pack
from flexlora.evaluation.kv_cache import DecodeStep, Prefill, SequenceGroup
from flexlora.evaluation.prefix_tree import Path, PrefixNode, groups, tree
from flexlora.journal import Meter
from flexlora.model import AttentionPass, Base

_SLACK: Final = {torch.float32: 1e-3}
_SLACK_OF_HALF: Final = 0.25
"""How far, in standard deviations of the logits, rounding may part two nearly equal ones."""


class UncachedLayersError(Exception):
    """Some layers of a model keep what they have read in another way than as keys and values."""


def checked(
    base: Base,
    prompts: Sequence[Int32s],
    max_new_tokens: int,
    stops: Sequence[int],
    batch_tokens: int,
    adapters: int = 1,
    meter: Meter | None = None,
) -> list[list[list[int]]] | None:
    """The answers of ``decode``, or None if the model's caches do not give its own answers.

    The longest prompt's answer is checked: every token must be the most likely one when prompt
    and answer are computed in one row without a cache, up to rounding.
    """
    try:
        answers = decode(base, prompts, max_new_tokens, stops, batch_tokens, adapters, meter)
    except UncachedLayersError:
        return None
    longest = max(range(len(prompts)), key=lambda prompt: len(prompts[prompt]))
    first = answers[0][longest]
    return answers if _is_likeliest(base, prompts[longest].tolist(), first) else None


def _is_likeliest(base: Base, prompt: list[int], answer: list[int]) -> bool:
    """Whether the first adapter's answer is the most likely one, computed in one row."""
    ids = torch.tensor([*prompt, *answer])
    tokens, at = torch.arange(len(ids)), torch.arange(len(prompt) - 1, len(ids) - 1)
    labels = ids[len(prompt) :]
    forest = Forest((0, len(ids)), (-1,))
    row = Pack(ids[None], tokens[None], forest, at, labels, torch.zeros_like(at))
    with torch.inference_mode(), base.only(0):
        logits = base.logits(row).float().cpu()
    chosen = logits.gather(1, labels[:, None])[:, 0]
    slack = _SLACK.get(base.model.dtype, _SLACK_OF_HALF) * logits.std(dim=-1)
    return bool((chosen >= logits.amax(dim=-1) - slack).all())


def decode(
    base: Base,
    prompts: Sequence[Int32s],
    max_new_tokens: int,
    stops: Sequence[int],
    batch_tokens: int,
    adapters: int = 1,
    meter: Meter | None = None,
) -> list[list[list[int]]]:
    """The ids that follow each prompt, ``answers[adapter][prompt]``, the stop token included.

    ``base`` has ``adapters`` adapters attached (1 also stands for none), and each of them
    answers every prompt. The prompts are read as a prefix tree in one row, so that shared
    tokens are computed once; after that every sequence is one row of the batch. Finished
    sequences leave the batch, and the next prompts use their room. ``batch_tokens`` bounds the
    tokens in the key-value caches of all adapters, with room for the answers. ``meter`` counts
    answers, an unfinished one by its share of tokens.

    Raises:
        UncachedLayersError: not every layer of the model has an attention that calls this module.
    """
    room = batch_tokens // adapters
    nodes = tree(prompts)
    waiting = groups(nodes, max_new_tokens, room)
    answers: list[list[list[int]]] = [[[] for _ in prompts] for _ in range(adapters)]
    active: list[SequenceGroup] = []
    finished, counted = 0, 0.0
    with torch.inference_mode():
        while waiting or active:
            admitted = _admitted(waiting, nodes, active, max_new_tokens, room)
            del waiting[: len(admitted)]
            if admitted:
                advanced = _prefill(base, prompts, nodes, admitted, max_new_tokens, adapters)
                active += advanced
            else:
                advanced = active
                _step(base, active, adapters)
            for group in advanced:
                group.finish_ended(stops, max_new_tokens)
            for group in (group for group in advanced if not group.unfinished):
                finished += len(group.prompts)
                for prompt, answer in zip(group.prompts, group.answers, strict=True):
                    answers[group.adapter][prompt] = answer
            active = [group for group in active if group.unfinished]
            if meter is not None:
                in_parts = sum(_answered(group, max_new_tokens) for group in active)
                counted, before = finished + in_parts, counted
                meter.advance(counted - before)
    return answers


def _answered(group: SequenceGroup, new: int) -> float:
    """How many answers of a group are written, an unfinished one by its share of tokens."""
    shares = (
        (group.lengths[n] + len(group.answers[n])) / (group.lengths[n] + new)
        for n in group.unfinished
    )
    return len(group.prompts) - len(group.unfinished) + sum(shares)


def _admitted(
    waiting: Sequence[list[Path]],
    nodes: Sequence[PrefixNode],
    active: Sequence[SequenceGroup],
    new: int,
    room: int,
) -> list[list[Path]]:
    """The next groups for which there is room beside the active ones; one if none is active."""
    used: dict[int, int] = {}
    for group in active:
        used[group.adapter] = used.get(group.adapter, 0) + group.capacity
    most = max(used.values(), default=0)
    admitted: list[list[Path]] = []
    for paths in waiting:
        most += sum(nodes[n].tokens for n in set().union(*paths)) + new * len(paths)
        if most > room and (active or admitted):
            break
        admitted.append(paths)
    return admitted


def _prefill(
    base: Base,
    prompts: Sequence[Int32s],
    nodes: Sequence[PrefixNode],
    admitted: Sequence[list[Path]],
    new: int,
    adapters: int,
) -> list[SequenceGroup]:
    """Read the prompts of some groups, once per adapter, and compute their first tokens."""
    path_of = {
        path[end]: path[: end + 1] for g in admitted for path in g for end in range(len(path))
    }
    edges = np.cumsum([0, *(nodes[n].tokens for n in path_of)]).tolist()
    spans = {n: slice(a, b) for n, a, b in zip(path_of, edges[:-1], edges[1:], strict=True)}
    row = [nodes[n] for n in path_of]
    ids = np.concatenate([prompts[node.prompt][node.start : node.end] for node in row])
    positions = np.concatenate([np.arange(node.start, node.end) for node in row])
    started = [
        SequenceGroup.of(adapter, paths, nodes, new, base.device)
        for adapter in range(adapters)
        for paths in admitted
    ]
    tokens = _next_tokens(
        base,
        torch.from_numpy(ids.astype(np.int64)).expand(adapters, -1),
        torch.from_numpy(positions).expand(adapters, -1),
        torch.tensor([spans[path[-1]].stop - 1 for paths in admitted for path in paths]),
        Prefill.of(started, spans, path_of, nodes, base.device),
    )
    _check_layers(base, started[0])
    first = iter(tokens)
    for group in started:
        group.answers = [[next(first)] for _ in group.prompts]
    return started


def _step(base: Base, active: Sequence[SequenceGroup], adapters: int) -> None:
    """Compute one more token for every unfinished sequence.

    Every adapter's part of the batch is as long as the longest, because the adapters share the
    batch equally.
    """
    sizes = [
        sum(len(group.unfinished) for group in active if group.adapter == adapter)
        for adapter in range(adapters)
    ]
    ids, positions = torch.zeros(2, adapters * max(sizes), dtype=torch.int64)
    free = [adapter * max(sizes) for adapter in range(adapters)]
    rows = []
    for group in active:
        start = free[group.adapter]
        free[group.adapter] = end = start + len(group.unfinished)
        ids[start:end] = torch.tensor([group.answers[s][-1] for s in group.unfinished])
        positions[start:end] = torch.tensor([group.position(s) for s in group.unfinished])
        rows.append(slice(start, end))
    masks = [group.extended_mask() for group in active]
    at = torch.zeros(1, dtype=torch.int64)
    step = DecodeStep(active, rows, masks)
    tokens = _next_tokens(base, ids[:, None], positions[:, None], at, step)
    for group, group_rows in zip(active, rows, strict=True):
        group.filled += len(group.unfinished)
        for sequence, token in zip(group.unfinished, tokens[group_rows], strict=True):
            group.answers[sequence].append(token)


def _next_tokens(
    base: Base, ids: Tensor, positions: Tensor, at: Tensor, attention_pass: AttentionPass
) -> list[int]:
    """The most likely token after each of the positions ``at`` (n,) of each row, row by row.

    ``ids`` and ``positions`` are (rows, tokens); the result has rows * n ids.
    """
    logits = base.logits_at(ids, positions, at, attention_pass)
    tokens: list[int] = logits.argmax(-1).flatten().tolist()
    return tokens


def _check_layers(base: Base, group: SequenceGroup) -> None:
    config: Any = base.model.config
    if len(group.keys) != config.get_text_config().num_hidden_layers:
        raise UncachedLayersError(base.name)
