"""What cannot be loaded is one sentence with the value, the place and a remedy."""

import json
import shutil
import socket

import pytest

from flexlora.errors import ConfigError
from flexlora.model import loading
from flexlora.model.source import Source
from support import families, models


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return models.save(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def refused(name, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        Source(str(name), **options).load()
    message = str(caught.value)
    assert "\n" not in message
    assert "set model." in message or "give one of" in message
    return message


def changed(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_a_folder_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"there is no folder {tmp_path / 'gone'};" in refused(tmp_path / "gone")
    assert f"there is no folder {tmp_path / 'a' / 'gone'};" in refused("./a/gone")
    assert "the name is empty" in refused("")
    (tmp_path / "file.gguf").touch()
    assert "it is a file, not a folder" in refused(tmp_path / "file.gguf")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "the folder has no config.json"),
        ("model.safetensors", r"the folder has no \*\.safetensors"),
        ("tokenizer*", "the folder has no tokenizer.json"),
    ],
)
def test_a_file_that_is_not_there(folder, missing, message):
    for path in folder.glob(missing):
        path.unlink()
    with pytest.raises(ConfigError, match=message):
        Source(str(folder)).load()


def test_what_stands_in_the_place_of_a_model(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "only in pickle files" in refused(folder)
    (folder / "config.json").rename(folder / "adapter_config.json")
    assert "it is a LoRA adapter" in refused(folder)
    (folder / "adapter_config.json").rename(folder / "model.gguf")
    assert "GGUF is not read" in refused(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llamax"}, "has no models of the type 'llamax'"),
        ({"model_type": "llamax", "auto_map": {}}, "need code of their own, which is not run"),
        ({"model_type": "t5"}, "of the type 't5' do not predict the next token"),
        ({"model_type": None}, "its config.json has no model_type"),
        ({"hidden_size": 64}, "its weights and config.json do not fit together"),
        ({"num_hidden_layers": 3}, "its weights lack 'model.layers.2."),
    ],
)
def test_a_config_that_does_not_fit(folder, changes, message):
    changed(folder, **changes)
    assert message in refused(folder)


def test_damaged_files(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "damaged or incomplete" in refused(folder)
    (folder / "tokenizer.json").write_text("{")
    assert "its tokenizer cannot be read" in refused(folder)
    (folder / "config.json").write_text('{"a":')
    assert "its config.json is not a JSON object" in refused(folder)


def test_an_attention_that_is_not_there(folder, tmp_path):
    assert "whose package is not installed" in refused(folder, attention="flash_attention_2")
    assert "; give one of auto, " in refused(folder, attention="x")
    families.build("mpt", families.SINGLE["mpt"]).save_pretrained(tmp_path / "mpt")
    models.words_tokenizer().save_pretrained(tmp_path / "mpt")
    assert "set model.attention to 'auto'" in refused(tmp_path / "mpt", attention="sdpa")


def test_a_model_that_looks_ahead(folder, tmp_path):
    model = families.build("bert", {"is_decoder": False})
    model.save_pretrained(tmp_path / "bert")
    models.words_tokenizer().save_pretrained(tmp_path / "bert")
    assert "later tokens change what it predicts" in refused(tmp_path / "bert")


def test_a_hub_that_cannot_be_reached(monkeypatch):
    """At once: by itself the hub's client tries for most of a minute."""

    def unreachable(address, timeout):
        raise OSError(address, timeout)

    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr(loading.os, "environ", {})
    message = refused("some-organisation-nobody-has/a-model")
    assert "the model is not in the local cache, and the Hugging Face hub cannot be" in message


def test_packages_that_are_missing_are_named():
    for text in ("It requires the timm library.", "You can run: `pip install timm`"):
        error = loading._of_import("a", ImportError(text), {"attn_implementation": None})
        assert str(error).endswith("install it with: pip install timm")


@pytest.mark.parametrize(
    ("key", "kernel"),
    [
        ("_attn_implementation", "kernels-community/flash-attn2"),
        ("attn_implementation", "somebody/kernel"),
        ("_attn_implementation", "flash_attention_2"),
        ("_experts_implementation", "deepgemm"),
    ],
)
def test_a_models_config_names_no_kernel_to_download(folder, key, kernel):
    """transformers would fetch it from the hub, and run it."""
    changed(folder, **{key: kernel})
    assert f"to '{kernel}', which may be code to download" in refused(folder)


def test_a_models_config_may_name_what_transformers_has(folder):
    changed(folder, _attn_implementation="eager")
    assert Source(str(folder)).load().shapes
