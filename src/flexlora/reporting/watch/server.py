"""The server of the status page: read-only, without login, and here alone unless told otherwise."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse

from flexlora.errors import ConfigError, FlexloraError
from flexlora.journal import Journal
from flexlora.reporting.watch import metrics, page, words
from flexlora.reporting.watch.run_state import RunState

HEADERS = {
    "Content-Security-Policy": page.POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_STARTED_WITHIN_SECONDS = 30.0


class _Watched:
    """The run in a folder, looked at by one request at a time."""

    def __init__(self, folder: Path) -> None:
        # The name of "." is that of the folder that it stands for.
        self.name = folder.resolve().name
        self._journal, self._standing, self._lock = Journal(folder), RunState(), threading.Lock()

    def status(self) -> dict[str, Any]:
        """How the run stands, for programs and for the page."""
        with self._lock:
            return words.status(self._now(), self.name, time.time())

    def metrics(self) -> bytes:
        """How the run stands, for Prometheus."""
        with self._lock:
            return metrics.text(self._now())

    def _now(self) -> RunState:
        for event in self._journal.news():
            if event is None:
                self._standing = RunState()
            else:
                self._standing.add(event)
        return self._standing


def app(folder: Path, hosts: Collection[str] | None = None) -> FastAPI:
    """The status page of the run in ``folder``, its ``/status.json`` and its ``/metrics``.

    A request costs what the journal has grown by since the last one. The folder may be empty as
    yet. ``hosts`` are the names under which it answers, any by default; where only this machine
    is to see it, they keep away pages whose own name was made to point here.
    """
    watched = _Watched(folder)
    made = FastAPI(title="flexlora", openapi_url=None, docs_url=None, redoc_url=None)

    @made.middleware("http")
    async def guarded(
        request: Request, answer: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        # Not as the request's URL has it, which has another where the header is malformed.
        asked = re.sub(r":[0-9]*$", "", request.headers.get("host", "")).lower()
        if hosts is not None and asked not in hosts:
            said = f"This page is not served under the name {asked!r}.\n"
            response: Response = PlainTextResponse(said, status_code=421)
        else:
            response = await answer(request)
        response.headers.update(HEADERS)
        return response

    @made.exception_handler(FlexloraError)
    def unreadable(request: Request, error: Exception) -> Response:
        return PlainTextResponse(f"{error}\n", status_code=500)

    @made.api_route("/", methods=["GET", "HEAD"])
    def shown() -> Response:
        text = page.render(watched.status()["shown"])
        return HTMLResponse(text.encode(errors="replace"))

    @made.api_route("/status.json", methods=["GET", "HEAD"])
    def status() -> Response:
        # As ASCII: a name may hold half a surrogate pair, which has no bytes of its own.
        text = json.dumps(watched.status(), allow_nan=False)
        return Response(text, media_type="application/json")

    @made.api_route("/metrics", methods=["GET", "HEAD"])
    def scraped() -> Response:
        return Response(watched.metrics(), headers={"Content-Type": metrics.CONTENT_TYPE})

    return made


@dataclass(frozen=True)
class Served:
    """A status page that is being served at ``url`` by a thread, until it is stopped."""

    url: str
    _server: uvicorn.Server
    _thread: threading.Thread

    def stop(self) -> None:
        """Answer what was asked, then stop; a second time it does nothing."""
        self._server.should_exit = True
        self._thread.join()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def start(folder: Path, host: str = "127.0.0.1", port: int = 0) -> Served:
    """Serve the page of the run in ``folder`` from a thread; port 0 is any that is free.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    listening, url = _listening(host, port)
    server = _server(app(folder, _hosts(host)))
    thread = threading.Thread(
        target=server.run, args=([listening],), name="flexlora-watch", daemon=True
    )
    thread.start()
    _await(server, thread, url)
    return Served(url, server, thread)


def serve(folder: Path, host: str = "127.0.0.1", port: int = 0) -> None:
    """Serve the page of the run in ``folder`` until it is interrupted, and say where.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    listening, url = _listening(host, port)
    print(f"status page: {url} (stop with Ctrl-C)", flush=True)
    with suppress(KeyboardInterrupt):
        _server(app(folder, _hosts(host))).run([listening])


def address(text: str) -> tuple[str, int]:
    """The host and the port of a text such as 127.0.0.1:8800 or [::1]:8800.

    Raises:
        ConfigError: it is not of this form.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ConfigError(f"--listen takes HOST:PORT, such as 127.0.0.1:8800, not {text!r}.")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _listening(host: str, port: int) -> tuple[socket.socket, str]:
    """A socket that listens, and the page's address; a warning where others reach it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"The status page cannot listen on {host}, port {port}: {error.strerror or error}. "
            "Give another address."
        ) from error
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listening.getsockname()[1]}/"
    if not _is_loopback(host):
        print(
            f"warning: everyone who reaches {url} sees the status page: there is no login and "
            "no encryption.",
            file=sys.stderr,
        )
    return listening, url


def _hosts(host: str) -> Collection[str] | None:
    """The names under which a page answers that only this machine is to see."""
    shown = f"[{host}]" if ":" in host else host
    return {"localhost", "127.0.0.1", "[::1]", shown} if _is_loopback(host) else None


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _server(made: FastAPI) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            made,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=2,
        )
    )


def _await(server: uvicorn.Server, thread: threading.Thread, url: str) -> None:
    deadline = time.monotonic() + _STARTED_WITHIN_SECONDS
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise ConfigError(f"The status page at {url} did not start; see above.")
        time.sleep(0.01)
