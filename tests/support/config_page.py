"""The tables of docs/configuration.md: types and defaults from the code; run it to write them.

The meanings are written in the page itself. A key that is new gets a row without a meaning, which
a test finds.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from flexlora import methods
from flexlora.config.experiment import Experiment
from flexlora.config.kinds import Kind, keys_of
from flexlora.method import averagers, regularizers, server_optimizers

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
HEAD = "| key | type | default | meaning |\n| --- | --- | --- | --- |\n"
PLUGINS = {
    "method": methods.PLUGINS,
    "server_optimizer": server_optimizers.PLUGINS,
    "regularizer": regularizers.PLUGINS,
    "averager": averagers.PLUGINS,
}
COMMON = "of several methods"
"""The part of the options that several methods share, with one meaning."""

SHARED = ("weights", "accuracy", "precision", "split")


def page() -> str:
    """The page with the tables as the code has them and the meanings as they are written."""
    text = PAGE.read_text(encoding="utf-8")
    parts = re.split(r"^(##+ .*\n)", text, flags=re.MULTILINE)
    written = tables()
    for place in range(1, len(parts), 2):
        name = parts[place].strip("# \n`").strip("[]").removeprefix("Options ").removeprefix("of `")
        name = "" if name == "Top level" else name
        if name in written:
            parts[place + 1] = _with_table(parts[place + 1], written.pop(name))
    assert not written, f"The page has no sections for {list(written)}."
    return "".join(parts)


def tables() -> dict[str, dict[str, tuple[str, str]]]:
    """By section, the type and the default of every key."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for section, name, kind, default in _keys(Experiment, ""):
        found.setdefault(section, {})[name] = (_type(kind), _shown(default))
    for label, plugins in PLUGINS.items():
        for plugin in plugins.shipped():
            cls = plugins.kind(plugin)
            for option, kind in keys_of(cls).items():
                row = (_type(kind), _shown(getattr(cls, option, None)))
                if label == "method" and option in SHARED:
                    found.setdefault(COMMON, {})[option] = (row[0], _common_default(option, row[1]))
                else:
                    found.setdefault(plugin, {})[option] = row
    return found


def meanings() -> dict[str, str]:
    """The meaning of every row of a table of keys."""
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", text, re.MULTILINE)
    return {
        key: cells.rsplit(" | ", 1)[-1].strip() for key, cells in rows if cells.count(" | ") > 1
    }


def _common_default(option: str, shown: str) -> str:
    return {"weights": '`"examples"`'}.get(option, shown)


def _keys(section: type, place: str) -> Iterator[tuple[str, str, Kind, object]]:
    defaults = _defaults(section)
    for name, kind in keys_of(section).items():
        below = [member for member in kind.members() if keys_of(member)]
        if below and place + name != "rankstypes" and len(kind.members()) == 1:
            yield from _keys(below[0], f"{place}.{name}".lstrip("."))
        elif place or name not in PLUGINS:
            yield place, name, kind, defaults[name]


def _defaults(section: type) -> Mapping[str, object]:
    if dataclasses.is_dataclass(section):
        return {field.name: field.default for field in dataclasses.fields(section)}
    assert issubclass(section, BaseModel)
    return {
        name: field.get_default(call_default_factory=True)
        for name, field in section.model_fields.items()
    }


def _type(kind: Kind) -> str:
    words = kind.words().replace(", such as", ":").replace("a text in quotes", "a text")
    return re.sub(r"^an? ", "", words).replace("|", "\\|")


def _shown(default: object) -> str:
    if default in (dataclasses.MISSING, PydanticUndefined):
        return "required"
    return "–" if default is None else f"`{json.dumps(default)}`"


def _with_table(body: str, rows: Mapping[str, tuple[str, str]]) -> str:
    """A section with its first table of keys written anew."""
    table = re.search(r"^\| key \|.*\n\| ---.*\n((?:\|.*\n)*)", body, re.MULTILINE)
    assert table is not None, f"The section of {list(rows)} has no table of keys."
    written = dict(re.findall(r"^\| `(\w+)` \|.*? \| ([^|]*) \|$", table[1], re.MULTILINE))
    lines = [
        f"| `{key}` | {kind} | {default} | {written.get(key, '')} |\n"
        for key, (kind, default) in rows.items()
    ]
    return body[: table.start()] + HEAD + "".join(lines) + body[table.end() :]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
