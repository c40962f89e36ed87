"""Conversations of other programs in the one form that a corpus stores.

That form is a list of messages, each with ``role`` and ``content`` and what else the chat template
may use (``name``, ``tool_calls``, ...), which ends with the assistant's message to learn; if tools
are described, an object with that list and ``tools``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

Message = dict[str, Any]
"""One message of a conversation: its ``role``, its ``content`` and optional further keys."""

_ROLE_KEYS: Final = ("role", "from")
_CONTENT_KEYS: Final = ("content", "value")
_ROLES: Final[Mapping[str, str]] = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
"""The role that a role of ShareGPT, of OpenAI's older files, or of Gemini stands for."""

_TEXT_PARTS: Final = ("text", "input_text", "output_text")


class Fault(Exception):
    """What is wrong with a conversation, as the end of a sentence."""


@dataclass(frozen=True)
class Conversation:
    """A conversation that ends with the answer to learn, which is the last that is trained.

    ``messages_cut`` is the number of messages after that answer, which were removed, and
    ``earlier_answers`` that of the assistant's messages before it, which are part of the prompt.
    """

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] | None
    messages_cut: int
    earlier_answers: int

    def text(self) -> str:
        """The conversation as a corpus stores it."""
        messages: Any = list(self.messages)
        return json.dumps(
            messages if self.tools is None else {"messages": messages, "tools": self.tools},
            ensure_ascii=False,
        )


def stored(text: str) -> tuple[tuple[Message, ...], tuple[Any, ...] | None]:
    """Messages and tools of a conversation as a corpus stores it."""
    content = json.loads(text)
    if isinstance(content, dict):
        return tuple(content["messages"]), tuple(content["tools"])
    return tuple(content), None


def parse(value: Any, tools: Any = None) -> Conversation | None:
    """The conversation in a list of messages or its JSON text; None if it has nothing to learn.

    Understands ``role`` and ``content`` as well as ShareGPT's ``from`` and ``value``, contents in
    text parts, and function calls of both of OpenAI's forms. A message of the assistant with
    ``weight`` 0 is not learnt. Keys whose value is null are left out, as Parquet has every key in
    every message.

    Raises:
        Fault: a message cannot be read, or has parts other than text.
    """
    listed = _list(_rows_of_columns(_decoded(value)), "a conversation", "messages")
    messages = [_message(each) for each in listed]
    learnt = [
        place
        for place, (message, is_trained) in enumerate(messages)
        if message["role"] == "assistant" and is_trained
    ]
    if not learnt or learnt[-1] == 0:
        return None
    last = learnt[-1]
    earlier = sum(message["role"] == "assistant" for message, _ in messages[:last])
    kept = tuple(message for message, _ in messages[: last + 1])
    return Conversation(kept, _tools(tools), len(messages) - len(kept), earlier)


def _decoded(value: Any) -> Any:
    """The value, parsed if it is JSON text, as in a CSV file."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise Fault(
            f"the conversation is text that is not JSON ({error}); write it as a list of "
            '{"role": ..., "content": ...}'
        ) from error


def _rows_of_columns(value: Any) -> Any:
    """The messages of a dict of lists, as ``datasets`` stores a sequence of dicts."""
    keys = value.keys() if isinstance(value, Mapping) else ()
    if not any(key in keys for key in _ROLE_KEYS):
        return value
    columns = [column for column in value.values() if isinstance(column, Sequence)]
    if len(columns) != len(keys) or len({len(column) for column in columns}) > 1:
        return [value]
    if any(isinstance(column, str) for column in columns):
        return [value]
    return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]


def _list(value: Any, what: str, items: str) -> list[Any]:
    if isinstance(value, Mapping) and isinstance(value.get(items), Sequence):
        value = value[items]
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise Fault(
            f'{what} is {value!r:.60}; it must be a list of {{"role": ..., "content": ...}}'
        )
    return list(value)


def _message(raw: Any) -> tuple[Message, bool]:
    """One message in the stored form, and whether it may be learnt."""
    if isinstance(raw, list) and raw and all(isinstance(each, tuple) for each in raw):
        raw = dict(raw)  # a map of Arrow
    if not isinstance(raw, Mapping):
        raise Fault(f"a message is {raw!r:.60}; it must have a role and a content")
    given = {str(key): value for key, value in raw.items() if value is not None}
    role_key = next((key for key in _ROLE_KEYS if key in given), None)
    content_key = next((key for key in _CONTENT_KEYS if key in given), None)
    if role_key is None or not isinstance(given[role_key], str):
        raise Fault(
            f"a message has no role: {dict(given)!r:.80}; it needs 'role' and 'content', or "
            "'from' and 'value'"
        )
    source_role = given[role_key].strip().casefold()
    further = {
        key: value
        for key, value in given.items()
        if key not in (role_key, content_key, "weight", "function_call")
    }
    calls = _calls(given, source_role, content_key)
    message = {
        "role": "assistant" if source_role == "function_call" else _role(source_role),
        "content": "" if content_key is None else _content(given[content_key]),
        **further,
    }
    if calls is None and isinstance(given.get("tool_calls"), Sequence):
        calls = given["tool_calls"]
    if calls is not None:
        message["tool_calls"] = [_call(call) for call in calls]
        if source_role == "function_call":
            message["content"] = ""
    if content_key is None and not calls:
        raise Fault(f"a message has no content: {dict(given)!r:.80}")
    return message, _is_trained(given.get("weight", 1))


def _role(role: str) -> str:
    return _ROLES.get(role, role)


def _is_trained(weight: Any) -> bool:
    if isinstance(weight, bool) or weight in (0, 1):
        return bool(weight)
    raise Fault(f"a message has the weight {weight!r}; it must be 0 (not learnt) or 1")


def _content(value: Any) -> str:
    """The text of a message's content, whose text parts are joined by new lines."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence):
        raise Fault(f"the content of a message is {value!r:.60}; it must be text")
    texts = []
    for part in value:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) else None
        if (kind is not None and kind not in _TEXT_PARTS) or not isinstance(text, str):
            raise Fault(
                f"a message has a part of the type {kind or type(part).__name__!r}, and only "
                "text can be learnt; remove such rows, or the part"
            )
        texts.append(text)
    return "\n".join(texts)


def _calls(given: Mapping[str, Any], role: str, content_key: str | None) -> list[Any] | None:
    """The tool calls of a message in one of the older forms; None if it has none of these."""
    call = given.get("function_call")
    if role == "function_call" and content_key is not None:
        call = given[content_key]
    if isinstance(call, str):
        try:
            call = json.loads(call)
        except json.JSONDecodeError as error:
            raise Fault(f"a function call is not JSON: {call!r:.60}") from error
    if call is None:
        return None
    every = call if isinstance(call, list) else [call]
    return [{"type": "function", "function": each} for each in every]


def _call(call: Any) -> Any:
    """A tool call whose arguments are an object, as chat templates expect, and not JSON text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return _without_none(call)
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except json.JSONDecodeError:
        return _without_none(call)
    return _without_none({**call, "function": {**function, "arguments": arguments}})


def _tools(value: Any) -> tuple[Any, ...] | None:
    """Descriptions of tools, each wrapped as chat templates expect it; None if there are none."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise Fault(f"the tools are text that is not JSON ({error})") from error
    if not value:
        return None
    if not isinstance(value, Sequence) or not all(isinstance(tool, Mapping) for tool in value):
        raise Fault(f"the tools are {value!r:.60}; they must be a list of objects")
    pruned = [_without_none(tool) for tool in value]
    return tuple(
        tool if "function" in tool or "type" in tool else {"type": "function", "function": tool}
        for tool in pruned
    )


def _without_none(value: Any) -> Any:
    """The value without the keys whose value is null, at any depth."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_none(item) for item in value]
    return value
