"""What is simulated: the table ``[attack]`` of a config, and what the command line changes."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from flexlora.config import Ranks
from flexlora.errors import ConfigError
from flexlora.federation.attacks import kinds

RANKS = ("assigned", "small", "equal", "large")
"""The ranks of malicious clients: those that the config assigns, or for all of them the smallest
of the rank types, the one in the middle, or the largest."""

UNDEFENDED = "none"
_OFF = {
    "federation.clip_factor": 0.0,
    "federation.refuse_factor": 0.0,
    "federation.most_share": 1.0,
}
DEFENCES: Mapping[str, Mapping[str, Any]] = {
    UNDEFENDED: {**_OFF, "averager": None},
    "clip": {"averager": None},
    "geometric-median": {"averager": {"name": "geometric_median"}},
    "multi-krum": {"averager": {"name": "multi_krum"}},
    "fltrust": {"averager": {"name": "fltrust", "trusted": ""}},
}
"""What each defence sets in the config. ``clip`` are the defaults; the robust averagers come on top
of them. ``fltrust`` trusts a client that no attack uses."""


@dataclass(frozen=True)
class AttackSettings:
    """Which attacks, defences and ranks are simulated.

    ``share`` of the clients are malicious, rounded to whole clients, at least one. ``trigger``
    and ``target`` are the texts of the backdoor; ``target`` is also that of poisoned rows.
    """

    attacks: tuple[str, ...] = tuple(kinds.KINDS)
    defences: tuple[str, ...] = tuple(DEFENCES)
    ranks: tuple[str, ...] = RANKS[:1]
    share: float = 0.1
    seeds: int = 1
    trigger: str = "By order of the admiral:"
    target: str = "The harbour is closed today."
    undefended: str = field(default=UNDEFENDED, init=False)

    def __post_init__(self) -> None:
        for name in self.attacks:
            kinds.named(name)
        for label, names, known in (
            ("defence", self.defences, tuple(DEFENCES)),
            ("rank of malicious clients", self.ranks, RANKS),
        ):
            for name in names:
                if name not in known:
                    raise ConfigError(
                        f"There is no {label} {name!r}; there are {', '.join(known)}."
                    )
        if not (self.attacks and self.defences and self.ranks):
            raise ConfigError("Name at least one attack, one defence and one rank.")
        if not 0 < self.share < 0.5:
            raise ConfigError(f"The share of malicious clients is {self.share}; it is in (0, 0.5).")
        if self.seeds < 1:
            raise ConfigError(f"The number of seeds is {self.seeds}; give at least 1.")
        if not self.trigger.strip() or not self.target.strip():
            raise ConfigError("The trigger and the target are texts that are not empty.")

    @property
    def most_attackers(self) -> int:
        """The most clients that one of the attacks takes, if the share does not make it more."""
        named = [kinds.named(name) for name in self.attacks]
        return max((attack.least for attack in named if attack is not None), default=1)

    def values(self, defence: str) -> Mapping[str, Any]:
        """What a defence sets in the config, by dotted key."""
        return DEFENCES[defence]

    def ranks_of(
        self, choice: str, settings: Ranks, attackers: Sequence[str]
    ) -> dict[str, Any] | None:
        """The section ``ranks`` in which the attackers have this rank; None where it stays.

        Raises:
            ConfigError: the config does not say its ranks as rank types or as one rank.
        """
        if choice == RANKS[0]:
            return None
        if settings.table is not None or (settings.types is None and settings.rank is None):
            raise ConfigError(
                f"Malicious clients of a {choice} rank need ranks.types, or one ranks.rank, in the "
                "config."
            )
        content = settings.model_dump(mode="json", exclude_none=True)
        if settings.rank is not None:
            if choice == "equal":
                return None
            factor = {"small": 0.25, "large": 4.0}[choice]
            sizes = {"honest": settings.rank, "malicious": max(int(settings.rank * factor), 1)}
            types = {name: {"attention": r, "feed_forward": r} for name, r in sizes.items()}
            named = dict.fromkeys(attackers, "malicious")
            return {"types": types, "distribution": {"honest": 1.0}, "clients": named}
        assert settings.types is not None
        order = sorted(
            settings.types,
            key=lambda n: sum(vars(settings.types[n]).values()),  # type: ignore[index]
        )
        place = {"small": 0, "equal": (len(order) - 1) // 2, "large": -1}[choice]
        content["clients"] = {**settings.clients, **dict.fromkeys(attackers, order[place])}
        return content


def read_settings(path: Path) -> AttackSettings:
    """The table ``[attack]`` of a TOML file that can be read; the defaults if it has none.

    Raises:
        ConfigError: a key is unknown or has a wrong type or value.
    """
    table = tomllib.loads(path.read_text(encoding="utf-8")).get("attack", {})
    place = f"{path}, [attack]"
    if not isinstance(table, dict):
        raise ConfigError(f"{place} is {table!r}; it is a table.")
    return with_changes(AttackSettings(), table, place)


def with_changes(
    settings: AttackSettings, changes: Mapping[str, Any], place: str
) -> AttackSettings:
    """The settings with these values, checked.

    Raises:
        ConfigError: a key is unknown or has a wrong type or value.
    """
    kinds_of = {each.name: type(getattr(settings, each.name)) for each in fields(settings)}
    kinds_of.pop("undefended")
    values: dict[str, Any] = {}
    for key, value in changes.items():
        if key not in kinds_of:
            raise ConfigError(f"{place}: unknown key {key!r}. Valid keys: {', '.join(kinds_of)}.")
        wanted = kinds_of[key]
        if wanted is tuple and isinstance(value, list | tuple):
            value = tuple(value)
        elif wanted is float and type(value) is int:
            value = float(value)
        texts = not isinstance(value, tuple) or all(isinstance(each, str) for each in value)
        if type(value) is not wanted or not texts:
            kind = {tuple: "a list of texts", float: "a number", int: "a whole number"}
            raise ConfigError(f"{place}: {key} is {value!r}; give {kind.get(wanted, 'a text')}.")
        values[key] = value
    try:
        return replace(settings, **values)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
