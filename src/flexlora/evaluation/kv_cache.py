"""Attention while prompts are read and continued: over trees of tokens, without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from flexlora.evaluation.prefix_tree import Node


@dataclass(eq=False)
class Family:
    """Answers in the making that one adapter writes over common keys and values.

    ``prompts`` are their numbers and ``lengths`` their tokens; ``nodes`` is what is kept of
    them. ``keys`` and ``values`` are by layer (1, key heads, places, head size), and
    ``filled`` of the places hold something. Member i may see the places where ``seen[i]``
    (members, places) is true; a new token takes the next free one. ``alive`` are the members
    that go on.
    """

    part: int
    prompts: list[int]
    lengths: list[int]
    nodes: list[int]
    seen: Tensor
    filled: int
    alive: list[int]
    answers: list[list[int]] = field(default_factory=list)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        part: int,
        ways: Sequence[Sequence[int]],
        nodes: Sequence[Node],
        new: int,
        device: torch.device,
    ) -> Family:
        """Members by their ways through the tree, with room for ``new`` tokens of each."""
        held = list(dict.fromkeys(node for way in ways for node in way))
        sizes = torch.tensor([nodes[node].tokens for node in held])
        filled = int(sizes.sum())
        seen = torch.zeros(len(ways), filled + new * len(ways), dtype=torch.bool)
        for member, way in enumerate(ways):
            mine = torch.tensor([node in way for node in held])
            seen[member, :filled] = mine.repeat_interleave(sizes)
        leaves = [nodes[way[-1]] for way in ways]
        return cls(
            part=part,
            prompts=[leaf.prompt for leaf in leaves],
            lengths=[leaf.end for leaf in leaves],
            nodes=held,
            seen=seen.to(device),
            filled=filled,
            alive=list(range(len(ways))),
        )

    @property
    def places(self) -> int:
        """For how many tokens there is room."""
        return self.seen.shape[1]

    def position(self, member: int) -> int:
        """The position, from 0, of the last token that a member has written."""
        return self.lengths[member] + len(self.answers[member]) - 1

    def opened(self) -> Tensor:
        """What the members alive may see, (alive, places), once each has a place more."""
        alive = torch.tensor(self.alive, device=self.seen.device)
        end = self.filled + len(alive)
        self.seen[alive, torch.arange(self.filled, end, device=alive.device)] = True
        return self.seen[alive, :end]

    def leave(self, stops: Sequence[int], most: int) -> None:
        """Members that wrote a stop, or as many as ``most`` tokens, are done."""
        self.alive = [
            member
            for member in self.alive
            if self.answers[member][-1] not in stops and len(self.answers[member]) < most
        ]


class Reading(Protocol):
    """What attention does in one pass of the model."""

    @property
    def longest(self) -> int:
        """The number of tokens that the longest prompt, answer included, has by now."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """From (batch, heads, tokens, head size) to (batch, tokens, heads, head size)."""


@dataclass(frozen=True, eq=False)
class Prefill:
    """A tree of prompts in one row, for every adapter; families keep what they need of it.

    ``spans[n]`` is where node n lies in the row, ``ways[n]`` the nodes from its root to it.
    ``masks[n]`` is what its tokens may see of its way, None for a root.
    """

    families: Sequence[Family]
    spans: Mapping[int, slice]
    ways: Mapping[int, Sequence[int]]
    masks: Mapping[int, Tensor | None]

    @classmethod
    def of(
        cls,
        families: Sequence[Family],
        spans: Mapping[int, slice],
        ways: Mapping[int, Sequence[int]],
        nodes: Sequence[Node],
        device: torch.device,
    ) -> Prefill:
        """With the masks of the nodes: all of their ancestors, and causal from there on."""
        masks: dict[int, Tensor | None] = {}
        for n, way in ways.items():
            shape = nodes[n].tokens, nodes[n].end
            ones = torch.ones(shape, dtype=torch.bool, device=device)
            masks[n] = ones.tril(nodes[n].start) if len(way) > 1 else None
        return cls(families, spans, ways, masks)

    @property
    def longest(self) -> int:
        """The number of tokens of the longest prompt."""
        return max(max(family.lengths) for family in self.families)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Each node attends to its way; one kernel call for each."""
        out = q.new_empty(*q.shape[:3], v.shape[3])
        for node, span in self.spans.items():
            way = self.ways[node]
            out[:, :, span] = _attended(
                q[:, :, span], self._of(k, way), self._of(v, way), self.masks[node], scale
            )
        for family in self.families:
            for kept, states in ((family.keys, k), (family.values, v)):
                mine = self._of(states[family.part, None], family.nodes)
                kept[layer] = F.pad(mine, (0, 0, 0, family.places - family.filled))
        return out.transpose(1, 2)

    def _of(self, states: Tensor, nodes: Sequence[int]) -> Tensor:
        if len(nodes) == 1:
            return states[:, :, self.spans[nodes[0]]]
        return torch.cat([states[:, :, self.spans[node]] for node in nodes], dim=2)


@dataclass(frozen=True, eq=False)
class Step:
    """One new token of every member alive, each in a row of the batch.

    ``rows[i]`` are the rows of family i, ``masks[i]`` what they may see (``Family.opened``).
    A row of no family only fills its part up; what comes out of it is of no meaning.
    """

    families: Sequence[Family]
    rows: Sequence[slice]
    masks: Sequence[Tensor]

    @property
    def longest(self) -> int:
        """The number of tokens of the longest prompt with its answer."""
        return 1 + max(family.position(m) for family in self.families for m in family.alive)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """One kernel call for each family, of which the members are queries side by side."""
        out = q.new_zeros(q.shape[0], 1, q.shape[1], v.shape[3])
        for family, rows, mask in zip(self.families, self.rows, self.masks, strict=True):
            keys, values, end = family.keys[layer], family.values[layer], mask.shape[1]
            keys[0, :, family.filled : end] = k[rows, :, 0].transpose(0, 1)
            values[0, :, family.filled : end] = v[rows, :, 0].transpose(0, 1)
            members = q[rows, :, 0].transpose(0, 1)[None]
            got = _attended(members, keys[:, :, :end], values[:, :, :end], mask, scale)
            out[rows, 0] = got[0].transpose(0, 1)
        return out


def _attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Attention of (batch, heads, tokens, head size) under a mask, without one causal."""
    attention = F.scaled_dot_product_attention
    if mask is None:
        return attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    # Heads that share a key head become queries of it: under a mask CUDA's fast kernels do
    # not know groups, and repeating the keys would cost more than the attention itself.
    batch, heads, tokens, _ = q.shape
    groups = heads // k.shape[1]
    folded = q.reshape(batch, k.shape[1], groups * tokens, -1)
    got = attention(folded, k, v, attn_mask=mask.repeat(groups, 1), scale=scale)
    return got.reshape(batch, heads, tokens, -1)
