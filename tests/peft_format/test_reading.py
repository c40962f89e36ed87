import dataclasses
import math
import pickle

import pytest
import torch
from safetensors.torch import save_file

from flexlora.peft_format import (
    CONFIG,
    WEIGHTS,
    read,
    write,
)
from support.peft_folders import (
    D1,
    Q0,
    Q1,
    key,
    store,
    tensors_of,
)


@pytest.mark.parametrize("rslora", [False, True])
def test_folds_the_scale_and_honours_patterns(tmp_path, rslora):
    tensors = tensors_of({Q0: 2, Q1: 5})
    store(
        tmp_path,
        tensors,
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 5, "q_proj": 2, ".*": 9},
        alpha_pattern={"^model.layers.0.*": 3.5},
        r=8,
        use_rslora=rslora,
    )
    stored = read(tmp_path)
    for module, rank, alpha in ((Q0, 2, 3.5), (Q1, 5, 6)):
        scale = alpha / (math.sqrt(rank) if rslora else rank)
        expected = scale * tensors[key(module, "B")] @ tensors[key(module, "A")]
        torch.testing.assert_close(stored.adapter[module].B @ stored.adapter[module].A, expected)
        assert stored.layers[module].scale == scale
    assert stored.ranks == {Q0: 2, Q1: 5}


def test_patterns_match_whole_names_only(tmp_path):
    stored = read(store(tmp_path, alpha_pattern={"proj": 100, "self_attn": 50, "": 7}))
    assert {layer.scale for layer in stored.layers.values()} == {3.0}


def test_values_are_read_on_look_up(tmp_path):
    tensors = tensors_of({Q0: 2, Q1: 2})
    tensors[key(Q1, "B")][3, 1] = math.nan
    stored = read(store(tmp_path, tensors))
    assert stored.adapter[Q0].shape == (11, 7)
    place = rf"{WEIGHTS}: 'base_model\.model\.{Q1}\.lora_B\.weight' contains NaN"
    with pytest.raises(ValueError, match=place):
        stored.adapter[Q1]
    with pytest.raises(ValueError, match=place):
        stored.loaded()


def test_loaded_outlives_the_file(tmp_path):
    lazy = read(store(tmp_path))
    loaded = lazy.loaded()
    expected = lazy.adapter[Q0]
    (tmp_path / WEIGHTS).unlink()
    torch.testing.assert_close(loaded.adapter[Q0].B, expected.B)
    with pytest.raises(ValueError, match=f"{WEIGHTS} can no longer be read"):
        lazy.adapter[Q0]


def test_a_file_that_changes_is_noticed(tmp_path):
    lazy = read(store(tmp_path))
    save_file(tensors_of({Q0: 3, D1: 4}), tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="has changed since it was opened"):
        lazy.adapter[Q0]


def test_unknown_modules_are_key_errors(tmp_path):
    stored = read(store(tmp_path))
    assert "other" not in stored.adapter
    with pytest.raises(KeyError):
        stored.adapter["other"]


def test_lazy_adapters_can_be_pickled_to_workers(tmp_path):
    stored = read(store(tmp_path))
    copy = pickle.loads(pickle.dumps(stored))
    torch.testing.assert_close(copy.adapter[Q1].A, stored.adapter[Q1].A)


def test_dtypes_as_stored_and_as_requested(tmp_path):
    tensors = {name: value.bfloat16() for name, value in tensors_of({Q0: 2}).items()}
    store(tmp_path, tensors, lora_alpha=0.7)
    exact = tensors[key(Q0, "B")].float() * 0.35
    assert read(tmp_path, dtype=None).adapter[Q0].B.dtype == torch.bfloat16
    assert torch.equal(read(tmp_path, dtype=None).adapter[Q0].B, exact.bfloat16())
    assert torch.equal(read(tmp_path).adapter[Q0].B, exact)
    wide = read(tmp_path, torch.float64).adapter[Q0].B
    assert torch.equal(wide, tensors[key(Q0, "B")].double() * 0.35)


def test_overflow_in_folding_is_refused(tmp_path):
    tensors = {name: value.half() for name, value in tensors_of({Q0: 2}).items()}
    store(tmp_path, tensors, lora_alpha=1e7)
    assert read(tmp_path).adapter[Q0].B.isfinite().all()
    with pytest.raises(ValueError, match=rf"'{Q0}' overflows torch.float16"):
        read(tmp_path, dtype=None).adapter[Q0]


@pytest.mark.parametrize("half", "AB")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_refuses_values_that_are_not_finite(tmp_path, half, value):
    tensors = tensors_of({Q0: 2})
    tensors[key(Q0, half)][1, 1] = value
    stored = read(store(tmp_path, tensors))
    with pytest.raises(ValueError, match=f"{WEIGHTS}: '.*lora_{half}.weight' contains NaN or inf"):
        stored.adapter[Q0]


def test_refuses_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"{CONFIG} is missing"):
        read(tmp_path)
    store(tmp_path / "named")
    with pytest.raises(ValueError, match=rf"{CONFIG} is missing.*perhaps .*named"):
        read(tmp_path)
    with pytest.raises(ValueError, match=f"{CONFIG} is a file; give the folder"):
        read(tmp_path / "named" / CONFIG)
    (tmp_path / "named" / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"{WEIGHTS} is missing"):
        read(tmp_path / "named")


def test_paths_may_be_strings(tmp_path, adapter):
    write(adapter, str(tmp_path / "out"))
    assert read(str(tmp_path / "out")).directory == tmp_path / "out"
    assert set(read(str(tmp_path / "out")).adapter) == set(adapter)


def test_the_values_are_frozen(tmp_path):
    stored = read(store(tmp_path))
    with pytest.raises(dataclasses.FrozenInstanceError):
        stored.base_model = "other"
