"""One resident base model, and adapters swapped into and out of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from flexlora.data import Forest, Pack
from flexlora.errors import AdapterError
from flexlora.lowrank import Factors
from flexlora.model import smollm2
from flexlora.model.layers import attention, last_layer, mlp, norm
from flexlora.model.layers.lora import Layout, LoRALinear, Part
from flexlora.model.trainable import FlatAdapter


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
        self._layout = Layout()
        self._layers = _place(model, targets, self._layout)
        _lean(model)
        self._ends_early = _end_early(model, self._layout)
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
    def attached(self, *adapters: Mapping[str, Factors]) -> Iterator[None]:
        """The model with these adapters, for evaluation; without them again afterwards.

        Of several, each has an equal part of every batch, in their order.

        Raises:
            AdapterError: an adapter's modules or shapes are not the model's.
        """
        dtype = self.model.dtype
        here = [
            {
                m: Part(f.A.to(self.device, dtype), f.B.to(self.device, dtype))
                for m, f in adapter.items()
            }
            for adapter in map(self._checked, adapters)
        ]
        with self._with(here):
            yield

    @contextmanager
    def training(self, *adapters: FlatAdapter) -> Iterator[None]:
        """The model with trainable factors; without them again afterwards.

        Of several, ``logits`` is told which rows are whose.

        Raises:
            AdapterError: an adapter's modules or shapes are not the model's.
        """
        with self._with([self._trainable(flat) for flat in adapters]):
            yield

    def _trainable(self, flat: FlatAdapter) -> dict[str, Part]:
        """An adapter's parts; of a module that has but a rest, no term is trained."""
        rest = self._checked(flat.rest)
        beside = {m: Part(f.A[:0], f.B[:, :0], 1.0, f) for m, f in rest.items()}
        return beside | {
            m: Part(f.A, f.B, flat.scales[m], rest.get(m))
            for m, f in self._checked(flat.factors).items()
        }

    @property
    def folds(self) -> bool:
        """Whether updates can be added to the weights themselves, at full precision."""
        layers = [layer.base for layer in self._layers.values()]
        return all(type(x) is nn.Linear and x.weight.dtype == torch.float32 for x in layers)

    @contextmanager
    def folded(self, adapters: Sequence[Mapping[str, Factors]]) -> Iterator[None]:
        """The model with these updates added to its weights; to the bit as before afterwards.

        Costs a copy of the weights concerned and one GEMM for each module of each adapter.

        Raises:
            AdapterError: the weights are not in float32, in which a small update would be lost.
        """
        if adapters and not self.folds:
            raise AdapterError(
                f"{self.name} is held in {self.model.dtype} or quantised, and an update added to "
                "its weights would be rounded away; load it with model.dtype 'float32'."
            )
        before: dict[str, Tensor] = {}
        try:
            for adapter in adapters:
                for path, f in self._checked(adapter).items():
                    weight = self._layers[path].base.weight
                    before.setdefault(path, weight.detach().clone())
                    weight.addmm_(f.B.to(weight), f.A.to(weight))
            yield
        finally:
            for path, weight in before.items():
                self._layers[path].base.weight.copy_(weight)

    @contextmanager
    def recomputing(self, wanted: bool) -> Iterator[None]:
        """Keep one layer's activations instead of all layers', for about a third more time.

        Raises:
            AdapterError: the model cannot.
        """
        if not wanted:
            yield
            return
        layers = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not layers:
            raise AdapterError(f"{self.name} cannot recompute; unset training.recompute_above.")
        # Of the layers alone, not of what is in them: training mode would turn dropout on.
        # And not through the model's own switch, which leaves a hook on the embeddings.
        # What is recomputed in the backward pass needs the edges of its forward pass.
        recompute = partial(checkpoint, use_reentrant=False, context_fn=self._layout.twice)
        for layer in layers:
            cast(Any, layer)._gradient_checkpointing_func = recompute
            layer.gradient_checkpointing = layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.gradient_checkpointing = layer.training = False

    @property
    def shares(self) -> bool:
        """Whether the attention can take examples that share their first tokens."""
        return self._implementation in (attention.NAME, "sdpa", "eager")

    def logits(self, row: Pack, edges: Sequence[int] | None = None) -> Tensor:
        """The logits (places of the loss, vocabulary) of a row, at its ``loss_positions``.

        ``edges`` say which tokens belong to which adapter, if there are several. The head
        runs on the positions asked for and on no others.

        Raises:
            AdapterError: the attention cannot do what the row or the model asks for.
        """
        with self._layout.of(edges):
            out = self.model(
                input_ids=to_device(row.input_ids, self.device),
                position_ids=to_device(row.position_ids, self.device),
                use_cache=False,
                **self._kept(row, edges),
                **self._seen(row.forest),
            )
        return cast(Tensor, out.logits[0])

    def _kept(self, row: Pack, edges: Sequence[int] | None) -> dict[str, Any]:
        """What tells the last layer and the head where there is loss."""
        if not self._ends_early or not self.shares:
            return {"logits_to_keep": to_device(row.loss_positions, self.device)}
        places, order = torch.unique(row.loss_positions, return_inverse=True)
        bounds = None if edges is None else torch.searchsorted(places, torch.tensor(edges))
        return {
            "places": to_device(places, self.device),
            "place_edges": None if bounds is None else tuple(bounds.tolist()),
            "logits_to_keep": to_device(order, self.device),
        }

    def _seen(self, forest: Forest) -> dict[str, Any]:
        """What tells the model's attention which tokens see which."""
        if self._implementation == attention.NAME:
            # A mask is what our attention does without; transformers takes a 4-D one as it is.
            return {"attention_mask": torch.empty(1, 1, 0, 0), "forest": forest}
        if self.shares:
            seen = forest.mask(0, forest.edges[-1]).to(self.device)
            hidden = torch.zeros(seen.shape, dtype=self.model.dtype, device=self.device)
            hidden.masked_fill_(~seen, torch.finfo(self.model.dtype).min)
            return {"attention_mask": hidden[None, None]}
        if any(prefix >= 0 for prefix in forest.prefixes):
            raise AdapterError(
                f"model.attention {self._implementation!r} cannot share first tokens of examples."
            )
        bounds = torch.tensor(forest.edges, dtype=torch.int32, device=self.device)
        longest = forest.longest
        return {
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    @property
    def _implementation(self) -> str:
        return str(self.model.config._attn_implementation)

    @contextmanager
    def _with(self, adapters: Sequence[Mapping[str, Part]]) -> Iterator[None]:
        """The layers with the parts of these adapters, then without.

        An adapter that lacks a module which one beside it has takes part there at rank 0.
        """
        found: dict[str, tuple[Part, ...]] = {}
        for path, (out, in_) in self.shapes.items():
            held = [adapter.get(path) for adapter in adapters]
            first = next((part for part in held if part is not None), None)
            if first is None:
                found[path] = ()
                continue
            nothing = Part(first.A.new_empty(0, in_), first.B.new_empty(out, 0))
            found[path] = tuple(nothing if part is None else part for part in held)
        try:
            for path, layer in self._layers.items():
                layer.parts = found[path]
            yield
        finally:
            for layer in self._layers.values():
                layer.parts = ()

    def _checked(self, adapter: Mapping[str, Factors]) -> Mapping[str, Factors]:
        shapes = self.shapes
        for module, factors in adapter.items():
            if module not in shapes:
                raise AdapterError(f"The adapter's module {module!r} is none of {self.name}'s.")
            if factors.shape != shapes[module]:
                raise AdapterError(
                    f"The adapter's module {module!r} is {factors.shape} (out, in), "
                    f"but {self.name}'s is {shapes[module]}."
                )
        return adapter


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """The tensor there; to a CUDA device without waiting for the copy."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def _place(
    model: nn.Module, targets: Collection[str] | None, layout: Layout
) -> dict[str, LoRALinear]:
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
        raise AdapterError(f"No linear layer is called {sorted(missing)}; the model has {names}.")
    layers = {}
    for path, linear in found.items():
        parent, _, name = path.rpartition(".")
        layers[path] = LoRALinear(linear, layout)
        setattr(model.get_submodule(parent), name, layers[path])
    return layers


def _lean(model: nn.Module) -> None:
    """Put our own norms and feed-forward blocks where the model's are known to be the same."""
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if norm.fits(module):
            setattr(model.get_submodule(parent), name, norm.RMSNorm(module))
        elif mlp.fits(module):
            setattr(model.get_submodule(parent), name, mlp.GatedMLP(module))


def _end_early(model: nn.Module, layout: Layout) -> bool:
    """Let the last decoder layer work where there is loss alone; whether it is one that can."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers) or not last_layer.fits(layers[-1]):
        return False
    layers[-1] = last_layer.LastLayer(layers[-1], layout)
    return True
