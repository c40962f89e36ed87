"""The server of the status page: read-only, without login, by default on this machine only."""

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
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse

from flexlora import addresses
from flexlora.errors import ConfigError, FlexloraError
from flexlora.journal import Journal
from flexlora.reporting import html
from flexlora.reporting.run_files import REPORT
from flexlora.reporting.watch import metrics, page, words
from flexlora.reporting.watch.run_state import RunState
from flexlora.reporting.watch.time_left import TimeLeft

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
    """The run in a folder, read by one request at a time."""

    def __init__(self, folder: Path, with_report: bool) -> None:
        # The name of "." is empty before it is resolved.
        self.name = folder.resolve().name
        self._report = folder / REPORT if with_report else None
        self._journal, self._lock = Journal(folder), threading.Lock()
        self._state = RunState()
        self._left = TimeLeft(self._state)

    def status(self) -> dict[str, Any]:
        """The state of the run for programs and for the page."""
        with self._lock:
            report = REPORT if self.report() else ""
            now, at = self._now(), time.time()
            return words.status(now, self.name, at, report, self._left.left(at))

    def report(self) -> Path | None:
        """The report of the run, if it was written and is served."""
        return self._report if self._report and self._report.is_file() else None

    def metrics(self) -> bytes:
        """The state of the run for Prometheus."""
        with self._lock:
            return metrics.text(self._now())

    def _now(self) -> RunState:
        for event in self._journal.news():
            if event is None:
                self._state = RunState()
                self._left = TimeLeft(self._state)
            else:
                self._state.add(event)
                self._left.add(event)
        return self._state


def app(folder: Path, hosts: Collection[str] | None = None) -> FastAPI:
    """The status page of the run in ``folder``, its ``/status.json`` and its ``/metrics``.

    A request reads only what was added to the journal since the last one. The folder may still be
    empty. ``hosts`` are the host names that it answers to, any by default; on a page for this
    machine only, they stop DNS rebinding: foreign names that resolve to this machine. Such a page
    also serves the run's report, once there is one.
    """
    # A report contains rows of data, which not everyone who may see the status is to read.
    watched = _Watched(folder, with_report=hosts is not None)
    application = FastAPI(title="flexlora", openapi_url=None, docs_url=None, redoc_url=None)

    @application.middleware("http")
    async def guarded(
        request: Request, answer: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        # Not from the request's URL, which has another host if the header is malformed.
        host = re.sub(r":[0-9]*$", "", request.headers.get("host", "")).lower()
        if hosts is not None and host not in hosts:
            refusal = f"This page is not served under the name {host!r}.\n"
            response: Response = PlainTextResponse(refusal, status_code=421)
        else:
            response = await answer(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    @application.exception_handler(FlexloraError)
    def unreadable(request: Request, error: Exception) -> Response:
        return PlainTextResponse(f"{error}\n", status_code=500)

    @application.api_route("/", methods=["GET", "HEAD"])
    def shown() -> Response:
        text = page.render(watched.status()["shown"])
        return HTMLResponse(text.encode(errors="replace"))

    @application.api_route("/status.json", methods=["GET", "HEAD"])
    def status() -> Response:
        # As ASCII: a name may contain half a surrogate pair, which has no bytes of its own.
        text = json.dumps(watched.status(), allow_nan=False)
        return Response(text, media_type="application/json")

    @application.api_route(f"/{REPORT}", methods=["GET", "HEAD"])
    def reported() -> Response:
        path = watched.report()
        if path is None:
            return PlainTextResponse("There is no report here.\n", status_code=404)
        return HTMLResponse(path.read_bytes(), headers={"Content-Security-Policy": html.POLICY})

    @application.api_route("/metrics", methods=["GET", "HEAD"])
    def scraped() -> Response:
        return Response(watched.metrics(), headers={"Content-Type": metrics.CONTENT_TYPE})

    return application


@dataclass(frozen=True)
class Served:
    """A status page that a thread serves at ``url`` until it is stopped."""

    url: str
    _server: uvicorn.Server
    _thread: threading.Thread

    def stop(self) -> None:
        """Answer open requests, then stop; a second call does nothing."""
        self._server.should_exit = True
        self._thread.join()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def start(folder: Path, host: str = "127.0.0.1", port: int = 0) -> Served:
    """Serve the page of the run in ``folder`` from a thread; port 0 is any free port.

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
    """Serve the page of the run in ``folder`` until it is interrupted, and print its address.

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
    return addresses.parse(text, "--listen", "127.0.0.1:8800")


def _listening(host: str, port: int) -> tuple[socket.socket, str]:
    """A socket that listens, and the page's address; a warning where others reach it."""
    try:
        listening = addresses.listener(host, port)
    except OSError as error:
        raise ConfigError(
            f"The status page cannot listen on {host}, port {port}: {error.strerror or error}. "
            "Give another address."
        ) from error
    url = f"http://{addresses.joined(host, listening.getsockname()[1])}/"
    if not addresses.is_loopback(host):
        print(
            f"warning: everyone who reaches {url} sees the status page: there is no login and "
            "no encryption.",
            file=sys.stderr,
        )
    return listening, url


def _hosts(host: str) -> Collection[str] | None:
    """The names under which a page answers that only this machine is to see."""
    if not addresses.is_loopback(host):
        return None
    return {"localhost", "127.0.0.1", "[::1]", addresses.in_brackets(host)}


def _server(application: FastAPI) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            application,
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
            raise ConfigError(
                f"The status page at {url} did not start; its error is printed above."
            )
        time.sleep(0.01)
