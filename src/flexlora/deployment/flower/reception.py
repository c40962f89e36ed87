"""The gate's own answer to a client that says hello, and the notes on clients that are unknown."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from starlette.types import Scope, Send

from flexlora import __version__
from flexlora.deployment.greeting import HELLO, KEY_HEADER, NAME_HEADER, KeyState
from flexlora.deployment.server.run_files import DELIVERED, NODES, NUMBERS, note

PATH: Final = HELLO.encode()
_FINGERPRINT: Final = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_SAME_KEY_SECONDS: Final = 600.0
_ANY_KEY_SECONDS: Final = 5.0
_MOST_KEYS: Final = 1000


def is_hello(scope: Scope) -> bool:
    """Whether a request is a client's hello, exactly as sent."""
    is_exact = scope.get("raw_path") == PATH and not scope["query_string"]
    return is_exact and scope["method"] == "GET"


@dataclass
class Reception:
    """Says to a client whether its key is registered, by the files in the run's ``folder``.

    An unknown key is noted for the server's console: every key once in ten minutes, and at most
    one in five seconds.
    """

    folder: Path
    _noted_at: dict[str, float] = field(default_factory=dict)

    async def answer(self, scope: Scope, send: Send) -> None:
        """Answer a hello; it has no body, and what is sent of one is not read."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        key = headers.get(KEY_HEADER.encode(), "")
        state = self.state(key)
        if state is KeyState.UNKNOWN and _FINGERPRINT.fullmatch(key):
            address = (scope.get("client") or ("an unknown address",))[0]
            self._note(key, headers.get(NAME_HEADER.encode(), ""), address)
        facts = {
            "version": __version__,
            "key": state,
            "finished": (self.folder / DELIVERED).exists(),
        }
        await _send_json(send, facts)

    def state(self, key: str) -> KeyState:
        """What is known of a key's fingerprint."""
        number = _stored(self.folder / NUMBERS).get(key)
        if number is None:
            return KeyState.UNKNOWN
        is_authorised = number in _stored(self.folder / NODES).values()
        return KeyState.REGISTERED if is_authorised else KeyState.REVOKED

    def _note(self, key: str, name: str, address: str) -> None:
        now = time.monotonic()
        last = max(self._noted_at.values(), default=-_SAME_KEY_SECONDS)
        before = self._noted_at.get(key, -_SAME_KEY_SECONDS)
        if now - before < _SAME_KEY_SECONDS or now - last < _ANY_KEY_SECONDS:
            return
        if len(self._noted_at) >= _MOST_KEYS:
            self._noted_at.clear()
        self._noted_at[key] = now
        called = f" that calls itself {name}" if _NAME.fullmatch(name) else ""
        note(
            self.folder,
            f"a client at {address}{called} has an unknown key, {key}; to admit it: flexlora keys "
            "DIR --add NAME.pub",
        )


async def _send_json(send: Send, facts: dict[str, Any]) -> None:
    content = json.dumps(facts).encode() + b"\n"
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def _stored(file: Path) -> dict[str, int]:
    if not file.exists():
        return {}
    content: dict[str, int] = json.loads(file.read_text(encoding="utf-8"))
    return content
