"""The commands for real clients: keys, serve, join and demo-flower."""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from flexlora.cli.options import Changes, refuse_file
from flexlora.errors import ConfigError, FlexloraError

if TYPE_CHECKING:
    from flexlora.config import Experiment
    from flexlora.data.corpora.table import Columns
    from flexlora.deployment.node.capacity import Modules
    from flexlora.deployment.server.supervisor import Listening

PORT = 8090
MOST_DIFFERENCE = 1e-6
"""Of the demonstration's two adapters, relative, in their products."""


def make_keys(
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    host: Annotated[
        list[str] | None,
        typer.Option(help="A name or address of the server; makes its certificates."),
    ] = None,
    node: Annotated[
        list[str] | None,
        typer.Option(help="A client's name; makes its key, with --host in DIR/NAME."),
    ] = None,
) -> None:
    """Make the server's certificates, and the keys by which it knows its clients."""
    from flexlora.deployment import keys
    from flexlora.deployment.server import supervisor as serving

    if not host and not node:
        raise ConfigError(
            "Say whose keys to make: --host for the server's certificates, --node for a client."
        )
    if host:
        made = keys.make_server(folder, host)
        print(f"the server's: {made.certificate}, {made.key}; keep {folder} to yourself")
        (folder / serving.NODES).mkdir(mode=0o700, exist_ok=True)
    for name in node or ():
        if not host and not (folder / serving.NODES).is_dir():
            public = keys.make_node(folder, name)
            print(f"send {public} to the server's owner; put the server's ca.crt into {folder}")
            continue
        public = keys.make_node(folder / name, name)
        shutil.copy(folder / "ca.crt", folder / name)
        shutil.copy(public, folder / serving.NODES)
        print(f"give {folder / name} to the owner of {name!r}, over a channel that you trust")


def serve(
    path: Annotated[Path | None, typer.Argument(metavar="CONFIG.toml")] = None,
    changes: Changes = None,
    folder: Annotated[Path | None, typer.Option(help="Where the run is kept.")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Go on with a run that was stopped.")
    ] = None,
    clients: Annotated[
        int | None,
        typer.Option(min=1, help="How many must have joined before the first round."),
    ] = None,
    listen: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help=f"Where clients reach this server; 0.0.0.0:{PORT}, or with --insecure 127.0.0.1.",
        ),
    ] = "",
    key_folder: Annotated[
        Path | None, typer.Option("--keys", metavar="DIR", help="Made by: flexlora keys.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS, no keys: tests on 127.0.0.1 alone.")
    ] = False,
    status: Annotated[
        str, typer.Option(metavar="HOST:PORT|off", help="A read-only page of the run.")
    ] = "127.0.0.1:0",
) -> None:
    """Run a federation whose clients join from other machines."""
    from flexlora.deployment.server import server_run
    from flexlora.federation import compose

    listening = _listening(listen, key_folder, insecure)
    if resume is not None:
        if path is not None or changes or folder is not None or clients is not None:
            raise ConfigError("--resume takes the folder of a run, --listen and --keys only.")
        settings, target = _stored(resume), resume
        _same_keys(resume, insecure)
    else:
        if path is None:
            raise ConfigError("Give a CONFIG.toml, or --resume DIR.")
        settings = compose.load(path, changes or ())
        target = folder or Path(settings.run.folder or f"runs/{path.stem}")
        refuse_file(target, "--folder")
        _refuse_existing(target)
        how = settings.federation
        first = clients if clients is not None else how.cohort or how.quorum
        if key_folder is not None:
            from flexlora.deployment.keys import ServerKeys

            ServerKeys.of(key_folder)  # before anything is written
        server_run.lay_out(target, settings, server_run.Plan.new(first, bound=not insecure))
    _serve(settings, target, listening, status)


def join(
    server: Annotated[str, typer.Argument(metavar="HOST:PORT")],
    data: Annotated[Path, typer.Option(help="Your rows: .parquet, .jsonl, .json or .csv.")],
    rank: Annotated[
        str, typer.Option(metavar="auto|N", help="At most; auto measures this machine.")
    ] = "auto",
    modules: Annotated[
        str, typer.Option(metavar="all|attention|feed_forward", help="What this client trains.")
    ] = "all",
    key_folder: Annotated[
        Path | None,
        typer.Option("--keys", metavar="DIR", help="Your NAME.key and the server's ca.crt."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="This client's name; the key's if not given.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS, no keys: a server on 127.0.0.1 alone.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Where you keep the base model, if not under its name.")
    ] = None,
    device: Annotated[str, typer.Option(help="As PyTorch names it.")] = "cpu",
    memory: Annotated[
        float | None, typer.Option(metavar="GIB", help="For the adapter in training, at most.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="For one turn, at most; limits an automatic rank.")
    ] = None,
    columns: Annotated[
        str | None, typer.Option(metavar="A=B,...", help="E.g. input=text,output=answer.")
    ] = None,
    rows_of: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of a file of several clients, whose rows.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(metavar="DIR", help="What the client keeps to itself.")
    ] = None,
) -> None:
    """Take part in a federation with your own rows, which stay here."""
    from flexlora.deployment import keys
    from flexlora.deployment.node import join as joining
    from flexlora.deployment.node.capacity import Capacity
    from flexlora.deployment.node.node import NodeConfig

    if (key_folder is None) is not insecure:
        raise ConfigError("Give --keys DIR, or, for a test on this machine, --insecure and --name.")
    found = None if key_folder is None else keys.NodeKey.of(key_folder, name)
    known = name if found is None else found.name
    if known is None:
        raise ConfigError("Without keys this client needs a --name.")
    most = None if memory is None else _bytes(memory)
    owner = NodeConfig(
        name=known,
        data=data,
        state=state or Path(f"flexlora-{known}"),
        budget=Capacity(_rank(rank), most, seconds, _modules(modules)),
        columns=_columns(columns),
        rows_of=rows_of,
        model=model,
        device=device,
    )
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        joining.join(server, owner, found, _say)
    except KeyboardInterrupt:
        print("left the federation", file=sys.stderr)


def show_demo(
    folder: Annotated[Path | None, typer.Option(help="Where the two runs are kept.")] = None,
) -> None:
    """Three real clients of ranks 4, 16 and 64 as processes with TLS, on a small real model."""
    from flexlora.deployment import demo

    target = folder or Path("runs") / f"flower-{datetime.now():%Y%m%d-%H%M%S}"
    if target.is_dir():
        raise ConfigError(f"{target} exists already; give --folder the name of a new folder.")
    refuse_file(target, "--folder")
    found = demo.show(target)
    for name, seconds in zip(("real", "simulated"), found.rounds_seconds, strict=True):
        print(f"{name} rounds, seconds: {', '.join(f'{s:.1f}' for s in seconds)}")
    print(f"adapter: {found.adapter}")
    print(f"difference of the products from the simulation's: {found.difference:.2g}")
    if found.difference > MOST_DIFFERENCE:
        raise ConfigError(f"The two adapters differ by more than {MOST_DIFFERENCE}.")


def _serve(settings: Experiment, folder: Path, listening: Listening, status: str) -> None:
    """Serve and watch; say how to go on if it is stopped."""
    from rich.console import Console

    from flexlora.cli import progress
    from flexlora.deployment.server import supervisor as serving
    from flexlora.reporting import page, tracker, trackers

    console = Console()
    followers = trackers.of(settings.run.trackers, folder)
    signal.signal(signal.SIGTERM, _interrupt)
    how = settings.federation
    turns = how.rounds * (how.cohort or how.quorum)
    where = f"{listening.host}:{listening.port}"
    with _page(folder, status) as url:
        say = f"waiting for clients on {where}; journal {folder}; status page {url}"
        console.print(say, highlight=False, soft_wrap=True)
        try:
            run = tracker.following(serving.serve(folder, listening), followers, folder)
            with closing(run) as events:
                shown = progress.show(events, console, turns)
        except KeyboardInterrupt:
            resume = f"flexlora serve --resume {folder}, and --listen and --keys as before"
            print(f"\nstopped; go on with: {resume}", file=sys.stderr)
            raise SystemExit(130) from None
    console.print(f"adapter: {shown[-1]['adapter']}", soft_wrap=True)
    console.print(f"report:  {page.write(folder)}", soft_wrap=True)


@contextmanager
def _page(folder: Path, status: str) -> Iterator[str]:
    """The status page while the run goes on; its address, or why there is none."""
    if status == "off":
        yield "off"
        return
    from flexlora.reporting import watch

    try:
        start = watch.start
    except FlexloraError as error:
        yield f"not served: {error}"
        return
    with start(folder, *watch.address(status)) as served:
        yield served.url


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def _listening(listen: str, folder: Path | None, insecure: bool) -> Listening:
    from flexlora.deployment.server.supervisor import Listening

    listen = listen or f"{'127.0.0.1' if insecure else '0.0.0.0'}:{PORT}"
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"--listen takes HOST:PORT such as 0.0.0.0:{PORT}, not {listen!r}.")
    if (folder is None) is not insecure:
        raise ConfigError(
            "Give --keys DIR (made by: flexlora keys DIR --host NAME), or, for a test on this "
            "machine, --insecure."
        )
    return Listening(host.strip("[]"), int(port), folder)


def _bytes(gibibytes: float) -> int:
    if not 0 < gibibytes < math.inf:
        raise ConfigError(f"--memory takes a number of GiB above 0, not {gibibytes}.")
    return int(gibibytes * 2**30)


def _same_keys(folder: Path, insecure: bool) -> None:
    """A run goes on with keys if it began with them: names were bound to them, or were not."""
    from flexlora.deployment.server import server_run

    plan = json.loads((folder / server_run.PLAN).read_text(encoding="utf-8"))
    if plan["bound"] is insecure:
        raise ConfigError(
            f"The run in {folder} was begun {'with keys' if insecure else 'with --insecure'} and "
            "goes on in the same way, as names of clients were bound to keys, or were not."
        )


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
    """The columns that a text ``corpus name=file's name,...`` gives; others are not there."""
    from flexlora.data.corpora.table import Columns

    if text is None:
        return None
    known = [field.name for field in fields(Columns)]
    given: dict[str, str | None] = dict.fromkeys(known)
    for part in text.split(","):
        name, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or name not in known:
            raise ConfigError(
                f"--columns takes {'=..., '.join(known)}=..., separated by commas, not {part!r}."
            )
        given[name] = column
    return Columns(**given)


def _stored(folder: Path) -> Experiment:
    """The experiment that a served run was laid out with."""
    from flexlora.deployment.server import server_run
    from flexlora.federation import compose

    file = folder / server_run.CONFIG
    if not (folder / server_run.PLAN).exists():
        raise ConfigError(
            f"There is no served run to resume in {folder}: it has no {server_run.PLAN}."
        )
    return compose.parse(json.loads(file.read_text(encoding="utf-8")), str(file))


def _refuse_existing(folder: Path) -> None:
    from flexlora.deployment.server import server_run
    from flexlora.federation import checkpoint

    if (folder / checkpoint.POINTER).exists() or (folder / server_run.PLAN).exists():
        raise ConfigError(
            f"{folder} already holds a run; go on with: flexlora serve --resume {folder}, or give "
            "another --folder."
        )
