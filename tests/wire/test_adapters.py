import json

import pytest
import safetensors.torch
import torch

from flexlora import wire
from flexlora.errors import ProtocolError
from flexlora.lowrank.factors import Adapter, Factors
from flexlora.wire import fields
from support.factors import random_factors

ADAPTER = Adapter(
    {
        "model.q": random_factors(11, 3, 7, 1, torch.float32),
        "model.up": random_factors(13, 2, 5, 2, torch.float32),
    }
)


def test_a_file_is_read_module_by_module(tmp_path):
    path = tmp_path / "state.safetensors"
    path.write_bytes(wire.encode(ADAPTER, {"kind": "state"}, torch.float32))
    adapter, header = wire.open_file(path)
    assert header == {"format": fields.FORMAT, "kind": "state"}
    assert list(adapter) == sorted(ADAPTER)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        adapter["model.q"]


def test_a_file_cut_off_while_in_use_is_refused_by_name(tmp_path):
    path = tmp_path / "state.safetensors"
    path.write_bytes(wire.encode(ADAPTER, {"kind": "state"}, torch.float32))
    adapter, _ = wire.open_file(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ProtocolError, match=r"state\.safetensors ends within 'model.up.B'"):
        dict(adapter)


def test_no_other_dtypes_are_read_than_those_in_which_adapters_are_written(tmp_path):
    path = tmp_path / "state.safetensors"
    header = {"flexlora": json.dumps({"format": fields.FORMAT, "kind": "state"})}
    for dtype, name in ((torch.int64, "I64"), (torch.int8, "I8"), (torch.bool, "BOOL")):
        tensors = {"a.A": torch.ones(2, 7, dtype=dtype), "a.B": torch.ones(9, 2)}
        path.write_bytes(safetensors.torch.save(tensors, header))
        with pytest.raises(ProtocolError, match=rf"state\.safetensors: 'a\.A' has .* '{name}'"):
            wire.open_file(path)


def test_a_file_that_is_no_adapter_is_refused_by_name(tmp_path):
    path = tmp_path / "noise.safetensors"
    path.write_bytes(b"noise")
    with pytest.raises(ValueError, match=r"noise\.safetensors is not a valid safetensors file"):
        wire.open_file(path)


def test_factors_that_share_memory_are_stored_as_if_each_had_its_own():
    up = ADAPTER["model.up"]
    shared = Adapter({"a": up, "b": up, "c": up.first(1)})
    own = Adapter({module: Factors(f.B.clone(), f.A.clone()) for module, f in shared.items()})
    data = wire.encode(shared, {"kind": "state"}, torch.float32)
    assert data == wire.encode(own, {"kind": "state"}, torch.float32)
    assert torch.equal(wire.decode(data)[0]["c"].A, up.A[:1])
