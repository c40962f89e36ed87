"""Clients on the workers of a Ray cluster, each of which has a base model of its own."""

import importlib.util
import os
import secrets
import sys

from flexlora.errors import ConfigError

if importlib.util.find_spec("ray") is None:
    raise ConfigError(
        "Workers of a Ray cluster need the package 'ray'; install it with: "
        "pip install 'flexlora[ray]'."
    )


def require_token() -> None:
    """Let nobody but this process and its workers into a cluster that it starts.

    Ray listens on all of a machine's addresses and runs what it is sent. It reads this once,
    when it is imported, so that it does nothing afterwards, or where RAY_AUTH_MODE is set.
    """
    if "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
