"""docs/methods.md, generated from the methods and from measured messages; run it to write it."""

import ast
import inspect
import operator
import re
from pathlib import Path

import torch

from flexlora import methods, wire
from flexlora.method.interface import Client
from support.rounds import draw_of, jolt, made, started, turn

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
MODULE, SHAPE = "model.layers.0.mlp.gate_proj", (1536, 576)
RANKS = {True: (4, 8, 16), False: (8, 8, 8)}
"""Of the three clients of the measured rounds, for methods that take mixed ranks and others."""
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
    """Bytes up and down of the middle client in rounds 2 and 3, and what the formulas speak of."""
    method, shapes = made(name), {MODULE: SHAPE}
    ranks = RANKS[method.mixed_ranks]
    clients = [
        Client(f"c{i}", {MODULE: r}, f"t{i}", n)
        for i, (r, n) in enumerate(zip(ranks, (13, 17, 29), strict=True))
    ]
    state, kept = started(method, clients, shapes), dict.fromkeys(c.id for c in clients)
    up, down, energy_ranks, budget, sides = [], [], [], [], []
    for number in (1, 2, 3):
        learn = jolt(number, method=method)
        turns = [turn(method, state, c, number, learn, kept[c.id], shapes) for c in clients]
        client = clients[MEASURED]
        handed = method.handout(state, client, draw_of(number))
        if number > 1:
            up.append(
                body(wire.encode_upload(turns[MEASURED].upload, torch.float32, method.sparse))
            )
            down.append(body(wire.encode_download(handed, torch.float32, method.sparse)))
            energy_ranks.append(max([a[MODULE].rank for a in handed.merge.values()], default=0))
            budget.append(turns[MEASURED].upload.adapter[MODULE].rank)
            sides.append(turns[MEASURED].upload.adapter[MODULE].shape[0])
        kept = {t.client.id: t.kept for t in turns}
        state = method.aggregate(state, [t.upload for t in turns])
    return {"up": up, "down": down, "p": energy_ranks, "b": budget, "c": sides, "ranks": ranks}


def predicted(name: str, found: dict) -> dict[str, list[float]]:
    """What the formulas say of the same messages, in bytes."""
    kind, ranks = methods.kind(name), found["ranks"]
    m, n = SHAPE
    names = {
        "m": m,
        "n": n,
        "r": ranks[MEASURED],
        "R": max(ranks),
        "S": sum(ranks),
        "K": len(ranks),
    }
    said = {}
    for way in ("up", "down"):
        early, _, late = getattr(kind, way).partition(" then ")
        said[way] = []
        for at, number in enumerate((2, 3)):
            # Rounds 2 and 3; "or" begins with round 1, "then" with round 3.
            parts = (late if late and number == 3 else early).split(" or ")
            now = {name: found[name][at] for name in ("p", "b", "c")}
            numbers = value(parts[(number - 1) % len(parts)], {**names, **now})
            said[way].append(4 * round(numbers))
    return said


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


def ways(name: str) -> str:
    """What composes with the method, as it declares."""
    kind = methods.kind(name)
    found = [label for attribute, label in COMPOSES.items() if getattr(kind, attribute, False)]
    return ", ".join(found) or "–"


COMPOSES = {"product": "server optimisers", "fixed_frame": "SCAFFOLD"}


def row(name: str) -> str:
    kind, found = methods.kind(name), measured(name)
    exact = "no" if not kind.exact else "term by term" if kind.rank_wise else "yes"
    formulas = [re.sub(r"\*", " ", getattr(kind, way)) for way in ("up", "down")]
    cells = [
        f"`{name}`",
        kind.title,
        kind.paper,
        "–" if kind.personal else exact,
        "yes" if kind.mixed_ranks else "no",
        "yes" if kind.by_module else "no",
        f"{formulas[0]}: {kib(found['up'])}",
        f"{formulas[1]}: {kib(found['down'])}",
        kind.server,
        ways(name),
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

A method of this library is one file in `src/flexlora/methods/`. The tests in
`tests/methods/test_laws.py` ("laws") run on all of them. To add your own, see
[CONTRIBUTING.md](../CONTRIBUTING.md). The columns of the table:

- **Exact:** whether the server's result is the weighted mean of the clients' products, up to the
  rank that the server keeps. "Term by term": the mean of each rank-one component is over the
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
    lines = sorted(code_lines(name) for name in methods.names())
    head = HEAD.format(
        shape=f"{SHAPE[0]} x {SHAPE[1]}",
        header=f"| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|",
        median=lines[len(lines) // 2],
        guide=GUIDE.read_text(encoding="utf-8") if GUIDE.exists() else "",
    )
    rows = "\n".join(row(name) for name in methods.names())
    return f"{head}{rows}\n\n## What each one does\n\n" + "\n".join(map(notes, methods.names()))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
