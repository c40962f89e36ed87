"""Which clients take part in a round."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flexlora.errors import ConfigError


def cohort(clients: Sequence[str], size: int, draw: np.random.Generator) -> list[str]:
    """``size`` clients, uniformly without replacement, in the order of ``clients``.

    The paper samples 5 % of them (arXiv 2402.11505, section 4.1). All of them if there are
    no more than ``size``.

    Raises:
        ConfigError: no client would take part.
    """
    if size < 1 or not clients:
        raise ConfigError(f"A round needs at least one client, not {size} of {len(clients)}.")
    if size >= len(clients):
        return list(clients)
    chosen = draw.choice(len(clients), size, replace=False)
    return [clients[i] for i in sorted(chosen)]
