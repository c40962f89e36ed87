"""A shorter first pause before Flower pulls the rest of a message again.

A message is visible before all of its objects have arrived. Flower pulls missing objects again
after one second, two, four, up to ten: its constant PULL_INITIAL_BACKOFF, which is bound as a
default when its modules are imported, and is not a setting. Half of a payload's transfer time
would be waited once more in every client process. The server fetches answers itself: ``inbox``.
"""

from __future__ import annotations

from typing import Final

from flwr.supercore.inflatable import inflatable_utils

_FIRST_PAUSE_SECONDS: Final = 0.1


def shorten_pull_backoff() -> None:
    """Let this process pull again after a tenth of a second, then after twice as long each time."""
    for pull in (
        inflatable_utils.pull_objects,
        inflatable_utils.pull_and_inflate_object_from_tree,
    ):
        defaults = pull.__kwdefaults__ or {}
        pull.__kwdefaults__ = {**defaults, "initial_backoff": _FIRST_PAUSE_SECONDS}
