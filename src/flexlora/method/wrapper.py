"""A method around another: it is the other one in all that it does not change."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from flexlora.lowrank import Adapter, Factors, Parametrization
from flexlora.method.averager import Cohort, Mean, Weights
from flexlora.method.interface import (
    Client,
    Download,
    Feature,
    FreshAdapters,
    Info,
    Method,
    RoundContext,
    State,
    Turn,
    UploadSpec,
)
from flexlora.method.truncation import Truncation


class MethodWrapper(Method):
    """Passes every decision to ``inner``; a wrapper defines those that it changes, and no others.

    Abstract: a wrapper says what it wraps, and what people call that which it adds.
    """

    @property
    @abstractmethod
    def wrapped(self) -> Method:
        """The method inside."""

    @property
    @abstractmethod
    def label(self) -> str:
        """What stands behind the inner method's title; empty if nothing should."""

    @property
    def info(self) -> Info:
        """The inner method's, with the label in its title."""
        info = self.wrapped.info
        return replace(info, title=f"{info.title}; {self.label}") if self.label else info

    @property
    def features(self) -> frozenset[Feature]:
        """The inner method's."""
        return self.wrapped.features

    @property
    def needs(self) -> frozenset[Mean]:
        """The inner method's."""
        return self.wrapped.needs

    @property
    def weights(self) -> Weights:
        """The inner method's."""
        return self.wrapped.weights

    @property
    def truncation(self) -> Truncation:
        """The inner method's."""
        return self.wrapped.truncation

    def start(self, fresh: Adapter, context: RoundContext) -> State:
        """As the inner method does."""
        return self.wrapped.start(fresh, context)

    def handout(self, state: State, client: Client, context: RoundContext) -> Download:
        """As the inner method does."""
        return self.wrapped.handout(state, client, context)

    def prepare(
        self, download: Download, private: Mapping[str, Adapter], fresh: FreshAdapters
    ) -> Download:
        """As the inner method does."""
        return self.wrapped.prepare(download, private, fresh)

    def select(self, download: Download, probed: Adapter) -> Mapping[str, Sequence[int]]:
        """As the inner method does."""
        return self.wrapped.select(download, probed)

    def parametrize(self, start: Download) -> Mapping[str, Parametrization] | None:
        """As the inner method does."""
        return self.wrapped.parametrize(start)

    def penalty(self, current: Mapping[str, Factors], start: Download) -> Tensor | None:
        """As the inner method does."""
        return self.wrapped.penalty(current, start)

    def upload_from(self, turn: Turn) -> Adapter:
        """As the inner method does."""
        return self.wrapped.upload_from(turn)

    def aux_from(self, turn: Turn) -> Mapping[str, Adapter]:
        """As the inner method does."""
        return self.wrapped.aux_from(turn)

    def untrained(self, download: Download, context: RoundContext) -> Adapter:
        """As the inner method does."""
        return self.wrapped.untrained(download, context)

    def private_from(self, turn: Turn) -> Mapping[str, Adapter]:
        """As the inner method does."""
        return self.wrapped.private_from(turn)

    def upload_spec(self, state: State, client: Client, context: RoundContext) -> UploadSpec:
        """As the inner method does."""
        return self.wrapped.upload_spec(state, client, context)

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """As the inner method does."""
        return self.wrapped.aggregate(state, cohort, context)

    def global_adapter(self, state: State, context: RoundContext) -> Adapter:
        """As the inner method does."""
        return self.wrapped.global_adapter(state, context)
