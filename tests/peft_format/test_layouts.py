"""What people give in place of a PEFT adapter: each is named, with what to do about it."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from flexlora.errors import AdapterError
from flexlora.peft_format import CONFIG, WEIGHTS, check, locate, read, write
from support.peft_folders import Q0, key, matrix, store


def put(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: matrix(2, 3, 1) for name in names}, path)
    return path


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"


def mlx(folder):
    put(folder / "adapters.safetensors", ["model.layers.0.self_attn.q_proj.lora_a"])
    text(folder / CONFIG, json.dumps({"fine_tune_type": "lora", "num_layers": 2}))
    return folder


def mlx_weights(folder):
    return mlx(folder) / "adapters.safetensors"


def mlx_without_config(folder):
    (mlx(folder) / CONFIG).unlink()
    return folder


def kohya(folder):
    return put(folder / "style.safetensors", ["lora_unet_down_blocks_0.lora_down.weight"])


def kohya_folder(folder):
    return kohya(folder).parent


def diffusers(folder):
    put(folder / "pytorch_lora_weights.safetensors", ["unet.down.to_q.lora_A.weight"])
    return folder


def diffusers_file(folder):
    return diffusers(folder) / "pytorch_lora_weights.safetensors"


def gguf(folder):
    path = text(folder / "lora.gguf", "")
    path.write_bytes(b"GGUF" + bytes(60))
    return path


def gguf_folder(folder):
    return gguf(folder).parent


def full_model(folder):
    put(folder / "model.safetensors", ["model.embed_tokens.weight"])
    text(folder / "config.json", "{}")
    return folder


def full_model_file(folder):
    return full_model(folder) / "model.safetensors"


def pickled(folder):
    path = text(folder / "adapter_model.bin", "")
    path.write_bytes(pickle.dumps({"a": 1}) * 9)
    text(folder / CONFIG, '{"peft_type": "LORA"}')
    return folder


def pickled_alone(folder):
    path = text(folder / "lora.pt", "")
    torch.save({"a": torch.ones(2)}, path)
    return folder


def lfs_pickle(folder):
    text(pickled(folder) / "adapter_model.bin", LFS)
    return folder


def lfs_file(folder):
    return text(folder / "x.safetensors", LFS)


def torchtune(folder):
    torch.save({"a": torch.ones(2)}, text(folder / "adapter_0.pt", ""))
    text(folder / CONFIG, '{"peft_type": "LORA", "r": 2}')
    return folder


def zero(folder):
    text(folder / "zero_to_fp32.py", "")
    return folder


def archive(folder):
    return text(folder / "adapter.zip", "PK")


def trainer(folder):
    for step in (500, 1000, 90):
        store(folder / f"checkpoint-{step}")
    return folder


def compared(folder):
    for name in ("fedit", "flexlora"):
        store(folder / name / "rounds" / "00001" / "adapter")
    return folder


def weights_file(folder):
    return store(folder) / WEIGHTS


def renamed_weights(folder):
    (store(folder) / WEIGHTS).rename(folder / "lora.safetensors")
    return folder


def unfinished_run(folder):
    text(folder / "metrics.jsonl", "")
    return folder


GIVEN = [
    (mlx, r"is an MLX adapter.*lora_alpha = scale \* rank"),
    (mlx_weights, "is an MLX adapter"),
    (mlx_without_config, "is an MLX adapter"),
    (kohya, r"kohya's sd-scripts.*convert_kohya_ss_sd_lora_to_peft"),
    (kohya_folder, r"style.safetensors beside it is a LoRA in the layout of kohya"),
    (diffusers, "is a diffusers LoRA.*set_adapters"),
    (diffusers_file, "is a diffusers LoRA"),
    (gguf, "is a GGUF file of llama.cpp; give the PEFT adapter"),
    (gguf_folder, "is a GGUF file of llama.cpp"),
    (full_model, "is a whole model and not an adapter.*mergekit-extract-lora"),
    (full_model_file, "is a whole model and not an adapter"),
    (pickled, "adapter_model.bin is a pickle.*safe_serialization=True"),
    (pickled_alone, "lora.pt beside it is a pickle"),
    (lfs_pickle, "adapter_model.bin is a Git LFS pointer.*git lfs pull"),
    (lfs_file, "is a Git LFS pointer"),
    (torchtune, "adapter_0.pt is an adapter in torchtune's own layout.*HFCheckpointer"),
    (zero, "is a checkpoint of DeepSpeed.*stage3_gather_16bit_weights_on_model_save"),
    (archive, "is an archive; unpack it"),
    (trainer, r"perhaps .*checkpoint-1000\."),
    (compared, r"perhaps .*flexlora.rounds.00001.adapter\."),
    (weights_file, f"is a file; give the folder that contains {CONFIG}, "),
    (renamed_weights, f"lora.safetensors beside it is a file; name it {WEIGHTS}"),
    (unfinished_run, "is a run of flexlora that has finished no round"),
]


@pytest.mark.parametrize(("make", "message"), GIVEN)
def test_what_is_not_a_peft_adapter_is_named(tmp_path, make, message):
    given = make(tmp_path / "given")
    for command in (check, read):
        with pytest.raises(AdapterError, match=message) as caught:
            command(given)
        assert str(given) in str(caught.value)
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_a_name_of_the_hub_is_not_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match=r"hf download someone/lora-8b --local-dir lora-8b\)"):
        check("someone/lora-8b")
    with pytest.raises(AdapterError, match=r"no/such/folder does not exist; .*\.json\.$"):
        check("no/such/folder")


def test_a_run_means_the_adapter_of_its_last_round(tmp_path, adapter):
    for number in (2, 10):
        write(adapter, tmp_path / "rounds" / f"{number:05d}" / "adapter")
    assert locate(tmp_path) == tmp_path / "rounds" / "00010" / "adapter"
    assert check(tmp_path).directory == locate(tmp_path)
    # A folder that is an adapter itself is that adapter.
    write(adapter, tmp_path / "own")
    (tmp_path / "own").rename(tmp_path / "both")
    (tmp_path / "both" / "rounds").mkdir()
    assert locate(tmp_path / "both") == tmp_path / "both"


def test_a_key_that_only_resembles_peft_is_refused(tmp_path):
    names = {key(Q0, "A"): matrix(2, 7, 1), "base_model.h.0.q_proj.lora_B.weight": matrix(11, 2, 2)}
    with pytest.raises(AdapterError, match=r"does not begin with base_model\.model\."):
        read(store(tmp_path, names))
