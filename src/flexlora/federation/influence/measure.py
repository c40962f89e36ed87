"""How far uploads are from those of clients that learnt nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flexlora import wire
from flexlora.federation.client_store import file_name
from flexlora.federation.prepared import PreparedRun
from flexlora.lowrank import Adapter, parameter_change, product_change
from flexlora.method import (
    Client,
    Download,
    Feature,
    Mean,
    Method,
    State,
    Upload,
    comparable,
    in_parallel,
)
from flexlora.storage.untrusted import RefusalCode

PRODUCT = "product"
"""The kind of change that is measured in products ``B A``. The others name the factors that
travel, "BA", "B" or "A", or an adapter beside them, and are measured in their parameters."""
BESIDE = "beside "

IN_PRODUCTS = frozenset({Mean.PRODUCTS, Mean.PRODUCTS_BY_COMPONENT})

LARGEST_CANCELLATION = 1e4
"""The largest ``|B| |A| / |B A|`` of a module: float32 keeps few digits of a product beyond it."""

Norms = Mapping[str, Mapping[str, float]]
"""By kind and module."""


@dataclass(frozen=True)
class Change:
    """How much one upload changes: norms by kind and module.

    ``usual`` is what such norms are in proportion to at this client's ranks, so that clients of
    unequal ranks can be compared. ``bounding`` are the kinds that the aggregate is made of; a
    change of another kind only tells a hostile upload. ``cancelling`` are the modules whose
    product is what is left of much larger terms.
    """

    norms: Norms
    usual: Norms
    bounding: frozenset[str]
    cancelling: Sequence[str] = ()

    @cached_property
    def relative(self) -> Norms:
        """The norms in units of what is usual."""
        return {
            kind: {m: norm / self.usual[kind][m] for m, norm in norms.items()}
            for kind, norms in self.norms.items()
        }


@dataclass(frozen=True)
class Starts:
    """The uploads that the clients of a round would send if they learnt nothing.

    ``folder`` has the downloads that clients of equal ranks share, where they are made for the
    requests; others are made again.
    """

    prepared: PreparedRun
    number: int
    state: State
    folder: Path

    def of(self, client: Client) -> tuple[Download, Adapter]:
        """A client's download as it travels, and its upload without training."""
        method, context = self.prepared.method, self.prepared.context(self.number)
        if Feature.SAME_FOR_EQUAL_RANKS in method.features:
            download = wire.open_download(self._file(client))
        else:
            download = method.handout(self.state, client, context)
            rounded = download.adapter.to(self.prepared.wire_dtype)
            download = Download(
                rounded, download.frozen, component_ids=download.component_ids, ints=download.ints
            )
        return download, method.untrained(download, context)

    def _file(self, client: Client) -> Path:
        path = download_file(self.folder, client)
        if not path.exists():
            method, context = self.prepared.method, self.prepared.context(self.number)
            download = method.handout(self.state, client, context)
            self.folder.mkdir(exist_ok=True)
            sparse = Feature.SPARSE_MESSAGES in method.features
            path.write_bytes(wire.encode_download(download, self.prepared.wire_dtype, sparse))
        return path


def download_file(folder: Path, client: Client) -> Path:
    """Where the download of all clients of these ranks lies."""
    return folder / f"{file_name(client.rank_type)}.safetensors"


def kinds_of(method: Method) -> tuple[bool, bool]:
    """Whether a method's aggregate is made of products, and whether it is made of factors.

    One that reads single uploads, or names no mean, may make it of both.
    """
    both = Mean.UPLOADS in method.needs or not method.needs
    products = both or bool(method.needs & IN_PRODUCTS)
    return products, both or bool(method.needs - IN_PRODUCTS - {Mean.AUX_FACTORS})


def measured(upload: Upload, client: Client, starts: Starts) -> Change:
    """How much an upload changes, by the Gram matrices of its factors; reads each tensor once.

    Costs O(rank^2 (out + in)) for each module where products count, else one pass.

    Raises:
        RefusedMessage: it numbers other components than the client was given to train.
    """
    prepared = starts.prepared
    download, start = starts.of(client)
    for module, ids in download.component_ids.items():
        if list(upload.component_ids.get(module, ())) != list(ids):
            raise wire.RefusedMessage(
                RefusalCode.WRONG_COMPONENTS,
                f"The upload of client {client.id!r} for round {upload.round}: module {module!r} "
                "numbers other components than the client was given.",
            )
    in_products, in_factors = kinds_of(prepared.method)

    def of_module(module: str) -> tuple[dict[str, tuple[float, float]], bool]:
        f = upload.adapter[module]
        base = comparable(f, start, module)
        factors = ("B" if f.shape[0] else "") + ("A" if f.shape[1] else "")
        rank = max(f.rank, 1)
        is_vector = factors == "B" and f.shape[0] != prepared.shapes[module][0]
        scale = 1.0 if is_vector else _scale(prepared, download, module, rank)
        whole = _usual(factors, rank, scale)
        if not in_products or factors != "BA":
            return {factors: (parameter_change(f, base), whole)}, False
        product = product_change(f, base)
        changes = {
            factors: (product.parameters, whole),
            PRODUCT: (product.norm, _usual("B", rank, scale)),
        }
        return changes, product.cancels > LARGEST_CANCELLATION

    modules = list(upload.adapter)
    norms: dict[str, dict[str, float]] = {}
    usual: dict[str, dict[str, float]] = {}
    cancelling = []
    for module, (changes, cancels) in zip(modules, in_parallel(of_module, modules), strict=True):
        for kind, (norm, size) in changes.items():
            norms.setdefault(kind, {})[module] = norm
            usual.setdefault(kind, {})[module] = size
        cancelling += [module] if cancels else []
    for name, adapter in upload.aux.items():
        kind = BESIDE + name
        norms[kind] = {module: parameter_change(f) for module, f in adapter.items()}
        usual[kind] = {module: max(f.rank, 1) ** 0.5 for module, f in adapter.items()}
    bounding = [kind for kind in norms if in_factors or kind == PRODUCT or kind.startswith(BESIDE)]
    if not in_products:
        bounding = [kind for kind in bounding if kind != PRODUCT]
    return Change(norms, usual, frozenset(bounding), cancelling)


def _scale(prepared: PreparedRun, download: Download, module: str, rank: int) -> float:
    """The LoRA scale at which a client trains this module."""
    if Feature.PROBES in prepared.method.features:
        rank = download.adapter.rank(module)
    elif download.component_ids and download.frozen is not None:
        rank += download.frozen.rank(module)
    return prepared.experiment.training.scale(rank)


def _usual(factors: str, rank: int, scale: float) -> float:
    """What the change of these factors is in proportion to, where clients train with Adam.

    Every number of a factor moves by about the learning rate, in ``B`` times the LoRA scale. The
    product's change is mostly that of ``B``: the rows of ``A`` have much the same norm.
    """
    squares = {"B": scale**2, "A": 1.0, "BA": (1 + scale**2) / 2, "": 1.0}
    return math.sqrt(rank * squares[factors])
