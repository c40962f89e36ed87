"""One resident base model, and adapters swapped into and out of it."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from flexlora import smollm2
from flexlora.adapter import Factors
from flexlora.training.flat import FlatAdapter, Scale

SEGMENTS = "flexlora_segments"
"""Our attention over several examples laid in one row: each example attends to itself only."""


DTYPES = ("float32", "bfloat16", "float16")


class LoRALinear(nn.Module):
    """A frozen linear layer with a place for factors; without them, the layer itself."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.A: Tensor | None = None
        self.B: Tensor | None = None
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """``x W' + scale (x A') B'``."""
        if self.A is None or self.B is None:
            return cast(Tensor, self.base(x))
        if type(self.base) is nn.Linear:
            y = _FusedLoRA.apply(  # type: ignore[no-untyped-call]
                x, self.base.weight, self.base.bias, self.A, self.B, self.scale
            )
            return cast(Tensor, y)
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        return cast(Tensor, self.base(x)) + self.scale * F.linear(F.linear(x, A), B)


class _FusedLoRA(torch.autograd.Function):
    """The layer and its factors as one node: the input is saved once, sums are in place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        h = rows @ A.to(x.dtype).t()
        y = F.linear(rows, W, bias)
        y.addmm_(h, B.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(rows, h, W, A, B)
        ctx.scale = scale
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, h, W, A, B = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        through = g @ B.to(g.dtype)
        through *= ctx.scale
        dx = None
        if ctx.needs_input_grad[0]:
            dx = g @ W
            dx.addmm_(through, A.to(g.dtype))
            dx = dx.view(*grad.shape[:-1], -1)
        dA = (through.t() @ rows).to(A.dtype) if ctx.needs_input_grad[3] else None
        dB = (g.t() @ h).mul_(ctx.scale).to(B.dtype) if ctx.needs_input_grad[4] else None
        return dx, None, None, dA, dB, None


class Base:
    """A resident causal language model with a place for one adapter at a time."""

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        name: str,
        targets: Collection[str] | None = None,
    ) -> None:
        self.model = model.requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self._layers = _place(model, targets)
        self.model.train(False)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape (out, in) of every adapted module, in the model's order."""
        return {
            path: (layer.base.out_features, layer.base.in_features)
            for path, layer in self._layers.items()
        }

    @property
    def published(self) -> str:
        """The name under which others know the model."""
        return smollm2.HUB if self.name == smollm2.NAME else self.name

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.device

    @contextmanager
    def attached(self, adapter: Mapping[str, Factors]) -> Iterator[None]:
        """The model with this adapter, for evaluation; without it again afterwards.

        Raises:
            ValueError: the adapter's modules or shapes are not the model's.
        """
        self._check(adapter)
        dtype = self.model.dtype
        self._set(
            {
                m: Factors(f.B.to(self.device, dtype), f.A.to(self.device, dtype))
                for m, f in adapter.items()
            }
        )
        try:
            yield
        finally:
            self._clear()

    @contextmanager
    def training(self, adapter: FlatAdapter) -> Iterator[None]:
        """The model with trainable factors; without them again afterwards.

        Raises:
            ValueError: the adapter's modules or shapes are not the model's.
        """
        self._check(adapter.factors)
        self._set(adapter.factors, adapter.scale)
        try:
            yield
        finally:
            self._clear()

    @contextmanager
    def recomputing(self, wanted: bool) -> Iterator[None]:
        """Keep one layer's activations instead of all layers', for about a third more time.

        Raises:
            ValueError: the model cannot.
        """
        if not wanted:
            yield
            return
        layers = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not layers:
            raise ValueError(f"{self.name} cannot recompute; unset training.recompute_above.")
        # Of the layers alone, not of what is in them: training mode would turn dropout on.
        # And not through the model's own switch, which leaves a hook on the embeddings.
        recompute = partial(checkpoint, use_reentrant=False)
        for layer in layers:
            cast(Any, layer)._gradient_checkpointing_func = recompute
            layer.gradient_checkpointing = layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.gradient_checkpointing = layer.training = False

    def logits(self, input_ids: Tensor, position_ids: Tensor, starts: Tensor, at: Tensor) -> Tensor:
        """The logits (len(at), vocabulary) at positions ``at`` of one row of examples.

        ``starts`` (examples + 1,) bounds the examples in the row. The head runs on the
        positions asked for and on no others.
        """
        # A mask is what our attention does without; transformers takes a 4-D one as it is.
        own = self.model.config._attn_implementation == SEGMENTS
        mask = torch.empty(1, 1, 0, 0) if own else None
        lengths = starts.diff()
        longest = int(lengths.max())
        out = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=mask,
            logits_to_keep=at,
            use_cache=False,
            cu_seq_lens_q=starts.int(),
            cu_seq_lens_k=starts.int(),
            max_length_q=longest,
            max_length_k=longest,
        )
        return cast(Tensor, out.logits[0])

    def _set(self, factors: Mapping[str, Factors], scale: Scale | None = None) -> None:
        for path, f in factors.items():
            layer = self._layers[path]
            layer.A, layer.B = f.A, f.B
            layer.scale = scale(f.rank) if scale else 1.0

    def _clear(self) -> None:
        for layer in self._layers.values():
            layer.A = layer.B = None

    def _check(self, adapter: Mapping[str, Factors]) -> None:
        shapes = self.shapes
        for module, factors in adapter.items():
            if module not in shapes:
                raise ValueError(f"The adapter's module {module!r} is none of {self.name}'s.")
            if factors.shape != shapes[module]:
                raise ValueError(
                    f"The adapter's module {module!r} is {factors.shape} (out, in), "
                    f"but {self.name}'s is {shapes[module]}."
                )


@dataclass(frozen=True)
class Source:
    """Which base model, and how it is held.

    ``name`` is a folder, a model of the hub or ``smollm2-135m-instruct``. ``targets`` are
    the last parts of the adapted modules' paths, by default every linear layer but the
    head. ``quantize`` loads the weights in 4 bits (bitsandbytes, CUDA).
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    name: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    quantize: Literal["none", "4bit"] = "none"
    attention: str = SEGMENTS
    targets: tuple[str, ...] | None = None

    def load(self) -> Base:
        """The model in memory.

        Raises:
            ValueError: it cannot be had, or not on this machine in this form.
        """
        _check_device(self.device, self.quantize)
        if self.dtype not in DTYPES:
            raise ValueError(f"model.dtype is {self.dtype!r}; give one of {', '.join(DTYPES)}.")
        path = smollm2.folder() if self.name == smollm2.NAME else self.name
        options: dict[str, Any] = {
            "dtype": getattr(torch, self.dtype),
            "attn_implementation": self.attention,
        }
        if self.quantize == "4bit":
            options["quantization_config"] = transformers.BitsAndBytesConfig(  # type: ignore[no-untyped-call]
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=options["dtype"],
            )
            options["device_map"] = {"": self.device}
        _register_segments()
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            model = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"The base model {self.name!r} could not be loaded: {reason} Give a folder with "
                f"config.json and safetensors, or a name that the hub knows."
            ) from error
        if self.quantize == "none":
            model = cast(Any, model).to(self.device)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return Base(model, tokenizer, self.name, self.targets)


def kind(module: str) -> str:
    """Whether a module path is of the ``attention`` or of the ``feed_forward`` block.

    Raises:
        ValueError: its path says neither.
    """
    parts = module.lower().split(".")[:-1]
    if any("attn" in part or "attention" in part for part in parts):
        return "attention"
    if any(part in ("mlp", "ffn", "feed_forward", "feedforward", "ff") for part in parts):
        return "feed_forward"
    raise ValueError(
        f"Module {module!r} is neither in an attention nor in a feed-forward block, so a rank "
        "type with a rank for each does not say its rank. Give types with one rank, or set "
        "model.targets."
    )


def _place(model: nn.Module, targets: Collection[str] | None) -> dict[str, LoRALinear]:
    """Wrap the targeted linear layers where they stand."""
    head = cast(Any, model).get_output_embeddings()
    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and (targets is None or path.rsplit(".", 1)[-1] in targets)
    }
    missing = set(targets or ()) - {path.rsplit(".", 1)[-1] for path in found}
    if missing or not found:
        names = sorted(
            {p.rsplit(".", 1)[-1] for p, m in model.named_modules() if isinstance(m, nn.Linear)}
        )
        raise ValueError(f"No linear layer is called {sorted(missing)}; the model has {names}.")
    layers = {}
    for path, linear in found.items():
        parent, _, name = path.rpartition(".")
        layers[path] = LoRALinear(linear)
        setattr(model.get_submodule(parent), name, layers[path])
    return layers


def _check_device(device: str, quantize: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = "none"
    if kind not in ("cpu", "cuda", "mps", "xpu"):
        raise ValueError(f"model.device is {device!r}; give 'cpu', 'cuda' or 'cuda:0'.")
    if quantize not in ("none", "4bit"):
        raise ValueError(f"model.quantize is {quantize!r}; give 'none' or '4bit'.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"model.device is {device!r}, but this machine has no CUDA device; set 'cpu'."
        )
    if quantize == "4bit":
        if not device.startswith("cuda"):
            raise ValueError(
                "model.quantize is '4bit', which bitsandbytes does on CUDA only; set "
                f"model.device to 'cuda' or model.quantize to 'none' (device is {device!r})."
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(
                "model.quantize is '4bit'; install it with: pip install 'flexlora[gpu]'."
            )


def _register_segments() -> None:
    """Make our attention known to transformers by its name."""
    transformers.AttentionInterface.register(SEGMENTS, _segment_attention)
    transformers.AttentionMaskInterface.register(SEGMENTS, transformers.masking_utils.sdpa_mask)


def _segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each example of a row to itself; otherwise transformers' own.

    One kernel call for each example: no mask of row x row entries, and no product between
    examples that a mask would throw away. Tensors are (1, heads, row, head size).
    """
    bounds = options.get("cu_seq_lens_q")
    if bounds is None:
        sdpa = transformers.integrations.sdpa_attention.sdpa_attention_forward
        return sdpa(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            **options,
        )
    edges = bounds.tolist()
    window = options.get("sliding_window")
    unsupported = [name for name in ("softcap", "s_aux") if options.get(name) is not None]
    if unsupported or (window and max(b - a for a, b in itertools.pairwise(edges)) > window):
        raise ValueError(
            f"This model's attention uses {unsupported or 'a sliding window'}, which the default "
            "attention of examples in one row cannot do; set model.attention to 'eager'."
        )
    outputs = [
        F.scaled_dot_product_attention(
            query[:, :, a:b],
            key[:, :, a:b],
            value[:, :, a:b],
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
            enable_gqa=True,
        )
        for a, b in itertools.pairwise(edges)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None
