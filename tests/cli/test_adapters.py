"""The commands merge and check."""

import pytest
import torch

from flexlora import peft_format
from flexlora.lowrank.factors import Adapter
from support import commands
from support.commands import python
from support.factors import random_factors

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def call(monkeypatch, capsys):
    return lambda *words: commands.call(monkeypatch, capsys, *words)


@pytest.fixture
def adapters(tmp_path):
    for name, rank in (("a", 2), ("b", 3)):
        factors = random_factors(11, rank, 7, seed=rank, dtype=torch.float32)
        peft_format.write(Adapter({Q: factors}), tmp_path / name, base_model="tiny/base")
    return tmp_path / "a", tmp_path / "b"


def test_merge_prints_the_energy_kept_and_writes(call, adapters, tmp_path):
    out = tmp_path / "out"
    code, said, _ = call("merge", *adapters, "--weights", "3,1", "--rank", "4", "--out", out)
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
def test_merge_says_what_is_wrong_and_writes_nothing(call, adapters, tmp_path, words, message):
    out = tmp_path / "out"
    code, _, said = call("merge", *adapters, "--out", out, *words)
    assert code == 2 and message in said and not out.exists()


def test_merge_does_not_overwrite(call, adapters):
    code, _, said = call("merge", *adapters, "--out", adapters[0])
    assert code == 2 and str(adapters[0]) in said


def test_a_long_path_of_a_module_is_not_broken(call, tmp_path):
    module = "model.decoder." + ".".join(f"inner_block_{n}" for n in range(6)) + ".q_proj"
    for name, rank in (("a", 2), ("b", 3)):
        factors = random_factors(11, rank, 7, seed=rank, dtype=torch.float32)
        peft_format.write(Adapter({module: factors}), tmp_path / name)
    code, said, _ = call("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    assert code == 0 and said.count(module) == 2


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    """A limit on the size of files stands for the disk."""
    pytest.importorskip("resource", reason="Windows has no such limit")
    for name in ("a", "b"):
        factors = random_factors(311, 2, 207, seed=5, dtype=torch.float32)
        peft_format.write(Adapter({Q: factors}), tmp_path / name)
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "sys.argv = ['flexlora', 'merge', 'a', 'b', '--out', 'out']\n"
        "from flexlora.cli.main import main\n"
        "main()\n"
    )
    result = python("-c", code, cwd=tmp_path)
    assert result.code == 2 and "Traceback" not in result.err
    assert "cannot be written" in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_check_tells_and_fails_on_what_is_misread(call, adapters):
    code, said, _ = call("check", adapters[0])
    assert code == 0 and "vLLM" in said and "tiny/base" in said
    config = adapters[0] / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_rslora": false', '"use_rslora": true'))
    code, said, _ = call("check", adapters[0])
    assert code == 1 and "llama.cpp: misreads it" in said


def test_check_of_nothing(call, tmp_path):
    code, _, said = call("check", tmp_path / "no")
    assert code == 2 and said.startswith("error: ") and "Traceback" not in said
