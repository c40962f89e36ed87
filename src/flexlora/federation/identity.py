"""Whether a run that is resumed is the one that was started, and whether it is over."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from flexlora.config import Experiment, parse
from flexlora.errors import ConfigError, ProtocolError
from flexlora.journal import Record, counted


def identity(experiment: Experiment) -> str:
    """A hash of all settings that a resumed run must share with its beginning."""
    text = json.dumps(_shared(experiment), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def check_same(experiment: Experiment, stored: str, record: Record) -> None:
    """Refuse to resume a run, whose identity is ``stored``, with another config.

    A key that a later version has added counts with its default.

    Raises:
        ProtocolError: naming the keys that differ.
    """
    if stored == identity(experiment):
        return
    keys = None
    for start in record.events("start"):
        try:
            begun = parse(start["config"], str(record.path))
        except (ConfigError, KeyError):
            continue  # of a version whose keys this one does not know
        keys = list(differing(_shared(begun), _shared(experiment)))
    if keys == []:
        return
    what = f" (it differs in {', '.join(keys)})" if keys else ""
    raise ProtocolError(
        f"The run in {record.folder} was started with another config{what}; only "
        "federation.rounds and the run section may change when it is resumed."
    )


def is_over(experiment: Experiment, record: Record) -> bool:
    """Whether the run has finished with all the rounds of this config.

    Raises:
        ProtocolError: it has finished more of them.
    """
    events = list(record.events("start", "finish"))
    if not events or events[-1]["event"] != "finish":
        return False
    done, wanted = events[-1]["rounds"], experiment.federation.rounds
    if done > wanted:
        raise ProtocolError(
            f"federation.rounds is {wanted}, but the run in {record.folder} has finished "
            f"{counted(done, 'round')}; give a larger number."
        )
    return bool(done == wanted)


def differing(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[str]:
    """The dotted keys of the values that differ."""
    for key in sorted(ours.keys() | theirs.keys()):
        one, other, place = ours.get(key), theirs.get(key), (*path, key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from differing(one, other, place)
        elif one != other:
            yield ".".join(place)


def _shared(experiment: Experiment) -> dict[str, Any]:
    return experiment.model_dump(mode="json", exclude={"run": True, "federation": {"rounds"}})
