"""The gate's own answer to a client that says hello, and the notes on clients that are unknown."""

from __future__ import annotations

import contextlib
import json
import re
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from starlette.types import Scope, Send

from flexlora import __version__
from flexlora.deployment.flower.connections import network_of
from flexlora.deployment.flower.signatures import RegisteredKeys
from flexlora.deployment.greeting import HELLO, KEY_HEADER, NAME_HEADER, KeyState
from flexlora.deployment.server.run_files import DELIVERED, note

PATH: Final = HELLO.encode()
_FINGERPRINT: Final = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_NOTED_SECONDS: Final = 600.0
_ANY_KEY_SECONDS: Final = 5.0
_MOST_OF_NETWORK: Final = 3
_MOST_NOTES: Final = 12


def is_hello(scope: Scope) -> bool:
    """Whether a request is a client's hello, exactly as sent."""
    is_exact = scope.get("raw_path") == PATH and not scope["query_string"]
    return is_exact and scope["method"] == "GET"


@dataclass
class Reception:
    """Says to a client whether its key is registered in the run in ``folder``.

    An unknown key is noted for the server's console: in ten minutes each key once, at most three
    keys of one address and twelve in all; and at most one in five seconds.
    """

    folder: Path
    registered: RegisteredKeys
    # When, which key, from where: those of the last ten minutes.
    _notes: list[tuple[float, str, str]] = field(default_factory=list)

    async def answer(self, scope: Scope, send: Send) -> None:
        """Answer a hello; it has no body, and what is sent of one is not read."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        key = headers.get(KEY_HEADER.encode(), "")
        state = self.registered.state(key)
        if state is KeyState.UNKNOWN and _FINGERPRINT.fullmatch(key):
            address = (scope.get("client") or ("an unknown address",))[0]
            self._note(key, headers.get(NAME_HEADER.encode(), ""), address)
        facts = {
            "version": __version__,
            "key": state,
            "finished": (self.folder / DELIVERED).exists(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        await _send_json(send, facts)

    def _note(self, key: str, name: str, address: str) -> None:
        now, network = time.monotonic(), network_of(address)
        self._notes = [each for each in self._notes if now - each[0] < _NOTED_SECONDS]
        of_network = sum(where == network for _, _, where in self._notes)
        if (
            any(key == noted for _, noted, _ in self._notes)
            or (self._notes and now - self._notes[-1][0] < _ANY_KEY_SECONDS)
            or of_network >= _MOST_OF_NETWORK
            or len(self._notes) >= _MOST_NOTES
        ):
            return
        self._notes.append((now, key, network))
        called = f" that calls itself {name}" if _NAME.fullmatch(name) else ""
        with contextlib.suppress(OSError):  # a full disk turns nobody away
            note(
                self.folder,
                f"a client at {address}{called} has an unknown key, {key}; to admit it: flexlora "
                "keys DIR --add NAME.pub",
            )


async def _send_json(send: Send, facts: dict[str, Any]) -> None:
    content = json.dumps(facts).encode() + b"\n"
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})
