import json
import math
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora import wire
from flexlora.lowrank.factors import Adapter
from flexlora.method.interface import Download, Upload
from flexlora.wire import fields
from support.factors import random_factors

ADAPTER = Adapter(
    {
        "model.q": random_factors(11, 3, 7, 1, torch.float32),
        "model.up": random_factors(13, 2, 5, 2, torch.float32),
    }
)
UPLOAD = Upload("anna", 4, ADAPTER, 17, {"seconds": 0.5, "tokens": 321.0})


def assert_equal(got: Adapter, want: Adapter) -> None:
    assert set(got) == set(want)
    for module in want:
        assert torch.equal(got[module].B, want[module].B)
        assert torch.equal(got[module].A, want[module].A)


def raw(header: object, tensors=None) -> bytes:
    """Bytes of the right form with any header."""
    default = {f"{m}.A": f.A for m, f in ADAPTER.items()}
    default |= {f"{m}.B": f.B for m, f in ADAPTER.items()}
    text = header if isinstance(header, str) else json.dumps(header)
    return safetensors.torch.save(tensors or default, metadata={"flexlora": text})


HEADER = {
    "format": fields.FORMAT,
    "kind": "upload",
    "client": "anna",
    "round": 4,
    "examples": 17,
    "facts": {"seconds": 0.5},
}


DOWNLOAD = {"format": fields.FORMAT, "kind": "download"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_download_comes_back_as_it_travelled(dtype):
    data = wire.encode_download(Download(ADAPTER), dtype)
    got = wire.decode_download(data).adapter
    assert {f.B.dtype for f in got.values()} == {dtype}
    assert_equal(got, ADAPTER.to(dtype))


def test_half_the_dtype_is_half_the_bytes():
    whole, half = (
        len(wire.encode_download(Download(ADAPTER), d)) for d in (torch.float32, torch.bfloat16)
    )
    assert whole - half == 2 * ADAPTER.parameters


def test_an_upload_comes_back_from_its_file(tmp_path):
    path = tmp_path / "upload"
    path.write_bytes(wire.encode_upload(UPLOAD, torch.float32))
    got = wire.open_upload(path)
    assert (got.client, got.round, got.examples) == ("anna", 4, 17)
    assert got.metrics == UPLOAD.metrics
    assert wire.stored_at(got.adapter) == path
    assert_equal(got.adapter, ADAPTER)
    with pytest.raises(KeyError):
        got.adapter["model.k"]


def test_equal_input_gives_equal_bytes_in_whatever_order():
    turned = Adapter(dict(reversed(list(ADAPTER.items()))))
    facts = dict(reversed(list(UPLOAD.metrics.items())))
    other = Upload("anna", 4, turned, 17, facts)
    assert wire.encode_upload(UPLOAD, torch.float32) == wire.encode_upload(other, torch.float32)


def test_the_length_of_an_upload_does_not_depend_on_the_clock():
    """Otherwise the bytes counted would differ from run to run."""
    lengths = {
        len(wire.encode_upload(Upload("anna", 4, ADAPTER, 17, {"seconds": s}), torch.float32))
        for s in (0.5, 0.02108752500037, 12.345678901234567, 100.0)
    }
    assert len(lengths) == 1


def test_views_of_one_tensor_are_stored_each_for_itself():
    shared = torch.arange(30.0)
    factors = random_factors(11, 3, 7, 3, torch.float32)
    adapter = Adapter(
        {
            "a": type(factors)(shared[:15].view(5, 3), shared[15:].view(3, 5)),
            "b": type(factors)(factors.B.t().contiguous().t(), factors.A[:, ::1]),
        }
    )
    assert_equal(
        wire.decode_download(wire.encode_download(Download(adapter), torch.float32)).adapter,
        adapter,
    )


def test_what_cannot_be_said_in_json_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        wire.encode_upload(Upload("a", 1, ADAPTER, 1, {"loss_total": float("nan")}), torch.float32)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "was cut off at 0 bytes"),
        (b"\x10" + b"\0" * 7, "was cut off at"),
        (b"\xff" * 40, "was cut off at"),
        (struct.pack("<Q", 2) + b"{}", "has format None"),
        (struct.pack("<Q", 4) + b"{\xfe[]", "codec can't decode"),
        (struct.pack("<Q", 6) + b"[1, 2]", "does not begin with {"),
        (raw({**HEADER, "format": 99}), "format 99; this version reads format 2"),
        (raw("[]"), "reads format 2"),
        (raw({**HEADER, "kind": "upload"}), "expected a message of kind 'download', not 'upload'"),
        (raw("{"), "."),
        (raw("[" * 100_000), "."),
        (
            wire.encode_download(Download(ADAPTER), torch.float32)[:-4],
            "does not lie within",
        ),
        (raw(DOWNLOAD, {"a.A": torch.ones(3, 7)}), "'a' has no B"),
        (
            raw(DOWNLOAD, {"a.A": torch.ones(2, 7), "a.B": torch.ones(9, 3)}),
            "ranks, 3 and 2, differ",
        ),
        (
            raw(
                DOWNLOAD,
                {"a.A": torch.ones(2, 7), "a.B": torch.ones(9, 2), "c": torch.ones(1)},
            ),
            "unknown tensor 'c'",
        ),
    ],
)
def test_bytes_that_are_no_download_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        wire.decode_download(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "download"}, "expected a message of kind 'upload', not 'download'"),
        ({"client": 5}, "'client' is 5, not a name"),
        ({"round": "4"}, "'round' is '4', not a round"),
        ({"round": True}, "'round' is True"),
        ({"examples": 1.5}, "'examples' is 1.5"),
        ({"examples": None}, "'examples' is None"),
        ({"facts": []}, "'facts' is "),
        ({"facts": {"seconds": "soon"}}, "."),
        ({"facts": {"seconds": None}}, "."),
        ({"facts": {"seconds": [1]}}, "."),
        ({"facts": {"seconds": 10**400}}, "."),
        ({"facts": {"seconds": float("nan")}}, "."),
    ],
)
def test_ill_typed_fields_of_an_upload_are_refused(tmp_path, changes, message):
    path = tmp_path / "upload"
    path.write_bytes(raw({**HEADER, **changes}))
    with pytest.raises(ValueError, match=message):
        wire.open_upload(path)


ENCODED = wire.encode_upload(UPLOAD, torch.float32)


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, len(ENCODED)),
    st.integers(0, 500),
    st.binary(max_size=12),
)
def test_damaged_bytes_are_refused_or_still_an_upload(tmp_path_factory, cut, place, noise):
    data = ENCODED[:cut] if cut % 2 else ENCODED
    data = data[:place] + noise + data[place + len(noise) :]
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(data)
    for read in (lambda: wire.decode(data), lambda: dict(wire.open_upload(path).adapter)):
        try:
            read()
        except ValueError:
            continue


def copied() -> Adapter:
    """The same numbers in tensors of their own."""
    return ADAPTER.to(torch.float64)


def test_every_field_of_a_download_travels(tmp_path):
    download = Download(
        ADAPTER,
        frozen=copied(),
        base_updates={12: copied(), 3: copied().only(["model.q"])},
        base_rounds=(1, 2),
        factors="B",
        learning_rate_factor=0.25,
        component_ids={"model.q": (4, 0, 2), "model.up": (1, 3)},
        ranks={"model.q": 3, "model.up": 0},
        aux={"control": copied()},
        ints={"period": -2},
    )
    data, path = wire.encode_download(download, torch.float32), tmp_path / "download"
    path.write_bytes(data)
    for got in (wire.decode_download(data), wire.open_download(path)):
        assert_equal(got.adapter, ADAPTER)
        assert_equal(got.frozen, ADAPTER)
        assert list(got.base_updates) == [3, 12] and list(got.aux) == ["control"]
        for adapter in (got.base_updates[12], got.aux["control"]):
            assert_equal(adapter, ADAPTER)
        assert_equal(got.base_updates[3], ADAPTER.only(["model.q"]))
        for name in ("base_rounds", "factors", "learning_rate_factor", "ranks", "ints"):
            assert getattr(got, name) == getattr(download, name)
        assert got.component_ids == download.component_ids


def test_a_download_may_be_ranks_only():
    """Where the client makes its adapter itself."""
    download = Download(Adapter({}), ranks={"model.q": 3})
    got = wire.decode_download(wire.encode_download(download, torch.float32))
    assert not got.adapter and got.ranks == {"model.q": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factors": "AB"}, "'factors' is 'AB', not BA, B or A"),
        ({"learning_rate_factor": 0}, "'learning_rate_factor' is 0, not a number"),
        ({"learning_rate_factor": "1"}, "'learning_rate_factor' is '1', not a number"),
        ({"base_rounds": [0]}, "is \\[0\\], not a list of distinct rounds"),
        ({"base_rounds": {}}, "is {}, not a list of distinct rounds"),
        ({"ranks": {"model.q": -1}}, "not ranks by module"),
        ({"ranks": [3]}, "not ranks by module"),
        ({"ints": {"period": 0.5}}, "not whole numbers by name"),
        ({"ints": {"period": True}}, "not whole numbers by name"),
    ],
)
def test_ill_typed_fields_of_a_download_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        wire.decode_download(raw({**DOWNLOAD, **changes}))


def test_sections_that_are_unknown_are_refused(tmp_path):
    tensors = {"other/model.q.A": torch.ones(2, 7), "other/model.q.B": torch.ones(9, 2)}
    with pytest.raises(ValueError, match=r"unknown tensor 'other/model\.q\.A'"):
        wire.decode_download(raw(DOWNLOAD, tensors))
    path = tmp_path / "upload"
    path.write_bytes(raw(HEADER, tensors))
    with pytest.raises(ValueError, match=r"unknown tensor 'other/model\.q\.A'"):
        wire.open_upload(path)


def test_adapters_beside_an_upload_travel(tmp_path):
    path = tmp_path / "upload"
    upload = Upload("anna", 4, ADAPTER, 17, aux={"control": copied().only(["model.q"])})
    path.write_bytes(wire.encode_upload(upload, torch.float32))
    got = wire.open_upload(path)
    assert_equal(got.adapter, ADAPTER)
    assert list(got.aux) == ["control"]
    assert_equal(got.aux["control"], ADAPTER.only(["model.q"]))


def test_whether_a_file_has_a_module_is_known_without_reading_it(tmp_path):
    path = tmp_path / "upload"
    upload = Upload("anna", 4, ADAPTER, 17, aux={"control": copied().only(["model.q"])})
    for sent in (upload, UPLOAD):
        path.write_bytes(wire.encode_upload(sent, torch.float32))
        got = wire.open_upload(path)
        path.unlink()
        for adapter in (got.adapter, got.adapter.only(["model.q"]), *got.aux.values()):
            assert "model.q" in adapter and "model.k" not in adapter
            with pytest.raises(FileNotFoundError):
                adapter["model.q"]


# --- without zeros -------------------------------------------------------------------------

LIST = {"sparse": {"dtype": "F32", "shapes": {"a.A": [3, 70]}}}


def holes(share: float, dtype=torch.float32, seed=1) -> Adapter:
    """Factors of which a share is zero; every tensor is a view, and one has no numbers."""
    draw = torch.Generator().manual_seed(seed)
    modules = {}
    for number, module in enumerate(("model.q", "model.up")):
        f = random_factors(110 + number, 3, 70, seed + number, dtype)
        B, A = (
            x.where(torch.rand(x.shape, generator=draw) >= share, torch.zeros_like(x))
            for x in (f.B, f.A)
        )
        modules[module] = type(f)(B.T.contiguous().T, A)
    modules["model.half"] = modules["model.q"].restricted("B")
    return Adapter(modules)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.75, 0.99, 1.0])
def test_without_zeros_everything_comes_back_to_the_bit(tmp_path, dtype, share):
    adapter = holes(share, dtype)
    upload = Upload("anna", 4, adapter, 17, {"seconds": 0.5})
    path = tmp_path / "upload"
    path.write_bytes(wire.encode_upload(upload, dtype, sparse=True))
    assert_equal(wire.open_upload(path).adapter, adapter)
    down = wire.encode_download(
        Download(adapter, aux={"beside": holes(share, dtype, 9)}, factors="B"), dtype, sparse=True
    )
    got = wire.decode_download(down)
    assert_equal(got.adapter, adapter)
    assert_equal(got.aux["beside"], holes(share, dtype, 9))
    assert {f.B.dtype for f in got.adapter.values()} == {dtype}


def test_signs_of_zeros_and_infinities_are_kept():
    A = torch.zeros(3, 70)
    A[0, 0], A[1, 2], A[2, 69] = -0.0, math.inf, math.nan
    f = type(ADAPTER["model.q"])(torch.zeros(110, 3), A)
    data = wire.encode_download(Download(Adapter({"a": f})), torch.float32, sparse=True)
    assert b'\\"a.A\\": [3, 70]' in data[:2000]
    got = wire.decode_download(data).adapter["a"].A
    assert torch.equal(got.view(torch.int32), A.view(torch.int32))


def test_only_tensors_that_get_smaller_travel_without_zeros():
    """The mask takes a 32nd of float32 numbers; tensors without zeros stay as they are."""
    full, empty = (
        [
            len(wire.encode_download(Download(holes(s)), torch.float32, sparse))
            for sparse in (False, True)
        ]
        for s in (0.0, 0.99)
    )
    assert full[0] == full[1]
    assert empty[1] < 0.5 * empty[0]  # of the rest most is the header
    one = Adapter({"a": type(ADAPTER["model.q"])(torch.ones(110, 3), torch.zeros(3, 70))})
    text = wire.encode_download(Download(one), torch.float32, sparse=True)
    assert b'\\"a.A\\"' in text[:2000] and b'\\"a.B\\"' not in text[:2000]


def test_the_bytes_are_the_numbers_and_a_bit_for_each_entry():
    adapter = Adapter({"a": holes(0.9)["model.q"]})
    data = wire.encode_download(Download(adapter), torch.float32, sparse=True)
    body = len(data) - 8 - int.from_bytes(data[:8], "little")
    numbers = sum(int((x != 0).sum()) for x in (adapter["a"].B, adapter["a"].A))
    assert body == 4 * numbers + -(-110 * 3 // 8) + -(-3 * 70 // 8)


def bare(**changes) -> bytes:
    """A download of which one tensor is 40 bytes: 3 numbers and the mask of 3 x 70 entries."""
    mask = torch.zeros(27, dtype=torch.uint8)
    mask[0], mask[5] = 0b10000010, 0b1
    data = torch.cat([torch.tensor([1.0, 2.0, 3.0]).view(torch.uint8), mask])
    tensors = {"a.A": changes.pop("data", data), "a.B": torch.ones(110, 3)}
    return raw({**DOWNLOAD, **LIST, **changes}, tensors)


def test_the_form_is_numbers_then_mask(tmp_path):
    A = torch.zeros(3, 70)
    A[0, 0], A[0, 6], A[0, 47] = 1.0, 2.0, 3.0
    assert torch.equal(wire.decode_download(bare()).adapter["a"].A, A)


BYTES = torch.zeros(39, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparse": []}, "not a table of the sparse tensors"),
        ({"sparse": None}, "not a table of the sparse tensors"),
        ({"sparse": {"dtype": "F32"}}, "does not say which tensors"),
        ({"sparse": {"dtype": "F32", "shapes": [["a.A", 3, 70]]}}, "does not say which tensors"),
        ({"sparse": {"dtype": "I64", "shapes": {"a.A": [3, 70]}}}, "have the dtype 'I64'"),
        ({"sparse": {"dtype": ["F32"], "shapes": {"a.A": [3, 70]}}}, "have the dtype "),
        ({"sparse": {"shapes": {"a.A": [3, 70]}}}, "does not say which tensors"),
        ({"sparse": {"dtype": "F32", "shapes": {}}}, "'a.A' is not both"),
        ({"sparse": {"dtype": "F32", "shapes": {"a.B": [110, 3]}}}, "'a.A' is not both"),
        ({"sparse": {"dtype": "F32", "shapes": {"a.A": [3, 70], "z": [1, 1]}}}, "'z' is not both"),
        (
            {"sparse": {"dtype": "F32", "shapes": {"a.A": [3, 70], "a.B": [110, 3]}}},
            "'a.B' is not both",
        ),
        (
            {"sparse": {"dtype": "F32", "shapes": {"a.A": [3, -70]}}},
            r"has the shape \[3, -70\] in the header",
        ),
        (
            {"sparse": {"dtype": "F32", "shapes": {"a.A": [3.0, 70]}}},
            "has the shape .* in the header",
        ),
        (
            {"sparse": {"dtype": "F32", "shapes": {"a.A": [True, 70]}}},
            "has the shape .* in the header",
        ),
        ({"sparse": {"dtype": "F32", "shapes": {"a.A": [210]}}}, "has the shape .* in the header"),
        ({"sparse": {"dtype": "F32", "shapes": {"a.A": "3x"}}}, "has the shape .* in the header"),
        (
            {"sparse": {"dtype": "F32", "shapes": {"a.A": [3, 10**30]}}},
            "has the shape .* in the header",
        ),
        # Enormous matrices need enormous masks, which are not there.
        ({"sparse": {"dtype": "F32", "shapes": {"a.A": [3, 2**31 - 1]}}}, "its mask takes"),
        ({"sparse": {"dtype": "F32", "shapes": {"a.A": [70, 3]}}}, "."),
        ({"sparse": {"dtype": "F32", "shapes": {"a.A": [3, 69]}}}, "."),
        ({"sparse": {"dtype": "F64", "shapes": {"a.A": [3, 70]}}}, "have two dtypes"),
        ({"sparse": {"dtype": "F16", "shapes": {"a.A": [3, 70]}}}, "have two dtypes"),
        ({"data": BYTES[:38]}, "not a sparse matrix of shape"),
        ({"data": BYTES}, "marks 0 of 210 entries but has 3"),
        ({"data": BYTES[:26]}, "its mask takes 27"),
        ({"data": BYTES.view(3, 13)}, "its mask takes 27"),
        ({"data": torch.cat([BYTES[:26], BYTES[:1] + 1])}, "marks 0 of 210 entries but has 0"),
    ],
)
def test_hostile_bytes_without_zeros_are_refused(tmp_path, changes, message):
    """By both readers, the one in memory and the one of files."""
    data, path = bare(**changes), tmp_path / "download"
    path.write_bytes(data)
    if "[70, 3]" in str(changes):
        message = "their ranks|ranks, 3 and 70"
    for read in (
        lambda: wire.decode_download(data),
        lambda: dict(wire.open_download(path).adapter),
    ):
        with pytest.raises(ValueError, match=message):
            read()


def test_bytes_that_no_header_names_are_no_numbers():
    tensors = {"a.A": torch.ones(3, 7, dtype=torch.uint8), "a.B": torch.ones(11, 3)}
    with pytest.raises(ValueError, match=r"'a\.A' is not both"):
        wire.decode_download(raw(DOWNLOAD, tensors))


THIN = wire.encode_upload(Upload("anna", 4, holes(0.8), 17), torch.float32, sparse=True)


@settings(deadline=None, max_examples=300)
@given(st.integers(0, len(THIN)), st.integers(0, len(THIN)), st.binary(max_size=12))
def test_damaged_bytes_without_zeros_are_refused_or_still_an_upload(
    tmp_path_factory, cut, place, noise
):
    data = THIN[:cut] if cut % 5 == 0 else THIN
    data = data[:place] + noise + data[place + len(noise) :]
    path = tmp_path_factory.getbasetemp() / "damaged-thin"
    path.write_bytes(data)
    for read in (lambda: wire.decode(data), lambda: dict(wire.open_upload(path).adapter)):
        try:
            read()
        except ValueError:
            continue


@pytest.mark.parametrize("said", ["[1]", "5", '"x"', "true", "null", "{}"])
def test_a_header_that_is_no_table_is_refused(said, tmp_path):
    """A client may send any JSON; the server must be able to say that it is lost."""
    path = tmp_path / "upload"
    path.write_bytes(safetensors.torch.save({}, metadata={"flexlora": said}))
    with pytest.raises(ValueError, match="has format None"):
        wire.open_upload(path)
