"""Rounds of Flower's simulation: FedAvg over the factors, clients in Ray's processes."""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import client
import recipe
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from safetensors.torch import save_file

TOTALS = ("loss_total", "loss_tokens", "tokens")


class Marks:
    """The time at which each round ended, and the totals of its clients."""

    def __init__(self, clients: int) -> None:
        self.clients = clients
        self.ends: list[float] = []
        self.totals = dict.fromkeys(TOTALS, 0.0)

    def __call__(self, replies: list[RecordDict], weighted_by: str) -> MetricRecord:
        """Add up the metrics of a round; Flower calls it after averaging the arrays.

        Raises:
            RuntimeError: a client failed; Flower would continue without it.
        """
        if len(replies) != self.clients:
            raise RuntimeError(f"{len(replies)} of {self.clients} clients replied.")
        for name in TOTALS:
            values = [reply.metric_records["metrics"][name] for reply in replies]
            self.totals[name] += sum(float(str(value)) for value in values)
        self.ends.append(time.perf_counter())
        return MetricRecord({"clients": len(replies)})


def warm(grid: Grid, clients: int, how: ConfigRecord) -> None:
    """Wait for the nodes and let each process import and load the model that it keeps.

    Raises:
        RuntimeError: a client failed.
    """
    while len(nodes := list(grid.get_node_ids())) < clients:
        time.sleep(0.1)
    content = RecordDict({"config": how})
    questions = [Message(content, node, MessageType.QUERY, ttl=600.0) for node in nodes]
    replies = list(grid.send_and_receive(questions, timeout=600.0))
    if failed := [reply.error.reason for reply in replies if reply.has_error()]:
        raise RuntimeError(f"{len(failed)} clients failed to start: {failed[0]}")


def server(work: recipe.Work, options: argparse.Namespace) -> ServerApp:
    """The ServerApp, which writes the result when its rounds are over."""
    app = ServerApp()
    how = ConfigRecord(
        {
            "work": str(work.folder),
            "keep": options.keep,
            "threads": options.threads // options.workers,
        }
    )

    @app.main()  # type: ignore[untyped-decorator, unused-ignore]
    def main(grid: Grid, context: Context) -> None:
        warm(grid, work.clients, how)
        marks = Marks(work.clients)
        strategy = FedAvg(
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=work.clients,
            min_available_nodes=work.clients,
            train_metrics_aggr_fn=marks,
        )
        started = time.perf_counter()
        done = strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(work.start()),
            num_rounds=work.rounds,
            train_config=how,
        )
        save_file(done.arrays.to_torch_state_dict(), options.out / "adapter.safetensors")
        starts = [started, *marks.ends[:-1]]
        seconds = [end - start for start, end in zip(starts, marks.ends, strict=True)]
        recipe.finish(options.out, seconds, marks.totals)

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--keep", action="store_true", help="keep the model in each process")
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    work = recipe.read(options.work)
    run_simulation(
        server_app=server(work, options),
        client_app=client.app,
        num_supernodes=work.clients,
        backend_config={
            "init_args": {"num_cpus": options.threads, "include_dashboard": False},
            "client_resources": {
                "num_cpus": options.threads // options.workers,
                "num_gpus": 0.0,
            },
        },
    )


if __name__ == "__main__":
    main()
