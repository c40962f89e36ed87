import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flexlora.errors import AdapterError
from flexlora.lowrank.factors import Factors
from flexlora.peft_format import CONFIG, WEIGHTS, Report, check, write

Q0 = "model.layers.0.self_attn.q_proj"
Q1 = "model.layers.1.self_attn.q_proj"
V1 = "model.layers.1.self_attn.v_proj"


def matrix(rows, columns, seed):
    values = np.random.default_rng(seed).normal(size=(rows, columns)) * 0.01
    return torch.tensor(values, dtype=torch.float32)


def store(folder, ranks, tensors=None, **config):
    """An adapter of (11, 7) layers as another program would leave it."""
    folder.mkdir(exist_ok=True)
    values = {}
    for seed, (module, rank) in enumerate(ranks.items()):
        values[f"base_model.model.{module}.lora_A.weight"] = matrix(rank, 7, seed)
        values[f"base_model.model.{module}.lora_B.weight"] = matrix(11, rank, 50 + seed)
    plain = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 6,
        "base_model_name_or_path": "some/base",
    }
    plain["target_modules"] = sorted({module.rpartition(".")[2] for module in ranks})
    (folder / CONFIG).write_text(json.dumps(plain | config))
    save_file(values | (tensors or {}), folder / WEIGHTS)
    return folder


def outcomes(report):
    return {verdict.consumer: verdict.outcome for verdict in report.verdicts}


def verdict(report, consumer):
    return next(verdict for verdict in report.verdicts if verdict.consumer == consumer)


VLLM, NEWER = "vLLM up to 0.30.0", "vLLM after 0.30.0"


def test_facts(tmp_path):
    ranks = {Q0: 2, Q1: 5, V1: 2}
    report = check(store(tmp_path, ranks, rank_pattern={r"layers\.1\..*q_proj": 5}))
    assert report.base_model == "some/base"
    assert report.modules == 3
    assert report.ranks == {2: 2, 5: 1}
    assert report.parameters == (2 + 5 + 2) * (11 + 7)
    assert report.bytes == (tmp_path / WEIGHTS).stat().st_size
    assert report.scales == (6 / 5, 3.0)
    assert report.dtypes == ("float32",)
    assert report.warnings == ()
    assert not report.refusal


def test_largest_norm(tmp_path):
    big = {
        f"base_model.model.{Q1}.lora_A.weight": matrix(3, 7, 8),
        f"base_model.model.{Q1}.lora_B.weight": 4 * matrix(11, 3, 9),
    }
    report = check(store(tmp_path, {Q0: 3, Q1: 3, V1: 3}, big, r=3))
    expected = 2 * torch.linalg.norm(
        big[f"base_model.model.{Q1}.lora_B.weight"] @ big[f"base_model.model.{Q1}.lora_A.weight"]
    )
    assert report.largest[0] == Q1
    assert report.largest[1] == pytest.approx(float(expected), rel=1e-5)


def test_what_we_write_is_read_alike_by_all(tmp_path):
    factors = {Q0: Factors(matrix(11, 2, 1), matrix(2, 7, 2))}
    factors[Q1] = Factors(matrix(11, 3, 3), matrix(3, 7, 4))
    write(factors, tmp_path / "out", "some/base")
    report = check(tmp_path / "out")
    assert report.alike
    assert set(outcomes(report)) == {"PEFT", VLLM, NEWER, "SGLang", "llama.cpp", "TensorRT-LLM"}
    assert report.scales == (1.0,)
    assert report.warnings == ()
    assert "1 of 6 rank-one components are zero in both" in report.notes[0]
    assert report.lines()[-1] == f"note: {report.notes[0]}"


MISREADINGS = [
    # ranks, settings, then who misreads: vLLM <= 0.30.0, llama.cpp, TensorRT-LLM
    ({Q0: 2, Q1: 2}, {}, (False, False, False)),
    ({Q0: 2, Q1: 2}, {"use_rslora": True}, (False, True, False)),
    ({Q0: 1, Q1: 1}, {"use_rslora": True, "r": 1}, (False, False, False)),
    ({Q0: 2, Q1: 5}, {"rank_pattern": {"layers.1.*q_proj": 5}}, (True, False, False)),
    ({Q0: 2, Q1: 2}, {"alpha_pattern": {"layers.1.*q_proj": 9}}, (True, True, True)),
    (
        {Q0: 2, Q1: 5},
        {"rank_pattern": {"layers.1.*": 5}, "alpha_pattern": {"layers.1.*": 15}},
        (False, True, True),
    ),
    (
        {Q0: 2, Q1: 5},
        {"rank_pattern": {"layers.1.*": 5}, "use_rslora": True},
        (True, True, False),
    ),
    ({Q0: 2, Q1: 2}, {"alpha_pattern": {"k_proj": 9}}, (False, False, False)),
    ({Q0: 2, Q1: 2}, {"lora_alpha": 0}, (False, True, False)),
]


@pytest.mark.parametrize(("ranks", "settings", "wrong"), MISREADINGS)
def test_who_misreads(tmp_path, ranks, settings, wrong):
    report = check(store(tmp_path, ranks, **settings))
    outcome = outcomes(report)
    expected = ["misreads" if is_wrong else "reads" for is_wrong in wrong]
    assert [outcome[VLLM], outcome["llama.cpp"], outcome["TensorRT-LLM"]] == expected
    assert (outcome["PEFT"], outcome[NEWER]) == ("reads", "reads")
    rslora = settings.get("use_rslora") and any(rank > 1 for rank in ranks.values())
    assert outcome["SGLang"] == ("misreads" if wrong[0] or rslora else "reads")
    assert report.alike == (not any(wrong))
    for each in report.verdicts:
        assert (each.outcome == "misreads") == ("--rank max --out NEW" in each.remedy)
        assert (each.outcome == "misreads") == ("get a wrong scale" in each.why)


def test_the_reason_gives_the_figures(tmp_path):
    report = check(store(tmp_path, {Q0: 2, Q1: 5}, rank_pattern={"layers.1.*": 5}))
    why = verdict(report, VLLM).why
    assert f"1 of 2 modules get a wrong scale, such as {Q1}: 3 instead of 1.2" in why


@pytest.mark.parametrize(
    ("rank", "outcome", "text"),
    [
        (16, "reads", ""),
        (17, "reads", "if it is started with --max-lora-rank 32"),
        (257, "reads", "if it is started with --max-lora-rank 320"),
        (513, "refuses", "rank 513 is above its largest, 512"),
    ],
)
def test_vllm_ranks(tmp_path, rank, outcome, text):
    report = check(store(tmp_path, {Q0: rank}, r=rank))
    for consumer in (VLLM, NEWER):
        assert verdict(report, consumer).outcome == outcome
        assert verdict(report, consumer).why == text


def test_llama_cpp_needs_the_base_model(tmp_path):
    report = check(store(tmp_path, {Q0: 2}, base_model_name_or_path=None))
    assert verdict(report, "llama.cpp").why == "if convert_lora_to_gguf.py is given --base"


def test_warns_of_untrained_modules(tmp_path):
    zero = {f"base_model.model.{Q1}.lora_B.weight": torch.zeros(11, 2)}
    report = check(store(tmp_path / "one", {Q0: 2, Q1: 2, V1: 2}, zero))
    assert report.warnings[0].startswith(f"1 of 3 modules have an update of zero, such as {Q1}")
    report = check(store(tmp_path / "all", {Q1: 2}, zero))
    assert report.warnings[0].startswith("the update is zero everywhere")


def test_counts_padding_only_where_both_factors_are_zero(tmp_path):
    A, B = matrix(5, 7, 1), matrix(11, 5, 2)
    A[1], A[3], B[:, 3], B[:, 4] = 0, 0, 0, 0
    tensors = {
        f"base_model.model.{Q1}.lora_A.weight": A,
        f"base_model.model.{Q1}.lora_B.weight": B,
    }
    report = check(store(tmp_path, {Q0: 5, Q1: 5}, tensors, r=5))
    assert report.notes[0].startswith("1 of 10 rank-one components are zero in both B and A")


def test_warns_of_large_updates_and_odd_alphas(tmp_path):
    report = check(store(tmp_path, {Q0: 2, Q1: 2}, alpha_pattern={"layers.1.*": -9e3}))
    assert report.warnings[0].startswith(f"1 of 2 modules have very large updates, worst {Q1}")
    assert "zero or negative" in report.warnings[1]


def test_warns_of_patterns_that_overlap(tmp_path):
    twice = {"layers.1.*": 9, "q_proj": 4}
    report = check(store(tmp_path / "one", {Q0: 2, Q1: 2, V1: 2}, alpha_pattern=twice))
    assert f"match 1 modules, such as {Q1}, and the first counts" in report.warnings[0]
    same = {"layers.1.*": 4, "q_proj": 4}
    assert not check(store(tmp_path / "two", {Q0: 2, Q1: 2}, alpha_pattern=same)).warnings


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"use_dora": True},
            {"PEFT": "reads", "vLLM": "refuses", "llama.cpp": "refuses"},
        ),
        ({"bias": "all"}, {"PEFT": "reads", "vLLM": "refuses", "llama.cpp": "refuses"}),
        (
            {"init_lora_weights": "pissa"},
            {
                VLLM: "misreads",
                NEWER: "refuses",
                "SGLang": "misreads",
                "llama.cpp": "misreads",
                "TensorRT-LLM": "misreads",
            },
        ),
        (
            {"init_lora_weights": "lora_ga"},
            dict.fromkeys((VLLM, NEWER, "SGLang", "llama.cpp", "TensorRT-LLM"), "misreads"),
        ),
        ({"use_novelty": True, "peft_version": "0.99.0"}, {}),
        ({"alora_invocation_tokens": [1, 2]}, {"PEFT": "reads"}),
        ({"target_parameters": ["experts.up"]}, {"PEFT": "reads"}),
        (
            {"trainable_token_indices": [1]},
            {"PEFT": "reads", "vLLM": "refuses", "llama.cpp": "refuses"},
        ),
    ],
)
def test_reports_what_is_more_than_b_times_a(tmp_path, settings, expected):
    report = check(store(tmp_path, {Q0: 2}, **settings))
    assert outcomes(report) == expected
    assert next(iter(settings)) in report.refusal
    assert not report.alike
    assert any(line.startswith("refused ") for line in report.lines())
    assert report.bytes == (tmp_path / WEIGHTS).stat().st_size


def test_unsound_adapters_are_errors(tmp_path):
    with pytest.raises(AdapterError, match="does not exist"):
        check(tmp_path / "nowhere")
    bad = {f"base_model.model.{Q0}.lora_B.weight": torch.full((11, 2), math.nan)}
    with pytest.raises(ValueError, match=f"{WEIGHTS}: '.*{Q0}.lora_B.weight' contains NaN"):
        check(store(tmp_path / "nan", {Q0: 2}, bad))
    with pytest.raises(ValueError, match="has rank 3"):
        check(store(tmp_path / "rank", {Q0: 3}))


def test_lines(tmp_path):
    folder = tmp_path / "with space"
    report = check(store(folder, {Q0: 2, Q1: 5}, rank_pattern={"layers.1.*": 5}))
    text = "\n".join(report.lines())
    assert "base model  some/base" in text
    assert "ranks       2 (x1), 5 (x1)" in text
    assert "scales      1.2, 3" in text
    assert "PEFT: OK" in report.lines()
    assert f"{VLLM}: misreads it: " in text
    assert f"flexlora merge '{folder}' --rank max --out NEW" in text
    assert all(line.isprintable() for line in report.lines())


def test_a_condition_follows_the_ok(tmp_path):
    report = check(str(store(tmp_path, {Q0: 17}, r=17)))
    assert f"{NEWER}: OK if it is started with --max-lora-rank 32" in report.lines()


def test_lines_carry_no_control_characters(tmp_path):
    report = check(store(tmp_path, {Q0: 2}, base_model_name_or_path="a\x1b[2Jb"))
    assert "base model  a?[2Jb" in report.lines()


def test_the_report_is_frozen(tmp_path):
    report = check(store(tmp_path, {Q0: 2}))
    assert isinstance(report, Report)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.modules = 7
