"""A client's machine: its rows, its model, its limits, and its local training."""

from __future__ import annotations

import hashlib
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from flexlora.config import RankType
from flexlora.data import Columns, Corpus, TokenStore
from flexlora.deployment import run_spec
from flexlora.deployment.node import base_model, finished, requested
from flexlora.deployment.node.capacity import Capacity, Proposal
from flexlora.deployment.node.limits import Limits, TimeLimit, ended_after
from flexlora.deployment.node.own_rows import in_split, own_rows
from flexlora.deployment.node.requested import Allowed
from flexlora.deployment.node.worker_socket import Response
from flexlora.deployment.run_spec import RunSpec
from flexlora.errors import ConfigError, FlexloraError, ProtocolError, sentence
from flexlora.federation import (
    ClientRuntime,
    ClientStore,
    HoldoutLoss,
    LostBase,
    TurnRequest,
    drawn,
    holdout_loss,
    turn,
)
from flexlora.lowrank import Adapter
from flexlora.method import Feature
from flexlora.model import Base, smollm2
from flexlora.storage import (
    DamagedFile,
    close_to_others,
    is_intact,
    sum_file,
    write_new,
    write_summed,
)
from flexlora.storage.untrusted import one_line, short

_MOST_EXAMPLES = 10**7
"""Of one round: each takes a number in memory."""
_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class NodeConfig:
    """What the data's owner decides, and no server can change.

    ``name`` identifies the client in all runs. ``columns`` None takes the standard column names
    that the data has. ``model`` is a path of the base model or its name on the hub; None takes the
    server's, unless that is a path. ``state`` is the folder of local client state.

    ``holdout`` is the share of the rows that never train, 0 for none; None takes the server's. The
    finished adapter is written to ``out``, None for ``adapter`` in ``state``; with ``own_rank``
    truncated to the rank that this client trains.
    """

    name: str
    data: Path
    state: Path
    capacity: Capacity = field(default_factory=Capacity)
    limits: Limits = field(default_factory=Limits.of_machine)
    columns: Columns | None = None
    rows_of: str | None = None
    model: str | None = None
    device: str = "cpu"
    holdout: float | None = None
    out: Path | None = None
    own_rank: bool = False

    @property
    def adapter(self) -> Path:
        """Where the finished adapter is written."""
        return self.out or self.state / "adapter"


@dataclass
class Node:
    """Answers the server's requests; the base model and the tokens stay in memory between them."""

    config: NodeConfig
    notify: Callable[[str], None] = print
    """Takes sentences for the owner."""
    rows: Corpus = field(init=False)
    _base: dict[str, Base] = field(default_factory=dict)
    _enrolment: dict[str, _Enrolment] = field(default_factory=dict)
    _evaluated: dict[str, HoldoutLoss] = field(default_factory=dict)
    """The last evaluation, by what was asked: asked again, it is answered without computing."""

    def __post_init__(self) -> None:
        self.rows = own_rows(self.config.data, self.config.columns, self.config.rows_of)

    @property
    def is_enrolled(self) -> bool:
        """Whether it takes part in a run already, so that the base model is in memory."""
        return bool(self._enrolment)

    def handle(self, header: Mapping[str, Any], payload: bytes) -> Response:
        """The response to a request of the server.

        These are: to "enrol" in a run, a "turn" of training, to "evaluate" an adapter, and, after
        the last round, to "store" the finished adapter and that the run is "over".

        An error is returned in the header's ``error``; the next request is handled as usual.
        """
        try:
            handlers = {
                "enrol": self._enrol,
                "turn": self._turn,
                "evaluate": self._evaluate,
                "store": self._store,
                "over": self._over,
            }
            kind = header.get("kind")
            if not isinstance(kind, str) or kind not in handlers:
                raise ProtocolError(
                    f"The server sent a request of the unknown kind {short(kind)}; install the "
                    "same version of flexlora on both sides."
                )
            return handlers[kind](header, payload)
        # The disk may be full or the memory too small: any error is reported to the server.
        except Exception as error:
            said = sentence(error)
            if said is None:
                traceback.print_exc()  # a fault of the library or of a plug-in
                said = f"{type(error).__name__}: {error}"
            forgot = {"forgot": True} if isinstance(error, LostBase) else {}
            # Neither the server's text nor the paths of this machine are passed on as they are.
            text = said
            if not isinstance(error, FlexloraError) or isinstance(error, LostBase | DamagedFile):
                text = self._without_paths(text)
            return {"error": one_line(text), **forgot}, b""

    @property
    def published(self) -> str:
        """The public name, or the folder, of the base model in memory."""
        return next((base.published for base in self._base.values()), "")

    def _without_paths(self, text: str) -> str:
        """A sentence for the server, which is not told where files lie on this machine.

        Not for one with a server's own words: it would confirm a path that was guessed.
        """
        config = self.config
        paths = {
            "ADAPTER": config.out,
            "STATE": config.state,
            "DATA": config.data,
            "MODEL": config.model,
        }
        for name, path in paths.items():
            if path is not None and Path(path).is_absolute():
                text = text.replace(str(path), name)
        return text

    def _enrol(self, header: Mapping[str, Any], payload: bytes) -> Response:
        """Accept the server's run specification; report this client and its limits."""
        enrolment = self._enrolled(header)
        runtime, proposal = enrolment.runtime, enrolment.proposal
        return {
            "client": self.config.name,
            "examples": len(runtime.rows[self.config.name]),
            "attention": proposal.rank.attention,
            "feed_forward": proposal.rank.feed_forward,
            "tokens_per_second": proposal.tokens_per_second,
            "device": str(runtime.base.device),
            "holdout": len(runtime.holdout.get(self.config.name, ())),
            "kept": (enrolment.folder / "private").exists(),
        }, b""

    def _turn(self, header: Mapping[str, Any], payload: bytes) -> Response:
        """Train on a download. The upload is stored, in case the connection breaks."""
        enrolment, round = self._enrolled(header), self._round(header, least=1)
        digest = hashlib.sha256(payload).hexdigest()[:16]
        stored = enrolment.folder / f"upload-{round:05d}-{digest}"
        if not is_intact(stored):
            write_summed(stored, enrolment.train(self.config.name, round, payload))
            for old in enrolment.folder.glob("upload-*"):
                if old not in (stored, sum_file(stored)):
                    old.unlink()
        return {"round": round}, stored.read_bytes()

    def _evaluate(self, header: Mapping[str, Any], payload: bytes) -> Response:
        """The loss of an adapter on the held-out rows; only numbers are returned."""
        enrolment, round = self._enrolled(header), self._round(header, least=0)
        client, rows = self.config.name, header.get("rows")
        if not enrolment.runtime.holdout.get(client):
            raise ProtocolError(f"Client {client!r} holds out no rows and evaluates nothing.")
        if type(rows) is not int or rows < 1:
            raise ProtocolError(f"The server asks for an evaluation on {short(rows)} rows.")
        personal = header.get("personal") is True
        asked = hashlib.sha256(repr((enrolment.spec, round, rows, personal)).encode() + payload)
        if (key := asked.hexdigest()) not in self._evaluated:
            adapter = enrolment.evaluated(client, round, payload, personal)
            self._evaluated = {key: holdout_loss(enrolment.runtime, client, adapter, rows)}
        return {"round": round, **asdict(self._evaluated[key])}, b""

    def _store(self, header: Mapping[str, Any], payload: bytes) -> Response:
        """Check the finished adapter and write it to the client's disk, for PEFT."""
        spec, rounds = run_spec.parse(str(header.get("terms"))), header.get("rounds")
        if type(rounds) is not int or rounds < 1:
            raise ProtocolError(f"The server sends an adapter of {short(rounds)} rounds.")
        base = self._model(spec)
        received = requested.read(payload, "adapter", self.config.limits)
        requested.check_adapter(received, base.shapes)
        ranks = None
        if self.config.own_rank:
            rank = self._enrolled(header).proposal.rank
            ranks = rank.by_module(list(base.shapes))
        file = _file(self._folder(spec), "finished", payload)
        try:
            digest = finished.write(file, base, self.config.adapter, header.get("digest"), ranks)
        finally:
            file.unlink(missing_ok=True)
        return {
            "client": self.config.name,
            "rounds": rounds,
            "digest": digest,
        }, b""

    def _over(self, header: Mapping[str, Any], payload: bytes) -> Response:
        """The federation is finished; the caller ends."""
        return {}, b""

    def _round(self, header: Mapping[str, Any], least: int) -> int:
        """The round of a request to this client."""
        round = header.get("round")
        mine = header.get("client") == self.config.name
        if type(round) is not int or not (mine and least <= round <= requested.MOST_ROUNDS):
            raise ProtocolError(
                f"The request is for client {short(header.get('client'))} in round {short(round)}; "
                f"this is client {self.config.name!r}."
            )
        return round

    def _enrolled(self, header: Mapping[str, Any]) -> _Enrolment:
        """The run of a request; each has the specification, as this process may be new."""
        spec = run_spec.parse(str(header.get("terms")))
        enrolment = self._enrolment.get(spec.run)
        if enrolment is None or enrolment.spec != spec:
            enrolment = self._prepared(spec)
            self._enrolment = {spec.run: enrolment}
        return enrolment

    def _prepared(self, spec: RunSpec) -> _Enrolment:
        base = self._model(spec)
        folder = self._folder(spec)
        cache = self.config.state / "tokens"
        with ended_after(self.config.limits.seconds, "Preparing the rows with the chat template"):
            store = TokenStore.build(self.rows, base.tokenizer, spec.prompt, spec.max_tokens, cache)
        train, held_out = self._divided(spec)
        _check_length(spec, len(train))
        clients = ClientStore(folder / "private")
        for path in clients.discard_unfit(base.shapes):
            self.notify(
                f"removed {path}, an update of the base model that cannot be used: the server "
                "sends it again"
            )
        runtime = ClientRuntime(
            base=base,
            store=store,
            rows={self.config.name: train},
            method=spec.composed(),
            training=spec.training,
            wire_dtype=spec.dtype,
            seed=spec.seed,
            clients=clients,
            holdout={self.config.name: held_out} if len(held_out) else {},
            each_step=TimeLimit(self.config.limits.seconds),
        )
        limit = RankType(spec.attention, spec.feed_forward)
        proposal = self.config.capacity.propose(runtime, limit)
        return _Enrolment(spec, folder, runtime, proposal, self.config.limits)

    def _folder(self, spec: RunSpec) -> Path:
        """The folder of a run in the client's state."""
        folder = self.config.state / spec.run
        # It has rows as tokens, and the client's own factors.
        close_to_others(self.config.state)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _divided(self, spec: RunSpec) -> tuple[Sequence[int], Sequence[int]]:
        """The rows that train, and those that are held out, as a simulation divides them."""
        share = spec.holdout_share if self.config.holdout is None else self.config.holdout
        train = np.flatnonzero(in_split(self.rows, "train"))
        marked = np.flatnonzero(in_split(self.rows, "validation"))
        if not share or len(marked):
            return train.tolist(), marked.tolist() if share else []
        held_out = train[drawn(len(train), share, spec.seed, self.config.name)]
        return np.setdiff1d(train, held_out).tolist(), held_out.tolist()

    def _model(self, spec: RunSpec) -> Base:
        """The base model, on this client's device; loaded once."""
        name = spec.model.name
        # First by its form: a server must not learn which files exist.
        is_path = not _HUB_NAME.fullmatch(name) or (name != smollm2.NAME and Path(name).exists())
        if self.config.model is None and is_path:
            raise ProtocolError(
                f"The server's config names the base model by a local path, {name!r}, and not by "
                "its name on the hub; this client must give its own copy: join with --model PATH."
            )
        source = replace(spec.model, name=self.config.model or name, device=self.config.device)
        key = repr(source)
        if key not in self._base:
            # First the memory of the model before, which is not needed any more.
            self._enrolment, self._base = {}, {}
            try:
                base_model.check(source)
                self._base = {key: source.load()}
            except ConfigError as error:
                # The owner's own path, of which the server is not told.
                own = self.config.model
                raise ConfigError(
                    str(error).replace(own, "MODEL") if own else str(error)
                ) from error
        return self._base[key]


@dataclass(frozen=True)
class _Enrolment:
    """A run in which this machine takes part."""

    spec: RunSpec
    folder: Path
    runtime: ClientRuntime
    proposal: Proposal
    limits: Limits

    def train(self, client: str, round: int, download: bytes) -> bytes:
        """The upload of one round. The download is read from the disk, module by module."""
        job = TurnRequest(client, round, self._checked("download", round, download))
        if isinstance(self.runtime.each_step, TimeLimit):
            self.runtime.each_step.begin()
        return turn(job, self.runtime)

    def evaluated(self, client: str, round: int, payload: bytes, personal: bool) -> Adapter:
        """The adapter to evaluate after ``round``: the server's, or this client's own model."""
        if personal:
            file = self._checked("evaluated", round + 1, payload)
            return self.runtime.start(TurnRequest(client, round + 1, file)).adapter
        header = requested.read(payload, "adapter", self.limits)
        requested.check_adapter(header, self.runtime.base.shapes)
        return finished.opened(_file(self.folder, "evaluated", payload), self.runtime.base)

    def _checked(self, name: str, round: int, payload: bytes) -> Path:
        """A file with a download, checked, from which it is read module by module.

        Raises:
            ProtocolError: it cannot be used, or asks for more than the owner allows.
        """
        header = requested.read(payload, "download", self.limits)
        shapes, clients = self.runtime.base.shapes, self.runtime.clients
        allowed = Allowed(
            shapes=shapes,
            ranks=self.proposal.rank.by_module(list(shapes)),
            largest_rank=max(self.spec.attention, self.spec.feed_forward),
            limits=self.limits,
            trains_parts=Feature.PROBES in self.runtime.method.features,
            kept=clients.update_bytes() if clients else {},
        )
        requested.check_download(header, round, allowed)
        file = _file(self.folder, name, payload)
        requested.check_values(file)
        return file


def _check_length(spec: RunSpec, rows: int) -> None:
    """Refuse a plan of local training that is too long to be listed.

    Raises:
        ProtocolError: with its length.
    """
    training = spec.training
    examples = training.steps(rows) * min(training.batch_examples, rows)
    if examples > _MOST_EXAMPLES:
        raise ProtocolError(
            f"The server asks for {training.epochs} epochs of {rows} rows in each round; this "
            f"client trains on at most {_MOST_EXAMPLES} examples in a round. Lower training.epochs "
            "or training.max_steps in the server's config."
        )


def _file(folder: Path, name: str, content: bytes) -> Path:
    """A new file of this name; the folder may have been deleted meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    write_new(file, content)
    return file
