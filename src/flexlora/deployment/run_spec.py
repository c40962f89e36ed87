"""The specification of a run: all that a client's machine needs to take part."""

from __future__ import annotations

from collections.abc import Mapping
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
from flexlora.training import Training

ATTENTIONS = ("auto", attention.NAME, "sdpa", "eager", "flash_attention_2")
"""The attention kernels that a server may name; transformers would download others."""


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
        ProtocolError: it is ill-formed, or names something that this version does not have.
    """
    try:
        spec = RunSpec.model_validate_json(text, strict=True)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors()[:5]
        )
        raise ProtocolError(
            f"The server's run specification cannot be read ({faults}). Install the same version "
            "of flexlora on both sides."
        ) from error
    if spec.model.attention not in ATTENTIONS:
        raise ProtocolError(
            f"The server names the attention kernel {spec.model.attention!r}, which transformers "
            f"might download; this node accepts {', '.join(ATTENTIONS)}. Change model.attention in "
            "the server's config."
        )
    spec.composed()
    return spec
