"""Reading and writing the directories in which PEFT keeps LoRA adapters."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flexlora.adapter import Adapter, Factors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for ``--max-lora-rank``."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The number formats read, by their names in a safetensors header."""

_PREFIX = "base_model.model."
_KEY = re.compile(rf"{re.escape(_PREFIX)}(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
_MODULE = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")
_MODULE_CHARACTERS = 512

_CONFIG_BYTES = 16 << 20
_HEADER_BYTES = 32 << 20

_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.pkl")
_CONVERT = (
    "convert it with PEFT on a machine you trust, save_pretrained(..., safe_serialization=True)"
)

_VARIANTS = {
    "use_dora": "DoRA also rescales the base weights",
    "use_qalora": "QA-LoRA pools the inputs",
    "use_bdlora": "BD-LoRA stores blocks of the factors",
    "lora_bias": "the adapter adds biases",
    "modules_to_save": "whole modules were trained beside the adapter",
    "trainable_token_indices": "rows of the embedding were trained beside the adapter",
    "target_parameters": "the adapter changes bare parameters, not modules",
    "layer_replication": "the base model's layers are repeated",
    "alora_invocation_tokens": "aLoRA applies to some tokens only",
    "arrow_config": "Arrow routes between several adapters",
    "kasa_config": "KaSA truncates the base weights",
    "monteclora_config": "MonteCLoRA stores a sampler beside the factors",
    "velora_config": "VeLoRA stores projections beside the factors",
    "megatron_config": "Megatron shards the layers",
}
"""Settings that make an adapter more than ``B @ A``, and why."""

_CHANGES_NOTHING = frozenset(
    {
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config"),
        *("ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out"),
        *("inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform"),
        *("loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core"),
        *("merge_weights", "peft_type", "peft_version", "qalora_group_size", "r"),
        *("rank_pattern", "revision", "runtime_config", "target_modules", "task_type"),
        "use_rslora",
    }
)
"""Settings that are honoured, or that say nothing about what trained factors mean.

``fan_in_fan_out`` is among them: it tells PEFT that the *base* weight is stored
transposed; ``B`` is (out, rank) and ``A`` (rank, in) either way.
"""

_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base model's weights as they were (PEFT 0.21.2)."""

_Value = TypeVar("_Value")


class Unsupported(ValueError):
    """A sound PEFT directory whose adapter is not a plain ``B @ A`` for each module."""


class _Settings(BaseModel):
    """The part of ``adapter_config.json`` that says what the factors mean."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    r: int = Field(gt=0)
    lora_alpha: float
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    base_model_name_or_path: str | None = None
    task_type: str | None = None
    target_modules: list[str] | str | None = None


@dataclass(frozen=True)
class Span:
    """Where one tensor lies in a safetensors file: ``start`` and ``bytes`` count from 0."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, int]
    start: int
    bytes: int


@dataclass(frozen=True)
class Layer:
    """What header and configuration say about one module, before any value is read."""

    A: Span
    B: Span
    alpha: float
    scale: float

    @property
    def rank(self) -> int:
        """The rank of the stored factors."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (out, in) of the update."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def parameters(self) -> int:
        """How many numbers are stored."""
        return self.rank * sum(self.shape)


@dataclass(frozen=True, eq=False)
class StoredFactors(Mapping[str, Factors]):
    """Factors that stay in their file; each look-up reads one module, and keeps nothing.

    The scale is folded into ``B`` in float32, or float64 where stored or wanted so.

    Raises:
        ValueError: on look-up, a value is NaN or infinite, or the file has changed.
    """

    weights: Path
    layers: Mapping[str, Layer]
    dtype: torch.dtype | None
    stamp: tuple[int, int, int]

    def __getitem__(self, module: str) -> Factors:
        layer = self.layers[module]
        try:
            with self.weights.open("rb") as file:
                if _stamp(os.fstat(file.fileno())) != self.stamp:
                    raise ValueError(
                        f"{self.weights} has changed since it was opened; read the adapter again."
                    )
                A, B = (_values(file, span, self.weights) for span in (layer.A, layer.B))
        except OSError as error:
            raise ValueError(
                f"{self.weights} can no longer be read ({error.strerror}); restore the file."
            ) from error
        stored = torch.promote_types(A.dtype, B.dtype)
        dtype = self.dtype or stored
        exact = torch.promote_types(torch.promote_types(stored, dtype), torch.float32)
        factors = Factors((B.to(exact) * layer.scale).to(dtype), A.to(dtype))
        if not (factors.B.isfinite().all() and factors.A.isfinite().all()):
            raise ValueError(
                f"{self.weights}: {module!r} overflows {dtype} once its scale {layer.scale:g} "
                f"is folded in; read it as torch.float32 or torch.float64."
            )
        return factors

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __contains__(self, module: object) -> bool:
        return module in self.layers


@dataclass(frozen=True, eq=False)
class PeftAdapter:
    """A LoRA adapter as read from ``directory``; its ``adapter`` has the scale folded in.

    ``layers`` holds what can be told without reading values; ``config`` is the raw
    ``adapter_config.json``.
    """

    directory: Path
    adapter: Adapter
    layers: Mapping[str, Layer]
    base_model: str | None
    task_type: str | None
    config: dict[str, Any]

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each module, from the header alone."""
        return {module: layer.rank for module, layer in self.layers.items()}

    def loaded(self) -> PeftAdapter:
        """The same with every value in memory, and so checked.

        Raises:
            ValueError: as for a look-up in `StoredFactors`.
        """
        return dataclasses.replace(self, adapter=Adapter(dict(self.adapter)))


# --- reading -------------------------------------------------------------------------------


def read(directory: Path, dtype: torch.dtype | None = torch.float32) -> PeftAdapter:
    """Open a PEFT LoRA directory: everything is checked now but the values.

    Values are read module by module when asked for, converted to ``dtype``, or left as
    stored if ``dtype`` is None; merging many adapters thus holds one module of each.
    Costs one pass over the header. Nothing is ever unpickled.

    Raises:
        Unsupported: the adapter is not a plain ``B @ A`` for each module (DoRA, biases,
            retrained modules, initialisations that change the base model, ...).
        ValueError: anything is missing, malformed or inconsistent.
    """
    config = read_config(directory)
    _refuse_variants(config, directory / CONFIG)
    settings = _settings(config, directory / CONFIG)
    weights = _weights_file(directory)
    spans, stamp = _header(weights)
    layers = _layers(_halves(spans, weights), settings, directory)
    return PeftAdapter(
        directory=directory,
        adapter=Adapter(StoredFactors(weights, layers, dtype, stamp)),
        layers=layers,
        base_model=settings.base_model_name_or_path,
        task_type=settings.task_type,
        config=config,
    )


def read_config(directory: Path) -> dict[str, Any]:
    """The raw ``adapter_config.json`` of a LoRA adapter.

    Raises:
        ValueError: the directory or the file is missing, or it is not the JSON of a LoRA
            adapter.
    """
    path = directory / CONFIG
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise ValueError(f"{directory} {what}; give the folder that holds {CONFIG}.")
    if not path.is_file():
        inner = sorted(child.parent.name for child in directory.glob(f"*/{CONFIG}"))
        hint = f"perhaps {directory / inner[0]}" if inner else f"one that holds {CONFIG}"
        raise ValueError(f"{path} is missing; give the adapter's own folder, {hint}.")
    if path.stat().st_size > _CONFIG_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, more than the {_CONFIG_BYTES} allowed; "
            f"save the adapter again with PEFT."
        )
    try:
        config = _parse_json(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not sound JSON ({_short(error)}); save the adapter again with PEFT."
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object; save the adapter again with PEFT.")
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{path}: peft_type is {_short(config.get('peft_type'))}, and only 'LORA' is "
            f"read; convert the adapter to LoRA with PEFT or train a LoRA."
        )
    return config


def _parse_json(data: bytes) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            names = [name for name, _ in items]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {_short(twice)} stands there twice")
        return found

    def constant(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    return json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)


def _refuse_variants(config: Mapping[str, Any], path: Path) -> None:
    plain = "merge it into its base model with PEFT, or train a plain LoRA"
    for name, reason in _VARIANTS.items():
        if config.get(name):
            raise Unsupported(
                f"{path}: {name} is {_short(config[name])}: {reason}, which B @ A cannot say; "
                f"{plain}."
            )
    if config.get("bias", "none") != "none":
        raise Unsupported(
            f"{path}: bias is {_short(config['bias'])}: biases of the base model were trained "
            f"too, which B @ A cannot say; {plain}."
        )
    init = config.get("init_lora_weights", True)
    init = init.lower() if isinstance(init, str) else init
    # `in` alone would take 1 for True.
    if not any(init is known or (isinstance(known, str) and init == known) for known in _INITS):
        remedy = (
            "train a LoRA with another init_lora_weights"
            if init == "loftq"
            else "convert it with PEFT, "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
        raise Unsupported(
            f"{path}: init_lora_weights is {_short(init)}, which may change the base model's "
            f"weights, so that the factors do not fit the original; {remedy}."
        )
    for name, value in config.items():
        if value and name not in _CHANGES_NOTHING:
            raise Unsupported(
                f"{path}: {_short(name)} is {_short(value)}, a setting unknown here that may "
                f"change what the factors mean; delete it if you know that it does not."
            )


def _settings(config: Mapping[str, Any], path: Path) -> _Settings:
    try:
        settings = _Settings.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        given = "missing" if first["type"] == "missing" else _short(first["input"])
        raise ValueError(
            f"{path}: {_short(place)} is {given}: {first['msg'].lower()}; correct it or save "
            f"the adapter again with PEFT."
        ) from error
    for pattern, rank in (settings.rank_pattern or {}).items():
        if rank <= 0:
            raise ValueError(
                f"{path}: rank_pattern gives {_short(pattern)} the rank {rank}; give it 1 or more."
            )
    return settings


def _weights_file(directory: Path) -> Path:
    path = directory / WEIGHTS
    if path.is_file():
        return path
    pickles = [name for name in _PICKLES if (directory / name).exists()]
    if pickles:
        raise ValueError(
            f"{directory / pickles[0]} is a pickle, which can run any program when loaded, "
            f"and is not read; {_CONVERT}."
        )
    raise ValueError(f"{path} is missing; save the adapter again with PEFT.")


def _header(path: Path) -> tuple[dict[str, Span], tuple[int, int, int]]:
    """The float matrices in a safetensors file, once safetensors has found it sound."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            start = file.read(16)
            length = int.from_bytes(start[:8], "little")
            file.seek(8)
            header = file.read(min(length, _HEADER_BYTES))
        if len(start) < 16 or start[8:9] != b"{" or length > status.st_size - 8:
            raise ValueError(_recognised(start, status.st_size))
        if length > _HEADER_BYTES:
            raise ValueError(f"its header has {length} bytes, and {_HEADER_BYTES} are allowed")
        with safe_open(path, framework="pt"):
            entries = _parse_json(header)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a sound safetensors file: {_short(error)}; copy it again, or save "
            f"the adapter again with PEFT."
        ) from error
    entries.pop("__metadata__", None)
    if not entries:
        raise ValueError(f"{path} holds no tensors; save the trained adapter again with PEFT.")
    data = range(8 + length, status.st_size)
    spans = {key: _span(key, entry, data, path) for key, entry in entries.items()}
    return spans, _stamp(status)


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _recognised(start: bytes, size: int) -> str:
    """What a file that is not safetensors is."""
    if start.startswith(b"PK\x03\x04"):
        return f"it is a zip, as PyTorch's pickles are, and is not read ({_CONVERT})"
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05" and start[8:9] != b"{":
        return f"it is a pickle, and is not read ({_CONVERT})"
    if start.startswith(b"version https://"):
        return "it is a Git LFS pointer (fetch the file itself with `git lfs pull`)"
    if start.startswith(b"GGUF"):
        return "it is a GGUF file (give the PEFT adapter that it was made from)"
    return f"it was cut off at {size} bytes, or is of another kind"


def _span(key: str, entry: Any, data: range, path: Path) -> Span:
    match = _KEY.fullmatch(key)
    if not match:
        raise _strange_key(key, path)
    module = match["module"]
    if len(module) > _MODULE_CHARACTERS or not _MODULE.fullmatch(module):
        raise ValueError(
            f"{path}: {_short(key)} names no module; give letters, digits, _ and -, joined by "
            f"dots, at most {_MODULE_CHARACTERS} characters."
        )
    # safetensors has checked this; but it also takes a list for the object, and another
    # program may have put another file in place since.
    match entry:
        case {"dtype": str(name), "shape": [*shape], "data_offsets": [int(first), int(last)]}:
            pass
        case _:
            raise ValueError(
                f"{path}: the header's entry for {_short(key)} does not say dtype, shape and "
                f"data_offsets; save the adapter again with PEFT."
            )
    if name not in DTYPES:
        raise ValueError(
            f"{path}: {_short(key)} has the dtype {_short(name)}, not one of "
            f"{', '.join(DTYPES)}; save the adapter in one of these."
        )
    if len(shape) != 2 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(
            f"{path}: {_short(key)} has the shape {_short(shape)}, and only matrices that "
            f"are not empty are read; save a linear layer's adapter, with gathered weights."
        )
    length = math.prod(shape) * DTYPES[name].itemsize
    if not (first >= 0 and last - first == length and last <= len(data)):
        raise ValueError(
            f"{path}: {_short(key)} does not lie within the file; copy the file again."
        )
    return Span(key, DTYPES[name], (shape[0], shape[1]), data.start + first, length)


def _strange_key(key: str, path: Path) -> ValueError:
    plain = "merge it into its base model with PEFT, or train a plain LoRA"
    named = re.search(r"\.lora_[AB]\.([^.]+)\.weight$", key)
    if "lora_magnitude_vector" in key:
        return Unsupported(f"{path}: {_short(key)} belongs to DoRA, not to B @ A; {plain}.")
    if "lora_embedding_" in key:
        return Unsupported(f"{path}: {_short(key)} adapts an embedding, not a matrix; {plain}.")
    if key.endswith(".bias"):
        return Unsupported(f"{path}: {_short(key)} is a trained bias, not B @ A; {plain}.")
    if key.startswith(_PREFIX) and named:
        return ValueError(
            f"{path}: {_short(key)} carries the adapter name {_short(named[1])}, as in "
            f"memory; save it with PEFT's save_pretrained, which leaves the name out."
        )
    if key.startswith(_PREFIX) and ".lora_" not in key:
        return Unsupported(
            f"{path}: {_short(key)} is a whole tensor (modules_to_save, or a resized "
            f"embedding), not B @ A; {plain}."
        )
    return ValueError(
        f"{path}: {_short(key)} is not of the form {_PREFIX}MODULE.lora_A.weight (or lora_B) "
        f"that PEFT writes; save the adapter with PEFT."
    )


def _halves(spans: Mapping[str, Span], path: Path) -> dict[str, tuple[Span, Span]]:
    """Each module's A and B, in the order of their names."""
    halves = {}
    for module in sorted({key[len(_PREFIX) : -len(".lora_A.weight")] for key in spans}):
        keys = [f"{_PREFIX}{module}.lora_{half}.weight" for half in "AB"]
        for key, other in (keys, keys[::-1]):
            if key not in spans:
                raise ValueError(
                    f"{path}: {_short(other)} is there but {_short(key)} is missing; save the "
                    f"adapter again with PEFT."
                )
        A, B = (spans[key] for key in keys)
        if A.shape[0] != B.shape[1]:
            raise ValueError(
                f"{path}: {_short(A.key)} is {A.shape} (rank, in) and {_short(B.key)} is "
                f"{B.shape} (out, rank): their ranks differ; save the adapter again with PEFT."
            )
        halves[module] = A, B
    return halves


def _layers(
    halves: Mapping[str, tuple[Span, Span]], settings: _Settings, directory: Path
) -> dict[str, Layer]:
    path = directory / CONFIG
    modules = list(halves)
    _refuse_untargeted(modules, settings.target_modules, directory)
    ranks = matched(settings.rank_pattern or {}, modules, f"{path}: rank_pattern")
    alphas = matched(settings.alpha_pattern or {}, modules, f"{path}: alpha_pattern")
    layers = {}
    for module, (A, B) in halves.items():
        rank = next(iter(ranks[module]), settings.r)
        if A.shape[0] != rank:
            raise ValueError(
                f"{directory / WEIGHTS}: {_short(A.key)} has rank {A.shape[0]}, but {path} "
                f"says {rank} (r and rank_pattern); put right the one that is wrong."
            )
        alpha = next(iter(alphas[module]), settings.lora_alpha)
        scale = alpha / (math.sqrt(rank) if settings.use_rslora else rank)
        layers[module] = Layer(A, B, alpha, scale)
    return layers


def _refuse_untargeted(
    modules: Sequence[str], targets: list[str] | str | None, directory: Path
) -> None:
    # A regular expression was evaluated by whoever trained the adapter; the tensors say
    # what it chose. A list is cheap to check, and PEFT drops what it does not name.
    if not isinstance(targets, list):
        return
    names = set(targets)
    for module in modules:
        parts = module.split(".")
        if not any(".".join(parts[start:]) in names for start in range(len(parts))):
            raise ValueError(
                f"{directory / WEIGHTS} adapts {module!r}, which target_modules in "
                f"{directory / CONFIG} does not name, so that PEFT would leave it out; add it "
                f"there or remove its tensors."
            )


def _values(file: BufferedReader, span: Span, path: Path) -> Tensor:
    data = bytearray(span.bytes)
    file.seek(span.start)
    if file.readinto(data) != span.bytes:
        raise ValueError(f"{path} ends within {_short(span.key)}; copy the file again.")
    values = torch.frombuffer(data, dtype=span.dtype).view(span.shape)
    if not values.isfinite().all():
        raise ValueError(
            f"{path}: {_short(span.key)} holds NaN or infinite values; the training diverged, "
            f"so take an earlier checkpoint."
        )
    return values


def _short(value: object) -> str:
    """An untrusted value made fit for an error message."""
    text = str(value) if isinstance(value, Exception) else repr(value)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 160 else f"{text[:80]}...{text[-60:]}"


# --- rank_pattern and alpha_pattern --------------------------------------------------------

_PATTERN_CHARACTERS = 512
# Some ten seconds at the very worst; what people write takes milliseconds.
_PATTERN_STEPS = 3e10
_STEPS_PER_MATCH = 1000
_TOKEN = re.compile(
    r"(?P<escape>\\\D)|(?P<set>\[\^?[\w.\\-]+\])|(?P<open>\((\?:)?)|(?P<close>\))"
    r"|(?P<repeat>[*+]|\{\d*,?\d*\})|(?P<optional>\?)|(?P<or>\|)|(?P<plain>[\w.^$/:@, -])",
    re.ASCII | re.DOTALL,
)


def matched(
    patterns: Mapping[str, _Value], modules: Sequence[str], place: str
) -> dict[str, list[_Value]]:
    """The values of the patterns that match each module, in the patterns' order.

    PEFT takes the first. Patterns are regular expressions from strangers: their length,
    their constructs and the steps that matching them could take at worst are bounded.

    Raises:
        ValueError: a pattern in ``place`` is unsound, or might take too long.
    """
    compiled = [(_compiled(pattern, place), value) for pattern, value in patterns.items()]
    longest = max((len(module) for module in modules), default=0)
    dots = max((module.count(".") for module in modules), default=0)
    steps = sum(_STEPS_PER_MATCH + (dots + 2) * _ways(pattern, longest) for pattern in patterns)
    if steps * len(modules) > _PATTERN_STEPS:
        raise ValueError(
            f"{place} could take too long to match its {len(patterns)} patterns with "
            f"{len(modules)} modules; name modules plainly, with fewer * + ? and |."
        )
    return {
        module: [value for expression, value in compiled if expression.match(module)]
        for module in modules
    }


def _compiled(pattern: str, place: str) -> re.Pattern[str]:
    if len(pattern) > _PATTERN_CHARACTERS:
        raise ValueError(
            f"{place} has a pattern of {len(pattern)} characters, {_short(pattern)}; at most "
            f"{_PATTERN_CHARACTERS} are allowed."
        )
    _refuse_constructs(pattern, place)
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{place}: {_short(pattern)} is no regular expression ({_short(error)}); correct it."
        ) from error


def _tokens(pattern: str) -> list[str]:
    """The kinds of the pattern's parts; the last is ``""`` if a part is not understood."""
    kinds: list[str] = []
    position = 0
    while position < len(pattern):
        token = _TOKEN.match(pattern, position)
        if token is None or "--" in token[0]:
            return [*kinds, ""]
        kinds.append(str(token.lastgroup))
        position = token.end()
    return kinds


def _refuse_constructs(pattern: str, place: str) -> None:
    kinds = _tokens(pattern)
    pairs = list(pairwise(kinds))
    if "" in kinds or ("open", "optional") in pairs:
        raise ValueError(
            f"{place}: {_short(pattern)} uses more of regular expressions than is read here "
            f"(names, . [sets] | groups and * + ? are, back references and lookaround are "
            f"not); name the modules plainly."
        )
    if ("close", "repeat") in pairs:
        raise ValueError(
            f"{place}: {_short(pattern)} repeats a group, which can take for ever to match; "
            f"name the modules plainly."
        )


def _ways(pattern: str, characters: int) -> float:
    """A bound on the ways in which a pattern can be tried at one place."""
    kinds = _tokens(pattern)
    pairs = list(pairwise(["", *kinds]))
    optional = sum(pair[1] == "optional" and pair[0] != "repeat" for pair in pairs)
    exponent = kinds.count("repeat") * math.log2(characters + 1) + optional
    branches, groups = 0.0, [1]
    for kind in kinds:
        if kind == "open":
            groups.append(1)
        elif kind == "or":
            groups[-1] += 1
        elif kind == "close" and len(groups) > 1:
            branches += math.log2(groups.pop())
    exponent += branches + sum(math.log2(group) for group in groups)
    return math.exp2(min(exponent, 100))


# --- writing -------------------------------------------------------------------------------


def write(
    adapter: Mapping[str, Factors],
    directory: Path,
    base_model: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    task_type: str | None = "CAUSAL_LM",
    rank: int | Literal["max", "vllm"] = "max",
    metadata: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> None:
    """Write an adapter in the one form that PEFT, vLLM, llama.cpp and others read alike.

    All modules get one ``r``, padded with zeros: the largest, or ``rank``, or the next
    that vLLM can be set to. ``lora_alpha = r``, so that the scale is 1; no patterns. The
    same adapter gives the same bytes. The folder appears whole or not at all. ``metadata``
    must be fit for JSON and goes into the model card. Holds the padded copy in memory.

    ``target_modules`` are last names (``q_proj``), or whole paths where a last name would
    also choose a layer that the adapter leaves out.

    Raises:
        ValueError: the adapter is empty, not finite or of higher rank than ``rank``; a
            name is not a module path; ``directory`` is in use (``replace=True`` replaces
            an adapter, and nothing else).
    """
    directory = directory.resolve()
    _refuse_target(directory, replace)
    tensors, common = _padded(adapter, rank, dtype)
    config = _config(list(adapter), common, base_model, task_type)
    card = _card(base_model, task_type, metadata or {})
    partial = directory.parent / f".{directory.name}.{secrets.token_hex(8)}.partial"
    partial.mkdir(parents=True)
    try:
        _write_text(partial / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        _write_text(partial / CARD, card)
        # One entry only: safetensors writes several in no fixed order.
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / WEIGHTS).chmod((partial / CONFIG).stat().st_mode)
        _move(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _refuse_target(directory: Path, replace: bool) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ValueError(f"{directory} is a file; give the name of a new folder.")
    files = sorted(path.name for path in directory.iterdir())
    if files and not replace:
        raise ValueError(
            f"{directory} is not empty; give the name of a new folder or ask for the adapter "
            f"there to be replaced."
        )
    foreign = sorted({*files} - {CONFIG, WEIGHTS, CARD})
    if foreign:
        raise ValueError(
            f"{directory} also holds {_short(foreign[0])}, which replacing would delete; give "
            f"the name of a new folder."
        )


def _padded(
    adapter: Mapping[str, Factors], rank: int | str, dtype: torch.dtype
) -> tuple[dict[str, Tensor], int]:
    if not adapter:
        raise ValueError("The adapter has no modules; give one that has, to write it.")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"Cannot write {dtype}; take torch.float32, bfloat16 or float16.")
    factors = {}
    for module, value in adapter.items():
        if len(module) > _MODULE_CHARACTERS or not _MODULE.fullmatch(module):
            raise ValueError(
                f"{_short(module)} is no module path; give letters, digits, _ and -, joined "
                f"by dots, at most {_MODULE_CHARACTERS} characters."
            )
        factors[module] = value.to("cpu").to(dtype)
        if not all(half.isfinite().all() for half in (factors[module].A, factors[module].B)):
            raise ValueError(
                f"The factors of {module!r} are not finite in {dtype}; write them in "
                f"torch.float32, or take an earlier state if training diverged."
            )
    common = _common_rank(max(1, *(value.rank for value in factors.values())), rank)
    tensors = {}
    for module, value in factors.items():
        padded = value.padded(common)
        for name, half in (("A", padded.A), ("B", padded.B)):
            # A copy, for safetensors refuses tensors that share memory.
            copy = half.detach().clone(memory_format=torch.contiguous_format)
            tensors[f"{_PREFIX}{module}.lora_{name}.weight"] = copy
    return tensors, common


def _common_rank(largest: int, rank: int | str) -> int:
    if rank == "max":
        return largest
    if rank == "vllm":
        allowed = [value for value in VLLM_RANKS if value >= largest]
        if not allowed:
            raise ValueError(
                f"The adapter has rank {largest}, and vLLM goes up to {VLLM_RANKS[-1]}; "
                f"truncate the adapter first."
            )
        return allowed[0]
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise ValueError(f"rank is {rank!r}; give a number, 'max' or 'vllm'.")
    if rank < largest:
        raise ValueError(
            f"The adapter has rank {largest}, above the {rank} asked for; truncate the "
            f"adapter first or ask for {largest}."
        )
    return rank


def _config(
    modules: Sequence[str], rank: int, base_model: str | None, task_type: str | None
) -> dict[str, Any]:
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": targets(modules),
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }


def targets(modules: Sequence[str]) -> list[str]:
    """PEFT's ``target_modules`` for these modules: last names, or else whole paths.

    Last names do as long as no layer between those adapted goes without: the layers
    numbered 0 to n must each have the same modules. What else the base model has under
    the same last name cannot be known here; PEFT gives it an update of zero.
    """
    layers: dict[str, set[int]] = {}
    for module in modules:
        layer = re.search(r"(?<=\.)\d+(?=\.)", module)
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", module, count=1)
        layers.setdefault(kind, set()).update([int(layer[0])] if layer else [])
    numbered = [numbers for numbers in layers.values() if numbers]
    every = set(range(max(map(len, numbered), default=0)))
    if all(numbers == every for numbers in numbered):
        return sorted({module.rpartition(".")[2] for module in modules})
    return sorted(modules)


def _card(base_model: str | None, task_type: str | None, metadata: Mapping[str, Any]) -> str:
    front: dict[str, Any] = {} if base_model is None else {"base_model": base_model}
    front |= {"library_name": "peft", "tags": ["lora"]}
    if task_type == "CAUSAL_LM":
        front["pipeline_tag"] = "text-generation"
    if metadata:
        front["flexlora"] = dict(metadata)
    # JSON is YAML, and quoted as untrusted names need it.
    try:
        lines = [
            f"{name}: {json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False)}"
            for name, value in front.items()
        ]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metadata is not fit for JSON ({_short(error)}); give numbers, texts, lists and "
            f"dictionaries."
        ) from error
    for line in lines:
        if not line.isprintable():
            raise ValueError(f"{_short(line)} has characters that cannot be printed; remove them.")
    base = f" for `{base_model}`" if base_model else ""
    return "\n".join(
        [
            "---",
            *lines,
            "---",
            "",
            "# LoRA adapter",
            "",
            f"A LoRA adapter{base} written by flexlora: one rank for all modules, scale 1.",
            "",
        ]
    )


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _move(partial: Path, directory: Path) -> None:
    """Put the finished folder in place, keeping the old one until the new one is there."""
    if not directory.exists():
        partial.rename(directory)
        return
    old = partial.with_suffix(".old")
    directory.rename(old)
    try:
        partial.rename(directory)
    except OSError:
        old.rename(directory)
        raise
    shutil.rmtree(old)
