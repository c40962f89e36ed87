"""The import graph of a package and the sizes of its files, read from the source alone."""

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Import:
    """One imported module: who imports, what, and on which line. Names are dotted paths."""

    importer: str
    imported: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


@dataclass(frozen=True)
class Package:
    """A package's modules by dotted name. ``packages`` are those that are an ``__init__``."""

    name: str
    trees: Mapping[str, ast.Module]
    lines: Mapping[str, int]
    packages: frozenset[str]

    @classmethod
    def read(cls, folder: Path) -> "Package":
        trees, lines, packages = {}, {}, set()
        for path in sorted(folder.rglob("*.py")):
            parts = [folder.name, *path.relative_to(folder).with_suffix("").parts]
            if parts[-1] == "__init__":
                parts.pop()
                packages.add(".".join(parts))
            text = path.read_text(encoding="utf-8")
            trees[".".join(parts)] = ast.parse(text)
            lines[".".join(parts)] = len(text.splitlines())
        return cls(folder.name, trees, lines, frozenset(packages))

    def room(self, module: str) -> str:
        """The part of the package at the top level that a module lies in."""
        return module.split(".")[1] if "." in module else ""

    @property
    def rooms(self) -> set[str]:
        """The modules and packages at the top level."""
        return {self.room(module) for module in self.trees} - {"", "__main__"}

    @property
    def imports(self) -> list[Import]:
        """All imports, those inside functions too; not those for type checkers only."""
        return [each for module, tree in self.trees.items() for each in self._of(module, tree)]

    @property
    def own(self) -> list[Import]:
        """The imports of modules of this package."""
        return [each for each in self.imports if each.imported.split(".")[0] == self.name]

    def _of(self, module: str, tree: ast.Module) -> Iterator[Import]:
        for node in _run_nodes(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(module, alias.name, node.lineno)
            elif isinstance(node, ast.ImportFrom):
                source = self._source(module, node)
                full = [f"{source}.{alias.name}" for alias in node.names]
                for target in dict.fromkeys(x if x in self.trees else source for x in full):
                    yield Import(module, target, node.lineno)

    def _source(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        up = node.level - (module in self.packages)
        parts = module.split(".")
        parents = parts[: len(parts) - up]
        return ".".join([*parents, *([node.module] if node.module else [])])


def _run_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those below ``if TYPE_CHECKING:``; its ``else`` runs."""
    yield node
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        children = node.orelse
    for child in children:
        yield from _run_nodes(child)


def upward(package: Package, order: Sequence[str]) -> list[str]:
    """Imports of a part of the package that is not above the importer's own in ``order``."""
    place = {room: number for number, room in enumerate(order)}
    found = []
    for each in package.own:
        source, target = package.room(each.importer), package.room(each.imported)
        if source in ("", "__main__") or target in ("", source):
            continue
        if place.get(target, len(order)) >= place.get(source, -1):
            found.append(str(each))
    return found


def cycles(package: Package) -> list[list[str]]:
    """Groups of modules that import each other, in whatever function the imports stand.

    An import of ``a.b`` from outside of ``a`` runs ``a`` too.
    """
    graph: dict[str, set[str]] = {module: set() for module in package.trees}
    for each in package.own:
        parts = each.imported.split(".")
        for end in range(2, len(parts) + 1):
            target = ".".join(parts[:end])
            inside = each.importer == target or each.importer.startswith(f"{target}.")
            if target in graph and (target == each.imported or not inside):
                graph[each.importer].add(target)
    return [sorted(group) for group in _components(graph) if len(group) > 1] + [
        [module] for module, targets in graph.items() if module in targets
    ]


def _components(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """The strongly connected components: modules that reach each other."""
    reached = {module: _reachable(graph, module) for module in graph}
    found: list[set[str]] = []
    for module in graph:
        if not any(module in group for group in found):
            both = {other for other in reached[module] if module in reached[other]}
            found.append({module} | both)
    return found


def _reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    open_ = [start]
    while open_:
        for target in graph[open_.pop()] - found:
            found.add(target)
            open_.append(target)
    return found


def side_doors(package: Package, entrances: Iterable[str]) -> list[str]:
    """Imports from another part of the package past its ``__init__`` and these entrances."""
    doors = {f"{package.name}.{entrance}" for entrance in entrances}
    return [
        str(each)
        for each in package.own
        if package.room(each.importer) not in ("__main__", package.room(each.imported))
        and each.imported.count(".") > 1
        and each.imported not in doors
    ]


def strays(package: Package, places: Mapping[str, Sequence[str]]) -> list[str]:
    """Imports of another distribution outside of the places that may import it."""
    found = []
    for each in package.imports:
        allowed = places.get(each.imported.split(".")[0])
        if allowed is None:
            continue
        homes = [f"{package.name}.{place}" for place in allowed]
        if not any(each.importer == home or each.importer.startswith(f"{home}.") for home in homes):
            found.append(str(each))
    return found


def functions(package: Package) -> dict[str, int]:
    """The lines of every function, by module and qualified name."""
    found: dict[str, int] = {}

    def visit(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = name
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = f"{name}.{child.name}"
                if not isinstance(child, ast.ClassDef):
                    assert child.end_lineno is not None
                    found[inner] = child.end_lineno - child.lineno + 1
            visit(child, inner)

    for module, tree in package.trees.items():
        visit(tree, module)
    return found


def too_long(sizes: Mapping[str, int], limit: int, allowed: Mapping[str, int]) -> list[str]:
    """What is longer than ``limit`` and than it is ``allowed``; entries no longer needed."""
    found = [
        f"{name} has {size} lines, not at most {allowed.get(name, limit)}"
        for name, size in sizes.items()
        if size > max(limit, allowed.get(name, 0))
    ]
    stale = [name for name in allowed if sizes.get(name, 0) <= limit]
    return found + [f"{name} is within {limit} lines: take its entry out" for name in stale]
