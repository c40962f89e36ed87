"""What a malicious or faulty server sends: a sentence, nothing kept, and the next turn works."""

import contextlib
import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from flexlora import model, wire
from flexlora.deployment.node import base_model
from flexlora.deployment.node import node as node_module
from flexlora.deployment.node.limits import Limits, ended_after
from flexlora.deployment.node.node import Node
from flexlora.lowrank import Adapter, Factors
from flexlora.storage import write_summed
from support import models
from support.node_server import RANK, RUN, Server, own_file, owner, settings

MESSAGE_BYTES, KEPT_BYTES = 2**20, 2**19
LARGE = 10**5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    models.save(folder / "model")
    own_file(folder)
    return folder


@pytest.fixture(scope="module")
def loaded() -> dict[str, model.Base]:
    return {}


@pytest.fixture(autouse=True)
def quick(monkeypatch, loaded):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    models.load_once(monkeypatch, loaded)


def small(folder: Path, state: Path, **changes) -> Node:
    """A client with small limits."""
    config = owner(folder, state, **changes)
    if hasattr(config, "limits"):  # an earlier version has none
        limits = replace(config.limits, message_bytes=MESSAGE_BYTES, kept_bytes=KEPT_BYTES)
        config = replace(config, limits=limits)
    return Node(config)


@dataclass
class Case:
    """A download of round 2 of FLoRA, by its sections and fields; or its bytes."""

    sentence: str
    sections: Callable[["Shapes"], dict[str, Factors]] = lambda shapes: {}
    fields: Callable[["Shapes"], dict] = lambda shapes: {}
    sparse: bool = False
    raw: bytes | None = None

    def payload(self, shapes: "Shapes") -> bytes:
        if self.raw is not None:
            return self.raw
        header = {"kind": "download", "ranks": dict.fromkeys(shapes.all, RANK)}
        header = {**header, **self.fields(shapes)}
        return wire.encode(Adapter(self.sections(shapes)), header, torch.float32, self.sparse)


@dataclass
class Shapes:
    all: dict[str, tuple[int, int]]

    @property
    def first(self) -> str:
        return next(iter(self.all))

    def factors(self, rank: int = 2, value: float = 0.5, module: str | None = None) -> Factors:
        out, in_ = self.all[module or self.first]
        return Factors(torch.full((out, rank), value), torch.full((rank, in_), value))


def one(section: str, **how) -> Callable[[Shapes], dict[str, Factors]]:
    return lambda s: {f"{section}/{s.first}" if section else s.first: s.factors(**how)}


def strange(section: str) -> Callable[[Shapes], dict[str, Factors]]:
    place = f"{section}/nope" if section else "nope"
    return lambda s: {place: Factors(torch.ones(4, 2), torch.ones(2, 3))}


def turned(section: str) -> Callable[[Shapes], dict[str, Factors]]:
    """A module of a wrong shape."""

    def sections(s: Shapes) -> dict[str, Factors]:
        factors = Factors(torch.ones(7, 2), torch.ones(2, 11))
        return {f"{section}/{s.first}" if section else s.first: factors}

    return sections


def header_only(metadata: dict, **tensors) -> bytes:
    text = json.dumps({"__metadata__": metadata, **tensors}).encode()
    return struct.pack("<Q", len(text)) + text


DOWN = json.dumps({"format": 2, "kind": "download"})
NAN, INF = float("nan"), float("inf")
LAYER = "no adapted layer of that name"
KEPT = "update 1"

CASES = {
    # Modules that the base model does not have.
    "update of an unknown module": Case(LAYER, strange(KEPT)),
    "a good update beside an unknown module": Case(
        LAYER, lambda s: {**one(KEPT)(s), **strange(KEPT)(s)}
    ),
    "a good update beside another that is not": Case(
        LAYER, lambda s: {**one(KEPT)(s), **strange("frozen")(s)}
    ),
    "frozen of an unknown module": Case(LAYER, strange("frozen")),
    "aux of an unknown module": Case(LAYER, strange("aux control")),
    "adapter of an unknown module": Case(LAYER, strange("")),
    "ranks of an unknown module": Case(LAYER, fields=lambda s: {"ranks": {"nope": 1}}),
    # Shapes.
    "update of another shape": Case("do not fit the layer's shape", turned(KEPT)),
    "update of one factor": Case(
        "do not fit",
        lambda s: {
            f"{KEPT}/{s.first}": Factors(torch.ones(s.all[s.first][0], 2), torch.ones(2, 0))
        },
    ),
    "update without rank and of no size": Case(
        "do not fit", lambda s: {f"{KEPT}/{s.first}": Factors(torch.ones(0, 2), torch.ones(2, 0))}
    ),
    # Ranks and sizes.
    "update of rank 600": Case("takes at most", one(KEPT, rank=600)),
    "frozen of rank 600": Case("takes at most", one("frozen", rank=600)),
    "aux of rank 600": Case("takes at most", one("aux x", rank=600)),
    "adapter of rank 4": Case("its limit is rank 3", one("", rank=4), lambda s: {"ranks": {}}),
    "adapter of rank 600": Case("its limit is rank 3", one("", rank=600), lambda s: {"ranks": {}}),
    "ranks above the owner's": Case(
        "its limit is rank 3", fields=lambda s: {"ranks": dict.fromkeys(s.all, 4)}
    ),
    "ranks without end": Case(
        "its limit is rank 3", fields=lambda s: {"ranks": dict.fromkeys(s.all, LARGE)}
    ),
    "sparse update that is large": Case("takes", one(KEPT, rank=LARGE, value=0.0), sparse=True),
    "sparse frozen that is large": Case("takes", one("frozen", rank=LARGE, value=0.0), sparse=True),
    "sparse aux that is large": Case("takes", one("aux x", rank=LARGE, value=0.0), sparse=True),
    "sparse adapter that is large": Case("takes", one("", rank=LARGE, value=0.0), sparse=True),
    "message that is large": Case(
        "in memory", lambda s: {f"update {n}/{s.first}": s.factors(rank=200) for n in range(1, 40)}
    ),
    "updates that fill the disk": Case(
        "--disk",
        lambda s: {f"{KEPT}/{m}": s.factors(rank=150, module=m) for m in s.all if "proj" in m},
    ),
    # Values.
    "NaN in an update": Case("not finite", one(KEPT, value=NAN)),
    "infinity in an update": Case("not finite", one(KEPT, value=INF)),
    "NaN in frozen": Case("not finite", one("frozen", value=NAN)),
    "NaN in aux": Case("not finite", one("aux x", value=-INF)),
    "NaN in the adapter": Case("not finite", one("", value=NAN)),
    "huge update": Case("norm is above", one(KEPT, value=1e30)),
    "huge frozen": Case("norm is above", one("frozen", value=1e30)),
    "NaN in the second of two updates": Case(
        "not finite", lambda s: {**one(KEPT)(s), **one("update 1", value=NAN)(s)}
    ),
    # Rounds.
    "update of this round": Case("is not before it", one("update 2")),
    "update of a later round": Case("is not before it", one("update 999999999")),
    "update of round 0": Case("unknown tensor", one("update 0")),
    "update of a round that is none": Case("unknown tensor", one("update ../../x")),
    "base_rounds of a later round": Case("before it", fields=lambda s: {"base_rounds": [1, 2]}),
    "base_rounds twice": Case("base_rounds", fields=lambda s: {"base_rounds": [1, 1]}),
    "base_rounds that are none": Case("base_rounds", fields=lambda s: {"base_rounds": "1"}),
    # Fields and form.
    "unknown section": Case("unknown tensor", one("merged")),
    "unknown field": Case("unknown field", fields=lambda s: {"exec": "ls"}),
    "another kind": Case("kind", fields=lambda s: {"kind": "upload"}),
    "a rate that is none": Case("rate", fields=lambda s: {"learning_rate_factor": -1}),
    "factors that are none": Case("factors", fields=lambda s: {"factors": "C"}),
    "ranks that are none": Case("ranks", fields=lambda s: {"ranks": [1]}),
    "component_ids of nothing": Case("component_ids", fields=lambda s: {"component_ids": {"x": 1}}),
    "nothing": Case("message", raw=b""),
    "a pickle": Case("message", raw=b"\x80\x04\x95" + b"x" * 50),
    "a header beyond the end": Case("message", raw=struct.pack("<Q", 2**40) + b"{}"),
    "a shape of 2^63": Case(
        "message",
        raw=header_only(
            {"flexlora": DOWN},
            **{
                "nope.A": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]},
                "nope.B": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]},
            },
        ),
    ),
    "200,000 tensors": Case(
        "",
        raw=header_only(
            {"flexlora": DOWN},
            **{
                f"n{i}.{x}": {"dtype": "F32", "shape": [0, 0], "data_offsets": [0, 0]}
                for i in range(3000)
                for x in "AB"
            },
        ),
    ),
    "deep JSON": Case("message", raw=header_only({"flexlora": "[" * 50_000})),
}


@pytest.fixture(scope="module")
def attacked(folder, tmp_path_factory) -> tuple[Server, Node]:
    """A server and a client that have finished a round of FLoRA."""
    place = tmp_path_factory.mktemp("attacked")
    return Server(place, settings(folder, "flora")), small(folder, place / "state")


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_download_is_refused_and_nothing_of_it_is_kept(attacked, name):
    server, here = attacked
    if not (here.config.state / RUN).exists():
        server.turn(here, 1)
    before = kept(here)
    payload = CASES[name].payload(Shapes(server.shapes))
    response, data = here.handle(server.header(2), payload)
    assert set(response) == {"error"} and data == b"", response
    sentence = response["error"]
    assert CASES[name].sentence in sentence, sentence
    assert len(sentence) <= 600 and sentence.isprintable()
    assert str(here.config.state) not in sentence
    assert kept(here) == before


def test_after_all_hostile_downloads_good_ones_are_trained(attacked):
    server, here = attacked
    for number in (2, 3, 4):
        server.turn(here, number)
    assert len([name for name in kept(here) if name.endswith(".safetensors")]) == 3


def kept(here: Node) -> dict[str, int]:
    """What is on the client's disk of a run, but for the one file of the last download."""
    files = (p for p in (here.config.state / RUN).rglob("*") if p.is_file())
    return {
        str(p.relative_to(here.config.state)): p.stat().st_size
        for p in files
        if p.name not in ("download", "evaluated") and not p.name.startswith("upload-")
    }


# Requests around a download.


@pytest.mark.parametrize(
    "changes",
    [
        {"round": 10**5},
        {"round": 10**30},
        {"round": "\x1b[31m\n1"},
        {"client": "\x1b[2J" + "x" * 10**6},
        {"client": ["x"] * 10**5},
    ],
)
def test_a_request_for_another_is_refused_in_one_line(folder, tmp_path, changes):
    server = Server(tmp_path, settings(folder))
    here = small(folder, tmp_path / "state")
    response, _ = here.handle(server.header(1, **changes), server.download(1))
    assert len(response["error"]) <= 600 and response["error"].isprintable()


@pytest.mark.parametrize("kind", ["evaluate", "store"])
@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        (strange(""), "of shape"),
        (turned(""), "of shape"),
        (one("", rank=600), "takes at most"),
        (one("", rank=LARGE, value=0.0), "sparse"),
        (one("", value=NAN), "NaN or infinity"),
        (one("frozen"), "unknown"),
    ],
)
def test_a_hostile_adapter_is_neither_evaluated_nor_kept(
    folder, tmp_path, kind, sections, sentence
):
    server = Server(tmp_path, settings(folder))
    here = small(folder, tmp_path / "state", holdout=0.3)
    server.enrolled(here)
    adapter = Adapter(sections(Shapes(server.shapes)))
    payload = wire.encode(adapter, {"kind": "adapter"}, torch.float32, sparse=True)
    header = {**server.header(1, rows=5, rounds=1, digest="0" * 64), "kind": kind}
    response, _ = here.handle(header, payload)
    assert sentence in response["error"], response
    assert not here.config.adapter.exists()
    server.turn(here, 1)


def test_the_same_evaluation_is_computed_once(folder, tmp_path, monkeypatch):
    server = Server(tmp_path, settings(folder))
    here = small(folder, tmp_path / "state", holdout=0.3)
    computed, loss = [], node_module.holdout_loss

    def counted(*arguments):
        computed.append(1)
        return loss(*arguments)

    monkeypatch.setattr(node_module, "holdout_loss", counted)
    payload = wire.encode(Adapter({}), {"kind": "adapter"}, torch.float32)
    asked = {**server.header(1), "kind": "evaluate", "rows": 10**12}
    first, *others = [here.handle(asked, payload)[0] for _ in range(5)]
    assert "error" not in first and others == [first] * 4 and len(computed) == 1
    here.handle({**asked, "rows": 1}, payload)
    assert len(computed) == 2


# Time


def test_training_without_end_is_ended_by_the_owners_time(folder, tmp_path):
    server = Server(tmp_path, settings(folder, training={"epochs": 10**4, "max_steps": None}))
    here = small(folder, tmp_path / "state")
    here = Node(replace(here.config, limits=replace(here.config.limits, seconds=0.5)))
    started = time.monotonic()
    response, data = here.handle(server.header(1), server.download(1))
    assert "Local training was ended after" in response["error"] and "--seconds" in str(response)
    assert data == b"" and time.monotonic() - started < 20
    assert not list((here.config.state / RUN).glob("upload-*"))


def test_a_plan_that_is_too_long_to_be_listed_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(node_module, "_MOST_EXAMPLES", 10**5)
    told = settings(folder, training={"epochs": 10**4 - 1, "max_steps": None, "batch_examples": 3})
    response, _ = small(folder, tmp_path / "state").handle(
        {"kind": "enrol", "terms": Server(tmp_path, told).told}, b""
    )
    assert "asks for 9999 epochs of 10 rows" in response["error"]


def test_a_template_without_end_is_ended(folder, tmp_path, loaded):
    """A hub model's chat template is a program, and the server names the model."""
    shutil.copytree(folder / "model", tmp_path / "model")
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(loops)
    own_file(tmp_path)
    here = owner(tmp_path, tmp_path / "state")
    here = Node(replace(here, limits=replace(here.limits, seconds=0.5)))
    terms = json.loads(Server(folder, settings(folder)).told)
    terms["prompt"] = "chat"
    started = time.monotonic()
    response, _ = here.handle({"kind": "enrol", "terms": json.dumps(terms)}, b"")
    assert "with the chat template was ended" in response["error"], response
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("seconds", [1e-9, 1e-4, 1e-3])
def test_time_that_is_over_at_the_end_is_no_later_fault(seconds):
    for _ in range(30):
        with contextlib.suppress(ValueError), ended_after(seconds, "It"):
            sum(range(2000))
    sum(range(10**6))


def test_a_server_is_not_told_where_files_lie(folder, tmp_path, monkeypatch):
    server = Server(tmp_path, settings(folder))
    here = small(folder, tmp_path / "state", out=tmp_path / "chosen" / "place")
    config = here.config

    def broken(job, runtime):
        places = (config.state / "x", config.data, config.model, config.out)
        raise OSError(28, "No space left on device", " ".join(map(str, places)))

    monkeypatch.setattr(node_module, "turn", broken)
    response, _ = here.handle(server.header(1), server.download(1))
    assert "No space left" in response["error"] and "STATE/x DATA MODEL ADAPTER" in str(response)
    assert str(tmp_path) not in str(response) and str(folder) not in str(response)


# What an earlier version has kept


@pytest.mark.parametrize("damage", ["a strange module", "NaN", "cut off", "empty"])
def test_what_was_kept_wrongly_does_not_last(folder, tmp_path, damage):
    server = Server(tmp_path, settings(folder, "flora"))
    here = small(folder, tmp_path / "state")
    server.turn(here, 1)
    server.turn(here, 2)
    (path,) = (here.config.state / RUN / "private" / "merged").glob("*.safetensors")
    shapes, good = Shapes(server.shapes), path.read_bytes()
    bad = {
        "a strange module": {"nope": Factors(torch.ones(4, 2), torch.ones(2, 3))},
        "NaN": {shapes.first: shapes.factors(value=NAN)},
    }
    if damage in bad:
        data = wire.encode(Adapter(bad[damage]), {"kind": "private"}, torch.float32)
    else:
        data = good[:-7] if damage == "cut off" else b""
    write_summed(path, data)
    printed: list[str] = []
    again = Node(here.config, printed.append)
    response, _ = again.handle(server.header(3), server.download(3))
    assert response.get("forgot") is True
    (line,) = printed
    assert str(path) in line and "the server sends it again" in line
    server.turn_again(again, 3)
    assert path.read_bytes() == good


def test_a_model_that_does_not_fit_is_not_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(base_model, "free_bytes", lambda device: 1000.0)
    server = Server(tmp_path, settings(folder))
    response, _ = small(folder, tmp_path / "state").handle(
        {"kind": "enrol", "terms": server.told}, b""
    )
    assert "weights, which take" in response["error"] and "1,000 B free" in response["error"]


def test_limits_are_above_zero(tmp_path):
    with pytest.raises(ValueError, match="give a number above 0"):
        Limits(1, 0)
    measured = Limits.of_machine(state=tmp_path / "not" / "there")
    assert measured.message_bytes >= 2**26 and measured.kept_bytes > 0
    assert measured.seconds == 24 * 3600
    assert Limits.of_machine(7, 11, 13.0) == Limits(7, 11, 13.0)
