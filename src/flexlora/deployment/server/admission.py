"""Which nodes may take part: those whose public keys are in the server's folder of keys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flexlora.deployment.server import run_files
from flexlora.deployment.server.run_files import NODES, NUMBERS

if TYPE_CHECKING:
    from flexlora.deployment.flower.superlink import SuperLink


@dataclass(frozen=True)
class Admission:
    """Keeps the SuperLink's authorised nodes equal to the public keys in ``keys``.

    The authorised nodes, and the fingerprints of all keys ever registered, are stored in the
    run's ``folder``.
    """

    folder: Path
    keys: Path
    link: SuperLink

    def update(self) -> list[str]:
        """Authorise nodes with new keys, revoke nodes without; returns a line on each change.

        Parses every key, some 0.2 ms each.

        Raises:
            ProtocolError: a file is no key, or Flower refuses; earlier changes stay.
        """
        from flexlora.deployment.keys import fingerprint, node_keys

        files = {name: (fingerprint(p), p) for name, p in node_keys(self.keys).items()}
        nodes, numbers = self._read(NODES), self._read(NUMBERS)
        prints = {name: fingerprint for name, (fingerprint, _) in files.items()}
        lines = self._revoke(prints, nodes, numbers)
        for name in sorted(files.keys() - nodes.keys()):
            lines.append(self._authorise(name, *files[name], nodes, numbers))
        return lines

    def _revoke(
        self, prints: dict[str, str], nodes: dict[str, int], numbers: dict[str, int]
    ) -> list[str]:
        """Revoke the nodes whose key was removed or replaced."""
        lines = []
        for name, node in list(nodes.items()):
            if name in prints and node not in numbers.values():
                # The last server was killed before it recorded the fingerprint as well.
                self._write(NUMBERS, numbers, prints[name], node)
            if name in prints and numbers.get(prints[name]) == node:
                continue
            self.link.unregister(node)
            self._write(NODES, nodes, name, None)
            change = "replaced" if name in prints else "removed"
            lines.append(f"revoked node {name}: its key was {change}")
        return lines

    def _authorise(
        self,
        name: str,
        fingerprint: str,
        path: Path,
        nodes: dict[str, int],
        numbers: dict[str, int],
    ) -> str:
        if fingerprint in numbers:
            return (
                f"node {name} is not authorised: its key {fingerprint} was revoked, and a revoked "
                f"key cannot be used again in the same run; make a new one: flexlora keys DIR "
                f"--node {name}"
            )
        node = self.link.number(path, name, {*numbers.values(), *nodes.values()})
        self._write(NODES, nodes, name, node)
        self._write(NUMBERS, numbers, fingerprint, node)
        return f"authorised node {name}"

    def _read(self, name: str) -> dict[str, int]:
        return run_files.numbers(self.folder, name)

    def _write(self, name: str, content: dict[str, int], key: str, node: int | None) -> None:
        """Change one entry in memory and on the disk; None removes it."""
        content.pop(key, None)
        if node is not None:
            content[key] = node
        run_files.write_numbers(self.folder, name, content)
