"""A data owner's machine: its rows, its model, its budget, and the turns it takes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from flexlora.config import RankType
from flexlora.data import Corpus, TokenStore
from flexlora.data.corpora import table
from flexlora.deployment import run_spec
from flexlora.deployment.node.capacity import Capacity, Proposal
from flexlora.deployment.node.worker_socket import Answer
from flexlora.deployment.run_spec import RunSpec
from flexlora.errors import ProtocolError
from flexlora.federation import ClientRuntime, ClientStore, LostBase, TurnRequest, turn
from flexlora.method import Download, Feature
from flexlora.model import Base, smollm2
from flexlora.storage.files import write_atomically

_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class NodeConfig:
    """What the owner of the data decides, and no server can change.

    ``name`` is the client's, for good. ``columns`` None takes the usual names, of those that the
    data has; a client, a category, a split and an input may be missing. ``model`` is where the
    owner keeps the base model, or its name; None takes the one that the server names, unless
    that is a path. ``state`` is the folder of what the client keeps to itself.
    """

    name: str
    data: Path
    state: Path
    budget: Capacity = field(default_factory=Capacity)
    columns: table.Columns | None = None
    rows_of: str | None = None
    model: str | None = None
    device: str = "cpu"


@dataclass
class Node:
    """What an owner's machine has in memory from one turn to the next: the base, the tokens."""

    owner: NodeConfig
    rows: Corpus = field(init=False)
    _base: dict[str, Base] = field(default_factory=dict)
    _joined: dict[str, _Joined] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = training_rows(self.owner)

    def answer(self, header: Mapping[str, Any], payload: bytes) -> Answer:
        """What the server asks: to "enrol" under its terms, or to take a "turn".

        Whatever goes wrong is said in the header's ``error``, and the next request is
        answered as ever.
        """
        try:
            kinds = {"enrol": self._enrol, "turn": self._turn}
            if header.get("kind") not in kinds:
                raise ProtocolError(
                    f"The server asks for {header.get('kind')!r}, which is unknown."
                )
            return kinds[header["kind"]](header, payload)
        # The disk may be full, the memory too small: the server shall hear of it.
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            forgot = {"forgot": True} if isinstance(error, LostBase) else {}
            return {"error": f"{kind}{error}", **forgot}, b""

    def _enrol(self, header: Mapping[str, Any], payload: bytes) -> Answer:
        """Take the server's terms, and say who this is and what it can do."""
        joined = self._agreed(header)
        place = joined.runtime
        return {
            "client": self.owner.name,
            "examples": len(place.rows[self.owner.name]),
            "attention": joined.means.rank.attention,
            "feed_forward": joined.means.rank.feed_forward,
            "tokens_per_second": joined.means.tokens_per_second,
            "device": str(place.base.device),
            "kept": (joined.folder / "private").exists(),
        }, b""

    def _turn(self, header: Mapping[str, Any], payload: bytes) -> Answer:
        """Train on a download; the upload is kept, in case that its way back is cut."""
        joined, round = self._agreed(header), header.get("round")
        if type(round) is not int or round < 1 or header.get("client") != self.owner.name:
            raise ProtocolError(
                f"The job is for client {header.get('client')!r} in round {round!r}; this is "
                f"client {self.owner.name!r}."
            )
        kept = joined.folder / f"upload-{round:05d}-{hashlib.sha256(payload).hexdigest()[:16]}"
        if not kept.exists():
            write_atomically(kept, joined.trained(self.owner.name, round, payload))
            for old in joined.folder.glob("upload-*"):
                if old != kept:
                    old.unlink()
        return {"round": round}, kept.read_bytes()

    def _agreed(self, header: Mapping[str, Any]) -> _Joined:
        """The run of the terms that every request brings: a worker may have been restarted."""
        agreed = run_spec.parse(str(header.get("terms")))
        joined = self._joined.get(agreed.run)
        if joined is None or joined.terms != agreed:
            joined = self._prepared(agreed)
            self._joined = {agreed.run: joined}
        return joined

    def _prepared(self, agreed: RunSpec) -> _Joined:
        base = self._model(agreed)
        folder = self.owner.state / agreed.run
        folder.mkdir(parents=True, exist_ok=True)
        self.owner.state.chmod(0o700)  # rows lie there as tokens, beside private halves
        cache = self.owner.state / "tokens"
        store = TokenStore.build(self.rows, base.tokenizer, agreed.prompt, agreed.max_tokens, cache)
        place = ClientRuntime(
            base=base,
            store=store,
            rows={self.owner.name: range(len(self.rows))},
            method=agreed.composed(),
            training=agreed.training,
            wire_dtype=agreed.dtype,
            seed=agreed.seed,
            clients=ClientStore(folder / "private"),
        )
        limit = RankType(agreed.attention, agreed.feed_forward)
        return _Joined(agreed, folder, place, self.owner.budget.means(place, limit))

    def _model(self, agreed: RunSpec) -> Base:
        """The base model, on the owner's device; loaded once."""
        named = agreed.model.name
        # By its form, and not by what is there: a server shall not learn which files exist.
        is_path = not _HUB_NAME.fullmatch(named) or (named != smollm2.NAME and Path(named).exists())
        if self.owner.model is None and is_path:
            raise ProtocolError(
                f"The server names the model {named!r}, which is a path on this machine and no "
                "name of the hub; the owner must say where the model is: join with --model."
            )
        source = replace(agreed.model, name=self.owner.model or named, device=self.owner.device)
        key = repr(source)
        if key not in self._base:
            self._base = {key: source.load()}
        return self._base[key]


@dataclass(frozen=True)
class _Joined:
    """A run that this machine takes part in."""

    terms: RunSpec
    folder: Path
    runtime: ClientRuntime
    means: Proposal

    def trained(self, client: str, round: int, download: bytes) -> bytes:
        """The upload of one turn. The download is read from the disk, module by module."""
        self.folder.mkdir(parents=True, exist_ok=True)  # it may have been lost meanwhile
        file = self.folder / "download"
        file.unlink(missing_ok=True)
        file.write_bytes(download)
        job = TurnRequest(client, round, file)
        self._check(job)
        return turn(job, self.runtime)

    def _ranks(self, download: Download) -> dict[str, int]:
        """The ranks that a download sends to be trained.

        A method that probes sends all components, of which the client then selects; what has not
        a module's shape is in a method's own form.
        """
        if Feature.PROBES in self.runtime.method.features:
            return {}
        shapes = self.runtime.base.shapes
        return {m: f.rank for m, f in download.adapter.items() if f.shape == shapes.get(m)}

    def _check(self, job: TurnRequest) -> None:
        """Refuse to train more than the owner gives.

        A method that probes hands out all terms, of which the client then chooses; what is no
        module's factors, nor tells of them by rank alone, is a method's own.
        """
        shapes = self.runtime.base.shapes
        most = self.means.rank.by_module(list(shapes))
        download = job.opened()
        ranks = dict(download.ranks) if download.ranks else self._ranks(download)
        for module in {**download.adapter, **ranks}:
            if module not in shapes:
                continue  # which training refuses
            if module not in most:
                raise ProtocolError(
                    f"The server asks client {job.client!r} to train {module!r}, which its owner "
                    "leaves out."
                )
            if ranks.get(module, 0) > most[module]:
                raise ProtocolError(
                    f"The server asks client {job.client!r} to train rank {ranks[module]} in "
                    f"{module!r}; its owner gives {most[module]} at most."
                )


def training_rows(owner: NodeConfig) -> Corpus:
    """The rows that the owner trains on: those of the train split, where the data is split.

    Raises:
        ProtocolError: there is none, or the file holds rows of several clients.
    """
    corpus = table.read(owner.data, owner.columns or _usual(owner.data))
    if "client" in corpus.columns:
        codes, owners = corpus.codes("client")
        if owner.rows_of is not None:
            if owner.rows_of not in owners:
                raise ProtocolError(f"{owner.data} has no rows of client {owner.rows_of!r}.")
            corpus = corpus.select(codes == list(owners).index(owner.rows_of))
        elif len(owners) > 1:
            raise ProtocolError(
                f"{owner.data} has rows of {len(owners)} clients ({', '.join(owners[:3])}, ...); "
                "say whose to train on: --rows-of NAME."
            )
    elif owner.rows_of is not None:
        raise ProtocolError(
            f"{owner.data} has no column that names clients, so --rows-of {owner.rows_of} chooses "
            "nothing; leave it out, or name the column: --columns client=NAME,..."
        )
    if "split" in corpus.columns:
        codes, splits = corpus.codes("split")
        corpus = corpus.select(np.array([name == "train" for name in splits], np.bool_)[codes])
    if not len(corpus):
        raise ProtocolError(f"{owner.data} has no row to train on; look at its split column.")
    return corpus


def _usual(data: Path) -> table.Columns:
    """The usual columns, without those that may be missing and are."""
    names = set(table.column_names(data))
    optional = ("instruction", "input", "client", "category", "split")
    return table.Columns(**{name: name if name in names else None for name in optional})
