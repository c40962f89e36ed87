"""A base model that a server names is compared with this machine before it is loaded."""

import json
import shutil
from types import SimpleNamespace

import pytest

from flexlora.deployment.node import base_model
from flexlora.model.source import Source
from support import models

GIB = 2**30


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return models.save(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def free(monkeypatch):
    """So much memory and disk is free."""

    def put(memory: float, disk: float = 100 * GIB) -> None:
        monkeypatch.setattr(base_model, "free_bytes", lambda device: memory)
        usage = SimpleNamespace(free=disk)
        monkeypatch.setattr(base_model.shutil, "disk_usage", lambda path: usage)

    return put


@pytest.fixture
def hub(monkeypatch):
    """A hub that says this of every model; the names that were asked for."""
    asked = []

    def put(total: int | None = None, **sizes: int) -> list[str]:
        files = [SimpleNamespace(rfilename=n.replace("__", "."), size=s) for n, s in sizes.items()]
        reported = None if total is None else SimpleNamespace(total=total)

        def info(self, name, **options):
            asked.append(name)
            return SimpleNamespace(siblings=files, safetensors=reported)

        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(base_model.huggingface_hub.HfApi, "model_info", info)
        return asked

    return put


def test_a_model_that_fits(whole, free):
    free(GIB)
    base_model.check(Source(str(whole)))


def test_its_memory_is_that_of_its_dtype(whole, free):
    free(16_480 * 3)
    base_model.check(Source(str(whole), dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"has 16,480 weights, which take 64\.4 KiB in float32"):
        base_model.check(Source(str(whole)))


def test_a_model_of_the_hub_that_does_not_fit_is_not_downloaded(free, hub):
    free(16 * GIB)
    asked = hub(total=70 * 10**9, model__safetensors=140 * GIB)
    with pytest.raises(ValueError, match=r"70,000,000,000 weights.*Join a federation of a smaller"):
        base_model.check(Source("somebody/large"))
    assert asked == ["somebody/large"]


def test_weights_that_the_hub_does_not_count_are_counted_by_their_bytes(free, hub):
    free(16 * GIB)
    hub(model__safetensors=140 * GIB)
    with pytest.raises(ValueError, match="weights, which take"):
        base_model.check(Source("somebody/large"))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"pytorch_model__bin": 5}, "the hub has no safetensors of it"),
        ({"model__safetensors": 5, "tokenizer__json": 10 * GIB}, r"its 'tokenizer\.json' has 10"),
        ({"model__safetensors": 8 * GIB}, r"takes 8\.00 GiB to download.*has 4\.00 GiB free"),
    ],
)
def test_files_of_the_hub_that_are_not_taken(free, hub, sizes, message):
    free(64 * GIB, disk=4 * GIB)
    hub(**sizes)
    with pytest.raises(ValueError, match=message):
        base_model.check(Source("somebody/model"))


def test_a_hub_that_does_not_answer_is_left_to_loading(monkeypatch, free):
    def info(self, name, **options):
        raise OSError("unreachable")

    free(GIB)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(base_model.huggingface_hub.HfApi, "model_info", info)
    base_model.check(Source("somebody/model"))
    base_model.check(Source("smollm2-135m-instruct"))


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 10**9}, {"vocab_size": 10**12}, {"intermediate_size": 10**7}],
)
def test_a_config_of_a_larger_model_than_its_weights_is_refused(whole, tmp_path, free, changes):
    """transformers would make the model in memory first."""
    folder = shutil.copytree(whole, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    free(GIB)
    with pytest.raises(ValueError, match=r"its config\.json has"):
        base_model.check(Source(str(folder)))
