import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from flexlora.errors import AdapterError
from flexlora.lowrank.factors import Adapter, Factors
from flexlora.peft_format import (
    CARD,
    CONFIG,
    VLLM_RANKS,
    WEIGHTS,
    read,
    write,
)
from support.peft_folders import D1, Q0, Q1, V0, factors, store, tensors_of


def product(factors):
    return factors.B.double() @ factors.A.double()


def test_round_trip(tmp_path, adapter):
    write(adapter, tmp_path / "out", "some/base", task_type="SEQ_CLS")
    stored = read(tmp_path / "out")
    assert (stored.base_model, stored.task_type) == ("some/base", "SEQ_CLS")
    assert set(stored.adapter) == set(adapter)
    assert stored.ranks == {Q0: 5, V0: 5, D1: 5}
    for module, expected in adapter.items():
        assert torch.equal(stored.adapter[module].first(expected.rank).B, expected.B)
        torch.testing.assert_close(product(stored.adapter[module]), product(expected))
        assert not stored.adapter[module].B[:, expected.rank :].any()


def test_the_written_form_is_the_safe_one(tmp_path, adapter):
    write(adapter, tmp_path / "out", "some/base")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == 5
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert (config["bias"], config["use_rslora"], config["use_dora"]) == ("none", False, False)
    assert config["init_lora_weights"] is True
    card = (tmp_path / "out" / CARD).read_text()
    assert card.startswith('---\nbase_model: "some/base"\nlibrary_name: "peft"\n')


@pytest.mark.parametrize(
    ("rank", "written"), [("max", 5), (5, 5), (6, 6), ("vllm", 8), (VLLM_RANKS[2], 16)]
)
def test_ranks_to_write(tmp_path, adapter, rank, written):
    write(adapter, tmp_path / "out", rank=rank)
    assert set(read(tmp_path / "out").ranks.values()) == {written}


@pytest.mark.parametrize(
    ("rank", "message"),
    [(4, "rank 5, above the requested 4"), ("best", "rank is 'best'"), (True, "rank is True")],
)
def test_refuses_ranks_to_write(tmp_path, adapter, rank, message):
    with pytest.raises(ValueError, match=message):
        write(adapter, tmp_path / "out", rank=rank)
    assert not list(tmp_path.iterdir())


def test_refuses_more_than_vllm_has(tmp_path):
    with pytest.raises(ValueError, match="rank 513, and vLLM supports up to 512"):
        write({Q0: Factors(torch.ones(2, 513), torch.ones(513, 3))}, tmp_path / "x", rank="vllm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_same_bytes(tmp_path, adapter, dtype):
    metadata = {"z": 1, "rounds": [3, 5], "a": "text: with 'quotes'"}
    for name in ("one", "two"):
        write(adapter, tmp_path / name, "b", dtype=dtype, metadata=metadata)
    for name in (WEIGHTS, CONFIG, CARD):
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
        assert one == two
    values = load_file(tmp_path / "one" / WEIGHTS)
    assert {value.dtype for value in values.values()} == {dtype}
    assert '"rounds": [3, 5]' in (tmp_path / "one" / CARD).read_text()


def test_the_card_is_valid_yaml_whatever_the_names(tmp_path, adapter):
    yaml = pytest.importorskip("yaml")
    base = "odd: 'name' # \"x\" \\ é 😀"
    write(adapter, tmp_path / "out", base, metadata={"note": "two\nlines"})
    front = (tmp_path / "out" / CARD).read_text(encoding="utf-8").split("---\n")[1]
    assert yaml.safe_load(front)["base_model"] == base
    assert yaml.safe_load(front)["flexlora"] == {"note": "two\nlines"}
    with pytest.raises(ValueError, match="cannot be printed"):
        write(adapter, tmp_path / "bad", "a\x85b")
    with pytest.raises(ValueError, match="metadata is not valid JSON"):
        write(adapter, tmp_path / "bad", metadata={"x": math.nan})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_replaces_only_an_adapter_and_only_with_replace(tmp_path, adapter):
    out = tmp_path / "out"
    out.mkdir()
    write(adapter, out)
    smaller = Adapter({Q0: adapter[Q0]})
    with pytest.raises(AdapterError, match=r"out is not empty.*--overwrite"):
        write(smaller, out)
    assert len(read(out).adapter) == 3
    write(smaller, out, replace=True)
    assert len(read(out).adapter) == 1
    (out / "optimizer.pt").write_text("precious")
    with pytest.raises(ValueError, match=r"also contains 'optimizer\.pt'"):
        write(adapter, out, replace=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file is a file"):
        write(adapter, tmp_path / "file", replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_a_failure_leaves_the_old_adapter(tmp_path, adapter, monkeypatch):
    write(adapter, tmp_path / "out")

    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("flexlora.peft_format.writing.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        write(Adapter({Q0: adapter[Q0]}), tmp_path / "out", replace=True)
    assert len(read(tmp_path / "out").adapter) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_refuses_adapters_that_cannot_be_written(tmp_path, adapter):
    with pytest.raises(ValueError, match="has no modules"):
        write(Adapter({}), tmp_path / "x")
    with pytest.raises(ValueError, match=r"'a\.\.b' is not a module path"):
        write({"a..b": adapter[Q0]}, tmp_path / "x")
    with pytest.raises(ValueError, match=f"'{Q0}' are not finite in torch.float32"):
        write({Q0: Factors(torch.full((3, 2), math.inf), torch.ones(2, 5))}, tmp_path / "x")
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        large = Factors(torch.full((3, 2), 1e6), torch.ones(2, 5))
        write({Q0: large}, tmp_path / "x", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"Cannot write torch\.int8"):
        write(adapter, tmp_path / "x", dtype=torch.int8)
    assert not list(tmp_path.iterdir())


def test_one_tensor_may_serve_two_modules(tmp_path):
    shared = factors(11, 7, 2, 4)
    write({Q0: shared, Q1: Factors(shared.B, shared.A)}, tmp_path / "out")
    assert torch.equal(read(tmp_path / "out").adapter[Q1].B, shared.B)


def test_rank_zero_is_written_as_an_update_of_zero(tmp_path):
    write({Q0: Factors(torch.zeros(11, 0), torch.zeros(0, 7))}, tmp_path / "out")
    assert read(tmp_path / "out").ranks == {Q0: 1}


@settings(deadline=None, max_examples=25)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    alpha=st.floats(-8, 8).filter(lambda value: abs(value) > 1e-3),
    rslora=st.booleans(),
)
def test_reading_then_writing_keeps_every_product(tmp_path_factory, ranks, alpha, rslora):
    folder = tmp_path_factory.mktemp("law")
    names = [f"h.{layer}.q_proj" for layer in range(len(ranks))]
    tensors = tensors_of(dict(zip(names, ranks, strict=True)))
    pattern = {f"h\\.{layer}\\..*": rank for layer, rank in enumerate(ranks)}
    store(folder / "in", tensors, r=9, rank_pattern=pattern, lora_alpha=alpha, use_rslora=rslora)
    before = read(folder / "in")
    write(before.adapter, folder / "out", rank="vllm")
    after = read(folder / "out")
    for name in names:
        torch.testing.assert_close(product(after.adapter[name]), product(before.adapter[name]))
