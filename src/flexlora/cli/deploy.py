"""The commands of a federation's server: keys, serve, and the demonstration of real clients.

The commands import what they need: Flower is optional, and PyTorch takes seconds to import.
"""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexlora import addresses
from flexlora.cli.interrupts import STOPPED
from flexlora.cli.join import interrupt
from flexlora.cli.join import join as join
from flexlora.cli.options import Changes, alone_in, refuse_file
from flexlora.cli.outputs import refuse_foreign_config, refuse_parts_of_runs
from flexlora.errors import ConfigError, FlexloraError
from flexlora.journal import counted
from flexlora.storage import locked

if TYPE_CHECKING:
    from flexlora.config import Experiment
    from flexlora.deployment.certificates import Renewed
    from flexlora.deployment.server.supervisor import Listening
    from flexlora.journal import Event

Stay = Annotated[
    float,
    typer.Option(
        metavar="MINUTES",
        min=0,
        help="How long to wait after the last round for clients without the adapter.",
    ),
]

_LOCK = "command.lock"
"""Who has it serves the run, from the first look at its folder on."""
PORT = 8090
PAGE_PORT = 8091


def make_keys(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the keys.")],
    host: Annotated[
        list[str] | None,
        typer.Option(
            help="Host name or address of the server; makes its certificate. May be repeated."
        ),
    ] = None,
    node: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of a client; makes its key pair, in DIR/NAME if DIR has the server's keys. "
            "May be repeated."
        ),
    ] = None,
    add: Annotated[
        list[Path] | None,
        typer.Option(metavar="NAME.pub", help="Admit a client by its public key. May be repeated."),
    ] = None,
    renew: Annotated[
        bool,
        typer.Option(
            "--renew",
            help="Renew the server's certificate, also during a run; --host adds names.",
        ),
    ] = False,
) -> None:
    """Create the server's certificate and the key pairs of clients, and admit clients.

    A client makes its own key pair: flexlora keys my-keys --node NAME. It sends NAME.pub to the
    server's owner, who admits it: flexlora keys server-keys --add NAME.pub.
    """
    from flexlora.deployment import certificates, keys

    if not host and not node and not add and not renew:
        raise ConfigError(
            "Nothing to do: give --host to make the server's certificate, --renew to renew it, "
            "--node to make a client's key pair, or --add to admit a client."
        )
    refuse_parts_of_runs(folder, "DIR")
    if renew:
        _print_renewed(certificates.renew_server(folder, host or ()))
    elif host:
        server = certificates.make_server(folder, host)
        print(f"wrote {server.certificate} and {server.key}; keep {folder} private")
        print(f"send {folder / 'ca.crt'} to the clients' owners")
        (folder / keys.NODES).mkdir(mode=0o700, exist_ok=True)
    for name in node or ():
        if not host and not (folder / keys.NODES).is_dir():
            _print_own_key(keys.make_node(folder, name), folder)
            continue
        public = keys.make_node(folder / name, name)
        shutil.copy(folder / "ca.crt", folder / name)
        shutil.copy(public, folder / keys.NODES)
        whose = f"send {folder / name} to client {name!r} over a secure channel"
        print(f"{whose}: anyone holding its private key can join")
    for file in add or ():
        name = keys.admit(folder, file)
        print(f"admitted client {name}, whose key is {keys.fingerprint(file)}")


def _print_renewed(renewed: Renewed) -> None:
    keys = renewed.keys
    print(
        f"renewed {keys.certificate}, valid until {keys.expires:%Y-%m-%d}; a server that is "
        "running takes it within seconds"
    )
    if renewed.ca_expired is not None:
        print(
            f"renewed {keys.ca} as well: send it to the clients' owners, who need it from "
            f"{renewed.ca_expired:%Y-%m-%d} on and can use it now"
        )


def _print_own_key(public: Path, folder: Path) -> None:
    from flexlora.deployment import keys

    print(f"wrote {public} and {public.with_suffix('.key')}; the latter never leaves this machine")
    print(f"send {public} to the server's owner, and compare: {keys.fingerprint(public)}")
    print(f"put the server's ca.crt into {folder}")


def serve(
    path: Annotated[Path | None, typer.Argument(metavar="CONFIG.toml")] = None,
    changes: Changes = None,
    folder: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of the run.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Resume the interrupted run in DIR.")
    ] = None,
    clients: Annotated[
        int | None,
        typer.Option(min=1, help="Clients to wait for before the first round."),
    ] = None,
    listen: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help=f"Address for clients; by default 0.0.0.0:{PORT}, with --insecure "
            f"127.0.0.1:{PORT}.",
        ),
    ] = "",
    key_folder: Annotated[
        Path | None,
        typer.Option("--keys", metavar="DIR", help="The server's keys, made with: flexlora keys."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS and no keys; listens only on 127.0.0.1.")
    ] = False,
    status: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT|off",
            help=f"Address of a read-only status page; by default 127.0.0.1:{PAGE_PORT}; port 0 "
            "is any free.",
        ),
    ] = "",
    stay: Stay = 60.0,
) -> None:
    """Run a federation whose clients join from other machines."""
    listening = _listening(listen, key_folder, insecure)
    _check_page(status)
    if resume is not None:
        if path is not None or folder is not None or clients is not None:
            raise ConfigError(
                "--resume takes the folder of a run, --listen, --keys, and --set "
                "federation.rounds=N for more rounds."
            )
        with locked(resume, _LOCK, _refusal(resume)):
            settings = _resumed(resume, listening, changes or ())
            _serve(settings, resume, listening, status, 60 * stay)
        return
    if path is None:
        raise ConfigError("Give a CONFIG.toml, or --resume DIR.")
    settings, target = _checked(path, changes or (), folder, listening)
    with alone_in(target, "--out", _LOCK, _refusal(target)):
        _begin(target, settings, clients, listening)
        _serve(settings, target, listening, status, 60 * stay)


def _refusal(folder: Path) -> str:
    """Why a second process may not serve the run in a folder."""
    return (
        f"The run in {folder} is served already, by another process on this machine; stop that "
        "process first."
    )


def _checked(
    path: Path, changes: Sequence[str], out: Path | None, listening: Listening
) -> tuple[Experiment, Path]:
    """The experiment and the folder of a new run, after all checks that need no folder."""
    from flexlora.deployment.server import server_run
    from flexlora.federation import compose

    settings = compose.load(path, changes)
    folder = out or Path(settings.run.folder or f"runs/{path.stem}")
    _refuse_existing(folder)
    refuse_file(folder, "--out")
    if listening.keys is not None:
        from flexlora.deployment.certificates import ServerKeys

        ServerKeys.of(listening.keys)
    server_run.check(settings)
    listening.check_free()
    return settings, folder


def _begin(folder: Path, settings: Experiment, clients: int | None, listening: Listening) -> None:
    """Write the folder of a new run, which is locked."""
    from flexlora.deployment.server import server_run

    _refuse_existing(folder)
    federation = settings.federation
    first = clients if clients is not None else federation.cohort or federation.quorum
    plan = server_run.ServePlan.new(first, bound=listening.keys is not None)
    server_run.write_run_folder(folder, settings, plan)


def _serve(
    settings: Experiment, folder: Path, listening: Listening, status: str, stay_seconds: float
) -> None:
    """Serve and show progress; print how to resume if it is interrupted."""
    from rich.console import Console

    from flexlora.cli import progress
    from flexlora.deployment.server import server_run, supervisor
    from flexlora.reporting import page, tracker, trackers

    console = Console()
    followers = trackers.of(settings.run.trackers, folder)
    signal.signal(signal.SIGTERM, interrupt)
    is_interrupted = False
    with _page(folder, status) as url:
        lines = f"listening on {listening.address}\njournal:     {folder}\nstatus page: {url}"
        console.print(lines, highlight=False, soft_wrap=True)
        try:
            served = supervisor.serve(folder, listening, stay_seconds)
            run = tracker.following(served, followers, folder)
            with closing(run) as events:
                progress.show(events, console)
        except KeyboardInterrupt:
            is_interrupted = True
    finish = server_run.finish_of(folder, settings)
    if finish is None:
        command = f"flexlora serve --resume {folder}, and --listen and --keys as before"
        print(f"\nstopped; resume with: {command}", file=sys.stderr)
        raise SystemExit(STOPPED)
    _print_end(folder, finish)
    print(f"report:  {page.write(folder)}")
    if is_interrupted:
        raise SystemExit(STOPPED)


def _print_end(folder: Path, finish: Event) -> None:
    """Print where the adapter of a finished run is, and which clients have it."""
    from flexlora.deployment.server import server_run
    from flexlora.peft_format import WEIGHTS
    from flexlora.storage import sha256

    adapter = server_run.adapter_of(folder, finish)
    with_adapter, without = server_run.delivered(folder, finish)
    print(f"the federation is finished: {counted(finish['rounds'], 'round')}")
    print(f"adapter: {adapter}")
    if (adapter / WEIGHTS).exists():
        print(f"SHA-256: {sha256(adapter / WEIGHTS)}")
    print(f"clients that have it: {', '.join(with_adapter) or 'none'}")
    if without:
        print(
            f"clients that do not have it yet: {', '.join(without)}; to send it to them when they "
            f"join again: flexlora serve --resume {folder}, and --listen and --keys as before"
        )


def _check_page(status: str) -> None:
    """Refuse an address of the status page that is in use, before anything is written."""
    if status in ("", "off"):
        return
    host, port = addresses.parse(status, "--status", f"127.0.0.1:{PAGE_PORT}")
    if port and not addresses.is_free(host, port):
        raise ConfigError(
            f"The status page cannot listen on {status}: another program does, or it is no address "
            "of this machine; give --status another HOST:PORT, or off."
        )


@contextmanager
def _page(folder: Path, status: str) -> Iterator[str]:
    """Serve the status page during the run; yields its address, or why there is none.

    Raises:
        ConfigError: the address that the user gave cannot be used.
    """
    if status == "off":
        yield "off"
        return
    from flexlora.reporting import watch

    try:
        start = watch.start
    except FlexloraError as error:
        yield f"not served: {error}"
        return
    note = ""
    if not status:
        status = f"127.0.0.1:{PAGE_PORT}"
        if not addresses.is_free("127.0.0.1", PAGE_PORT):
            status, note = "127.0.0.1:0", f" (port {PAGE_PORT} is in use)"
    with start(folder, *watch.address(status)) as served:
        yield f"{served.url}{note}"


def _listening(listen: str, folder: Path | None, insecure: bool) -> Listening:
    from flexlora.deployment.server.supervisor import Listening

    default = f"{'127.0.0.1' if insecure else '0.0.0.0'}:{PORT}"
    host, port = addresses.parse(listen or default, "--listen", f"0.0.0.0:{PORT}", free=False)
    if (folder is None) is not insecure:
        raise ConfigError(
            "Give --keys DIR (made by: flexlora keys DIR --host NAME), or, for a test on this "
            "machine, --insecure."
        )
    return Listening(host, port, folder)


def _resumed(folder: Path, listening: Listening, changes: Sequence[str]) -> Experiment:
    """The experiment of a run that goes on, with keys if and only if it had keys.

    Exits if the run is finished, no more rounds are asked for, and every client has the adapter.
    """
    from flexlora.deployment.server import server_run

    if not (folder / server_run.PLAN).exists():
        raise ConfigError(
            f"There is no served run to resume in {folder}: it has no {server_run.PLAN}."
        )
    insecure = listening.keys is None
    if server_run.ServePlan.read(folder).bound is insecure:
        before, option = ("with", "--keys DIR") if insecure else ("without", "--insecure")
        raise ConfigError(
            f"The run in {folder} was started {before} keys, which decide whether names of clients "
            f"belong to keys; resume it with {option}."
        )
    settings = server_run.read_config(folder)
    if changes:
        settings = server_run.with_more_rounds(folder, settings, _rounds(changes))
    if finish := server_run.finish_of(folder, settings):
        _print_end(folder, finish)
        print(
            f"for more rounds: flexlora serve --resume {folder} --set "
            f"federation.rounds={finish['rounds'] + 1}, and --listen and --keys as before"
        )
        if not server_run.delivered(folder, finish)[1]:
            # No error: services that restart a failed command must not restart this one.
            raise SystemExit(0)
    if changes:
        server_run.write_config(folder, settings)
    return settings


def _rounds(changes: Sequence[str]) -> int:
    """The number of rounds in the one change that a run that goes on can have."""
    key, _, value = changes[0].partition("=")
    if len(changes) > 1 or key.strip() != "federation.rounds" or not value.strip().isdecimal():
        raise ConfigError(
            f"A run that is resumed can have more rounds, --set federation.rounds=N, and no other "
            f"change, not {' '.join(changes)!r}."
        )
    return int(value)


def _refuse_existing(folder: Path) -> None:
    from flexlora.deployment.server import server_run
    from flexlora.federation import checkpoint

    refuse_parts_of_runs(folder, "--out")
    if checkpoint.is_begun(folder) or (folder / server_run.PLAN).exists():
        raise ConfigError(
            f"{folder} already holds a run; resume it with: flexlora serve --resume {folder}, or "
            "give another --out."
        )
    refuse_foreign_config(folder, "--out")
