"""The command line: what people type, right and wrong."""

import sys

import pytest
import torch

from flexlora import peft_format
from flexlora.cli import main
from flexlora.lowrank.factors import Adapter
from support.factors import random_factors

Q = "model.layers.0.self_attn.q_proj"


def call(monkeypatch, capsys, *words):
    """The exit code, output and errors of ``flexlora words``."""
    monkeypatch.setattr(sys, "argv", ["flexlora", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main.main()
    said = capsys.readouterr()
    return stop.value.code or 0, said.out, said.err


@pytest.fixture
def adapters(tmp_path):
    for name, rank in (("a", 2), ("b", 3)):
        factors = random_factors(11, rank, 7, seed=rank, dtype=torch.float32)
        peft_format.write(Adapter({Q: factors}), tmp_path / name, base_model="tiny/base")
    return tmp_path / "a", tmp_path / "b"


def test_merge_prints_the_energy_kept_and_writes(monkeypatch, capsys, adapters, tmp_path):
    out = tmp_path / "out"
    code, said, _ = call(
        monkeypatch, capsys, "merge", *adapters, "--weights", "3,1", "--rank", "4", "--out", out
    )
    assert code == 0 and "least energy kept: 9" in said and Q in said
    assert peft_format.read(out).ranks == {Q: 4}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "3;1"], "--weights takes numbers such as 3,1,2, not '3;1'"),
        (["--weights", "3,1,2"], "weight for each of 2 adapters, not 3"),
        (["--rank", "1.5"], "energy share between 0 and 1"),
        (["--rank", "lots"], "--rank is 'lots'"),
    ],
)
def test_merge_says_what_is_wrong_and_writes_nothing(
    monkeypatch, capsys, adapters, tmp_path, words, message
):
    out = tmp_path / "out"
    code, _, said = call(monkeypatch, capsys, "merge", *adapters, "--out", out, *words)
    assert code == 2 and message in said and not out.exists()


def test_merge_does_not_overwrite(monkeypatch, capsys, adapters):
    code, _, said = call(monkeypatch, capsys, "merge", *adapters, "--out", adapters[0])
    assert code == 2 and str(adapters[0]) in said


def test_check_tells_and_fails_on_what_is_misread(monkeypatch, capsys, adapters):
    code, said, _ = call(monkeypatch, capsys, "check", adapters[0])
    assert code == 0 and "vLLM" in said and "tiny/base" in said
    config = adapters[0] / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_rslora": false', '"use_rslora": true'))
    code, said, _ = call(monkeypatch, capsys, "check", adapters[0])
    assert code == 1 and "llama.cpp: misreads it" in said


def test_check_of_nothing(monkeypatch, capsys, tmp_path):
    code, _, said = call(monkeypatch, capsys, "check", tmp_path / "no")
    assert code == 2 and said.startswith("error: ") and "Traceback" not in said


def test_methods_lists_every_file(monkeypatch, capsys):
    code, said, _ = call(monkeypatch, capsys, "methods")
    assert code == 0
    for name in ("fedit", "flexlora", "hetlora"):
        assert f"{name}: " in said
    assert "arXiv 2402.11505" in said and "mixed ranks: no" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "Give a CONFIG.toml, or --resume DIR."),
        (["run", "missing.toml"], "missing.toml cannot be read"),
        (["run", "--resume", "nowhere"], "There is no run to resume in nowhere"),
        (["report", "nowhere"], "no metrics.jsonl in nowhere"),
    ],
)
def test_faults_are_one_message(monkeypatch, capsys, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, said = call(monkeypatch, capsys, *words)
    assert code == 2 and message in said


def test_unknown_keys_are_named_with_line_and_nearest(monkeypatch, capsys, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(
        '[model]\nname = "x"\n[data]\npath = "d.parquet"\nuseen_clients = 3\n'
        "[ranks]\nrank = 8\n[federation]\nrounds = 1\ncohort = 2\n"
    )
    code, _, said = call(monkeypatch, capsys, "run", path, "--set", "federation.rounds=many")
    assert code == 2
    assert "line 5: unknown key 'data.useen_clients'. Did you mean 'data.unseen_clients'?" in said
    assert "'federation.rounds' is 'many'" in said
