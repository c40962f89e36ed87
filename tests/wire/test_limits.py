"""What a message may claim: limits from the header alone, and what it costs to refuse one."""

import dataclasses
import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flexlora import wire
from flexlora.lowrank.factors import Adapter
from flexlora.method.interface import Download, ModuleSpec, Upload, UploadSpec
from flexlora.storage.untrusted import RefusalCode
from flexlora.wire import fields
from flexlora.wire.header import LARGEST_HEADER
from support.factors import random_factors

ADAPTER = Adapter(
    {
        "model.q": random_factors(11, 3, 7, 1, torch.float32),
        "model.up": random_factors(13, 2, 5, 2, torch.float32),
    }
)
SPECS = {"model.q": ModuleSpec((11, 7), 1, 3), "model.up": ModuleSpec((13, 5), 1, 2)}
FACTS = {"steps": 3, "loss_tokens": 9, "loss_total": 17.25}
LIMITS = {
    "steps": wire.FactLimit(3),
    "loss_tokens": wire.FactLimit(9),
    "loss_total": wire.FactLimit(10.0, whole=False, per="loss_tokens"),
}
EXPECTED = wire.ExpectedUpload("anna", 4, 17, UploadSpec(SPECS), torch.float32, False, LIMITS)


def sent(path: Path, upload: Upload, dtype=torch.float32, sparse=False) -> Path:
    path.write_bytes(wire.encode_upload(upload, dtype, sparse))
    return path


def good(**changes) -> Upload:
    return dataclasses.replace(Upload("anna", 4, ADAPTER, 17, FACTS), **changes)


def code_of(call: Callable[[], object]) -> RefusalCode:
    with pytest.raises(wire.RefusedMessage) as caught:
        call()
    assert str(caught.value).isprintable() and len(str(caught.value)) < 900
    return caught.value.code


# --- the size of an upload follows from what is expected -----------------------------------


@pytest.mark.parametrize("client", ["anna", "Zoë", "名前", "a" * 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_upload_is_known_before_it_comes(tmp_path, client, dtype):
    """To a few bytes for each tensor: the digits of its offsets."""
    expected = dataclasses.replace(EXPECTED, client=client, dtype=dtype)
    path = sent(tmp_path / "up", good(client=client), dtype)
    assert wire.open_upload(path, expected).client == client
    assert 0 <= wire.most_upload_bytes(expected) - path.stat().st_size <= 12 * 4 + 8


def test_fewer_ranks_and_other_digits_never_need_more(tmp_path):
    numbered = {m: dataclasses.replace(spec, components=1000) for m, spec in SPECS.items()}
    spec = UploadSpec(numbered, {"control": SPECS})
    expected = dataclasses.replace(EXPECTED, spec=spec, round=123, sparse=True)
    most = wire.most_upload_bytes(expected)
    for ranks in ({"model.q": 3, "model.up": 2}, {"model.q": 1, "model.up": 1}):
        adapter = ADAPTER.first(ranks)
        for share in (0.0, 1.0):
            thin = Adapter({m: type(f)(f.B * share, f.A * share) for m, f in adapter.items()})
            upload = good(
                round=123,
                adapter=thin,
                aux={"control": ADAPTER.first(ranks)},
                component_ids={m: range(999 - r, 999) for m, r in ranks.items()},
                metrics={**FACTS, "loss_total": 0.1 + 0.2},
            )
            path = sent(tmp_path / "up", upload, sparse=True)
            assert path.stat().st_size <= most
            assert wire.open_upload(path, expected).component_ids["model.q"][-1] == 998


def test_a_header_may_be_as_long_as_the_names_make_it():
    """64 KiB are enough for 200 modules of usual names, and 1,000 modules get what they need."""
    for modules, most in ((200, 64 * 2**10), (1000, 320 * 2**10)):
        names = [f"model.layers.{n // 7}.self_attn.q_proj{n % 7}" for n in range(modules)]
        spec = UploadSpec({name: ModuleSpec((4096, 4096), 1, 64) for name in names})
        limits = wire.ExpectedUpload("anna", 4, 17, spec, torch.bfloat16, False, LIMITS).limits
        assert limits.header_bytes < most
        assert limits.dense_bytes == modules * 64 * 8192 * 2
        assert limits.message_bytes == 8 + limits.header_bytes + limits.dense_bytes


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        ({}, RefusalCode.MISSING_KEY),
        ({"steps": 3, "loss_tokens": 9}, RefusalCode.MISSING_KEY),
        ({**FACTS, "more": 1}, RefusalCode.UNKNOWN_KEY),
        ({**FACTS, "steps": 4}, RefusalCode.IMPOSSIBLE_FACT),
        ({**FACTS, "steps": -1}, RefusalCode.IMPOSSIBLE_FACT),
        ({**FACTS, "steps": 3.0}, RefusalCode.IMPOSSIBLE_FACT),
        ({**FACTS, "loss_total": 90.1}, RefusalCode.IMPOSSIBLE_FACT),
        ({**FACTS, "loss_total": -0.1}, RefusalCode.IMPOSSIBLE_FACT),
        ({"steps": 0, "loss_tokens": 0, "loss_total": 0.5}, RefusalCode.IMPOSSIBLE_FACT),
    ],
)
def test_facts_are_those_that_can_be(tmp_path, facts, code):
    for possible in (FACTS, {**FACTS, "loss_total": 90}, dict.fromkeys(FACTS, 0)):
        wire.open_upload(sent(tmp_path / "up", good(metrics=possible)), EXPECTED)
    expected = dataclasses.replace(EXPECTED, facts={**LIMITS, "x": wire.FactLimit(1)})
    assert (
        code_of(lambda: wire.open_upload(sent(tmp_path / "up", good()), expected)) == "missing_key"
    )
    roomy = dataclasses.replace(EXPECTED, client="anna")
    assert code_of(lambda: roomy.check(header_of(tmp_path, facts))) == code


def header_of(folder: Path, facts: dict) -> wire.MessageHeader:
    return wire.read_header(sent(folder / "up", good(metrics=facts)))


def test_only_the_dtype_of_the_wire_is_taken(tmp_path):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        path = sent(tmp_path / "up", good(), dtype)
        roomy = dataclasses.replace(EXPECTED.limits, message_bytes=None)
        assert code_of(lambda p=path, r=roomy: wire.read_header(p, r)) == RefusalCode.WRONG_DTYPE


# --- what a header tells about any message -------------------------------------------------


def test_a_header_tells_what_a_download_takes_before_it_is_read(tmp_path):
    """What a client needs to know to compare it with its owner's limits."""
    download = Download(ADAPTER, frozen=ADAPTER.only(["model.q"]), base_updates={3: ADAPTER})
    data, path = wire.encode_download(download, torch.bfloat16), tmp_path / "down"
    path.write_bytes(data)
    for message in (data, path):
        got = wire.read_header(message, wire.HeaderLimits(kind="download"))
        assert got.sections.keys() == {"", "frozen", "update 3"}
        assert got.sections["frozen"] == {"model.q": wire.ModuleShape((11, 7), 3, torch.bfloat16)}
        assert got.dense_bytes == 2 * (2 * (3 * 18 + 2 * 18) + 3 * 18)
        assert got.message_bytes == len(data)
        tight = wire.HeaderLimits(dense_bytes=got.dense_bytes, message_bytes=len(data))
        wire.read_header(message, tight)
        for name, code in (("dense_bytes", "too_large"), ("message_bytes", "wrong_size")):
            less = dataclasses.replace(tight, **{name: getattr(tight, name) - 1})
            assert code_of(lambda m=message, x=less: wire.read_header(m, x)) == code


def test_sections_of_the_same_round_in_other_digits_are_refused():
    """One of them would replace the other without a word."""
    factors = ADAPTER["model.q"]
    for name in ("update 03", "update ٣", "update 0", "update -1", "update 3 ", "update x"):
        adapter = Adapter({"update 3/model.q": factors, f"{name}/model.q": factors})
        data = wire.encode(adapter, {"kind": "download"}, torch.float32)
        assert code_of(lambda d=data: wire.decode_download(d)) == RefusalCode.UNKNOWN_TENSOR


@pytest.mark.parametrize("kind", fields.FIELDS)
def test_every_kind_of_message_has_its_fields_and_no_other(kind):
    fine = {"client": "a", "round": 1, "examples": 1, "facts": {}} if kind == "upload" else {}
    data = wire.encode(ADAPTER, {"kind": kind, **fine}, torch.float32)
    assert wire.decode(data)[1]["kind"] == kind
    for more in ({"x": 1}, {"ranks": {}} if kind == "upload" else {"facts": {}}, {"": None}):
        data = wire.encode(ADAPTER, {"kind": kind, **fine, **more}, torch.float32)
        assert code_of(lambda d=data: wire.decode(d)) == RefusalCode.UNKNOWN_KEY
    if kind in ("private", "state", "adapter"):
        data = wire.encode(ADAPTER, {"kind": kind}, torch.float32, sparse=True)
        assert b"sparse" not in data  # nothing to leave out
        data = wire.encode(ADAPTER, {"kind": kind, "sparse": {}}, torch.float32)
        assert code_of(lambda d=data: wire.decode(d)) == RefusalCode.UNKNOWN_KEY


# --- what it costs -------------------------------------------------------------------------

MOST_MEMORY = 16 * 2**20
"""In bytes: what refusing a message may take, however large the message is."""


def framed(head: bytes, size: int = 0) -> Callable[[Path], None]:
    """A file with this header and so many bytes after it, which take no room on the disk."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(head)) + head)
            file.truncate(8 + len(head) + size)

    return write


def declared(header_bytes: int, size: int) -> Callable[[Path], None]:
    """A file that says that its header is so long, of zeros that take no room."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", header_bytes))
            file.truncate(size)

    return write


def table(own: dict, tensors: dict) -> bytes:
    return json.dumps({"__metadata__": {"flexlora": json.dumps(own)}, **tensors}).encode()


OWN = {
    "format": fields.FORMAT,
    "kind": "upload",
    "client": "anna",
    "round": 4,
    "examples": 17,
    "facts": FACTS,
}


def thin(shape: list[int], dtype: str) -> Callable[[Path], None]:
    """A sparse tensor of zeros: its mask alone travels."""
    mask = -(-shape[0] * shape[1] // 8)
    own = {**OWN, "sparse": {"dtype": dtype, "shapes": {"model.q.B": shape}}}
    return framed(
        table(
            own,
            {
                "model.q.B": {"dtype": "U8", "shape": [mask], "data_offsets": [0, mask]},
                "model.q.A": {"dtype": dtype, "shape": [3, 0], "data_offsets": [mask, mask]},
            },
        ),
        mask,
    )


def empty(count: int) -> bytes:
    one = b'":{"dtype":"F32","shape":[0,1],"data_offsets":[0,0]}'
    return b'{"' + b',"'.join(b"%d.A" % n + one for n in range(count)) + b"}"


BOMBS: dict[str, Callable[[], Callable[[Path], None]]] = {
    "a gigabyte": lambda: declared(100, 10**9),
    "a header of a gigabyte": lambda: declared(10**9, 10**9 + 8),
    "a header of 95 megabytes": lambda: declared(95_000_000, 95_000_008),
    "a header of 2^63 bytes": lambda: declared(2**63, 10**9),
    "24 MB of lists": lambda: framed(b'{"x":[' + b"[],[]," * 4_000_000 + b"[]]}"),
    "200,000 empty tensors": lambda: framed(empty(200_000)),
    "200,000 texts of metadata": lambda: framed(
        json.dumps({"__metadata__": {str(n): "" for n in range(200_000)}}).encode()
    ),
    "a client of 20 MB": lambda: framed(table({**OWN, "client": "c" * 20_000_000}, {})),
    "a module of 30 MB": lambda: framed(
        table(OWN, {"m" * 30_000_000: {"dtype": "F32", "shape": [0, 1], "data_offsets": [0, 0]}})
    ),
    "a mask of zeros of 30 MiB, F32": lambda: thin([30 * 2**20 * 8 // 3, 3], "F32"),
    "a mask of zeros of 100 MiB, F64": lambda: thin([100 * 2**20 * 8 // 3, 3], "F64"),
    "[2^63, 0]": lambda: framed(
        table(
            OWN,
            {
                "model.q.A": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]},
                "model.q.B": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]},
            },
        )
    ),
    "depth 100,000": lambda: framed(b'{"a":' + b"[" * 100_000),
    "lists as far as there is room": lambda: framed(b'{"x":[' + b"[]," * 250 + b"[]]}"),
}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_it_takes_memory(tmp_path, name, sparse):
    path = tmp_path / "bomb"
    BOMBS[name]()(path)
    expected = dataclasses.replace(EXPECTED, sparse=sparse)
    tracemalloc.start()
    try:
        code_of(lambda: wire.open_upload(path, expected))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MOST_MEMORY


def test_a_sparse_bomb_is_refused_by_what_it_would_take(tmp_path):
    """Where the size of the message alone does not tell: 64 times as much in memory."""
    path = tmp_path / "bomb"
    thin([30 * 2**20 * 8 // 3, 3], "F32")(path)
    for most in (2**20, 2**29):
        limits = wire.HeaderLimits(kind="upload", dense_bytes=most)
        assert code_of(lambda x=limits: wire.read_header(path, x)) == RefusalCode.TOO_LARGE
    assert wire.read_header(path).dense_bytes == 30 * 2**20 * 8 // 3 * 3 * 4


def test_memory_of_a_header_is_bounded_by_its_length(tmp_path):
    """Whatever it says, at most some 30 bytes of memory for each of its own."""
    path, size = tmp_path / "bomb", 2**16
    worst = 0.0
    for unit in (b"[],", b"{},", b'"",', b"1.5,", b"12345678901,", b"[[[[]]]],", b'{"a":{}},'):
        framed(b'{"x":[' + unit * (size // len(unit)) + b"0]}")(path)
        tracemalloc.start()
        try:
            code_of(lambda: wire.read_header(path))
            worst = max(worst, tracemalloc.get_traced_memory()[1] / size)
        finally:
            tracemalloc.stop()
    assert 1 < worst < 40


def test_a_header_may_have_16_mib_where_nothing_smaller_is_expected():
    assert LARGEST_HEADER == 16_777_216
