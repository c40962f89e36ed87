"""What Flower starts beside the SuperLink: the round loop, with the grid as its federation."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from flexlora.deployment.flower.grid import Flower
from flexlora.deployment.flower.pull_backoff import ask_sooner
from flexlora.deployment.server import server_run
from flexlora.errors import ProtocolError

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that ``flexlora serve`` has laid out in the run's folder."""
    ask_sooner()
    folder = str(context.run_config.get("folder") or "")
    if not folder:
        raise ProtocolError(
            "The run config names no folder; start the app by `flexlora serve`, or give "
            "-c 'folder=\"/path/of/a/run\"'."
        )
    server_run.host(Path(folder), lambda roll, terms, quorum: Flower(grid, roll, terms, quorum))
