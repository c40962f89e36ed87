"""A method around another: it is the other one in all that it does not change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from flexlora.lowrank import Adapter, Factors, Form
from flexlora.method.interface import Client, Download, Draw, Expected, Fresh, Method, State, Upload


@dataclass(frozen=True)
class MethodWrapper(Method):
    """Hands every decision to ``method``; a kind changes those it is about, and no others.

    What a method declares of itself is what the inner one declares.
    """

    method: Method

    def __post_init__(self) -> None:
        for declared in Method.__annotations__:
            object.__setattr__(self, declared, getattr(self.method, declared))

    @property
    def by_rank_alone(self) -> bool:
        """As the inner method says."""
        return self.method.by_rank_alone

    def start(self, adapter: Adapter) -> State:
        """As the inner method does."""
        return self.method.start(adapter)

    def handout(self, state: State, client: Client, draw: Draw) -> Download:
        """As the inner method does."""
        return self.method.handout(state, client, draw)

    def receive(self, download: Download, kept: Adapter | None, fresh: Fresh) -> Download:
        """As the inner method does."""
        return self.method.receive(download, kept, fresh)

    def choose(self, download: Download, probed: Adapter) -> Mapping[str, Sequence[int]]:
        """As the inner method does."""
        return self.method.choose(download, probed)

    def form(self, start: Download) -> Mapping[str, Form] | None:
        """As the inner method does."""
        return self.method.form(start)

    def penalty(self, now: Mapping[str, Factors], start: Download) -> Tensor | None:
        """As the inner method does."""
        return self.method.penalty(now, start)

    def shares(self, start: Download, trained: Adapter) -> Adapter:
        """As the inner method does."""
        return self.method.shares(start, trained)

    def keeps(self, start: Download, trained: Adapter) -> Adapter | None:
        """As the inner method does."""
        return self.method.keeps(start, trained)

    def expects(
        self, state: State, client: Client, shapes: Mapping[str, tuple[int, int]]
    ) -> Mapping[str, Expected]:
        """As the inner method does."""
        return self.method.expects(state, client, shapes)

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """As the inner method does."""
        return self.method.aggregate(state, uploads)

    def update(self, state: State) -> Adapter:
        """As the inner method does."""
        return self.method.update(state)
