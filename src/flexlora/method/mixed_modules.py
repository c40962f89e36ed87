"""Clients that do not all train the same modules: of each module the mean is over its trainers.

A phone may train the attention alone, a data centre the feed-forward blocks as well. Modules
that a client does not train are neither handed to it nor sent by it; in a round in which nobody
trains a module, it stays as it is.

Differs from a truncation to rank 0, which would count such a client with an update of zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flexlora.errors import ConfigError
from flexlora.method import partial_step
from flexlora.method.averaging import log, unmerged
from flexlora.method.interface import Client, Download, Draw, Expected, Method, State, Upload
from flexlora.method.wrapper import MethodWrapper
from flexlora.model import kind


@dataclass(frozen=True)
class MixedModules(MethodWrapper):
    """A method among clients whose ``ranks`` name some of the modules only."""

    def handout(self, state: State, client: Client, draw: Draw) -> Download:
        """The method's, of the client's modules; what is merged for good is of all modules."""
        download = self.method.handout(partial_step.part_of(state, client.ranks), client, draw)
        return replace(download, merge=unmerged(state, client)) if log(state) else download

    def expects(
        self, state: State, client: Client, shapes: Mapping[str, tuple[int, int]]
    ) -> Mapping[str, Expected]:
        """The method's, of the client's modules."""
        theirs = {module: shapes[module] for module in client.ranks}
        return self.method.expects(partial_step.part_of(state, client.ranks), client, theirs)

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The method's, for attention and for feed-forward modules from those who train them."""
        every = set(state.adapters["global"])
        held = [*state.adapters.values(), *(upload.adapter for upload in uploads)]
        if all(every <= set(adapter) for adapter in held):
            return self.method.aggregate(state, uploads)
        found = []
        for modules in _by_kind(list(state.adapters["global"])):
            holders = [upload for upload in uploads if upload.adapter.only(modules)]
            found.append(partial_step.aggregated(self.method, state, holders, modules))
        return partial_step.joined(state, found)


def targeted(method: Method) -> MixedModules:
    """The method for clients that train different modules.

    Raises:
        ConfigError: it decides over all modules at once.
    """
    if not method.by_module:
        raise ConfigError(
            f"{method.title} decides over all modules at once, so that every client must train all "
            "of them; give every rank type an attention and a feed_forward rank of at least 1, or "
            "use a method such as 'flexlora'."
        )
    return MixedModules(method)


def _by_kind(modules: Sequence[str]) -> list[list[str]]:
    """The modules of attention and those of feed-forward blocks, as far as there are any."""
    kinds: dict[str, list[str]] = {}
    for module in modules:
        kinds.setdefault(kind(module), []).append(module)
    return list(kinds.values())
