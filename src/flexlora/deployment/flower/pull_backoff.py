"""Flower asks for the rest of a message after a second; here, sooner.

A message can be seen before all of it is there. Whoever pulls it asks for what is missing after
one second, two, four, up to ten: that is Flower's constant PULL_INITIAL_BACKOFF, which is bound
as a default when its modules are imported, and is no setting. Half of the time that a payload
takes on its way would be waited once more, at the server and in every client process.
"""

from __future__ import annotations

from typing import Final

from flwr.supercore.inflatable import inflatable_utils

_FIRST_PAUSE_SECONDS: Final = 0.1


def ask_sooner() -> None:
    """Let this process ask again after a tenth of a second, then after twice as long each time."""
    for pull in (
        inflatable_utils.pull_objects,
        inflatable_utils.pull_and_inflate_object_from_tree,
    ):
        defaults = pull.__kwdefaults__ or {}
        pull.__kwdefaults__ = {**defaults, "initial_backoff": _FIRST_PAUSE_SECONDS}


def client_process() -> None:
    """Flower's program for one message on a node, which asks for it sooner."""
    from flwr.supernode.cli import flwr_clientapp

    ask_sooner()
    flwr_clientapp()


if __name__ == "__main__":
    client_process()
