"""The base model in memory, with adapters attached for evaluation or training."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import StrEnum
from functools import partial
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from flexlora.data import Pack
from flexlora.errors import AdapterError, ConfigError
from flexlora.lowrank import Factors
from flexlora.model import examples, replacement, smollm2
from flexlora.model.examples import Batch
from flexlora.model.inputs import flash_inputs, longest_alike, output_inputs, to_device
from flexlora.model.layers import attention
from flexlora.model.layers.attention import AttentionPass, PackedPass
from flexlora.model.layers.lora import LayerAdapter, Layout, shape_of, weight_of
from flexlora.model.trainable import FlatAdapter


class Rows(StrEnum):
    """How the examples of a row are computed; ``model.proof`` finds out what a model allows."""

    SHARED = "shared"
    """In one row, with shared first tokens once."""

    PACKED = "packed"
    """In one row, without shared tokens."""

    PADDED = "padded"
    """One per row, padded, by the model's own attention."""

    ALONE = "alone"
    """One per pass of the model."""


class Base:
    """A causal language model in memory, to which adapters can be attached.

    Its linear layers are replaced by layers that can carry adapters; its weights are frozen.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        name: str,
        targets: Collection[str] | None = None,
        kernel: str = attention.NAME,
        left_out: Collection[str] = (),
    ) -> None:
        attention.register()
        self.model = model.requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.rows = Rows.SHARED
        self.notices: tuple[str, ...] = ()
        self.kernel = kernel
        # Before layers are replaced: PEFT chooses among the modules of the original model.
        self.paths = tuple(path for path, _ in model.named_modules())
        self._options = frozenset(inspect.signature(model.forward).parameters)
        self._layout = Layout()
        self._layers = replacement.wrap_linear_layers(model, targets, self._layout, left_out)
        replacement.replace_norms_and_mlps(model)
        self._ends_early = replacement.replace_last_layer(model, self._layout)
        self.model.train(False)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape (out, in) of every adapted module, in the model's order."""
        return {path: shape_of(layer.base) for path, layer in self._layers.items()}

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether adapted layers store their weights as (in, out), as PEFT calls it."""
        return any(isinstance(layer.base, Conv1D) for layer in self._layers.values())

    @property
    def published(self) -> str:
        """The model's public name: of the hub, or as configured."""
        return smollm2.HUB if self.name == smollm2.NAME else self.name

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device

    @contextmanager
    def attached(self, *adapters: Mapping[str, Factors]) -> Iterator[None]:
        """Attach these adapters for evaluation, within the context.

        With several adapters each applies to an equal part of every batch, in their order.

        Raises:
            AdapterError: an adapter's modules or shapes are not the model's.
        """
        dtype = self.model.dtype
        layer_adapters = [
            {
                m: LayerAdapter(f.A.to(self.device, dtype), f.B.to(self.device, dtype))
                for m, f in adapter.items()
            }
            for adapter in map(self._checked, adapters)
        ]
        with self._attached(layer_adapters):
            yield

    @contextmanager
    def training(self, *adapters: FlatAdapter) -> Iterator[None]:
        """Attach trainable adapters, within the context.

        With several adapters, ``logits`` takes the bounds of each adapter's tokens.

        Raises:
            AdapterError: an adapter's modules or shapes are not the model's.
        """
        with self._attached([self._trainable(flat) for flat in adapters]):
            yield

    def _trainable(self, flat: FlatAdapter) -> dict[str, LayerAdapter]:
        """A trainable adapter by module; a module with only frozen factors has rank 0."""
        frozen = self._checked(flat.rest)
        only_frozen = {m: LayerAdapter(f.A[:0], f.B[:, :0], 1.0, f) for m, f in frozen.items()}
        return only_frozen | {
            m: LayerAdapter(f.A, f.B, flat.scales[m], frozen.get(m))
            for m, f in self._checked(flat.factors).items()
        }

    @property
    def folds(self) -> bool:
        """Whether updates can be added to the weights: all are unquantised and in float32."""
        layers = [layer.base for layer in self._layers.values()]
        return all(
            type(x) in (nn.Linear, Conv1D) and x.weight.dtype == torch.float32 for x in layers
        )

    @contextmanager
    def folded(self, adapters: Sequence[Mapping[str, Factors]]) -> Iterator[None]:
        """Add these updates to the weights within the context, and restore the weights exactly.

        Costs a copy of the changed weights and one matrix product per module and adapter.

        Raises:
            AdapterError: the weights are not in float32, so that a small update would be lost.
        """
        if adapters and not self.folds:
            raise AdapterError(
                f"The weights of {self.name} are {self.model.dtype} or quantised, and an update "
                "added to them would be lost to rounding; set model.dtype to 'float32' and "
                "model.quantize to 'none'."
            )
        original: dict[str, Tensor] = {}
        try:
            for adapter in adapters:
                for path, f in self._checked(adapter).items():
                    weight = weight_of(self._layers[path].base)
                    original.setdefault(path, weight.detach().clone())
                    weight.addmm_(f.B.to(weight), f.A.to(weight))
            yield
        finally:
            for path, weight in original.items():
                weight_of(self._layers[path].base).copy_(weight)

    @contextmanager
    def recomputing(self, enabled: bool) -> Iterator[None]:
        """Recompute activations in the backward pass (gradient checkpointing), if ``enabled``.

        Only one layer's activations are in memory; costs about a third more time.

        Raises:
            ConfigError: the model has no layers that support it.
        """
        if not enabled:
            yield
            return
        layers = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not layers:
            raise ConfigError(
                f"{self.name} does not support gradient checkpointing; remove "
                "training.recompute_above."
            )
        # Set on the layers only, not on their modules: training mode would turn dropout on.
        # The model's own switch would leave a hook on the embeddings.
        recompute = partial(checkpoint, use_reentrant=False, context_fn=self._recomputation)
        for layer in layers:
            cast(Any, layer)._gradient_checkpointing_func = recompute
            layer.gradient_checkpointing = layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.gradient_checkpointing = layer.training = False

    def _recomputation(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The contexts of a forward pass now, and of its recomputation: with all that holds now."""
        edges, only = self._layout.edges, self._layout.only
        implementation = self.model.config._attn_implementation

        @contextmanager
        def again() -> Iterator[None]:
            with self._layout.of(edges, only), self._attention(implementation):
                yield

        return nullcontext(), again()

    @contextmanager
    def _attention(self, implementation: str | None) -> Iterator[None]:
        """Let the model's layers call this attention within the context."""
        config = self.model.config
        original = config._attn_implementation
        config._attn_implementation = implementation
        try:
            yield
        finally:
            config._attn_implementation = original

    @property
    def shares_prefixes(self) -> bool:
        """Whether rows may contain examples that share their first tokens."""
        return self.rows is Rows.SHARED

    def decodes(self, tokens: int) -> bool:
        """Whether an ``AttentionPass`` can decode sequences of up to ``tokens`` tokens."""
        return self.rows is Rows.SHARED and self._rows_of(tokens) is Rows.SHARED

    def logits(self, row: Pack, edges: Sequence[int] | None = None) -> Tensor:
        """The logits (n, vocabulary) of a row at its n ``loss_positions``.

        With several adapters, adapter i applies to the tokens from ``edges[i]`` to
        ``edges[i + 1]``. The head runs only on the positions of the loss, if the model can do so.
        Where ``rows`` says so, the examples are computed one per row, see ``model.examples``.
        """
        rows = self._rows_of(row.forest.longest)
        if rows in (Rows.PADDED, Rows.ALONE):
            return examples.logits(row, edges, rows is Rows.PADDED, partial(self._batch, edges))
        outputs = output_inputs(row, edges, self.device, self._ends_early)
        kept = "logits_to_keep" in self._options
        with self._layout.of(edges):
            inputs = {
                "input_ids": to_device(row.input_ids, self.device),
                "position_ids": to_device(row.position_ids, self.device),
                **(outputs if kept else {}),
            }
            if self.kernel in attention.KERNELS:
                out = self._run(PackedPass(row.forest), **inputs)
            else:
                out = self.model(use_cache=False, **inputs, **flash_inputs(row.forest, self.device))
        logits = cast(Tensor, out.logits[0])
        return logits if kept else logits[to_device(row.loss_positions, self.device)]

    def logits_at(
        self, ids: Tensor, positions: Tensor, at: Tensor, attention_pass: AttentionPass
    ) -> Tensor:
        """The logits (rows, n, vocabulary) at the indices ``at`` (n,) of every row.

        ``ids`` and ``positions`` are (rows, tokens).
        """
        ids, positions, at = (x.to(self.device) for x in (ids, positions, at))
        options = {"logits_to_keep": at} if "logits_to_keep" in self._options else {}
        out = self._run(attention_pass, input_ids=ids, position_ids=positions, **options)
        return cast(Tensor, out.logits if options else out.logits[:, at])

    def _run(self, attention_pass: AttentionPass, **inputs: Any) -> Any:
        """The model's output, with the attention of ``attention_pass`` in every layer."""
        with self._attention(attention.NAME):
            return self.model(
                # Without it transformers would look for examples in the positions by itself.
                attention_mask=torch.ones_like(inputs["input_ids"]),
                use_cache=False,
                attention_pass=attention_pass,
                kernel=self.kernel,
                **inputs,
            )

    @contextmanager
    def only(self, adapter: int) -> Iterator[None]:
        """Apply only this one of the attached adapters, to all tokens, within the context."""
        with self._layout.of(None, adapter):
            yield

    def _rows_of(self, longest: int) -> Rows:
        """How a row is computed whose longest example has ``longest`` tokens."""
        return Rows.ALONE if longest > longest_alike(self.model.config) else self.rows

    def _batch(self, edges: Sequence[int] | None, batch: Batch, columns: Tensor) -> Tensor:
        """The logits (examples, columns, vocabulary) of a batch at these columns."""
        ids, mask = to_device(batch.input_ids, self.device), batch.attention_mask
        at, options = to_device(columns, self.device), {}
        if "logits_to_keep" in self._options:
            options["logits_to_keep"] = at
        if mask is not None:
            options["attention_mask"] = to_device(mask, self.device)
        with self._layout.of(None, None if edges is None else batch.adapter):
            out = self.model(input_ids=ids, use_cache=False, **options)
        return cast(Tensor, out.logits if "logits_to_keep" in options else out.logits[:, at])

    @contextmanager
    def _attached(self, adapters: Sequence[Mapping[str, LayerAdapter]]) -> Iterator[None]:
        """Set the layers' adapters within the context.

        If only some adapters have a module, the others have rank 0 there.
        """
        by_path: dict[str, tuple[LayerAdapter, ...]] = {}
        for path, (out, in_) in self.shapes.items():
            present = [adapter.get(path) for adapter in adapters]
            first = next((each for each in present if each is not None), None)
            if first is None:
                by_path[path] = ()
                continue
            empty = LayerAdapter(first.A.new_empty(0, in_), first.B.new_empty(out, 0))
            by_path[path] = tuple(empty if each is None else each for each in present)
        try:
            for path, layer in self._layers.items():
                layer.adapters = by_path[path]
            yield
        finally:
            for layer in self._layers.values():
                layer.adapters = ()

    def _checked(self, adapter: Mapping[str, Factors]) -> Mapping[str, Factors]:
        shapes = self.shapes
        for module, factors in adapter.items():
            if module not in shapes:
                raise AdapterError(
                    f"The adapter has a module {module!r}, but {self.name} has no adapted layer of "
                    "that name; use the base model and the model.targets it was trained with."
                )
            if factors.shape != shapes[module]:
                raise AdapterError(
                    f"The adapter's module {module!r} has the shape {factors.shape} (out, in), but "
                    f"in {self.name} it is {shapes[module]}; use the model it was trained with."
                )
        return adapter
