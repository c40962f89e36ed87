import json
import pickle
import zipfile

import numpy as np
import pytest
import torch

from flexlora.errors import AdapterError
from flexlora.peft_format import (
    WEIGHTS,
    read,
)
from support.peft_folders import Q0, key, matrix, outcome, store, tensors_of

STRANGE = [
    (f"base_model.model.{Q0}.lora_magnitude_vector", "belongs to DoRA"),
    ("base_model.model.model.embed_tokens.lora_embedding_A", "present but .* is missing"),
    ("base_model.model.lm_head.base_layer.weight", "is a whole tensor"),
    ("base_model.model.model.embed_tokens.trainable_tokens_delta", "trainable_token_indices"),
    ("base_model.model.mlp.experts.base_layer.lora_A.weight", "target_parameters"),
    (f"base_model.model.{Q0}.lora_B.bias", "is a trained bias"),
    ("base_model.model.lm_head.weight", "is a whole tensor"),
    ("base_model.model.score.modules_to_save.weight", "is a whole tensor"),
    (f"base_model.model.{Q0}.lora_A.default.weight", "several adapters .'default' and one without"),
    (f"{Q0}.lora_A.weight", "does not begin with base_model.model."),
    (f"diffusion_model.{Q0}.lora_A.weight", "does not begin with base_model.model."),
    (f"base_model.model.{Q0}.lora_C.weight", "is not of the form"),
    ("", "is not of the form"),
    ("base_model.model.a..b.lora_A.weight", "is not a module path"),
    ("base_model.model.a\x1b[2J.lora_A.weight", "is not a module path"),
    (f"base_model.model.{'x' * 513}.lora_A.weight", "is not a module path"),
]


@pytest.mark.parametrize(("name", "message"), STRANGE)
def test_refuses_strange_tensors(tmp_path, name, message):
    store(tmp_path, tensors_of({Q0: 2}) | {name: matrix(2, 7, 5)})
    with pytest.raises(AdapterError, match=message) as caught:
        read(tmp_path)
    assert WEIGHTS in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 800


A0, B0 = key(Q0, "A"), key(Q0, "B")


SHAPES = [
    ({A0: matrix(2, 7, 1)}, f"'{A0}' is present but '{B0}' is missing"),
    ({B0: matrix(11, 2, 1)}, f"'{B0}' is present but '{A0}' is missing"),
    ({A0: matrix(2, 7, 1), B0: matrix(11, 3, 2)}, "their ranks differ"),
    ({A0: torch.zeros(2, 7, 1), B0: matrix(11, 2, 2)}, rf"'{A0}' has the shape \[2, 7, 1\]"),
    ({A0: matrix(2, 7, 1), B0: torch.zeros(11)}, rf"'{B0}' has the shape \[11\]"),
    ({A0: torch.zeros(2, 0), B0: matrix(11, 2, 2)}, r"the shapes \[11, 2\] and \[2, 0\]"),
    ({A0: torch.zeros(0), B0: torch.zeros(0)}, "ZeRO-3.*stage3_gather_16bit_weights_on_model_sa"),
    ({A0: torch.zeros(2, 7, 1, 1), B0: torch.zeros(11, 2, 1, 1)}, "LoRA of a convolution"),
    (
        {A0: torch.ones(2, 7, dtype=torch.int8), B0: matrix(11, 2, 2)},
        f"'{A0}' has the dtype 'I8'",
    ),
    ({}, "contains no tensors"),
]


@pytest.mark.parametrize(("tensors", "message"), SHAPES)
def test_refuses_tensors_that_make_no_product(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(store(tmp_path, tensors))
    assert WEIGHTS in str(caught.value)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_refuses_pickles_without_opening_them(tmp_path, name):
    (store(tmp_path) / WEIGHTS).rename(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a pickle.*safe_serialization=True"):
        read(tmp_path)


def test_refuses_other_files_under_the_name_of_safetensors(tmp_path):
    path = store(tmp_path) / WEIGHTS
    torch.save(tensors_of({Q0: 2}), path)
    with pytest.raises(ValueError, match=f"{WEIGHTS} is not a .* it is a zip.*safe_serial"):
        read(tmp_path)
    path.write_bytes(pickle.dumps({"a": 1}) * 9)
    with pytest.raises(ValueError, match=r"it is a pickle.*safe_serialization"):
        read(tmp_path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    with pytest.raises(ValueError, match=r"Git LFS pointer.*git lfs pull"):
        read(tmp_path)
    path.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ValueError, match="GGUF file"):
        read(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="cut off at 0 bytes"):
        read(tmp_path)
    path.unlink()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "y")
    with pytest.raises(ValueError, match="it is a zip"):
        read(tmp_path)


def raw(header):
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(data).to_bytes(8, "little") + data


HEADERS = [
    (b"{" + b'"a":{"b":' * 3000, "not a valid safetensors file"),
    (b'{"a":' + b"[" * 100_000, "not a valid safetensors file"),
    (b"{\xff\xff}      ", "not a valid safetensors file"),
    (b'{"x": NaN}   ', "not a valid safetensors file"),
    (b"{}         ", "contains no tensors"),
]


@pytest.mark.parametrize(("header", "message"), HEADERS)
def test_refuses_broken_headers(tmp_path, header, message):
    (store(tmp_path) / WEIGHTS).write_bytes(raw(header))
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_refuses_a_huge_header(tmp_path):
    with (store(tmp_path) / WEIGHTS).open("wb") as file:
        file.write((33 << 20).to_bytes(8, "little") + b'{"')
        file.truncate(40 << 20)
    with pytest.raises(ValueError, match=r"its header has 34603008 bytes"):
        read(tmp_path)


def test_refuses_a_tensor_named_twice(tmp_path):
    entry = '{"dtype":"F32","shape":[2,7],"data_offsets":[0,56]}'
    header = f'{{"{A0}":{entry},"{A0}":{entry}}}'.encode()
    (store(tmp_path) / WEIGHTS).write_bytes(raw(header) + bytes(56))
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        read(tmp_path)


def test_refuses_entries_that_only_safetensors_understands(tmp_path):
    header = {A0: ["F32", [2, 7], [0, 56]]}
    (store(tmp_path) / WEIGHTS).write_bytes(raw(header) + bytes(56))
    with pytest.raises(ValueError, match=WEIGHTS):
        read(tmp_path)


def test_mutated_weights_are_refused_or_read_but_never_crash(tmp_path):
    path = store(tmp_path) / WEIGHTS
    sound = path.read_bytes()
    length = int.from_bytes(sound[:8], "little")
    random = np.random.default_rng(7)
    refused = 0
    for trial in range(400):
        data = bytearray(sound)
        if trial % 3 == 0:
            del data[int(random.integers(len(data))) :]
        else:
            for _ in range(int(random.integers(1, 4))):
                place = int(random.integers(8 + length if trial % 3 == 1 else len(data)))
                data[place] ^= 1 << int(random.integers(8))
        path.write_bytes(data)
        refused += outcome(tmp_path) is not None
    assert refused > 200
