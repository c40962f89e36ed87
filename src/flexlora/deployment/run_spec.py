"""The specification of a run: all that a client's machine needs to take part."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flexlora.config import Experiment
from flexlora.data import is_template
from flexlora.errors import ConfigError, ProtocolError
from flexlora.federation import compose, prepared
from flexlora.method import Method
from flexlora.model import Source
from flexlora.model.layers import attention
from flexlora.storage.untrusted import one_line, short
from flexlora.training import Training

ATTENTIONS = ("auto", attention.NAME, "sdpa", "eager", "flash_attention_2")
"""The attention kernels that a server may name; transformers would download others."""


LONGEST = 2**16
"""Characters of a specification as JSON."""

MOST: Mapping[str, float] = {
    "max_tokens": 2**17,
    "attention": 2**14,
    "feed_forward": 2**14,
    "seed": 2**63 - 1,
    "training.epochs": 10**4,
    "training.max_steps": 10**7,
    "training.batch_examples": 2**14,
    "training.pack_tokens": 2**18,
    "training.warmup_steps": 10**7,
    "training.recompute_above": 2**31,
    "training.learning_rate": 1e3,
    "training.round_decay": 1e3,
    "training.weight_decay": 1e3,
    "training.momentum": 1,
    "training.clip_norm": 1e12,
    "training.alpha": 1e6,
}
"""The largest numbers of a specification that a node accepts, beyond all that is of use."""

_MOST_OPTION = 10**4
"""The largest number in an option of a method, an optimiser or a regulariser."""
_MOST_TARGETS, _LONGEST_TEXT = 500, 200


class RunSpec(BaseModel):
    """What the server sends to every node, as JSON; it has no path and no address.

    ``run`` is the run's random id. ``attention`` and ``feed_forward`` are the largest ranks. The
    method and the regulariser are the server's, so that both sides compute the same. Clients hold
    out ``holdout_share`` of their rows, unless their owners choose another share.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    run: str = Field(pattern=r"^[0-9a-f]{16,64}$")
    seed: int = Field(ge=0)
    model: Source
    prompt: Literal["alpaca", "chat", "plain"]
    max_tokens: int = Field(ge=8)
    method: dict[str, Any]
    server_optimizer: dict[str, Any] | None = None
    regularizer: dict[str, Any] | None = None
    training: Training
    wire_dtype: Literal["float32", "bfloat16", "float16"]
    attention: int = Field(ge=0)
    feed_forward: int = Field(ge=0)
    holdout_share: float = Field(0.0, ge=0, lt=1)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which adapters are transmitted."""
        return prepared.dtype(self.wire_dtype)

    def composed(self) -> Method:
        """The method, wrapped by the server optimiser and the regulariser."""
        return compose.composed(
            self.method, self.server_optimizer, self.regularizer, self.training, files=False
        )


def of(settings: Experiment, run: str, limit: Mapping[str, int]) -> RunSpec:
    """The specification of an experiment; ``limit`` has the largest rank by type of module.

    Raises:
        ConfigError: the prompt is a template, which is a program and not sent to clients.
    """
    prompt = settings.data.prompt
    if is_template(prompt):
        raise ConfigError(
            "data.prompt is a template of your own, which is not sent to real clients, as it would "
            "be a program that they have to run; set data.prompt to 'alpaca', 'chat' or 'plain'."
        )
    return RunSpec(
        run=run,
        seed=settings.seed,
        model=settings.model,
        prompt=cast(Literal["alpaca", "chat", "plain"], prompt),
        max_tokens=settings.data.max_tokens,
        method=settings.method,
        server_optimizer=settings.server_optimizer,
        regularizer=settings.regularizer,
        training=settings.training,
        wire_dtype=settings.federation.wire_dtype,
        attention=limit["attention"],
        feed_forward=limit["feed_forward"],
        holdout_share=settings.evaluation.client_share,
    )


def parse(text: str) -> RunSpec:
    """The specification in a server's JSON.

    Raises:
        ProtocolError: it is ill-formed, names something that this version does not have or that
            would be code of others, or has numbers beyond all use.
    """
    if len(text) > LONGEST:
        raise ProtocolError(
            f"The server's run specification has {len(text)} characters; a node reads at most "
            f"{LONGEST}."
        )
    try:
        spec = RunSpec.model_validate_json(text, strict=True)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors()[:5]
        )
        raise ProtocolError(
            f"The server's run specification cannot be read ({one_line(faults, 300)}). Install "
            "the same version of flexlora on both sides."
        ) from error
    _check_numbers(spec)
    if spec.model.attention not in ATTENTIONS:
        raise ProtocolError(
            f"The server names the attention kernel {short(spec.model.attention)}, which "
            f"transformers might download; this node accepts {', '.join(ATTENTIONS)}. Change "
            "model.attention in the server's config."
        )
    if spec.model.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        raise ProtocolError(
            "The server names the attention kernel 'flash_attention_2', whose package flash_attn "
            "is not installed here, and transformers might download another in its place; install "
            "it, or change model.attention in the server's config to 'auto'."
        )
    spec.composed()
    return spec


def _check_numbers(spec: RunSpec) -> None:
    """Refuse numbers, texts and tables that no run needs, and that could cost anything.

    Raises:
        ProtocolError: with the place and the value.
    """
    for place, most in MOST.items():
        value: Any = spec
        for name in place.split("."):
            value = getattr(value, name)
        if value is not None and value > most:
            raise ProtocolError(_unusable(place, value, f"at most {most:g}"))
    targets = spec.model.targets or ()
    if len(targets) > _MOST_TARGETS:
        raise ProtocolError(_unusable("model.targets", len(targets), f"at most {_MOST_TARGETS}"))
    for place, text in [("model.name", spec.model.name), *(("model.targets", t) for t in targets)]:
        if len(text) > _LONGEST_TEXT or not text.isprintable():
            raise ProtocolError(_unusable(place, text, f"{_LONGEST_TEXT} printable characters"))
    for section in ("method", "server_optimizer", "regularizer"):
        options = getattr(spec, section) or {}
        if not isinstance(options.get("name", ""), str):
            raise ProtocolError(_unusable(f"{section}.name", options["name"], "a name"))
        for name, value in options.items():
            _check_option(f"{section}.{name}", value)


def _check_option(place: str, value: Any) -> None:
    """An option of a plug-in: a short text, a number within bounds, a few of them, or nothing."""
    if isinstance(value, list) and len(value) <= _MOST_TARGETS:
        for each in value:
            _check_option(place, each)
        return
    fits = value is None or isinstance(value, bool)
    if isinstance(value, str):
        fits = len(value) <= _LONGEST_TEXT and value.isprintable()
    elif isinstance(value, int | float) and not fits:
        fits = abs(value) <= _MOST_OPTION  # NaN is not
    if not fits:
        what = f"texts of {_LONGEST_TEXT} characters and numbers up to {_MOST_OPTION}"
        raise ProtocolError(_unusable(place, value, what))


def _unusable(place: str, value: object, most: str) -> str:
    return (
        f"The server's run specification has {short(place)} = {short(value)}; a node takes {most}."
    )
