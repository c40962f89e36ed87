"""Which block of a transformer a module belongs to."""

from __future__ import annotations

from flexlora.errors import ConfigError


def kind(module: str) -> str:
    """Whether a module path is of the ``attention`` or of the ``feed_forward`` block.

    Raises:
        ConfigError: its path says neither.
    """
    parts = module.lower().split(".")[:-1]
    if any("attn" in part or "attention" in part for part in parts):
        return "attention"
    if any(part in ("mlp", "ffn", "feed_forward", "feedforward", "ff") for part in parts):
        return "feed_forward"
    raise ConfigError(
        f"Module {module!r} is neither in an attention nor in a feed-forward block, so a rank "
        "type with a rank for each does not say its rank. Give types with one rank, or set "
        "model.targets."
    )
