import json
import math
import pickle
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flexlora.errors import AdapterError
from flexlora.storage.tensors import DTYPES, FLOAT_DTYPES, open_tensors
from flexlora.storage.untrusted import RefusalCode, RefusedBytes

TENSORS = {
    "a": torch.arange(15.0).view(3, 5),
    "b": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16),
    "c": torch.tensor([7, 8, 9], dtype=torch.uint8),
    "empty": torch.zeros(0, 7),
    "scalar": torch.tensor(4.25, dtype=torch.float64),
}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"note": "é", "n": "3"})
    return tmp_path / "x.safetensors"


def write(path, header, data=b""):
    """A file with any header and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(first, last, shape=(2, 7), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


def test_tensors_come_back_in_the_order_of_the_names(path):
    file = open_tensors(path)
    assert file.tensors.keys() == TENSORS.keys()
    assert file.metadata == {"note": "é", "n": "3"}
    for name, tensor in zip(("scalar", *TENSORS), file.read("scalar", *TENSORS), strict=True):
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_every_dtype_is_read_to_the_bit(tmp_path, dtype):
    values = torch.tensor([[0, 1, 2], [3, 250, 7]]).to(dtype)
    save_file({"x": values}, tmp_path / "x")
    (read,) = open_tensors(tmp_path / "x").read("x")
    assert read.dtype == dtype
    assert torch.equal(read.view(torch.uint8), values.view(torch.uint8))


def test_shapes_and_sizes_are_available_before_reading(path):
    stored = open_tensors(path).tensors["b"]
    assert (stored.dtype, stored.shape, stored.bytes) == (torch.bfloat16, (1, 2), 4)
    assert path.read_bytes()[stored.start :][:4] == TENSORS["b"].view(torch.uint8).numpy().tobytes()


def test_the_open_file_can_be_pickled_to_workers(path):
    (read,) = pickle.loads(pickle.dumps(open_tensors(path))).read("a")
    assert torch.equal(read, TENSORS["a"])


def test_what_is_read_is_independent_of_the_file(path):
    (read,) = open_tensors(path).read("a")
    path.write_bytes(bytes(path.stat().st_size))
    read[0, 0] = 99
    assert torch.equal(read[1:], TENSORS["a"][1:])


def test_missing_names_and_files(path):
    file = open_tensors(path)
    with pytest.raises(KeyError):
        file.read("a", "z")
    path.unlink()
    with pytest.raises(FileNotFoundError):
        file.read("a")
    with pytest.raises(AdapterError, match=r"x\.safetensors is not a valid safetensors file"):
        open_tensors(path)
    with pytest.raises(AdapterError, match="is not a valid safetensors file"):
        open_tensors(path.parent)


def test_a_file_cut_off_while_in_use_is_refused_by_name(path):
    file = open_tensors(path)
    path.write_bytes(path.read_bytes()[: file.tensors["a"].start + 8])
    with pytest.raises(AdapterError, match=r"x\.safetensors ends within 'a'"):
        file.read("a")


def test_a_replaced_file_is_refused_on_request(path):
    lenient, strict = open_tensors(path), open_tensors(path, refuse_changes=True)
    assert torch.equal(strict.read("a")[0], TENSORS["a"])
    save_file(TENSORS, path.with_name("copy"), metadata={"note": "é", "n": "3"})
    path.with_name("copy").replace(path)
    assert torch.equal(lenient.read("a")[0], TENSORS["a"])
    with pytest.raises(AdapterError, match="has changed since it was opened"):
        strict.read("a")


def test_only_the_given_dtypes_are_read(path):
    with pytest.raises(AdapterError, match="'c' has the dtype 'U8', which is not one of F64, F32"):
        open_tensors(path, FLOAT_DTYPES)
    write(path, {"x": entry(0, 14, dtype="I8")}, bytes(14))
    with pytest.raises(AdapterError, match="'x' has the dtype 'I8'"):
        open_tensors(path)


def test_the_length_of_the_header_is_checked_before_it_is_read(path):
    length = int.from_bytes(path.read_bytes()[:8], "little")
    open_tensors(path, largest_header=length)
    with pytest.raises(AdapterError, match=f"its header has {length} bytes, and {length - 1} are"):
        open_tensors(path, largest_header=length - 1)
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(AdapterError, match="cut off at 10 bytes"):
        open_tensors(path)


HEADERS = [
    b"{" + b'"a":{"b":' * 3000,
    b'{"a":' + b"[" * 100_000,
    b"{\xff\xff}",
    b'{"x": NaN}',
    b"[]",
    b'{"a":'
    + json.dumps(entry(0, 56)).encode()
    + b',"a":'
    + json.dumps(entry(0, 56)).encode()
    + b"}",
    {"a": ["F32", [2, 7], [0, 56]]},
    {"a": entry(0, 56), "b": entry(0, 56)},
    {"a": entry(0, 52)},
    {"a": entry(0, 60)},
    {"a": entry(4, 60)},
    {"a": entry(-4, 52)},
    {"a": entry(0, 56, (-2, -7))},
    {"a": entry(0, 56, (2, 7.0))},
    {"a": entry(0, 56, (True, 14))},
    {"a": {"dtype": "F32", "shape": [2, 7]}},
    {"a": None},
    {"__metadata__": {"n": 3}, "a": entry(0, 56)},
    {"__metadata__": ["n"], "a": entry(0, 56)},
    {"a": entry(0, 48, (2, 6))},
    {"a": entry(0, 24, (1, 6)), "b": entry(28, 56, (1, 7))},
    {"a": entry(0, 56), "b": entry(28, 28, (0, 7))},
    {"a": entry(0, 56), "b": entry(56, 56, (2**63, 0))},
    {"a": entry(0, 56), "b": entry(56, 56, (2**64 - 1, 0))},
    {"a": entry(0, 56, (1,) * 998 + (2, 7))},
    {"a": {**entry(0, 56), "more": 1}},
    {"a": entry(False, 56)},
    b' {"a":' + json.dumps(entry(0, 56)).encode() + b"}",
    b'{"a":{"dtype":"F32","shape":[2,7],"data_offsets":[0,1' + b"0" * 5000 + b"]}}",
    b'{"a":{"dtype":"F32","shape":[2,1e400],"data_offsets":[0,56]}}',
]


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_headers_that_are_not_valid_are_refused(path, header):
    write(path, header, bytes(56))
    with pytest.raises(AdapterError, match=r"x\.safetensors") as caught:
        open_tensors(path)
    assert len(str(caught.value)) < 700


def test_names_in_messages_are_short_and_printable(path):
    write(path, {"\x1b[2J" * 999: entry(0, 14, dtype="I8")}, bytes(14))
    with pytest.raises(AdapterError, match="has the dtype") as caught:
        open_tensors(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_mutated_files_are_refused_or_read_as_safetensors_reads_them(path):
    valid = path.read_bytes()
    length = int.from_bytes(valid[:8], "little")
    draw = np.random.default_rng(5)
    refused = 0
    for trial in range(600):
        data = bytearray(valid)
        if trial % 3 == 0:
            del data[int(draw.integers(len(data))) :]
        else:
            for _ in range(int(draw.integers(1, 4))):
                place = int(draw.integers(8 + length if trial % 3 == 1 else len(data)))
                data[place] ^= 1 << int(draw.integers(8))
        path.write_bytes(data)
        try:
            file = open_tensors(path)
        except AdapterError:
            refused += 1
            continue
        expected = load_file(path)
        assert file.tensors.keys() == expected.keys()
        for name, tensor in zip(expected, file.read(*expected), strict=True):
            assert tensor.shape == expected[name].shape
            assert math.prod(tensor.shape) == 0 or torch.equal(
                tensor.view(-1).view(torch.uint8), expected[name].view(-1).view(torch.uint8)
            )
    assert 200 < refused < 600


def test_many_keys_of_which_one_is_twice_are_refused_at_once(path):
    """Looking for the key must not take the square of their number."""
    keys = [f'"{n}":1' for n in range(200_000)] + ['"199999":1']
    write(path, b"{" + ",".join(keys).encode() + b"}")
    started = time.process_time()
    with pytest.raises(RefusedBytes, match="the key '199999' appears twice") as caught:
        open_tensors(path)
    assert caught.value.code is RefusalCode.DUPLICATE_KEY
    assert time.process_time() - started < 10
