"""Flower's SuperLink with two checks before it: who asks, and how much a node stores.

Run as a program in place of ``flower-superlink``, with the same options.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import uvicorn
from flwr.superlink.cli.flower_superlink import flower_superlink
from flwr.superlink.servicer.fleet import fleet_handlers
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from flexlora.deployment.flower import local_users
from flexlora.deployment.flower.local_users import OwnUserOnly
from flexlora.deployment.flower.reply_budget import MOST_OBJECT_BYTES, ReplyBudget
from flexlora.deployment.flower.superlink import LIMIT_FILE

_run = uvicorn.run


def guarded(app: Any, insecure: bool) -> OwnUserOnly:
    """Flower's application behind the check of the user.

    Without keys, nodes come to the SuperLink itself, and so their requests pass. What a request
    says of its own origin is read behind the check, for Flower's log.
    """
    behind: Any = ProxyHeadersMiddleware(app, trusted_hosts="127.0.0.1")
    find_owner = local_users.owner if local_users.can_tell() else None
    return OwnUserOnly(behind, insecure, MOST_OBJECT_BYTES + 2**12, find_owner)


def run_guarded(*, app: Any, **options: Any) -> None:
    """Serve Flower's application behind the checks, in place of ``uvicorn.run``."""
    insecure = options.get("ssl_certfile") is None
    _run(app=guarded(app, insecure), proxy_headers=False, **options)


def main() -> None:
    """Run the SuperLink until it is ended."""
    path = os.environ.get(LIMIT_FILE)
    ReplyBudget(None if path is None else Path(path)).install(fleet_handlers)
    uvicorn.run = run_guarded  # type: ignore[assignment]
    flower_superlink()


if __name__ == "__main__":
    main()
