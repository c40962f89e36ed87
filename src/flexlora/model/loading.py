"""Loading a model and its tokenizer with transformers; what cannot be loaded is one sentence."""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import transformers
from safetensors import SafetensorError

from flexlora.errors import ConfigError
from flexlora.storage import expanded
from flexlora.storage.untrusted import short

_REMEDY: Final = (
    "set model.name to a folder with config.json, tokenizer.json and safetensors, or to a causal "
    "language model of the Hugging Face hub"
)
_TOKENIZERS: Final = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json"),
    *("spiece.model", "tekken.json"),
)
_IMPLEMENTATIONS: Final = {
    "_attn_implementation": ("sdpa", "eager", "flex_attention"),
    "_experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
"""What a model's config may name: implementations that are in transformers itself."""
_SECONDS_TO_CONNECT: Final = 3.0


def load(name: str, path: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """The model and the tokenizer in a folder, or of the hub.

    ``name`` is what the config calls the model, for errors, and ``path`` the folder or the name on
    the hub. ``options`` are for transformers' ``from_pretrained``.

    Raises:
        ConfigError: they cannot be loaded, or not completely.
    """
    local = _check_folder(name, path)
    options = {**options, "local_files_only": local or _is_unreachable()}
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with _one_sentence(name, "its config", options):
        config = transformers.AutoConfig.from_pretrained(
            path, local_files_only=options["local_files_only"], trust_remote_code=False
        )
    _refuse_kernels(name, config)
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = config.model_type
        raise _error(name, f"models of the type {kind!r} do not predict the next token")
    with _one_sentence(name, "its tokenizer", options):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, local_files_only=options["local_files_only"], trust_remote_code=False
        )
    with _one_sentence(name, "its weights", options):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
            **options,
        )
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers would draw them at random.
        raise _error(name, f"its weights lack {missing[0]!r}{_more(missing)}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _refuse_kernels(name: str, config: Any) -> None:
    """Refuse a config that names kernels: transformers would download them from the hub, and run.

    Raises:
        ConfigError: with the kernel.
    """
    parts = [config, *(getattr(config, each, None) for each in getattr(config, "sub_configs", ()))]
    for part, (key, known) in itertools.product(parts, _IMPLEMENTATIONS.items()):
        kernel = getattr(part, key, None)
        if kernel is not None and kernel not in known:
            raise _error(
                name,
                f"its config.json sets {key} to {short(kernel)}, which may be code to download; "
                "take that line out of a copy",
            )


def _check_folder(name: str, path: str) -> bool:
    """Whether ``path`` is a folder; if so, it has the files of a model.

    Raises:
        ConfigError: a file is missing, or the path can only be a folder and is not there.
    """
    if not path.strip():
        raise _error(name, "the name is empty")
    folder = expanded(path, "model.name")
    if folder.is_file():
        raise _error(name, "it is a file, not a folder")
    if not folder.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
            raise _error(name, f"there is no folder {folder.absolute()}")
        return False
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise _error(name, "it is a LoRA adapter; its adapter_config.json names the base model")
    if not (folder / "config.json").exists():
        found = "GGUF is not read, and " if any(folder.glob("*.gguf")) else ""
        raise _error(name, f"{found}the folder has no config.json")
    _check_config(name, folder / "config.json")
    if not any((folder / each).exists() for each in _TOKENIZERS):
        raise _error(name, "the folder has no tokenizer.json, nor another tokenizer")
    if not any(folder.glob("*.safetensors")):
        pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        raise _error(
            name,
            "its weights are only in pickle files, which can run code: load it with transformers "
            "once and write it with save_pretrained"
            if pickled
            else "the folder has no *.safetensors",
        )
    return True


def _check_config(name: str, path: Path) -> None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise _error(name, "its config.json is not a JSON object")
    kind = config.get("model_type")
    if kind is None:
        raise _error(name, "its config.json has no model_type")
    if kind in transformers.CONFIG_MAPPING:
        return
    if "auto_map" in config:
        raise _error(name, f"models of the type {kind!r} need code of their own, which is not run")
    version = transformers.__version__
    raise _error(name, f"transformers {version} has no models of the type {kind!r}")


@contextmanager
def _one_sentence(name: str, what: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Turn the errors of transformers and the hub into one sentence about ``what``."""
    try:
        yield
    except ConfigError:
        raise
    except ImportError as error:
        raise _of_import(name, error, options) from error
    except SafetensorError as error:
        raise _error(name, "a file of its weights is damaged or incomplete") from error
    except OSError as error:
        raise _of_hub(name, what, error, options) from error
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        attention = options.get("attn_implementation")
        if attention is not None and "attention" in str(error).lower():
            raise ConfigError(
                f"model.attention is {attention!r}, which models like {name!r} do not have; set "
                "model.attention to 'auto'."
            ) from error
        reason = "and config.json do not fit together" if "weights" in what else "cannot be read"
        raise _error(name, f"{what} {reason}") from error


def _of_import(name: str, error: ImportError, options: Mapping[str, Any]) -> ConfigError:
    """The error of a package that is not installed."""
    attention = options.get("attn_implementation")
    if attention is not None and attention not in ("sdpa", "eager"):
        return ConfigError(
            f"model.attention is {attention!r}, whose package is not installed; install it, or set "
            "model.attention to 'auto'."
        )
    named = re.search(r"pip install (?:-U )?['`\"]?([\w.\[\]-]+)", str(error))
    package = named[1] if named else error.name
    if package is None:
        words = re.findall(r"requires the ([\w-]+) library", str(error))
        package = words[0] if words else "another package"
    return ConfigError(
        f"The base model {name!r} needs a package that is not installed; install it with: "
        f"pip install {package}"
    )


def _of_hub(name: str, what: str, error: OSError, options: Mapping[str, Any]) -> ConfigError:
    """The error of a model that is not in the cache, or that the hub does not give."""
    causes, cause = [], error.__cause__ or error.__context__
    while cause is not None:
        causes.append(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    if Path(name).is_dir():
        return _error(name, f"{what} cannot be read")
    if "GatedRepoError" in causes:
        return ConfigError(
            f"The base model {name!r} cannot be loaded: it is gated; accept its terms on "
            "huggingface.co and log in with: hf auth login"
        )
    if "RepositoryNotFoundError" in causes:
        return _error(name, "there is no such folder, and no public model of this name on the hub")
    if options["local_files_only"] or "LocalEntryNotFoundError" in causes:
        return _error(
            name,
            f"there is no folder {Path(name).absolute()}, the model is not in the local cache, and "
            "the Hugging Face hub cannot be reached",
        )
    return _error(name, f"the hub does not have {what}, or not as safetensors")


def _is_unreachable() -> bool:
    """Whether the hub cannot be reached; it retries for most of a minute by itself."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return True
    if any(os.environ.get(each) for each in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return False
    parts = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        with socket.create_connection((parts.hostname or "", port), _SECONDS_TO_CONNECT):
            return False
    except OSError:
        return True


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _error(name: str, reason: str) -> ConfigError:
    return ConfigError(f"The base model {name!r} cannot be loaded: {reason}; {_REMEDY}.")
