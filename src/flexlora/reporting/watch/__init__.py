"""The live status of a run: a page, its JSON, and Prometheus metrics.

Everything is read from the journal in the run's folder, each time only what is new. So the page
can be served by the process that runs the federation, by another one, or afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flexlora.errors import ConfigError
from flexlora.reporting.watch.run_state import RunState
from flexlora.reporting.watch.time_left import Estimate, TimeLeft

if TYPE_CHECKING:
    from flexlora.reporting.watch.server import Served, address, app, serve, start

__all__ = ["Estimate", "RunState", "Served", "TimeLeft", "address", "app", "serve", "start"]


def __getattr__(name: str) -> Any:
    """The server of the page, imported on first use: FastAPI is an optional package."""
    if name not in __all__:
        raise AttributeError(f"module 'flexlora.reporting.watch' has no attribute {name!r}")
    try:
        from flexlora.reporting.watch import server
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client"):
            raise
        raise ConfigError(
            f"The status page needs the package {error.name!r}; install it with: "
            "pip install 'flexlora[watch]'."
        ) from error
    return getattr(server, name)
