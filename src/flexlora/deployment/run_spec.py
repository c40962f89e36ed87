"""The terms of a federation: all that a data owner's machine must know to take part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flexlora.config import Experiment
from flexlora.errors import ProtocolError
from flexlora.federation import compose, prepared
from flexlora.method import Method
from flexlora.model import Source
from flexlora.model.layers import attention
from flexlora.training import Training

ATTENTIONS = (attention.NAME, "sdpa", "eager", "flash_attention_2")
"""The kernels that a server may ask for; transformers would fetch others from the hub."""


class RunSpec(BaseModel):
    """What the server tells every node once, as JSON; no path and no address is in it.

    ``run`` names the run. The method and the regulariser are those of the server, so that
    both sides compute the same.
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

    @property
    def dtype(self) -> torch.dtype:
        """The kind of numbers that adapters travel in."""
        return prepared.dtype(self.wire_dtype)

    def composed(self) -> Method:
        """The method, within the server optimiser and the regulariser."""
        return compose.composed(
            self.method, self.server_optimizer, self.regularizer, self.training, files=False
        )


def of(settings: Experiment, run: str, limit: Mapping[str, int]) -> RunSpec:
    """The terms of an experiment; ``limit`` has the largest rank by kind of module."""
    return RunSpec(
        run=run,
        seed=settings.seed,
        model=settings.model,
        prompt=settings.data.prompt,
        max_tokens=settings.data.max_tokens,
        method=settings.method,
        server_optimizer=settings.server_optimizer,
        regularizer=settings.regularizer,
        training=settings.training,
        wire_dtype=settings.federation.wire_dtype,
        attention=limit["attention"],
        feed_forward=limit["feed_forward"],
    )


def parse(text: str) -> RunSpec:
    """Terms from a server's JSON.

    Raises:
        ProtocolError: they are ill-formed, or name what this version does not have.
    """
    try:
        found = RunSpec.model_validate_json(text, strict=True)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors()[:5]
        )
        raise ProtocolError(
            f"The server's terms cannot be read ({faults}). Run the same version of flexlora on "
            "both sides."
        ) from error
    if found.model.attention not in ATTENTIONS:
        raise ProtocolError(
            f"The server names the attention {found.model.attention!r}, which may be code from the "
            f"network; this node takes one of {', '.join(ATTENTIONS)}."
        )
    found.composed()
    return found
