"""What can be wrong between a client and its server, found out before Flower's SuperNode starts.

A plain connection, a TLS handshake and one small request to the server's gate tell within seconds
what the SuperNode would hide. This module imports nothing slow, so that a fault is named before
PyTorch is loaded.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from flexlora import __version__, addresses
from flexlora.deployment.greeting import HELLO, KEY_HEADER, NAME_HEADER, KeyState
from flexlora.deployment.key_files import load_certificate
from flexlora.deployment.keys import NodeKey, fingerprint_of_private
from flexlora.errors import ConfigError, ProtocolError
from flexlora.journal import counted, duration
from flexlora.storage import untrusted

_SECONDS: Final = 5.0
_MOST_BYTES: Final = 4096
_NOTICE_DAYS: Final = 14
_MOST_SECONDS_AHEAD: Final = 5.0
_MOST_SECONDS_BEHIND: Final = 300.0
"""Flower's tolerances, with what is left for the time that a request takes."""
_EXPIRED, _NOT_YET_VALID, _OTHER_HOST, _OTHER_ADDRESS = 10, 9, 62, 64
"""OpenSSL's numbers of the faults of a certificate that are not those of another CA."""


@dataclass(frozen=True)
class Fault:
    """Why this client cannot take part now; ``is_final`` if it is no use to try again."""

    sentence: str
    is_final: bool = False


@dataclass(frozen=True)
class Greeting:
    """What the server's gate says of itself; ``notes`` are sentences for the client's owner."""

    notes: tuple[str, ...] = ()


def check_address(address: str, insecure: bool) -> None:
    """Refuse an address that cannot be a server's.

    Raises:
        ConfigError: it is not HOST:PORT.
        ProtocolError: an insecure server is not on this machine.
    """
    host, colon, port = address.rpartition(":")
    if "://" in address:
        raise ConfigError(
            f"join takes HOST:PORT, not the URL {address!r}; join "
            f"{address.partition('://')[2].rstrip('/') or 'server.example:8090'}."
        )
    if not colon or not port:
        raise ConfigError(
            f"join takes HOST:PORT, and {address!r} has no port; that of `flexlora serve` is 8090 "
            f"unless its owner chose another: join {(host or address).rstrip(':')}:8090."
        )
    addresses.parse(address, "join", "server.example:8090", free=False)
    if insecure and not addresses.is_loopback(host):
        raise ProtocolError(
            f"--insecure is for a server on this machine, not for {address}: give --keys, the "
            "folder with your key and the server's ca.crt."
        )


def greet(address: str, keys: NodeKey | None) -> Greeting | Fault:
    """Connect to the server at ``address`` and ask whether this client may take part.

    Takes at most some ten seconds.
    """
    if (fault := unreachable(address)) is not None:
        return fault
    target = addresses.parse(address, "join", "server.example:8090")
    try:
        return _insecure(address, target) if keys is None else _secure(address, target, keys)
    except ssl.SSLCertVerificationError as error:
        return _untrusted(error, target, keys)
    except ssl.SSLError:
        return Fault(
            f"The server at {address} does not use TLS: it was started with --insecure, or it is "
            "another program. Start it with --keys, or join the right address.",
            is_final=True,
        )
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return Fault(f"The server at {address} does not answer as it should ({reason}).")


def unreachable(address: str) -> Fault | None:
    """Why no connection to the server can be made; None if one can."""
    target = addresses.split(address)
    if target is None:
        return Fault(f"'{address}' is not of the form HOST:PORT.", is_final=True)
    try:
        socket.create_connection(target, _SECONDS).close()
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:  # without a network, such as right after the start
            return Fault(
                f"The name '{target[0]}' cannot be looked up now: check this machine's network."
            )
        return Fault(
            f"There is no machine of the name '{target[0]}' ({address}): check its spelling.",
            is_final=True,
        )
    except TimeoutError:
        return Fault(
            f"Nothing answers at {address} within {_SECONDS:.0f} s: the machine is down, or a "
            "firewall drops the connection."
        )
    except ConnectionRefusedError:
        return Fault(
            f"Nothing listens at {address}: `flexlora serve` is not running there (yet, or any "
            "more), or it listens at another port."
        )
    except OSError as error:
        return Fault(f"The server at {address} cannot be reached ({error.strerror or error}).")
    return None


def _untrusted(
    error: ssl.SSLCertVerificationError, target: tuple[str, int], keys: NodeKey | None
) -> Fault:
    """Why this client does not trust the server's certificate."""
    if error.verify_code in (_OTHER_HOST, _OTHER_ADDRESS):
        return Fault(
            f"The server's certificate does not name '{target[0]}': join with a name for which it "
            "was made, or have its owner make another: flexlora keys DIR --host NAME.",
            is_final=True,
        )
    clock = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    if error.verify_code == _EXPIRED and keys is not None and _has_expired(keys.ca):
        return Fault(
            f"Your {keys.ca} has expired (this machine's clock says {clock}): get the renewed "
            "ca.crt from the server's owner and put it there."
        )
    if error.verify_code == _EXPIRED:
        return Fault(
            "The server's certificate has expired: its owner renews it, while the server runs, "
            f"with: flexlora keys DIR --renew, and you keep your ca.crt. If it is valid, this "
            f"machine's clock is wrong: it says {clock}."
        )
    if error.verify_code == _NOT_YET_VALID:
        return Fault(
            "The server's certificate is not valid yet: check the clock of this machine, which "
            f"says {clock}, and that of the server."
        )
    return Fault(
        "The server's certificate is not signed by your ca.crt, so it is another server, or your "
        "ca.crt is that of another one: get the server's ca.crt from its owner.",
        is_final=True,
    )


def _has_expired(path: Path) -> bool:
    return load_certificate(path).not_valid_after_utc <= datetime.now(UTC)


def _ending(what: str, ends: datetime, remedy: str) -> list[str]:
    """A note on a certificate that expires soon."""
    left = ends - datetime.now(UTC)
    if left > timedelta(days=_NOTICE_DAYS):
        return []
    return [f"{what} expires on {ends:%Y-%m-%d}, in {counted(left.days, 'day')}: {remedy}"]


def _certificate_notes(ends: object, ca: Path) -> list[str]:
    """Notes on the server's certificate, which ends then, and on the CA's."""
    own = "ask the server's owner for the renewed ca.crt"
    notes = _ending(f"your {ca}", load_certificate(ca).not_valid_after_utc, own)
    if isinstance(ends, str):
        server = datetime.fromtimestamp(ssl.cert_time_to_seconds(ends), UTC)
        notes += _ending(
            "the server's certificate",
            server,
            "its owner renews it, while the server runs: flexlora keys DIR --renew",
        )
    return notes


def _clock_fault(answer: dict[str, Any]) -> Fault | None:
    """Why the server would refuse signatures made by this machine's clock; None if it would not."""
    try:
        ahead = (datetime.now(UTC) - datetime.fromisoformat(answer["time"])).total_seconds()
    except (KeyError, TypeError, ValueError, OverflowError):  # an earlier version
        return None
    if -_MOST_SECONDS_BEHIND < ahead < _MOST_SECONDS_AHEAD:
        return None
    return Fault(
        f"The clock of this machine is {duration(abs(ahead))} "
        f"{'ahead of' if ahead > 0 else 'behind'} the server's, which takes no signature of such a "
        "time: set the clocks of both, best by NTP."
    )


def _secure(address: str, target: tuple[str, int], keys: NodeKey) -> Greeting | Fault:
    context = ssl.create_default_context(cafile=keys.ca)
    connection = http.client.HTTPSConnection(*target, timeout=_SECONDS, context=context)
    headers = {KEY_HEADER: fingerprint_of_private(keys.key), NAME_HEADER: keys.name}
    connection.connect()
    shown = connection.sock.getpeercert() or {}
    answer = _answer(connection, headers)
    if answer is None:  # a proxy of the owner's in place of the gate
        return Greeting()
    if answer.get("key") == KeyState.UNKNOWN:
        return Fault(
            f"The server at {address} does not know the key of this client (yet): send "
            f"{keys.name}.pub, whose fingerprint is {headers[KEY_HEADER]}, to the server's owner, "
            f"who admits it: flexlora keys DIR --add {keys.name}.pub."
        )
    if answer.get("key") == KeyState.REVOKED:
        return Fault(
            f"The server's owner has revoked the key of this client, {keys.name}.key. To take part "
            "in this run again, make a new key and have it admitted."
        )
    if (fault := _clock_fault(answer)) is not None:
        return fault
    version = untrusted.one_line(answer.get("version"), 30)
    notes = _certificate_notes(shown.get("notAfter"), keys.ca)
    if version != __version__:
        notes.append(
            f"the server has flexlora {version}, this client {__version__}; install the same "
            "version if one refuses the other's messages"
        )
    if answer.get("finished") is True:
        notes.append("the federation is finished; asking for the adapter")
    return Greeting(tuple(notes))


def _insecure(address: str, target: tuple[str, int]) -> Greeting | Fault:
    try:
        _answer(http.client.HTTPConnection(*target, timeout=_SECONDS), {})
    except (http.client.HTTPException, ConnectionResetError):
        return Fault(
            f"The server at {address} answers, but not to plain HTTP: it was started with --keys. "
            "Join with --keys instead of --insecure.",
            is_final=True,
        )
    return Greeting()


def _answer(
    connection: http.client.HTTPConnection, headers: dict[str, str]
) -> dict[str, Any] | None:
    """What the gate answers; None if what answers is not the gate."""
    try:
        connection.request("GET", HELLO, headers=headers)
        response = connection.getresponse()
        body = response.read(_MOST_BYTES)
    finally:
        connection.close()
    try:
        answer = json.loads(body) if response.status == http.client.OK else None
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None
