"""Keys and values of groups of sequences, and attention over them, without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from flexlora.evaluation.prefix_tree import Path, PrefixNode
from flexlora.model import Layer


@dataclass(eq=False)
class SequenceGroup:
    """Sequences that one adapter continues, over one cache of keys and values.

    ``adapter`` is the index of the adapter. ``prompts`` are the indices of the sequences'
    prompts, ``lengths`` the prompts' tokens, and ``nodes`` the nodes of the prefix tree in the
    cache. ``keys`` and ``values`` are by layer (1, key heads, capacity, head size), and the
    first ``filled`` positions are in use; a new token takes the next one. ``visible``
    (sequences, capacity) is true where a slot has a token of a sequence, and ``positions``
    (capacity,) are the positions of the slots' tokens in their sequences. ``unfinished`` are the
    indices of the sequences that continue, and ``answers`` the tokens of each so far.
    """

    adapter: int
    prompts: list[int]
    lengths: list[int]
    nodes: list[int]
    visible: Tensor
    positions: Tensor
    filled: int
    unfinished: list[int]
    answers: list[list[int]] = field(default_factory=list)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        adapter: int,
        paths: Sequence[Path],
        nodes: Sequence[PrefixNode],
        new: int,
        device: torch.device,
    ) -> SequenceGroup:
        """The sequences of these paths, with capacity for ``new`` tokens of each."""
        cached = list(dict.fromkeys(node for path in paths for node in path))
        sizes = torch.tensor([nodes[node].tokens for node in cached])
        filled = int(sizes.sum())
        visible = torch.zeros(len(paths), filled + new * len(paths), dtype=torch.bool)
        for sequence, path in enumerate(paths):
            on_path = torch.tensor([node in path for node in cached])
            visible[sequence, :filled] = on_path.repeat_interleave(sizes)
        leaves = [nodes[path[-1]] for path in paths]
        positions = torch.zeros(visible.shape[1], dtype=torch.int64)
        positions[:filled] = torch.cat([torch.arange(nodes[n].start, nodes[n].end) for n in cached])
        return cls(
            adapter=adapter,
            prompts=[leaf.prompt for leaf in leaves],
            lengths=[leaf.end for leaf in leaves],
            nodes=cached,
            visible=visible.to(device),
            positions=positions.to(device),
            filled=filled,
            unfinished=list(range(len(paths))),
        )

    @property
    def capacity(self) -> int:
        """The number of tokens that fit in the cache."""
        return self.visible.shape[1]

    def position(self, sequence: int) -> int:
        """The position, from 0, of the last token of a sequence."""
        return self.lengths[sequence] + len(self.answers[sequence]) - 1

    def extended_mask(self) -> Tensor:
        """Give each unfinished sequence a slot for its next token; returns their mask.

        The mask is (unfinished, filled + unfinished), true where a slot has a token of a sequence.
        """
        unfinished = torch.tensor(self.unfinished, device=self.visible.device)
        end = self.filled + len(unfinished)
        new = torch.arange(self.filled, end, device=unfinished.device)
        self.visible[unfinished, new] = True
        self.positions[new] = torch.tensor(
            [self.position(sequence) for sequence in self.unfinished], device=new.device
        )
        return self.visible[unfinished, :end]

    def finish_ended(self, stops: Sequence[int], most: int) -> None:
        """Remove from ``unfinished`` the sequences with a stop token or ``most`` new tokens."""
        self.unfinished = [
            sequence
            for sequence in self.unfinished
            if self.answers[sequence][-1] not in stops and len(self.answers[sequence]) < most
        ]


@dataclass(frozen=True, eq=False)
class Prefill:
    """The pass that reads a tree of prompts in one row per adapter and fills the caches.

    ``spans[n]`` are the tokens of node n in the row, ``paths[n]`` the nodes from its root to
    it. ``masks[n]`` (tokens of n, tokens of its path) is true where a token comes after another;
    None for a root, whose attention is causal.
    """

    groups: Sequence[SequenceGroup]
    spans: Mapping[int, slice]
    paths: Mapping[int, Path]
    masks: Mapping[int, Tensor | None]

    @classmethod
    def of(
        cls,
        groups: Sequence[SequenceGroup],
        spans: Mapping[int, slice],
        paths: Mapping[int, Path],
        nodes: Sequence[PrefixNode],
        device: torch.device,
    ) -> Prefill:
        """The pass with the nodes' masks: all tokens of the ancestors, and causal within."""
        masks: dict[int, Tensor | None] = {}
        for n, path in paths.items():
            shape = nodes[n].tokens, nodes[n].end
            ones = torch.ones(shape, dtype=torch.bool, device=device)
            masks[n] = ones.tril(nodes[n].start) if len(path) > 1 else None
        return cls(groups, spans, paths, masks)

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each node attends to its path, in one kernel call per node; fills the caches."""
        out = q.new_empty(*q.shape[:3], v.shape[3])
        for node, span in self.spans.items():
            path = self.paths[node]
            keys, values = self._of_nodes(k, path), self._of_nodes(v, path)
            mask = self._mask(node, keys.shape[2], layer)
            out[:, :, span] = _attended(layer, q[:, :, span], keys, values, mask)
        index: int = cast(Any, layer.module).layer_idx
        for group in self.groups:
            for cache, states in ((group.keys, k), (group.values, v)):
                prompt_states = self._of_nodes(states[group.adapter, None], group.nodes)
                cache[index] = F.pad(prompt_states, (0, 0, 0, group.capacity - group.filled))
        return out.transpose(1, 2)

    def _mask(self, node: int, end: int, layer: Layer) -> Tensor | None:
        """What the tokens of a node see of the ``end`` tokens of its path, by the layer's rule."""
        span, rule = self.spans[node], layer.rule
        if layer.plain and rule.is_causal(end):
            return self.masks[node]
        at = torch.arange(end, device=rule.device)
        return rule.once(node, lambda: rule.visible(at[end - (span.stop - span.start) :], at))

    def _of_nodes(self, states: Tensor, nodes: Sequence[int]) -> Tensor:
        """The states (batch, heads, tokens, head size) of only these nodes' tokens."""
        if len(nodes) == 1:
            return states[:, :, self.spans[nodes[0]]]
        return torch.cat([states[:, :, self.spans[node]] for node in nodes], dim=2)


@dataclass(frozen=True, eq=False)
class DecodeStep:
    """The pass that computes one new token of every unfinished sequence, one per batch row.

    ``rows[i]`` are the batch rows of group i, and ``masks[i]`` its ``extended_mask``. Rows that
    belong to no group only pad an adapter's part of the batch; their output is not used.
    """

    groups: Sequence[SequenceGroup]
    rows: Sequence[slice]
    masks: Sequence[Tensor]

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One kernel call per group, with its sequences as queries; extends the caches."""
        out = q.new_zeros(q.shape[0], 1, q.shape[1], v.shape[3])
        index: int = cast(Any, layer.module).layer_idx
        for number, (group, rows) in enumerate(zip(self.groups, self.rows, strict=True)):
            keys, values, end = group.keys[index], group.values[index], self.masks[number].shape[1]
            keys[0, :, group.filled : end] = k[rows, :, 0].transpose(0, 1)
            values[0, :, group.filled : end] = v[rows, :, 0].transpose(0, 1)
            queries = q[rows, :, 0].transpose(0, 1)[None]
            mask = self._mask(number, layer)
            attended = _attended(layer, queries, keys[:, :, :end], values[:, :, :end], mask)
            out[rows, 0] = attended[0].transpose(0, 1)
        return out

    def _mask(self, number: int, layer: Layer) -> Tensor:
        """What the new tokens of a group see, by the layer's rule."""
        group, mask, rule = self.groups[number], self.masks[number], layer.rule
        longest = 1 + max(group.position(sequence) for sequence in group.unfinished)
        if rule.is_causal(longest):
            return mask
        at = group.positions[: mask.shape[1]]
        return rule.once(number, lambda: mask & rule.visible(at[group.filled :], at))


def _attended(layer: Layer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention under a mask (tokens, keys), or causal attention without one.

    q is (batch, heads, tokens, head size), k and v (batch, key heads, keys, head size); the
    result has the shape of q, with the values' head size.
    """
    attention, scale = F.scaled_dot_product_attention, layer.scale
    if mask is None:
        return attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    if not layer.plain:
        return layer.masked(q, k, v, mask)
    # Heads that share a key head become queries of it: with a mask CUDA's fast kernels do not
    # support grouped heads, and repeating the keys would cost more than the attention itself.
    batch, heads, tokens, _ = q.shape
    groups = heads // k.shape[1]
    grouped = q.reshape(batch, k.shape[1], groups * tokens, -1)
    out = attention(grouped, k, v, attn_mask=mask.repeat(groups, 1), scale=scale)
    return out.reshape(batch, heads, tokens, -1)
