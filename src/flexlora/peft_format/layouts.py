"""What a path holds if it is not a PEFT adapter: runs, checkpoints and other programs' formats."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from flexlora.errors import AdapterError
from flexlora.storage.tensors import DTYPES, open_tensors
from flexlora.storage.untrusted import short

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INDEX = "adapter_model.safetensors.index.json"
SHARD = re.compile(r"adapter_model-(\d+)-of-(\d+)\.safetensors")

CONVERT_PICKLE = (
    "convert it with PEFT on a machine that you trust, "
    "save_pretrained(..., safe_serialization=True)"
)

_TRANSPOSED = (
    "its lora_a and lora_b are the transposes of PEFT's lora_A and lora_B, so save them transposed "
    "under PEFT's names, with lora_alpha = scale * rank"
)
_MLX = f"is an MLX adapter, which PEFT does not load; {_TRANSPOSED}"
_DIFFUSERS = (
    "is a diffusers LoRA, for an image model and not in PEFT's layout; merge it in diffusers with "
    "pipe.load_lora_weights and pipe.set_adapters"
)
_KOHYA = (
    "is a LoRA in the layout of kohya's sd-scripts; convert it to PEFT with "
    "examples/lora_dreambooth/convert_kohya_ss_sd_lora_to_peft.py of PEFT's repository"
)
_TORCHTUNE = (
    "is an adapter in torchtune's own layout; train it with the checkpointer "
    "torchtune.training.FullModelHFCheckpointer, which writes PEFT's layout"
)
_GGUF = "is a GGUF file of llama.cpp; give the PEFT adapter from which it was made"
_FULL_MODEL = (
    "is a whole model and not an adapter; give the LoRA adapter that was trained on it, or extract "
    "one with mergekit-extract-lora"
)
_PICKLE = f"is a pickle, which can run any program when loaded, and is not read; {CONVERT_PICKLE}"
_LFS = "is a Git LFS pointer; fetch the file itself with `git lfs pull`"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".xz", ".zst", ".7z")


def locate(path: Path) -> Path:
    """The folder of the adapter that ``path`` means: itself, or the last round's of a run.

    Raises:
        AdapterError: there is no PEFT adapter; the sentence says what there is instead.
    """
    if path.is_dir():
        rounds = _numbered(path.glob(f"rounds/*/adapter/{CONFIG}"))
        if rounds and not (path / CONFIG).exists():
            return rounds[-1].parent
    refuse_other_formats(path)
    return path


def refuse_other_formats(directory: Path) -> None:
    """Refuse a path that is not a folder with an ``adapter_config.json``.

    Raises:
        AdapterError: it says what the path is, and what to do about it.
    """
    if not directory.exists():
        raise AdapterError(
            f"{directory} does not exist; give the folder that contains {CONFIG}"
            f"{_download(str(directory))}."
        )
    if not directory.is_dir():
        raise AdapterError(f"{directory} {_file(directory)}.")
    if not (directory / CONFIG).is_file():
        raise AdapterError(_folder(directory))


def refuse_missing_weights(directory: Path) -> None:
    """Say what a folder has in place of ``adapter_model.safetensors``.

    Raises:
        AdapterError: always.
    """
    if (directory / "adapters.safetensors").is_file():
        raise AdapterError(f"{directory} {_MLX}.")
    pickles = _with_suffix(directory, _PICKLES)
    if pickles and re.fullmatch(r"adapter_\d+\.pt", pickles[0].name):
        raise AdapterError(f"{pickles[0]} {_TORCHTUNE}.")
    if pickles:
        start = _start(pickles[0])
        what = _LFS if start.startswith(b"version https://") else _PICKLE
        raise AdapterError(f"{pickles[0]} {what}.")
    others = _with_suffix(directory, (".safetensors", ".gguf"))
    if others:
        raise AdapterError(
            f"{directory / WEIGHTS} is missing, and {others[0].name} beside it {_file(others[0])}."
        )
    raise AdapterError(f"{directory / WEIGHTS} is missing; save the adapter again with PEFT.")


def other_start(path: Path) -> str:
    """What a file is that should be safetensors, by its first bytes; empty if it may be that."""
    start = _start(path)
    if len(start) >= 16 and start[8:9] == b"{":
        return ""
    if start.startswith(b"PK\x03\x04"):
        return f"it is a zip, as PyTorch's pickles are, and is not read; {CONVERT_PICKLE}"
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
        return f"it is a pickle, and is not read; {CONVERT_PICKLE}"
    if start.startswith(b"version https://"):
        return "it is a Git LFS pointer; fetch the file itself with `git lfs pull`"
    if start.startswith(b"GGUF"):
        return "it is a GGUF file; give the PEFT adapter from which it was made"
    if len(start) < 16:
        return f"it was cut off at {len(start)} bytes; copy it again"
    return "it has another format; save the adapter again with PEFT"


def is_mlx(config: dict[str, object]) -> bool:
    """Whether an ``adapter_config.json`` was written by MLX."""
    return "peft_type" not in config and ("fine_tune_type" in config or "lora_layers" in config)


def mlx(path: Path) -> str:
    """The sentence about an adapter of MLX."""
    return f"{path} {_MLX}."


def _folder(directory: Path) -> str:
    """What a folder without ``adapter_config.json`` is, as a sentence."""
    missing = f"{directory / CONFIG} is missing"
    below = _numbered(
        path
        for pattern in ("*", "rounds/*/adapter", "*/rounds/*/adapter", "*/*")
        for path in directory.glob(f"{pattern}/{CONFIG}")
    )
    if below:
        return f"{missing}; give the adapter's own folder, perhaps {below[-1].parent}."
    if (directory / "pytorch_lora_weights.safetensors").is_file():
        return f"{directory} {_DIFFUSERS}."
    if (directory / "adapters.safetensors").is_file():
        return f"{directory} {_MLX}."
    if list(directory.glob("zero_to_fp32.py")) or list(directory.glob("global_step*")):
        return (
            f"{directory} is a checkpoint of DeepSpeed and not an adapter; run its zero_to_fp32.py "
            f"and save the adapter with PEFT's save_pretrained, or train with "
            f"stage3_gather_16bit_weights_on_model_save."
        )
    weights = _with_suffix(directory, (".safetensors", *_PICKLES))
    if (directory / "config.json").is_file() and weights:
        return f"{directory} {_FULL_MODEL}."
    if (directory / "metrics.jsonl").is_file():
        return f"{directory} is a run of flexlora that has finished no round; run it to the end."
    if weights and not (directory / WEIGHTS).is_file():
        return f"{missing}, and {weights[0].name} beside it {_file(weights[0])}."
    gguf = _with_suffix(directory, (".gguf",))
    if gguf:
        return f"{gguf[0]} {_GGUF}."
    return f"{missing}; give the adapter's own folder, one that contains {CONFIG}."


def _file(path: Path) -> str:
    """What a file is, with what to do, as the end of a sentence."""
    start = _start(path)
    if path.name in (CONFIG, WEIGHTS):
        return f"is a file; give the folder that contains {CONFIG}, {path.parent}"
    if start.startswith(b"version https://"):
        return _LFS
    if start.startswith(b"GGUF"):
        return _GGUF
    if path.suffix in _ARCHIVES:
        return "is an archive; unpack it and give the folder"
    if path.suffix in _PICKLES or start.startswith(b"\x80"):
        return _PICKLE
    if start[8:9] == b"{":
        return _safetensors(path)
    return f"is a file; give the folder that contains {CONFIG}"


def _safetensors(path: Path) -> str:
    """Whose safetensors file it is, by the names of its tensors."""
    try:
        names = list(open_tensors(path, DTYPES).tensors)
    except AdapterError:
        names = []
    if any(name.startswith(("lora_unet_", "lora_te")) for name in names):
        return _KOHYA
    if any(name.endswith((".lora_down.weight", ".lora_up.weight")) for name in names):
        return _KOHYA
    if any(re.match(r"(unet|text_encoder(_2)?|transformer)\..*lora", name) for name in names):
        return _DIFFUSERS
    if any(name.endswith((".lora_a", ".lora_b")) for name in names):
        return _MLX
    if any(name.endswith((".lora_a.weight", ".lora_b.weight")) for name in names):
        return _TORCHTUNE
    if any(".lora_A." in name or ".lora_embedding_A" in name for name in names):
        return f"is a file; name it {WEIGHTS} and give its folder, with its {CONFIG}"
    if names and not any("lora" in name for name in names):
        return _FULL_MODEL
    return f"is a file; give the folder that contains {CONFIG}"


def _download(name: str) -> str:
    """The advice on a name that looks like one of the Hugging Face hub."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        folder = name.rpartition("/")[2]
        return f" (an adapter of the hub: hf download {name} --local-dir {folder})"
    return ""


def _with_suffix(directory: Path, suffixes: Sequence[str]) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.suffix in suffixes)


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(16)
    except OSError as error:
        raise AdapterError(
            f"{path} cannot be read ({short(error.strerror)}); check its permissions and the disk."
        ) from error


def _numbered(paths: Iterable[Path]) -> list[Path]:
    """Paths in the order of the numbers in their names: checkpoint-1000 after checkpoint-500."""
    return sorted(set(paths), key=lambda path: natural(str(path)))


def natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10."""
    parts = re.split(r"(\d+)", text)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
