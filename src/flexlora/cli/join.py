"""The command `flexlora join`: a client of a federation, with its own rows."""

from __future__ import annotations

import math
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from flexlora.cli.options import alone_in
from flexlora.cli.outputs import refuse_parts_of_runs
from flexlora.errors import ConfigError, ProtocolError
from flexlora.storage import close_to_others, remove_drafts

if TYPE_CHECKING:
    from flexlora.data import Columns
    from flexlora.deployment.keys import NodeKey
    from flexlora.deployment.node.capacity import Modules
    from flexlora.deployment.node.node import NodeConfig


Server = Annotated[
    str, typer.Argument(metavar="HOST:PORT", help="Address of the server, without https://.")
]
Data = Annotated[
    Path, typer.Option(help="Your rows: Parquet, JSON, JSON lines, CSV, or a folder of them.")
]
Rank = Annotated[
    str, typer.Option(metavar="auto|N", help="LoRA rank, or auto to benchmark this machine.")
]
ModuleTypes = Annotated[
    str,
    typer.Option(metavar="all|attention|feed_forward", help="Modules that this client trains."),
]
KeyFolder = Annotated[
    Path | None,
    typer.Option("--keys", metavar="DIR", help="Folder of your NAME.key and the server's ca.crt."),
]
Name = Annotated[str | None, typer.Option(help="Name of this client; by default that of its key.")]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="No TLS and no keys; only to a server on 127.0.0.1.")
]
Model = Annotated[
    str | None,
    typer.Option(help="Path or hub name of the base model; by default the server's hub name."),
]
Device = Annotated[str, typer.Option(help="PyTorch device, e.g. cpu, cuda:0.")]
Memory = Annotated[
    float | None,
    typer.Option(
        metavar="GIB",
        help="Memory limit for the adapter, and for what the server sends at once (GiB).",
    ),
]
Disk = Annotated[
    float | None,
    typer.Option(
        metavar="GIB",
        help="Disk limit for what a server's updates keep here (GiB); by default half of the free "
        "space.",
    ),
]
Seconds = Annotated[
    float | None,
    typer.Option(
        help="Time limit per round (s), at which training is ended; caps the automatic rank. By "
        "default a day."
    ),
]
ColumnNames = Annotated[
    str | None,
    typer.Option(metavar="A=B,...", help="Names of your columns, e.g. output=answer."),
]
RowsOf = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Client name to select, if the file holds several clients."),
]
State = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Directory for local client state; by default flexlora-NAME."),
]
Holdout = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Share of your rows that never train and are evaluated on; 0 for none; by default "
        "the server's.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder for the finished adapter; default: STATE/adapter."),
]
OwnRank = Annotated[
    bool, typer.Option("--own-rank", help="Truncate the finished adapter to your own rank.")
]


def join(
    server: Server,
    data: Data,
    rank: Rank = "auto",
    modules: ModuleTypes = "all",
    key_folder: KeyFolder = None,
    name: Name = None,
    insecure: Insecure = False,
    model: Model = None,
    device: Device = "cpu",
    memory: Memory = None,
    disk: Disk = None,
    seconds: Seconds = None,
    columns: ColumnNames = None,
    rows_of: RowsOf = None,
    state: State = None,
    holdout: Holdout = None,
    out: Out = None,
    own_rank: OwnRank = False,
) -> None:
    """Take part in a federation with your own rows, which stay on this machine.

    At the end the finished adapter is on this machine too, for PEFT.
    """
    from flexlora.deployment import keys

    if (key_folder is None) is not insecure:
        raise ConfigError("Give --keys DIR, or, for a test on this machine, --insecure and --name.")
    key = None if key_folder is None else keys.NodeKey.of(key_folder, name)
    client = name if key is None else key.name
    if client is None:
        raise ConfigError("Without keys this client needs a --name.")
    for folder, option in ((state, "--state"), (out, "--out")):
        if folder is not None:
            refuse_parts_of_runs(folder, option)
    memory_bytes, disk_bytes = _bytes("--memory", memory), _bytes("--disk", disk)
    most_rank, share = _rank(rank), _holdout(holdout)
    _check_server(server, key)
    from flexlora.deployment.node.capacity import Capacity
    from flexlora.deployment.node.limits import Limits
    from flexlora.deployment.node.node import NodeConfig

    folder = state or Path(f"flexlora-{client}")
    config = NodeConfig(
        name=client,
        data=data,
        state=folder,
        capacity=Capacity(most_rank, memory_bytes, seconds, _modules(modules)),
        limits=Limits.of_machine(memory_bytes, disk_bytes, seconds, folder),
        columns=_columns(columns),
        rows_of=rows_of,
        model=model,
        device=device,
        holdout=share,
        out=out,
        own_rank=own_rank,
    )
    _take_part(server, config, key)


def _take_part(server: str, config: NodeConfig, key: NodeKey | None) -> None:
    """Join, alone in the folder of state, until the federation is over or this is interrupted."""
    from flexlora.deployment.node import join as joining

    signal.signal(signal.SIGTERM, interrupt)
    refusal = (
        f"Another process has joined with the state in {config.state}; let it end, or give another "
        "--state."
    )
    try:
        with alone_in(config.state, "--state", refusal=refusal):
            close_to_others(config.state)
            for place in (config.state, *config.state.iterdir()):
                remove_drafts(place)
            joining.join(server, config, key, _print_line)
    except KeyboardInterrupt:
        print("left the federation", file=sys.stderr)


def _check_server(server: str, key: NodeKey | None) -> None:
    """Name a fault of the connection before PyTorch is loaded, which takes seconds.

    Raises:
        ConfigError: the address is not HOST:PORT.
        ProtocolError: the server cannot be the right one.
    """
    from flexlora.deployment.node import preflight

    preflight.check_address(server, insecure=key is None)
    greeting = preflight.greet(server, key)
    if isinstance(greeting, preflight.Fault):
        if greeting.is_final:
            raise ProtocolError(greeting.sentence)
        _print_line(greeting.sentence)


def interrupt(*_: object) -> None:
    """Let SIGTERM end a command as Ctrl-C does."""
    raise KeyboardInterrupt


def _print_line(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def _bytes(option: str, gibibytes: float | None) -> int | None:
    if gibibytes is None:
        return None
    if not 0 < gibibytes < math.inf:
        raise ConfigError(f"{option} takes a number of GiB above 0, not {gibibytes}.")
    return max(int(gibibytes * 2**30), 1)


def _holdout(share: float | None) -> float | None:
    if share is not None and not 0 <= share < 1:
        raise ConfigError(f"--holdout takes a share from 0 to below 1, such as 0.2, not {share}.")
    return share


def _rank(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--rank takes auto or a number above 0, not {text!r}.")
    return int(text)


def _modules(text: str) -> Modules:
    from flexlora.deployment.node.capacity import Modules

    if text not in get_args(Modules):
        raise ConfigError(f"--modules takes {', '.join(get_args(Modules))}, not {text!r}.")
    return cast("Modules", text)


def _columns(text: str | None) -> Columns | None:
    """The columns in a text ``corpus name=file's name,...``."""
    if text is None:
        return None
    from flexlora.data import Columns

    names = [field.name for field in fields(Columns)]
    columns: dict[str, str | None] = dict.fromkeys(names)
    for part in text.split(","):
        name, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or name not in names:
            raise ConfigError(
                f"--columns takes {'=..., '.join(names)}=..., separated by commas, not {part!r}."
            )
        columns[name] = column
    return Columns(**columns)
