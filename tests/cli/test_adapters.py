"""The commands merge and check."""

import json

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
        factors = random_factors(12, rank, 7, seed=rank, dtype=torch.float32)
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


def test_a_large_merge_is_summed_up(call, tmp_path):
    names = [f"model.layers.{layer}.q_proj" for layer in range(41)]
    factors = {name: random_factors(5, 2, 4, dtype=torch.float32) for name in names}
    peft_format.write(factors, tmp_path / "a")
    _, said, _ = call("merge", tmp_path / "a", "--out", tmp_path / "out")
    assert "modules: 41, of rank 2 to 2 (--modules lists them)" in said
    assert names[40] not in said and "written: " in said
    _, said, _ = call("merge", tmp_path / "a", "--out", tmp_path / "all", "--modules")
    assert [line.split()[-1] for line in said.splitlines()[1:42]] == names


def test_merge_as_json_or_quietly(call, adapters, tmp_path):
    code, said, _ = call("merge", *adapters, "--out", tmp_path / "one", "--json")
    content = json.loads(said)
    assert code == 0 and content["rank"] == 5 and content["directory"] == str(tmp_path / "one")
    (module,) = content["modules"]
    assert module["module"] == Q and module["energy"] == pytest.approx(1)
    assert call("merge", *adapters, "--out", tmp_path / "two", "--quiet")[:2] == (0, "")


def test_merge_with_every_option(call, adapters, tmp_path):
    other = random_factors(5, 2, 4, dtype=torch.float32)
    peft_format.write({"lm_head": other}, tmp_path / "c", base_model="tiny/base")
    words = ["--weights", "1,-0.5,2", "--sum", "--absent", "skip", "--dtype", "bfloat16"]
    words += ["--base", "my/base", "--revision", "v2", "--task-type", "CAUSAL_LM"]
    code, said, _ = call("merge", *adapters, tmp_path / "c", "--out", tmp_path / "out", *words)
    assert code == 0 and "the sum over the adapters that have it (--sum)" in said
    config = json.loads((tmp_path / "out" / peft_format.CONFIG).read_text())
    assert config["base_model_name_or_path"] == "my/base"
    assert (config["revision"], config["task_type"]) == ("v2", "CAUSAL_LM")
    code, _, said = call("merge", *adapters, "--out", tmp_path / "x", "--weights", "1,-1")
    assert code == 2 and "--sum" in said


def test_check_as_json_or_quietly(call, adapters):
    code, said, _ = call("check", adapters[0], "--json")
    content = json.loads(said)
    assert code == 0 and content["alike"] is True and content["ranks"] == {"2": 1}
    assert content["verdicts"][0]["outcome"] == "reads"
    assert call("check", adapters[0], "--quiet")[:2] == (0, "")
    config = adapters[0] / "adapter_config.json"
    config.write_text(config.read_text().replace("q_proj", "k_proj"))
    code, said, _ = call("check", adapters[0], "--json")
    assert code == 1 and json.loads(said)["dropped"] == [Q]


def test_check_with_the_folder_of_a_base_model(call, adapters, tmp_path):
    (tmp_path / "base").mkdir()
    code, _, said = call("check", adapters[0], "--base", tmp_path / "base")
    assert code == 2 and "config.json is missing; give --base a folder" in said
    sizes = {"hidden_size": 7, "num_attention_heads": 1, "num_hidden_layers": 2}
    config = {"model_type": "llama", "vocab_size": 9, "intermediate_size": 5, "head_dim": 12}
    (tmp_path / "base" / "config.json").write_text(json.dumps(sizes | config))
    code, said, _ = call("check", adapters[0], "--base", tmp_path / "base")
    assert code == 0 and "PEFT: OK" in said
    path = adapters[0] / "adapter_config.json"
    path.write_text(path.read_text().replace(f'"{Q}"', '"q_proj"'))
    code, said, _ = call("check", adapters[0], "--base", tmp_path / "base")
    assert code == 1 and "also chooses model.layers.1.self_attn.q_proj" in said


def test_a_run_stands_for_its_last_adapter(call, adapters, tmp_path):
    for number, folder in enumerate(adapters, 9):
        place = tmp_path / "run" / "rounds" / f"{number:05d}"
        place.mkdir(parents=True)
        folder.rename(place / "adapter")
    code, said, _ = call("check", tmp_path / "run")
    assert code == 0 and "00010" in said and "ranks       3 (x1)" in said
    code, _, _ = call("merge", tmp_path / "run", "--out", tmp_path / "out")
    assert code == 0 and peft_format.read(tmp_path / "out").ranks == {Q: 3}


def test_help_says_the_rules(call):
    _, said, _ = call("merge", "--help")
    text = " ".join(said.replace("│", " ").split())
    assert "normalised to sum to 1" in text
    assert "counts as an update of zero" in text
    _, said, _ = call("check", "--help")
    assert "Exit code 1: one would misread" in " ".join(said.replace("│", " ").split())
