"""A proof, when a model is loaded, that a row of several examples gives what each gives alone.

Layers that see more than causal attention shows them (convolutions, states, positions by the
place in the row) would mix the examples of a row, and training would go on with wrong numbers.
So a few random rows are computed by the model as it was loaded, one example at a time, and then
as training computes them. Where the two differ, one example is computed per row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from flexlora.data import Pack, TokenStore, join, pack
from flexlora.errors import ConfigError
from flexlora.lowrank import Factors
from flexlora.model.base import Base, Rows
from flexlora.model.layers import attention
from flexlora.model.layers.lora import shape_of
from flexlora.model.replacement import linear_layers
from flexlora.model.unadapted import unadapted
from flexlora.seeds import rng

AUTO: Final = "auto"
"""The attention of this library if a model allows it, or else of transformers."""

_PREFIX, _TAILS, _LONG = 9, (4, 6), 24
"""Tokens of the examples: two that share a prefix, and a longer one."""

_LONGEST_WINDOW: Final = 128
"""A window of up to this many tokens is shorter than the longest example."""

_COLUMNS: Final = 1024
"""Of how many entries of the vocabulary the logits are compared."""

_ROUNDINGS: Final = {torch.float32: 8.0}
"""How much further than one rounding of every layer's output two orders of summing may lie.

Once for half precision, whose sums are in float32. Measured on the families of the tests: up to
0.6 times in float32 and 0.3 times in half precision, and what mixes examples from 2.3 times on.
"""

_MOST_TOLERATED: Final = 0.25


@dataclass(frozen=True, eq=False)
class Stock:
    """What the model computes as it was loaded, one example at a time.

    ``logits`` are (tokens, columns) of each example, ``tolerance`` is the relative error up to
    which two results count as equal. ``idle`` are the paths of linear layers that are not
    called for text, such as those of a vision tower, or whose result is more than a product, such
    as a router's.
    """

    examples: TokenStore
    logits: Sequence[Tensor]
    tolerance: float
    idle: frozenset[str]


def proven(
    model: Any,
    tokenizer: transformers.PreTrainedTokenizerBase,
    name: str,
    targets: Collection[str] | None = None,
    kernel: str = AUTO,
) -> Base:
    """The base model, with adapters' layers in place, and proved; it takes over ``model``.

    ``kernel`` is the config's ``model.attention``. ``model`` has the attention of transformers
    that is the reference: its default, or the ``kernel`` itself.

    Raises:
        ConfigError: the model cannot be trained, or not with this attention.
    """
    reference = stock(model, name)
    own = kernel in (AUTO, attention.NAME)
    notices = unadapted(model, reference.idle) if targets is None else ()
    base = Base(model, tokenizer, name, targets, attention.NAME if own else kernel, reference.idle)
    base.notices = notices
    prove(base, reference, required=kernel == attention.NAME)
    return base


def stock(model: Any, name: str) -> Stock:
    """The model's results on random examples, before any of its layers is replaced.

    Costs four passes over some 13 to 24 tokens each (up to 140 if a window is that short).

    Raises:
        ConfigError: the model cannot compute them.
    """
    examples, used = _examples(model.config), set[str]()
    linears = linear_layers(model)

    def note(path: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.shape[-1] == shape_of(linears[path])[0]:
            used.add(_kind(path))

    hooks = [
        layer.register_forward_hook(lambda _m, _i, output, path=path: note(path, output))
        for path, layer in linears.items()
    ]

    def compute(index: int) -> Tensor:
        return _compared(model(input_ids=_ids(examples, index), use_cache=False).logits[0])

    _ids = _ids_on(model.device)
    try:
        with torch.no_grad(), _innermost(model) as at:
            logits = [compute(index) for index in range(len(examples))]
            longest = len(examples) - 1
            with _rounded(model):
                noise = _distance(compute(longest), logits[longest])
    except Exception as error:
        raise ConfigError(
            f"The base model {name!r} cannot compute a row of tokens: its layer {at()} fails; set "
            "model.name to a causal language model."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not all(each.isfinite().all() for each in logits):
        raise ConfigError(
            f"The logits of {name!r} are not finite in {model.dtype}; set model.dtype to 'float32' "
            "or 'bfloat16'."
        )
    tolerance = min(_ROUNDINGS.get(model.dtype, 1.0) * noise, _MOST_TOLERATED)
    same = [each[:_PREFIX] for each in logits[:2]]
    if not _distance(same[0], same[1]) <= tolerance:
        raise ConfigError(
            f"The base model {name!r} cannot be trained: later tokens change what it predicts at "
            "earlier ones; set model.name to a causal language model."
        )
    idle = frozenset(path for path in linears if _kind(path) not in used)
    return Stock(examples, logits, tolerance, idle)


def prove(base: Base, stock: Stock, required: bool) -> None:
    """Set ``base.rows`` to the fastest way that gives the stock model's results.

    Without packed rows a notice names the layer and the reason; if they are ``required``, the
    model is refused.

    Raises:
        ConfigError: no way gives the stock model's results, or not the required one.
    """
    ways = list(Rows) if base.kernel in attention.KERNELS else list(Rows)[1:]
    faults = []
    with torch.no_grad():
        for base.rows in ways:
            fault = _fault(base, stock)
            if fault is None:
                break
            faults.append(fault)
        else:
            raise ConfigError(
                f"The base model {base.name!r} cannot be trained: {faults[-1]}; set model.name to "
                "another model."
            )
    if base.rows in (Rows.PADDED, Rows.ALONE):
        if required:
            raise ConfigError(
                f"model.attention is {base.kernel!r}, which needs rows of several examples, but "
                f"in {base.name} {faults[0]}; set model.attention to 'auto', which then computes "
                "one example per row."
            )
        base.notices += (
            f"One example per row is computed, which is slower than packed rows: in {base.name} "
            f"{faults[0]}.",
        )


def _fault(base: Base, stock: Stock) -> str | None:
    """Why the base model does not give the stock model's results as it computes rows now."""
    packed = base.rows in (Rows.SHARED, Rows.PACKED)
    try:
        with _innermost(base.model) as at:
            row, edges = _row(base, stock)
            plain = _compared(base.logits(row))
            wrong = _differs(plain, row, stock)
            if packed and not wrong:
                wrong = _adapters_differ(base, stock, row, edges, plain)
    # Other people's models fail on packed rows with every kind of exception.
    except Exception as error:
        if not packed and not isinstance(error, (TypeError, ValueError, RuntimeError)):
            raise
        return f"the layer {at()} does not take " + (
            "several examples in one row" if packed else "padded rows"
        )
    if not wrong:
        return None
    return f"the layer {_culprit(base, stock)} computes an example differently " + (
        "beside others in one row" if packed else "than without adapters"
    )


def _row(base: Base, stock: Stock) -> tuple[Pack, list[int]]:
    """The examples in one row, with a loss everywhere, and the bounds of two adapters in it."""
    last = len(stock.examples) - 1
    parts = [
        pack(stock.examples, part, prompt_loss=True, share=base.shares_prefixes)
        for part in (range(last), [last])
    ]
    owners = torch.cat([parts[0].owners, parts[1].owners + last])
    edges = np.cumsum([0, *(part.tokens for part in parts)]).tolist()
    return replace(join(parts), owners=owners), edges


def _differs(logits: Tensor, row: Pack, stock: Stock) -> bool:
    """Whether an example's logits are not those of the stock model."""
    return any(
        not _distance(logits[row.owners == i], want[:-1]) <= stock.tolerance
        for i, want in enumerate(stock.logits)
    )


def _adapters_differ(
    base: Base, stock: Stock, row: Pack, edges: Sequence[int], plain: Tensor
) -> bool:
    """Whether two adapters in one row reach other tokens than their own.

    The first one is zero, so that its tokens have the ``plain`` logits of the model.
    """
    adapter = _adapter(base)
    zero = {path: Factors(0 * f.B, f.A) for path, f in adapter.items()}
    with base.attached(zero, adapter):
        both = _compared(base.logits(row, edges))
        with base.only(1):
            whole = _compared(base.logits(row))
    second = row.owners == len(stock.examples) - 1
    pairs = (both[~second], plain[~second]), (both[second], whole[second])
    return any(not _distance(got, want) <= stock.tolerance for got, want in pairs)


def _adapter(base: Base) -> dict[str, Factors]:
    """A random adapter of rank 1 whose updates are about as large as the layers' outputs."""
    draw = torch.Generator().manual_seed(0)
    return {
        path: Factors(
            0.02 * torch.randn(out, 1, generator=draw), torch.randn(1, in_, generator=draw)
        )
        for path, (out, in_) in base.shapes.items()
    }


def _examples(config: Any) -> TokenStore:
    """Random rows of tokens, the longest last; the first two share their prefix."""
    text = config.get_text_config()
    windows = [getattr(text, n, None) for n in ("sliding_window", "attention_chunk_size")]
    shown = [w + 8 for w in windows if isinstance(w, int) and w <= _LONGEST_WINDOW]
    most = getattr(text, "max_position_embeddings", None) or max(_LONG, *shown, 0)
    long = min(max(_LONG, *shown, 0), most)
    draw = rng(0, "proof")
    # The upper half of a vocabulary often has tokens for images and the like.
    low, high = text.vocab_size // 8, max(text.vocab_size // 2, 2)
    sizes = (_PREFIX, *_TAILS, long)
    prefix, first, second, last = (draw.integers(low, high, size) for size in sizes)
    rows = [np.concatenate([prefix, first]), np.concatenate([prefix, second]), last]
    return TokenStore(
        ids=np.concatenate(rows).astype(np.int32),
        offsets=np.cumsum([0, *map(len, rows)]),
        prompt_tokens=np.ones(len(rows), np.int32),
        cut=0,
    )


def _ids_on(device: torch.device) -> Callable[[TokenStore, int], Tensor]:
    """A function that gives an example's ids (1, tokens) on the device."""
    return lambda store, index: torch.from_numpy(store[index].ids.astype(np.int64))[None].to(device)


def _compared(logits: Tensor) -> Tensor:
    """Some columns of logits (tokens, vocabulary), in float32 on the CPU."""
    step = -(-logits.shape[-1] // _COLUMNS)
    return logits[:, ::step].float().cpu()


def _distance(got: Tensor, want: Tensor) -> float:
    """The root mean square of the error, relative to the spread of the logits of a token."""
    spread = want - want.mean(dim=-1, keepdim=True)
    return float((got - want).norm() / spread.norm())


def _kind(path: str) -> str:
    """A module's path without the numbers of layers and experts."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)


@contextmanager
def _rounded(model: nn.Module) -> Iterator[None]:
    """Round the output of every innermost layer up or down by chance, within the context."""
    draw = torch.Generator().manual_seed(0)

    def rounded(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        signs = torch.randint(0, 2, output.shape, generator=draw).mul_(2).sub_(1)
        return output * (1 + torch.finfo(output.dtype).eps * signs.to(output))

    layers = [module for module in model.modules() if not any(module.children())]
    hooks = [layer.register_forward_hook(rounded) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _innermost(model: nn.Module) -> Iterator[Callable[[], str]]:
    """A function that names the innermost layer that has begun and not ended in this context."""
    begun: list[str] = []
    hooks = []
    for path, module in model.named_modules():
        name = f"{path or 'the model'} ({type(module).__name__})"
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: begun.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: begun.pop() and None))
    try:
        yield lambda: begun[-1] if begun else "the model"
    finally:
        for hook in hooks:
            hook.remove()


def _culprit(base: Base, stock: Stock) -> str:
    """The name of the innermost layer that makes different outputs of equal inputs.

    The inputs and outputs are those of the longest example, alone and as rows are computed now.
    """
    index, rows = len(stock.examples) - 1, base.rows
    row, _ = _row(base, stock)
    place = int(row.loss_positions[row.owners == index][0])
    with _states(base.model) as packed:
        base.logits(row)
    base.rows = Rows.ALONE
    with _states(base.model) as alone:
        base.logits(pack(stock.examples, [index], prompt_loss=True))
    base.rows = rows
    tokens = len(stock.examples[index])

    def equal(got: Tensor, want: Tensor) -> bool:
        got = got[0, place : place + tokens]
        return got.shape == want[0].shape and bool(
            (got - want[0]).norm() <= stock.tolerance * want[0].norm()
        )

    for path, (given, made) in packed.items():
        if path in alone and equal(given, alone[path][0]) and not equal(made, alone[path][1]):
            return f"{path} ({type(base.model.get_submodule(path)).__name__})"
    return "the model"


@contextmanager
def _states(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """The first input and output (1, tokens, size) of each layer, in the order in which it ends."""
    states: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(path: str, given: Sequence[Any], output: Any) -> None:
        made = output if isinstance(output, tuple) else (output,)
        pair = [next((x for x in xs if _is_hidden(x)), None) for xs in (given, made)]
        if pair[0] is not None and pair[1] is not None:
            states.setdefault(path, (pair[0].float().cpu(), pair[1].float().cpu()))

    hooks = [
        module.register_forward_hook(
            lambda _m, args, options, output, path=path: keep(
                path, (*args, *options.values()), output
            ),
            with_kwargs=True,
        )
        for path, module in model.named_modules()
        if path
    ]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def _is_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3
