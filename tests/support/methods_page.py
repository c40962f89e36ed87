"""docs/methods.md, generated from the methods and from measured messages; run it to write it."""

import ast
import inspect
import json
import operator
import re
from pathlib import Path

import torch

from flexlora import methods, wire
from flexlora.cli.methods import LISTED
from flexlora.cli.methods import row as listed_row
from flexlora.laws.rounds import aggregated, client_turn, context_of, first_state, noise
from flexlora.method import Client, Feature, Method

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
MODULE, SHAPE = "model.layers.0.mlp.gate_proj", (1536, 576)
MIXED_RANKS, EQUAL_RANKS = (4, 8, 16), (8, 8, 8)
"""Of the three clients of the measured rounds, for methods that support mixed ranks and others."""
MEASURED = 1
"""Which of the clients is measured: it takes part in every round."""

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def value(formula: str, names: dict[str, float]) -> float:
    """A formula of sums and products."""

    def of(node: ast.AST) -> float:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](of(node.left), of(node.right))
        return names[node.id] if isinstance(node, ast.Name) else node.value

    return of(ast.parse(formula, mode="eval").body)


def body(data: bytes) -> int:
    """The bytes of a message without its header."""
    return len(data) - 8 - int.from_bytes(data[:8], "little")


def measured(name: str) -> dict:
    """Bytes up and down of the middle client in rounds 2 and 3, and the formulas' variables."""
    method, shapes = methods.make(name), {MODULE: SHAPE}
    sparse = Feature.SPARSE_MESSAGES in method.features
    ranks = MIXED_RANKS if Feature.MIXED_RANKS in method.features else EQUAL_RANKS
    clients = [
        Client(f"c{i}", {MODULE: r}, f"t{i}", n)
        for i, (r, n) in enumerate(zip(ranks, (13, 17, 29), strict=True))
    ]
    state = first_state(method, clients, shapes)
    private = {client.id: {} for client in clients}
    up, down, update_ranks, budgets, sides = [], [], [], [], []
    for number in (1, 2, 3):
        context, learn = context_of(number, clients, shapes), noise(method, number)
        turns = [client_turn(method, state, c, context, learn, private[c.id]) for c in clients]
        handed = method.handout(state, clients[MEASURED], context)
        upload = turns[MEASURED].upload
        if number > 1:
            up.append(body(wire.encode_upload(upload, torch.float32, sparse)))
            down.append(body(wire.encode_download(handed, torch.float32, sparse)))
            update_ranks.append(max([a[MODULE].rank for a in handed.base_updates.values()] or [0]))
            budgets.append(upload.adapter[MODULE].rank)
            sides.append(upload.adapter[MODULE].shape[0])
        private = {turn.client.id: turn.private for turn in turns}
        state = aggregated(method, state, [turn.upload for turn in turns], context)
    return {"up": up, "down": down, "p": update_ranks, "b": budgets, "c": sides, "ranks": ranks}


def predicted(name: str, measurement: dict) -> dict[str, list[float]]:
    """The same messages' bytes by the formulas."""
    info, ranks = methods.make(name).info, measurement["ranks"]
    m, n = SHAPE
    names = {
        "m": m,
        "n": n,
        "r": ranks[MEASURED],
        "R": max(ranks),
        "S": sum(ranks),
        "K": len(ranks),
    }
    sizes = {}
    for way in ("up", "down"):
        early, _, late = getattr(info, way).partition(" then ")
        sizes[way] = []
        for at, number in enumerate((2, 3)):
            # Rounds 2 and 3; "or" begins with round 1, "then" with round 3.
            parts = (late if late and number == 3 else early).split(" or ")
            now = {name: measurement[name][at] for name in ("p", "b", "c")}
            numbers = value(parts[(number - 1) % len(parts)], {**names, **now})
            sizes[way].append(4 * round(numbers))
    return sizes


def kib(values: list[int]) -> str:
    return " or ".join(f"{v / 1024:.1f}" for v in dict.fromkeys(reversed(values)))


def code_lines(name: str) -> int:
    """Lines of a method's file without docstrings, comments and blank lines."""
    source = Path(inspect.getfile(methods.kind(name))).read_text(encoding="utf-8")
    tree, strings = ast.parse(source), set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            strings |= set(range(node.lineno, node.end_lineno + 1))
    return sum(
        1
        for number, line in enumerate(source.splitlines(), 1)
        if line.strip() and not line.strip().startswith("#") and number not in strings
    )


COMPOSES = {Feature.PRODUCT_STATE: "server optimizers", Feature.COMMON_FACTORS: "SCAFFOLD"}


def composes_with(method: Method) -> str:
    """What the method's features let be added to it."""
    return ", ".join(label for f, label in COMPOSES.items() if f in method.features) or "–"


def exactness(method: Method) -> str:
    if Feature.PERSONAL in method.features:
        return "–"
    if not method.info.exact:
        return "no"
    return "by component" if method.info.by_component else "yes"


def row(name: str) -> str:
    method, measurement = methods.make(name), measured(name)
    info, features = method.info, method.features
    up, down = (re.sub(r"\*", " ", formula) for formula in (info.up, info.down))
    cells = [
        f"`{name}`",
        info.title,
        info.paper,
        exactness(method),
        "yes" if Feature.MIXED_RANKS in features else "no",
        "yes" if Feature.PER_MODULE in features else "no",
        f"{up}: {kib(measurement['up'])}",
        f"{down}: {kib(measurement['down'])}",
        info.server,
        composes_with(method),
        str(code_lines(name)),
    ]
    return "| " + " | ".join(cells) + " |"


def notes(name: str) -> str:
    module = inspect.getmodule(methods.kind(name))
    return f"### `{name}`\n\n{inspect.cleandoc(module.__doc__)}\n"


COLUMNS = (
    *("name", "method", "paper", "exact", "mixed ranks", "mixed modules", "up, KiB", "down, KiB"),
    *("server, per module", "composes with", "code"),
)

HEAD = """# Methods

Generated from the methods by `make docs`; a test checks that it is up to date.

A method of this library is one file in `src/flexlora/methods/`. The laws of
`src/flexlora/laws/laws.py` are checked on all of them. To add your own, see
[CONTRIBUTING.md](../CONTRIBUTING.md). The columns of the table:

- **Exact:** whether the server's result is the weighted mean of the clients' products, up to the
  rank that the server keeps. "By component": the mean of each rank-one component is over the
  clients that have this component. A dash: each client's model is personal. Exactness is that of
  a float32 wire; a coarser `federation.wire_dtype` rounds every message.
- **Mixed ranks:** methods without it require all clients to use the same rank.
- **Mixed modules:** methods without it require all clients to train the same kinds of layers; the
  others average each module over the clients that train it. Other configurations are refused at
  startup.
- **Up** and **down:** parameters in an upload and a download for one module of m x n, as a
  formula: r is the client's rank, R the largest rank, S the sum of the ranks of the cohort, K its
  size, p the rank that an energy threshold leaves, b the number of components that a budget gives
  the module, c the number of parameters of a method that trains other parameters than `B` and
  `A`. "Or" separates alternating rounds, "then" an early from a later phase. After the formula:
  the measured KiB of float32 messages for one module of {shape}, for a client of rank 8 among
  clients of ranks 4, 8 and 16 (8, 8, 8 where ranks must be equal) that took part in every round.
- **Composes with:** FedProx composes with every method; a server optimizer or SCAFFOLD only with
  those named here, and is refused with others.
- **Code:** lines of code without comments, docstrings and blank lines. The median is {median}.

{guide}
## Table

{header}
"""

GUIDE = Path(__file__).with_name("methods_guide.md")


def page() -> str:
    lines = sorted(code_lines(name) for name in methods.shipped())
    head = HEAD.format(
        shape=f"{SHAPE[0]} x {SHAPE[1]}",
        header=f"| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|",
        median=lines[len(lines) // 2],
        guide=GUIDE.read_text(encoding="utf-8") if GUIDE.exists() else "",
    )
    rows = "\n".join(row(name) for name in methods.shipped())
    return f"{head}{rows}\n\n## What each one does\n\n" + "\n".join(map(notes, methods.shipped()))


def listed() -> str:
    """The rows of `flexlora methods`, which it reads without asking the methods."""
    return (
        json.dumps([listed_row(name) for name in methods.shipped()], indent=1, ensure_ascii=False)
        + "\n"
    )


if __name__ == "__main__":
    LISTED.write_text(listed(), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
