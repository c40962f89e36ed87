"""Wrong configs and wrong command lines, drawn at random with a seed."""

import copy
import random
import typing
from pathlib import Path
from typing import Any

import tomli_w
import typer

from flexlora import methods
from flexlora.cli import main
from flexlora.config.experiment import Experiment
from flexlora.config.kinds import Kind, keys_of

LONG = "x" * 5000

NUMBERS = (
    *(0, -1, 1, 2, 3, 7, 10**6, 2**31, 2**62, 2**63, 2**64, 10**30, -(2**63)),
    *(0.0, -0.5, 0.5, 1.0, 1.5, 1e-320, 1e-9, 1e308, float("inf"), float("-inf"), float("nan")),
)
TEXTS = (
    *("", " ", "a", "auto", "none", "default", "examples", "exact", "uniform", "normal"),
    *("cpu", "CPU", "cuda", "cuda:99", "cuda:-1", "mps", "xpu", "meta", "mkldnn", "vulkan:3"),
    *("privateuseone", "garbage:0:1", "sdpa", "eager", "flash_attention_2", "paged|sdpa"),
    *("kernels-community/x", "kernels-community/flash-attn", "vllm", "os:system"),
    *("plain", "alpaca", "chat", "natural", "hub", "procedural", "flower", "remote", "iid"),
    *("utf-16", "idna", "rot13", "nonsense", "ünï\u202e\u0007", "\x1b[31m", "\x00", "a\x00b"),
    *("{{ x }}", "{{ instruction", "{% for %}", "{{ ''.__class__.__mro__ }}", "a.jinja", "x=y"),
    *(
        "file",
        "file/x",
        "folder",
        "loop",
        "loop/x",
        "rows.parquet",
        "model",
        "tiny.toml",
        "damaged",
    ),
    *("/proc/self/mem", "/proc/1/environ", "/proc/nothing/x", "/dev/null", "/dev/full"),
    *("/etc/passwd", "~", "~nobody-at-all/x", "../..", "*", "[", "\\", "'", LONG, "a/" * 2000),
    *("http://127.0.0.1:1/x", "127.0.0.1:1", "localhost:x", "[::1]:99999", "0", "1e308", "nan"),
)
LISTS = ([], [""], ["a"], [LONG], [1], [0.5, 1.5], ["\x00"], ["tensorboard"], ["q_proj"], ["loop"])
TABLES = (
    *({}, {"name": ""}, {"name": "x"}, {"name": "plain"}, {"name": "os:system"}),
    *({"name": "fedprox", "mu": 1e308}, {"name": "scaffold"}, {"name": "fedavgm", "rate": 1e308}),
    *({"name": "fedadam", "tau": 1e-300}, {"a": 1}, {"a": {"b": {"c": {}}}}),
    *({"small": float("inf")}, {"small": 1e308, "large": 1e308}, {"small": 0, "large": 0}),
    *({"name": name} for name in methods.names()),
)
VALUES = (*NUMBERS, *TEXTS, True, False, *LISTS, *TABLES)

UNKNOWN = (("nothing",), ("", ""), ("model", "nothing"), ("ranks", "clients", "client1"))


def _keys(kind: Any, above: tuple[str, ...] = ()) -> typing.Iterator[tuple[str, ...]]:
    for name, below in keys_of(kind).items():
        yield (*above, name)
        for member in below.members():
            yield from _keys(member, (*above, name))


KEYS = (*sorted(set(_keys(Experiment))), *UNKNOWN)


def config(draw: random.Random, content: dict[str, Any]) -> bytes:
    """A config file with up to three keys changed or left out, sometimes no TOML any more."""
    content = copy.deepcopy(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        _change(draw, content, draw.choice(KEYS))
    data = tomli_w.dumps(content).encode()
    return damaged(draw, data) if draw.random() < 0.15 else data


def damaged(draw: random.Random, data: bytes) -> bytes:
    """The bytes with a few of them changed, cut out or put in."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(changed) or 1)
        new = draw.choice((b"=", b"[" * 3000, b"]", b'"', b"\xff", b"\n[data]\n", b"9" * 5000, b""))
        changed[at : at + draw.choice((0, 0, 1, 30))] = new
    return bytes(changed)


def _change(draw: random.Random, content: dict[str, Any], key: tuple[str, ...]) -> None:
    *above, last = key
    for part in above:
        if not isinstance(content.get(part), dict):
            content[part] = {}
        content = content[part]
    if draw.random() < 0.08:
        content.pop(last, None)
    else:
        content[last] = draw.choice(VALUES if draw.random() < 0.15 else _fitting(key))


def _fitting(key: tuple[str, ...]) -> tuple[Any, ...]:
    """The values of the kind that a key takes."""
    kind: Kind | None = Kind(Experiment)
    for part in key:
        kind = kind.child(part) if kind else None
    found: list[Any] = []
    for member in kind.members() if kind else ():
        origin = typing.get_origin(member)
        if origin is typing.Literal:
            found += typing.get_args(member)
        elif origin in (tuple, list):
            found += LISTS
        elif origin is dict or keys_of(member):
            found += TABLES
        elif member is str:
            found += TEXTS
        elif member in (int, float):
            found += [number for number in NUMBERS if type(number) in (int, member)]
        else:
            found += (True, False)
    return tuple(found) or VALUES


def places(folder: Path) -> None:
    """Beside a config: a file, a folder, a link to itself, and a run whose files are damaged."""
    (folder / "file").write_text("text")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "damaged").mkdir()
    for name in ("config.json", "metrics.jsonl", "checkpoint.json", "adapter_config.json"):
        (folder / "damaged" / name).write_text("{\n")


def words(draw: random.Random, commands: typing.Sequence[str]) -> list[str]:
    """A command with up to three options and arguments that make no sense."""
    name = draw.choice(commands)
    known = typer.main.get_command(main.app).commands[name].params
    found = [name]
    for parameter in draw.sample(known, min(len(known), draw.randint(0, 3))):
        value = draw.choice([str(each) for each in (*NUMBERS, *TEXTS)]).replace("\0", "0")
        if parameter.param_type_name == "argument":
            found.append(value)
        elif getattr(parameter, "is_flag", False):
            found.append(parameter.opts[0])
        else:
            key = ".".join(draw.choice(KEYS))
            found += [parameter.opts[0], f"{key}={value}" if "--set" in parameter.opts else value]
    return found
