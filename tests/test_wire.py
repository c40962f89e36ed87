import json
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora import wire
from flexlora.adapter import Adapter
from flexlora.method import Download, Upload
from ingredients import random_factors

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
    known = {f"{m}.A": f.A for m, f in ADAPTER.items()}
    known |= {f"{m}.B": f.B for m, f in ADAPTER.items()}
    text = header if isinstance(header, str) else json.dumps(header)
    return safetensors.torch.save(tensors or known, metadata={"flexlora": text})


HEADER = {
    "format": wire.FORMAT,
    "kind": "upload",
    "client": "anna",
    "round": 4,
    "examples": 17,
    "facts": {"seconds": 0.5},
}


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
    assert got.facts == UPLOAD.facts
    assert_equal(got.adapter, ADAPTER)
    with pytest.raises(KeyError):
        got.adapter["model.k"]


def test_equal_input_gives_equal_bytes_in_whatever_order():
    turned = Adapter(dict(reversed(list(ADAPTER.items()))))
    facts = dict(reversed(list(UPLOAD.facts.items())))
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
        (b"", "0 bytes received are no adapter"),
        (b"\x10" + b"\0" * 7, "header is cut off"),
        (b"\xff" * 40, "header is cut off"),
        (struct.pack("<Q", 2) + b"{}", "no flexlora header"),
        (struct.pack("<Q", 4) + b"\xff\xfe[]", "no flexlora header"),
        (struct.pack("<Q", 6) + b"[1, 2]", "no flexlora header"),
        (raw({**HEADER, "format": 99}), "format 99; this version reads format 1"),
        (raw("[]"), "reads format 1"),
        (raw({**HEADER, "kind": "upload"}), "Expected a download, got a 'upload'"),
        (raw("{"), "."),
        (raw("[" * 100_000), "."),
        (wire.encode_download(Download(ADAPTER), torch.float32)[:-4], "no adapter"),
        (raw({**HEADER, "kind": "download"}, {"a.A": torch.ones(3, 7)}), "'a' has no B"),
        (
            raw({**HEADER, "kind": "download"}, {"a.A": torch.ones(2, 7), "a.B": torch.ones(9, 3)}),
            "ranks, 3 and 2, differ",
        ),
        (
            raw(
                {**HEADER, "kind": "download"},
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
        ({"kind": "download"}, "Expected a upload"),
        ({"client": 5}, "'client' is 5, not a str"),
        ({"round": "4"}, "'round' is '4', not a int"),
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


def test_a_file_is_read_module_by_module(tmp_path):
    path = tmp_path / "state.safetensors"
    path.write_bytes(wire.encode(ADAPTER, {"kind": "state"}, torch.float32))
    adapter, header = wire.open_file(path)
    assert header == {"format": wire.FORMAT, "kind": "state"}
    assert list(adapter) == sorted(ADAPTER)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        adapter["model.q"]


def test_a_file_that_is_no_adapter_is_refused_by_name(tmp_path):
    path = tmp_path / "noise.safetensors"
    path.write_bytes(b"noise")
    with pytest.raises(ValueError, match=r"noise\.safetensors is no stored adapter"):
        wire.open_file(path)
