"""Which column of a source is which column of a corpus."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Final

from flexlora.errors import DataError

TEXTS: Final = ("instruction", "input", "output")

OTHER_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "instruction": ("prompt", "question", "query", "problem"),
    "input": ("context",),
    "output": ("completion", "response", "answer", "solution", "target"),
    "messages": ("conversations", "conversation", "dialogue", "dialog", "turns", "chat"),
    "client": ("client_id", "user", "user_id", "site", "hospital", "owner", "author", "device"),
    "category": ("label", "task", "topic"),
}
"""Common other names. Those of ``client`` and ``category`` are only suggested, since a wrong guess
would change results."""

TOOLS: Final = ("tools", "functions")
"""Columns beside ``messages`` that describe the tools a conversation may call."""

_CHANGES_THE_PROMPT: Final = ("system", "system_prompt", "history")
"""Columns that other programs put into the prompt; a notice says that they are not read."""


@dataclass(frozen=True)
class Columns:
    """The source's name of each column of a corpus.

    None, the default, stands for the column's own name if the source has it, and for the texts
    also for one of ``OTHER_NAMES`` if exactly one of these is there. "" says that there is no
    such column. A source must have any other name. With ``messages`` the rows are
    conversations, and instruction, input and output are not read. Without ``client`` the rows
    must be partitioned afterwards, without ``split`` they must be split.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    messages: str | None = None
    client: str | None = None
    category: str | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        if self.messages == "" == self.output:
            raise DataError(
                "Rows need an 'output' (the response to learn) or 'messages', but data.columns "
                'sets both to ""; name one of them.'
            )
        texts = [name for name in TEXTS if getattr(self, name)]
        if self.messages and texts:
            raise DataError(
                f"data.columns names both messages ('{self.messages}') and {', '.join(texts)}; a "
                "row is either a conversation or an instruction with its output. Remove one."
            )

    def explicit(self) -> dict[str, str]:
        """The columns that a source must have: from the corpus's name to the source's."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: source for name, source in named if source}

    def is_absent(self, name: str) -> bool:
        """Whether the column is said not to exist."""
        return bool(getattr(self, name) == "")


@dataclass(frozen=True)
class Chosen:
    """The source's name of every column to read, by the corpus's name.

    ``tools`` is the source's column of tool descriptions, beside ``messages`` only. ``notices``
    are sentences on names that were not the standard ones. ``fields`` are further columns, by the
    source's names, for a prompt template.
    """

    sources: Mapping[str, str]
    tools: str | None
    notices: tuple[str, ...]
    fields: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """The source's columns to read, each once, even if two columns use the same one."""
        tools = [self.tools] if self.tools else []
        return list(dict.fromkeys([*self.sources.values(), *tools, *self.fields]))


def choose(
    columns: Columns,
    names: Sequence[str],
    place: str,
    needs: Collection[str] = (),
    fields: Collection[str] = (),
) -> Chosen:
    """The columns to read from a source whose columns are ``names``.

    ``needs`` are optional columns without which the rows cannot be used, such as ``client``;
    ``fields`` are columns that a prompt template uses.

    Raises:
        DataError: explicit or needed columns are missing (names all of them), a wanted name
            occurs twice, or it is not clear which column is the prompt or the response.
    """
    sources = columns.explicit()
    missing = {name: source for name, source in sources.items() if source not in names}
    taken = set(sources.values())
    if missing:
        raise DataError(_missing(missing, names, place))
    finder = _Finder(columns, names, taken, place)
    if conversations := finder.conversations():
        sources["messages"] = conversations
        tools = next((name for name in TOOLS if name in names), None)
    else:
        sources |= finder.texts()
        tools = None
    for name in ("client", "category", "split"):
        if name not in sources and (source := finder.standard(name, shared=True)):
            sources[name] = source
    absent = [name for name in needs if name not in sources]
    if absent:
        raise DataError(_needed(absent, columns, names, place))
    unknown = [name for name in fields if name not in names]
    if unknown:
        raise DataError(
            f"The template data.prompt uses {_joined(unknown)}, but {place} has no such column; "
            f"its columns are {_listed(names)}."
        )
    _refuse_duplicates({**sources, **{name: name for name in fields}}, names, place)
    notices = _notices(columns, sources, names, place)
    return Chosen(sources, tools, notices, tuple(fields))


@dataclass(frozen=True)
class _Finder:
    """Looks for columns that are not named explicitly."""

    columns: Columns
    names: Sequence[str]
    taken: Collection[str]
    place: str

    def standard(self, name: str, shared: bool = False) -> str | None:
        """The source's column of this name, in any case; None if there is none or it is absent.

        ``shared``: even if another column is read from it.
        """
        if self.columns.is_absent(name):
            return None
        free = [each for each in self.names if shared or each not in self.taken]
        if name in free:
            return name
        same = [each for each in free if each.strip().casefold() == name]
        return same[0] if len(same) == 1 else None

    def one(self, name: str) -> str | None:
        """The standard name, else the only one of the common other names.

        Raises:
            DataError: the source has several of them.
        """
        if self.columns.is_absent(name):
            return None
        if found := self.standard(name):
            return found
        others = [
            each
            for each in self.names
            if each not in self.taken and each.strip().casefold() in OTHER_NAMES[name]
        ]
        if len(set(others)) > 1:
            raise DataError(
                f"{self.place} has several columns that may be the {name}: {', '.join(others)}. "
                f'Say which one: set data.columns.{name} = "{others[0]}", for example.'
            )
        return others[0] if others else None

    def conversations(self) -> str | None:
        """The column of conversations; None if the rows are instructions and outputs.

        Raises:
            DataError: the source has conversations and outputs, and nothing says which to read.
        """
        columns = self.columns
        if columns.messages or any(getattr(columns, name) for name in TEXTS):
            return columns.messages or None
        conversations, output = self.one("messages"), self.standard("output")
        if conversations and output and not columns.is_absent("output"):
            raise DataError(
                f"{self.place} has conversations ('{conversations}') and outputs ('{output}'). "
                f'Say which to read: data.columns = {{ messages = "{conversations}" }} or '
                f'data.columns = {{ output = "{output}" }}.'
            )
        return conversations

    def texts(self) -> dict[str, str]:
        """The columns of the prompt and the response.

        Raises:
            DataError: there is no response, or no prompt.
        """
        columns = self.columns
        texts = {name: getattr(columns, name) for name in TEXTS if getattr(columns, name)}
        for name in ("instruction", "input"):
            if name not in texts and (source := self.standard(name)):
                texts[name] = source
        if not (texts.keys() & {"instruction", "input"}) and (source := self.one("instruction")):
            texts["instruction"] = source
        if "input" not in texts and "instruction" in texts and (source := self.one("input")):
            texts["input"] = source
        if "output" not in texts and (source := self.one("output")):
            texts["output"] = source
        is_without_prompt = columns.is_absent("instruction") and columns.is_absent("input")
        faults = [] if "output" in texts else ["the response to learn ('output')"]
        if not (texts.keys() & {"instruction", "input"}) and not is_without_prompt:
            faults.insert(0, "the prompt ('instruction')")
        if faults:
            raise DataError(self._no_texts(faults, texts))
        return texts

    def _no_texts(self, faults: Sequence[str], texts: Mapping[str, str]) -> str:
        free = [name for name in self.names if name not in texts.values()]
        guess = {"instruction": "PROMPT", "output": "RESPONSE", **texts}
        for name in ("instruction", "output"):
            near = difflib.get_close_matches(name, free, n=1)
            if name not in texts and near:
                guess[name] = near[0]
        line = ", ".join(f'{name} = "{source}"' for name, source in guess.items())
        near = [n for n in guess.values() if n in free]
        hint = f" Did you mean '{near[0]}'?" if near else ""
        return (
            f"{self.place} has no column for {' and '.join(faults)}; its columns are "
            f"{_listed(self.names)}.{hint} Set data.columns = {{ {line} }}"
            + ("." if not {"PROMPT", "RESPONSE"} & set(guess.values()) else ", with your names.")
        )


def toml(columns: Columns) -> str:
    """The columns as the value of the key ``columns`` of a config's section ``[data]``."""
    named = ((field.name, getattr(columns, field.name)) for field in fields(columns))
    return "{ " + ", ".join(f'{n} = "{source}"' for n, source in named if source is not None) + " }"


def _missing(missing: Mapping[str, str], names: Sequence[str], place: str) -> str:
    """The sentence on explicit columns that a source does not have."""
    listed = ", ".join(f"'{source}' (data.columns.{n})" for n, source in missing.items())
    near = {
        source: match[0]
        for source in missing.values()
        if (match := difflib.get_close_matches(source, names, n=1))
    }
    hint = "".join(f" Did you mean '{each}'?" for each in dict.fromkeys(near.values()))
    return (
        f"{place} has no column {listed}; its columns are {_listed(names)}.{hint} Set each to a "
        'column of the data, or to "" if there is no such column.'
    )


def _needed(absent: Sequence[str], columns: Columns, names: Sequence[str], place: str) -> str:
    """The sentence on columns that the partition needs."""
    suggested = [
        each
        for name in absent
        for each in names
        if each.strip().casefold() in OTHER_NAMES.get(name, ())
        or difflib.get_close_matches(name, [each], cutoff=0.75)
    ]
    hint = f" Did you mean '{suggested[0]}'?" if suggested else ""
    said = {
        name: f'data.columns.{name} is ""'
        if columns.is_absent(name)
        else f"there is no column '{name}'"
        for name in absent
    }
    other = (
        ', or assign the rows to simulated clients: data.partition = { kind = "iid", clients = 4 }'
        if "client" in absent
        else ""
    )
    return (
        f"{place} does not say which {' and which '.join(absent)} a row belongs to "
        f"({'; '.join(said.values())}); its columns are {_listed(names)}.{hint} Set "
        f"{' and '.join(f'data.columns.{name}' for name in absent)} to the column's name{other}."
    )


def _refuse_duplicates(sources: Mapping[str, str], names: Sequence[str], place: str) -> None:
    for name, source in sources.items():
        if (times := names.count(source)) > 1:
            raise DataError(
                f"{place} has {times} columns '{source}', so it is not clear which one is the "
                f"{name}; rename all but one in the source."
            )


def _notices(
    columns: Columns, sources: Mapping[str, str], names: Sequence[str], place: str
) -> tuple[str, ...]:
    explicit = columns.explicit()
    guessed = [
        f"'{source}' is read as the {name}"
        for name, source in sources.items()
        if name not in explicit and source != name
    ]
    notices = []
    if guessed:
        notices.append(f"{place}: {_joined(guessed)} (data.columns can name others).")
    unread = [
        each
        for each in names
        if each.casefold() in _CHANGES_THE_PROMPT and each not in sources.values()
    ]
    if unread:
        notices.append(
            f"{place}: the column {_joined([repr(each) for each in unread])} is not read and "
            "not part of the prompts."
        )
    return tuple(notices)


def _joined(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _listed(names: Iterable[str]) -> str:
    """The names, of which at most twenty."""
    every = list(names)
    more = f" and {len(every) - 20} others" if len(every) > 20 else ""
    return ", ".join(every[:20]) + more if every else "none"
