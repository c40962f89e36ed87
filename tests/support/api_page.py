"""docs/api.md, made from the public names' signatures and docstrings; run it to write the page."""

import dataclasses
import enum
import inspect
from pathlib import Path
from typing import Any

import flexlora

PAGE = Path(__file__).parents[2] / "docs" / "api.md"

HEAD = """# The Python interface

Made by `make docs` from signatures and docstrings; a test keeps it true.

```python
import flexlora

settings = flexlora.load("federation.toml", ["federation.rounds=3"])
prepared = flexlora.prepare(settings)
for event in flexlora.run(prepared, "runs/federation"):
    print(event["event"])
```

`import flexlora` is quick: each name is imported on first use. Paths may be strings. Runnable files
are in [examples/](../examples).

## What is stable

flexlora is in alpha (0.x). These change in a new minor version only, and the changelog then names
what changed and how to convert:

- the names on this page, with their parameters;
- the keys of a config file and their defaults;
- the journal, `metrics.jsonl`: events and fields are added, never renamed or removed;
- the adapters written, which are plain PEFT: `adapter_config.json` with one `r` and
  `lora_alpha = r`, and `adapter_model.safetensors`;
- the command line: commands, options and exit codes (0: done; 1: a result that is not good, or a
  fault of flexlora, with its traceback; 2: a wrong input, one sentence; 130: interrupted).

These may change in any version:

- every other name, that is, all that is imported from `flexlora.SUBPACKAGE`;
- checkpoints (`state-*`, `checkpoint.json`, uploads): a run is resumed by the version that began
  it, or refused with a sentence;
- messages between server and clients: all sides of a federation run the same version;
- the wording of messages, the printed text and the HTML pages;
- which random numbers are drawn, and so the last digits of results.

"""


def page() -> str:
    names = [name for name in flexlora.__all__ if name != "__version__"]
    return HEAD + "\n".join(_section(name, getattr(flexlora, name)) for name in names)


def _section(name: str, thing: Any) -> str:
    lines = [f"## `{name}`", ""]
    if _is_plain(thing):
        lines += ["```python", _signature(name, thing), "```", ""]
    lines += [*_doc(thing), ""]
    if inspect.isclass(thing) and not issubclass(thing, BaseException):
        for attribute, member in _members(thing):
            lines += _member(attribute, member)
    return "\n".join(lines)


def _is_plain(thing: Any) -> bool:
    """Whether a call of it is worth showing: exceptions and abstract classes are not made."""
    if inspect.isclass(thing):
        return not (issubclass(thing, BaseException | enum.Enum) or inspect.isabstract(thing))
    return callable(thing)


def _members(kind: type) -> list[tuple[str, Any]]:
    """The public methods and properties that a class itself defines, in their order."""
    return [
        (name, member)
        for name, member in vars(kind).items()
        if not name.startswith("_")
        and isinstance(member, classmethod | staticmethod | property | type(_section))
    ]


def _member(name: str, member: Any) -> list[str]:
    if isinstance(member, property):
        shown, function = name, member.fget
    else:
        function = getattr(member, "__func__", member)
        bound = not isinstance(member, staticmethod)
        shown = _signature(name, function, bound, most_characters=200)
    return [f"### `{shown}`", "", *_doc(function), ""]


def _signature(name: str, thing: Any, bound: bool = False, most_characters: int = 96) -> str:
    signature = inspect.signature(thing)
    parameters = list(signature.parameters.values())[bound:]
    if inspect.isclass(thing):
        signature = signature.replace(return_annotation=inspect.Signature.empty)
    shown = [_parameter(parameter) for parameter in parameters]
    result = signature.return_annotation
    arrow = "" if result is inspect.Signature.empty else f" -> {_text(result)}"
    line = f"{name}({', '.join(shown)}){arrow}"
    if len(line) <= most_characters:
        return line
    return f"{name}(\n" + "".join(f"    {one},\n" for one in shown) + f"){arrow}"


def _parameter(parameter: inspect.Parameter) -> str:
    text = parameter.name
    if parameter.annotation is not inspect.Parameter.empty:
        text += f": {_text(parameter.annotation)}"
    if parameter.default is not inspect.Parameter.empty:
        # A default that is made anew for every object has no text that is the same every time.
        made = type(parameter.default).__name__ == "_HAS_DEFAULT_FACTORY_CLASS"
        default = "..." if made else repr(parameter.default)
        text += f" = {default}" if ":" in text else f"={default}"
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return stars.get(parameter.kind, "") + text


def _text(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _doc(thing: Any) -> list[str]:
    """The docstring as Markdown: ``code`` becomes `code`, a Raises section a list."""
    text = inspect.getdoc(thing) or ""
    if dataclasses.is_dataclass(thing) and text.startswith(f"{getattr(thing, '__name__', '')}("):
        return []  # the signature, which dataclasses put in the place of a docstring
    lines, raises = [], False
    for line in text.replace("``", "`").splitlines():
        if line == "Raises:":
            lines, raises = [*lines, "Raises:", ""], True
        elif raises and line.startswith("    ") and not line.startswith("     "):
            name, colon, rest = line.strip().partition(":")
            lines.append(f"- `{name}`{colon}{rest}")
        elif raises and line.startswith("     "):
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line)
    return lines


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
