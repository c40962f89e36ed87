"""What Flower starts beside the SuperLink: the round loop, with the grid as its federation."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from flexlora import hosting
from flexlora.federations.flower.grid import Flower
from flexlora.federations.flower.pulling import ask_sooner

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that ``flexlora serve`` has laid out in the run's folder."""
    ask_sooner()
    folder = str(context.run_config.get("folder") or "")
    if not folder:
        raise ValueError(
            "The run config names no folder; start the app by `flexlora serve`, or give "
            "-c 'folder=\"/path/of/a/run\"'."
        )
    hosting.host(Path(folder), lambda roll, terms, quorum: Flower(grid, roll, terms, quorum))
