"""Flower's SuperLink: started on loopback, and controlled by Flower's command line."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import ssl
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from flexlora.deployment.certificates import ServerKeys
from flexlora.deployment.flower.local_users import GUARDED
from flexlora.deployment.flower.processes import POLL_INTERVAL, Process, environment, program
from flexlora.deployment.server.run_files import REPLY_BYTES
from flexlora.errors import FlexloraError, ProtocolError
from flexlora.storage import close_to_others, write_atomically

_START_SECONDS: Final = 60.0
_CONNECTION: Final = "run"
"""The name of this run's SuperLink in Flower's own config."""
_PROGRAM: Final = "flexlora.deployment.flower.superlink_program"
LIMIT_FILE: Final = "FLEXLORA_REPLY_BYTES"
"""Environment variable of that program: the path of the file with the largest payload of an answer
in bytes."""
_DATABASE: Final = "state.db"
_PAGE_BYTES: Final = 65536
"""Page size of the database, which stores payloads in chunks of megabytes. With Flower's own size,
4096, writing takes three times as long and deleting twice as long."""
_IN_USE: Final = "already in use"
"""Part of Flower's error for a public key that is registered already."""


@dataclass
class SuperLink:
    """The SuperLink of one run, on loopback; its state is in the run's folder."""

    home: Path
    port: int
    tls: ServerKeys | None
    process: Process = field(init=False)

    def __post_init__(self) -> None:
        close_to_others(self.home)
        secure = (
            ["--insecure"]
            if self.tls is None
            else [
                *("--ssl-ca-certfile", str(self.tls.ca)),
                *("--ssl-certfile", str(self.tls.certificate)),
                *("--ssl-keyfile", str(self.tls.key)),
                "--enable-supernode-auth",
            ]
        )
        program("flower-superlink")  # it is installed
        arguments = [
            *(
                sys.executable,
                "-P",
                "-m",
                _PROGRAM,
                "--host",
                "127.0.0.1",
                "--port",
                str(self.port),
            ),
            *("--database", str(self.home / _DATABASE), *secure),
            "--disable-runtime-dependency-installation",
        ]
        log = self.home / "superlink.log"
        limit_file = self.home.parent / REPLY_BYTES
        env = environment(self.home) | {POLL_INTERVAL: "1.0"}  # it starts only the run
        env[LIMIT_FILE] = str(limit_file.resolve())
        self.process = Process(arguments, log, env)
        self._write_connection()
        self._make_database()

    @property
    def url(self) -> str:
        """Its address, with the scheme."""
        return f"{'http' if self.tls is None else 'https'}://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and wait until it answers, behind the check of who asks.

        Raises:
            ProtocolError: it does not answer within a minute, or without the check.
        """
        self._shrink_database()
        self.process.start()
        until = time.monotonic() + _START_SECONDS
        while time.monotonic() < until and self.process.ended is None:
            if self._is_guarded():
                return
            time.sleep(0.2)
        self.process.stop()
        raise ProtocolError(
            f"Flower's SuperLink did not start on port {self.port}; the end of its log "
            f"{self.process.log}:\n{self.process.last_lines()}"
        )

    def _is_guarded(self) -> bool:
        """Whether it answers, and this program's own check answers first."""
        host, seconds = "127.0.0.1", 5.0
        context = None if self.tls is None else ssl.create_default_context(cafile=self.tls.ca)
        connection = (
            HTTPConnection(host, self.port, timeout=seconds)
            if context is None
            else HTTPSConnection(host, self.port, timeout=seconds, context=context)
        )
        try:
            connection.request("GET", GUARDED)
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False  # it does not listen yet
        finally:
            connection.close()

    def register(self, public_key: Path, name: str) -> int:
        """Authorise the node with this key, under this name; returns Flower's number for it."""
        path = str(public_key)
        reply = self._flwr("supernode", "register", path, _CONNECTION, "--name", name)
        return int(reply["node-id"])

    def number(self, public_key: Path, name: str, recorded: Collection[int]) -> int:
        """Flower's number for a node, registered now or before; none of those ``recorded``.

        A server that was killed may have registered a node and not recorded it. Flower does not
        report the key of a node, but it is the one node that is not recorded.
        """
        try:
            return self.register(public_key, name)
        except FlexloraError as error:
            if _IN_USE not in str(error):
                raise
            unrecorded = self._registered() - set(recorded)
            if len(unrecorded) != 1:
                raise
            return unrecorded.pop()

    def unregister(self, node: int) -> None:
        """Revoke a node, connected or not; nothing happens if it is not registered."""
        if node in self._registered():
            self._flwr("supernode", "unregister", str(node), _CONNECTION)

    def _registered(self) -> set[int]:
        """Flower's numbers of the authorised nodes."""
        listed = self._flwr("supernode", "list", _CONNECTION)["nodes"]
        return {int(node["node-id"]) for node in listed if node["status"] != "unregistered"}

    def submit(self, folder: Path) -> str:
        """Start the run that is prepared in ``folder``; returns Flower's number for it."""
        app = self.home / "app"
        shutil.rmtree(app, ignore_errors=True)
        # Nodes get these files: no caches among them.
        shutil.copytree(
            str(files("flexlora.deployment.flower") / "app"),
            app,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        # JSON and TOML escape strings alike.
        run_config = f"folder={json.dumps(str(folder.resolve()))}"
        reply = self._flwr("run", str(app), _CONNECTION, "--run-config", run_config)
        return str(reply["run-id"])

    def status(self, run: str) -> str:
        """The state of a run: "running", "finished:completed", "finished:failed", ..."""
        reply = self._flwr("ls", _CONNECTION, "--run-id", run)
        return str(reply["runs"][0]["status"])

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        """Run a command of Flower's command line; returns its JSON.

        Raises:
            ProtocolError: the command fails, or does not end within a minute.
        """
        try:
            completed = subprocess.run(
                [program("flwr"), *arguments, "--format", "json"],
                capture_output=True,
                text=True,
                env=environment(self.home),
                stdin=subprocess.DEVNULL,
                timeout=_START_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ProtocolError(
                f"Flower did not answer `flwr {' '.join(arguments[:2])}` within "
                f"{_START_SECONDS:.0f} s: this machine is too busy, or the SuperLink hangs; its "
                f"log is {self.process.log}. Serve the run again with --resume."
            ) from error
        # Notes may stand before the JSON.
        start = completed.stdout.find("{")
        try:
            reply: dict[str, Any] = json.loads(completed.stdout[start:])
        except ValueError:
            reply = {}
        if completed.returncode or not reply.get("success"):
            output = (completed.stdout + completed.stderr).strip()[-800:]
            raise ProtocolError(
                f"Flower refused `flwr {' '.join(arguments[:2])}`: "
                f"{reply.get('error-message') or output}"
            )
        return reply

    def _make_database(self) -> None:
        """Create the database if there is none: its page size cannot be changed later."""
        file = self.home / _DATABASE
        if file.exists() and file.stat().st_size:
            return
        try:
            with _opened(file) as database:
                database.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
                database.execute("PRAGMA auto_vacuum = INCREMENTAL")
                database.execute("VACUUM")
        except ProtocolError:
            # One without the page size would be kept.
            if file.is_file():
                file.unlink()
            raise

    def _shrink_database(self) -> None:
        """Return the room of what was deleted to the disk."""
        with _opened(self.home / _DATABASE) as database:
            database.executescript("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(TRUNCATE);")

    def _write_connection(self) -> None:
        """Write the address of the SuperLink for Flower's command line."""
        trust = (
            "insecure = true"
            if self.tls is None
            else f"root-certificates = {json.dumps(str(self.tls.ca.resolve()))}"
        )
        text = (
            f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n'
            f'address = "127.0.0.1:{self.port}"\n{trust}\n'
        )
        write_atomically(self.home / "config.toml", text.encode())


_FAULTS: Final = {
    sqlite3.SQLITE_FULL: ("the disk is full", "free some space"),
    sqlite3.SQLITE_READONLY: ("it may not be written", "change its permissions"),
    sqlite3.SQLITE_PERM: ("it may not be used", "change its permissions"),
    sqlite3.SQLITE_CANTOPEN: ("it cannot be opened", "change the permissions of its folder"),
    sqlite3.SQLITE_BUSY: ("another program uses it", "end that program"),
    sqlite3.SQLITE_LOCKED: ("another program uses it", "end that program"),
    sqlite3.SQLITE_IOERR: (
        "the disk refused to read or write it",
        "free some space, or copy the folder to another disk",
    ),
    sqlite3.SQLITE_CORRUPT: (
        "it is damaged",
        "restore it from a copy, or start the run again in another folder",
    ),
    sqlite3.SQLITE_NOTADB: (
        "it is damaged",
        "restore it from a copy, or start the run again in another folder",
    ),
}
"""What is wrong with a database and what to do, by SQLite's primary error codes."""


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[sqlite3.Connection]:
    """Flower's database.

    Raises:
        ProtocolError: it cannot be used, with the reason and a remedy.
    """
    try:
        with contextlib.closing(sqlite3.connect(file)) as database:
            yield database
    except sqlite3.Error as error:
        # The extended codes have the primary one in their lowest byte.
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        reason, remedy = _FAULTS.get(code, (f"SQLite says {error}", "give another folder"))
        raise ProtocolError(f"{file} cannot be used: {reason}; {remedy}.") from error
