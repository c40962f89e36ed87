"""Federations of the models that people brought: the result in PEFT is that of this library."""

import os
from pathlib import Path

import pytest

from flexlora.federation import compose, rounds, setup

reference = pytest.importorskip("support.reference")

CASES = Path(__file__).parents[3] / "shared" / "cases"
CASES = Path(os.environ.get("FLEXLORA_CASES", CASES))
CONFIGS = {
    "50-families-that-work": ("opt", "gpt_neox", "qwen3"),
    "51-gpt2": ("gpt2",),
    "52-gpt-neo-and-gpt-j": ("gpt_neo", "gptj"),
    "54-bloom": ("bloom",),
    "55-mpt-alibi": ("mpt",),
    "56-sliding-window": ("gemma3", "mistral", "gpt_oss"),
    "58-mamba-hybrids": ("falcon_h1", "mamba"),
    "60-opt-feed-forward": ("opt",),
    "63-special-tokens": ("llama",),
    "64-resume-and-bfloat16": ("llama",),
    "65-mixture-of-experts": ("mixtral",),
}
RUNS = [
    (case, config, attention)
    for case, configs in CONFIGS.items()
    for config in configs
    for attention in ("auto", "eager")
]


@pytest.mark.slow
@pytest.mark.skipif(not CASES.is_dir(), reason="the folder of cases is not on this machine")
@pytest.mark.parametrize(("case", "config", "attention"), RUNS)
def test_a_run_gives_what_peft_computes(case, config, attention, tmp_path, monkeypatch):
    monkeypatch.chdir(CASES / case)
    monkeypatch.setenv("FLEXLORA_CACHE", str(tmp_path / "cache"))
    settings = compose.load(Path(f"{config}.toml"), [f'model.attention="{attention}"'])
    ready = setup.prepare(settings)
    events = list(rounds.run(ready, tmp_path / "run"))
    both = reference.differences(ready, Path(events[-1]["adapter"]))
    print(case, config, attention, ready.base.rows, reference.names(both))
    for each in both:
        assert each.largest < 2e-5 * each.scale
        assert each.loss == pytest.approx(each.reference_loss, abs=1e-5)
