"""Clients that do not all train the same modules: each module's mean is over its trainers.

A phone may train only the attention, a data centre the feed-forward blocks as well. Modules that
a client does not train are neither handed to it nor sent by it; in a round in which no client
trains a module, it stays as it is.

Differs from a truncation to rank 0, which would count such a client with an update of zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flexlora.method import partial_step
from flexlora.method.averager import Cohort
from flexlora.method.features import require
from flexlora.method.interface import (
    Client,
    Download,
    Feature,
    Method,
    RoundContext,
    State,
    UploadSpec,
)
from flexlora.method.wrapper import MethodWrapper
from flexlora.model import kind


@dataclass(frozen=True)
class MixedModules(MethodWrapper):
    """A method among clients whose ``ranks`` name only some of the modules."""

    inner: Method

    @property
    def wrapped(self) -> Method:
        """The method inside."""
        return self.inner

    @property
    def label(self) -> str:
        """None: the method is the same."""
        return ""

    def handout(self, state: State, client: Client, context: RoundContext) -> Download:
        """The method's, of the client's modules; base updates are of all modules."""
        part = context.only(client.ranks)
        download = self.inner.handout(state.only(client.ranks), client, part)
        if not state.merge_log.updates:
            return download
        return replace(download, base_updates=state.merge_log.pending(client.id))

    def upload_spec(self, state: State, client: Client, context: RoundContext) -> UploadSpec:
        """The method's, of the client's modules."""
        part = context.only(client.ranks)
        return self.inner.upload_spec(state.only(client.ranks), client, part)

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """The method's, for attention and for feed-forward modules from their trainers."""
        if all(len(cohort.ranks(module)) == len(cohort.clients) for module in context.ranks):
            return self.inner.aggregate(state, cohort, context)
        groups = _by_block(list(context.ranks)).values()
        parts = [
            partial_step.aggregate(self.inner, state, cohort, context, modules)
            for modules in groups
        ]
        return partial_step.joined(state, parts, context)


def for_mixed_modules(method: Method) -> MixedModules:
    """The method for clients that train different modules.

    Raises:
        ConfigError: it aggregates all modules at once.
    """
    require(
        method,
        Feature.PER_MODULE,
        "every client must train all modules; give every rank type an attention and a "
        "feed_forward rank of at least 1",
    )
    return MixedModules(method)


def _by_block(modules: Sequence[str]) -> dict[str, list[str]]:
    """The modules of attention and those of feed-forward blocks, as far as there are any."""
    blocks: dict[str, list[str]] = {}
    for module in modules:
        blocks.setdefault(kind(module), []).append(module)
    return blocks
