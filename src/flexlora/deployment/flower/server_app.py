"""The app that Flower starts beside the SuperLink: the round loop over Flower's grid."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from flexlora.deployment.flower.grid import FlowerTransport
from flexlora.deployment.server import server_run
from flexlora.errors import ProtocolError

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that ``flexlora serve`` has prepared in the run's folder."""
    folder = str(context.run_config.get("folder") or "")
    if not folder:
        raise ProtocolError(
            "The run config has no folder; start the app with `flexlora serve`, or give "
            "-c 'folder=\"/path/of/a/run\"'."
        )
    server_run.run_server(
        Path(folder), lambda registry, spec, quorum: FlowerTransport(grid, registry, spec, quorum)
    )
