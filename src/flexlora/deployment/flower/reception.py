"""The gate's own answer to a client that says hello, and the notes on clients that are unknown."""

from __future__ import annotations

import contextlib
import json
import re
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

from starlette.types import Scope, Send

from flexlora import __version__
from flexlora.deployment.flower.connections import network_of
from flexlora.deployment.flower.signatures import RegisteredKeys
from flexlora.deployment.greeting import HELLO, KEY_HEADER, NAME_HEADER, KeyState
from flexlora.deployment.server.run_files import DELIVERED, note

PATH: Final = HELLO.encode()
_FINGERPRINT: Final = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_SAME_KEY_SECONDS: Final = 600.0
_ANY_KEY_SECONDS: Final = 5.0
_KEYS_OF_ADDRESS: Final = 3
_MOST_KEYS: Final = 1000

_Value = TypeVar("_Value")


def is_hello(scope: Scope) -> bool:
    """Whether a request is a client's hello, exactly as sent."""
    is_exact = scope.get("raw_path") == PATH and not scope["query_string"]
    return is_exact and scope["method"] == "GET"


@dataclass
class Reception:
    """Says to a client whether its key is registered in the run in ``folder``.

    An unknown key is noted for the server's console: every key once in ten minutes, at most three
    keys of one address in that time, and at most one key in five seconds.
    """

    folder: Path
    registered: RegisteredKeys
    # Oldest first.
    _noted_at: dict[str, float] = field(default_factory=dict)
    _address_noted_at: dict[str, list[float]] = field(default_factory=dict)
    _last_noted_at: float = -_SAME_KEY_SECONDS

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
        before = self._noted_at.get(key, -_SAME_KEY_SECONDS)
        recent = [
            at for at in self._address_noted_at.get(network, ()) if now - at < _SAME_KEY_SECONDS
        ]
        if (
            now - before < _SAME_KEY_SECONDS
            or now - self._last_noted_at < _ANY_KEY_SECONDS
            or len(recent) >= _KEYS_OF_ADDRESS
        ):
            return
        self._last_noted_at = now
        _renewed(self._noted_at, key, now)
        _renewed(self._address_noted_at, network, [*recent, now])
        called = f" that calls itself {name}" if _NAME.fullmatch(name) else ""
        with contextlib.suppress(OSError):  # a full disk turns nobody away
            note(
                self.folder,
                f"a client at {address}{called} has an unknown key, {key}; to admit it: flexlora "
                "keys DIR --add NAME.pub",
            )


def _renewed(notes: dict[str, _Value], key: str, value: _Value) -> None:
    """Put an entry last; the oldest makes room for it."""
    notes.pop(key, None)
    if len(notes) >= _MOST_KEYS:
        del notes[next(iter(notes))]
    notes[key] = value


async def _send_json(send: Send, facts: dict[str, Any]) -> None:
    content = json.dumps(facts).encode() + b"\n"
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})
