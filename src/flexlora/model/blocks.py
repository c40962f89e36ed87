"""Which block of a transformer a module belongs to."""

from __future__ import annotations

from flexlora.errors import ConfigError


def kind(module: str) -> str:
    """The block of a module, from its path: ``attention`` or ``feed_forward``.

    Raises:
        ConfigError: the path contains the name of neither block.
    """
    parts = module.lower().split(".")[:-1]
    if any("attn" in part or "attention" in part for part in parts):
        return "attention"
    if any(part in ("mlp", "ffn", "feed_forward", "feedforward", "ff") for part in parts):
        return "feed_forward"
    raise ConfigError(
        f"Module {module!r} is neither in an attention nor in a feed-forward block, so its rank "
        "is not defined by a rank type with different ranks for the two. Use rank types with "
        "equal ranks, or leave the module out of model.targets."
    )
