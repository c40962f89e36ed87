import json

import pytest
import torch
from safetensors.torch import save_file

from flexlora import peft_format
from flexlora.errors import AdapterError
from flexlora.laws.dense import best, product, relative_error, weighted_sum
from flexlora.lowrank.factors import Adapter
from flexlora.peft_format.merging import merge, parse_rank
from support.factors import random_factors

SHAPES = {"model.layers.0.self_attn.q_proj": (11, 7), "model.layers.0.mlp.up_proj": (13, 5)}
Q, UP = SHAPES


@pytest.fixture
def adapters(tmp_path):
    """Three directories of ranks 2, 3 and 4, as values and on the disk."""
    stored = []
    for index, rank in enumerate((2, 3, 4)):
        adapter = Adapter(
            {
                module: random_factors(out, rank, in_, seed=10 * index + place, dtype=torch.float32)
                for place, (module, (out, in_)) in enumerate(SHAPES.items())
            }
        )
        peft_format.write(adapter, tmp_path / f"a{index}", base_model="tiny/base")
        stored.append((tmp_path / f"a{index}", adapter))
    return stored


def merged(out):
    return peft_format.read(out).adapter


def test_the_mean_of_products_without_loss(adapters, tmp_path):
    result = merge([d for d, _ in adapters], tmp_path / "out", weights=[3, 1, 2])
    for module in SHAPES:
        terms = [(w / 6, a[module]) for w, (_, a) in zip([3, 1, 2], adapters, strict=True)]
        assert relative_error(product(merged(tmp_path / "out")[module]), weighted_sum(terms)) < 1e-6
    assert [facts.energy for facts in result] == pytest.approx([1, 1])
    assert {k.module: (k.summed_rank, k.rank) for k in result} == {Q: (9, 7), UP: (9, 5)}


def test_a_rank_gives_the_best_approximation_and_its_energy(adapters, tmp_path):
    result = merge([d for d, _ in adapters], tmp_path / "out", rank=2)
    for facts in result:
        dense = weighted_sum([(1 / 3, a[facts.module]) for _, a in adapters])
        assert (
            relative_error(product(merged(tmp_path / "out")[facts.module]), best(dense, 2)) < 1e-5
        )
        assert facts.energy == pytest.approx(1 - relative_error(best(dense, 2), dense) ** 2)


def test_an_energy_share_is_kept_in_every_module_with_the_least_rank(adapters, tmp_path):
    result = merge([d for d, _ in adapters], tmp_path / "out", rank=0.9)
    for facts in result:
        dense = weighted_sum([(1 / 3, a[facts.module]) for _, a in adapters])
        assert facts.energy >= 0.9
        assert 1 - relative_error(best(dense, facts.rank - 1), dense) ** 2 < 0.9


def test_merging_an_adapter_with_itself_does_not_raise_its_rank(adapters, tmp_path):
    directory, adapter = adapters[1]
    result = merge([directory, directory], tmp_path / "out")
    assert [facts.rank for facts in result] == [3, 3]
    assert relative_error(product(merged(tmp_path / "out")[Q]), product(adapter[Q])) < 1e-6


def test_scales_and_patterns_are_honoured(adapters, tmp_path):
    """The same tensors under alpha 6 for rank 3 are twice the update."""
    directory, adapter = adapters[1]
    config = json.loads((directory / "adapter_config.json").read_text())
    config |= {"lora_alpha": 6, "alpha_pattern": {"up_proj": 12}}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    merge([directory], tmp_path / "out")
    for module, scale in ((Q, 2), (UP, 4)):
        want = scale * product(adapter[module])
        assert relative_error(product(merged(tmp_path / "out")[module]), want) < 1e-6


def test_a_module_that_one_adapter_lacks_counts_as_no_update(adapters, tmp_path):
    only = Adapter({UP: adapters[0][1][UP]})
    peft_format.write(only, tmp_path / "only", base_model="tiny/base")
    merge([adapters[0][0], tmp_path / "only"], tmp_path / "out")
    want = 0.5 * product(adapters[0][1][Q])
    assert relative_error(product(merged(tmp_path / "out")[Q]), want) < 1e-6


def test_modules_of_only_some_adapters_are_reported(adapters, tmp_path):
    only = Adapter({UP: adapters[0][1][UP]})
    peft_format.write(only, tmp_path / "only", base_model="tiny/base")
    result = merge([adapters[0][0], tmp_path / "only", adapters[1][0]], tmp_path / "out")
    absent = {facts.module: facts.absent_from for facts in result}
    assert absent == {Q: (tmp_path / "only",), UP: ()}
    assert result.notes == (
        f"1 of 2 modules are missing from some of the 3 adapters, such as {Q}, which is in 2 of "
        f"them. An adapter without a module counts there as an update of zero, with its full "
        f"weight (--absent skip takes the mean over the adapters that have the module).",
    )
    assert merge([adapters[0][0]], tmp_path / "whole").notes == ()


def test_a_rank_above_the_content_is_reported(adapters, tmp_path):
    result = merge([adapters[0][0]], tmp_path / "out", rank=64)
    assert result.rank == 2
    assert result.notes == (
        "The result has rank 2, below the 64 given, because no module needs more.",
    )


def test_the_result_describes_the_file(adapters, tmp_path):
    result = merge([d for d, _ in adapters], tmp_path / "out", rank=2)
    dense = {m: weighted_sum([(1 / 3, a[m]) for _, a in adapters]) for m in SHAPES}
    total = sum(float((matrix**2).sum()) for matrix in dense.values())
    lost = sum(float(((matrix - best(matrix, 2)) ** 2).sum()) for matrix in dense.values())
    assert result.energy == pytest.approx(1 - lost / total)
    assert (len(result), result.rank) == (2, 2)
    assert result.bytes == (tmp_path / "out" / peft_format.WEIGHTS).stat().st_size
    assert result.directory == tmp_path / "out"


def test_modules_are_in_the_order_of_their_numbers(tmp_path):
    names = [f"model.layers.{layer}.q_proj" for layer in range(12)]
    adapter = Adapter({name: random_factors(5, 1, 4, dtype=torch.float32) for name in names})
    peft_format.write(adapter, tmp_path / "in")
    assert [facts.module for facts in merge([tmp_path / "in"], tmp_path / "out")] == names


def test_paths_may_be_strings_but_not_one_string(adapters, tmp_path):
    result = merge([str(d) for d, _ in adapters], str(tmp_path / "out"))
    assert len(result) == 2
    with pytest.raises(AdapterError, match="takes a list of folders"):
        merge(str(adapters[0][0]), tmp_path / "other")
    with pytest.raises(AdapterError, match="give at least one"):
        merge([], tmp_path / "other")


def test_an_adapter_is_replaced_only_with_replace(adapters, tmp_path, monkeypatch):
    folder, adapter = adapters[0]
    monkeypatch.setattr("flexlora.peft_format.reading.read", None)  # refused before any reading
    with pytest.raises(AdapterError, match=r"is not empty.*--overwrite"):
        merge([folder], adapters[1][0])
    monkeypatch.undo()
    merge([folder], adapters[1][0], replace=True)
    assert relative_error(product(merged(adapters[1][0])[Q]), product(adapter[Q])) < 1e-6
    merge([folder, folder], folder, replace=True)  # an input may be replaced by the result
    assert relative_error(product(merged(folder)[Q]), product(adapter[Q])) < 1e-6


def test_on_any_error_nothing_is_written(adapters, tmp_path):
    directories = [d for d, _ in adapters]
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="weight for each of 3 adapters, not 2"):
        merge(directories, out, weights=[1, 2])
    with pytest.raises(ValueError, match=r"positive and finite, got -1"):
        merge(directories, out, weights=[1, -1, 2])
    with pytest.raises(ValueError, match="nowhere"):
        merge([*directories, tmp_path / "nowhere"], out)
    weights = directories[2] / "adapter_model.safetensors"
    tensors = {f"base_model.model.{UP}.lora_A.weight": torch.full((4, 5), torch.nan)}
    tensors |= {f"base_model.model.{UP}.lora_B.weight": torch.ones(13, 4)}
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors.*up_proj.*NaN|NaN.*up_proj"):
        merge(directories, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("weights", "how"),
    [
        ((1e308, 1e308, 1e308), {}),
        ((1e308, 1e308, 1.0), {"absent": "skip"}),
        ((1e308, -1e308, 1e308), {"sum_weights": True}),
        ((1.0, 2.0, 1e-300), {}),
        ((1.0, -2.0, 1e-300), {"sum_weights": True}),
        ((1e-300, 2e-300, 1e-300), {"sum_weights": True}),
        ((1e200, 2e200, 1e200), {"sum_weights": True}),
        ((1e40, 2e40, 1e40), {"sum_weights": True}),
        ((1e-8, 2e-8, 1e-8), {"sum_weights": True, "dtype": torch.float16}),
        ((1e6, 2e6, 1e6), {"sum_weights": True, "dtype": torch.float16}),
    ],
)
def test_weights_that_would_lose_an_adapter_or_the_result_are_refused(
    adapters, tmp_path, weights, how
):
    with pytest.raises(AdapterError, match="weights of ordinary size"):
        merge([d for d, _ in adapters], tmp_path / "out", weights, **how)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("unit", [1e300, 1e-300])
def test_only_the_ratio_of_weights_counts(adapters, tmp_path, unit):
    merge([d for d, _ in adapters], tmp_path / "out", [3 * unit, 1 * unit, 2 * unit])
    merge([d for d, _ in adapters], tmp_path / "plain", [3, 1, 2])
    got, want = (product(merged(tmp_path / name)[Q]) for name in ("out", "plain"))
    assert relative_error(got, want) < 1e-6


def test_other_shapes_and_other_bases_are_refused(adapters, tmp_path):
    other = Adapter({Q: random_factors(7, 2, 11, dtype=torch.float32)})
    peft_format.write(other, tmp_path / "other", base_model="tiny/base")
    with pytest.raises(ValueError, match=r"differs in shape .*a0: \(11, 7\), .*other: \(7, 11\)"):
        merge([adapters[0][0], tmp_path / "other"], tmp_path / "out")
    peft_format.write(adapters[0][1], tmp_path / "else", base_model="another/base")
    with pytest.raises(ValueError, match="different base models"):
        merge([adapters[0][0], tmp_path / "else"], tmp_path / "out")
    merge([adapters[0][0], tmp_path / "else"], tmp_path / "out", base="tiny/base")
    assert peft_format.read(tmp_path / "out").base_model == "tiny/base"


def test_ranks_as_people_write_them():
    assert [parse_rank(text) for text in ("16", "0.99", "max")] == [16, 0.99, "max"]
    for text in ("0", "-3", "1.5", "0.0", "nan", "many", "1e999"):
        with pytest.raises(ValueError, match="rank"):
            parse_rank(text)
