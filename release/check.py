"""Build a release twice, compare the two, and list what it was tested with.

    python release/check.py [OUT]

The second build is made from a copy of the files in another folder, in another time zone, locale
and order of hashes, and with other permissions of new files. OUT (``dist`` by default) then has the
wheel and the source distribution in ``packages``, ``SHA256SUMS``, and ``sbom.cdx.json``: the pinned
versions of all dependencies as a CycloneDX document. Needs ``release/requirements.txt``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

PACKAGES = "packages"
"""The folder of what is uploaded: PyPI takes nothing else."""

OTHER = {"TZ": "Pacific/Kiritimati", "LC_ALL": "C", "PYTHONHASHSEED": "77"}
"""What differs in the second build."""


def main() -> None:
    """Build twice and compare; exit code 1 and the names of the files that differ."""
    out = Path(sys.argv[1] if sys.argv[1:] else "dist").resolve()
    epoch = commit_time(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "first"), Path(folder, "second")
        for name, options in (("a", {}), ("another folder", OTHER)):
            copy(ROOT, Path(folder, name))
            build(Path(folder, name), first if name == "a" else second, epoch, options)
        sums = {path.name: sha256(path) for path in sorted(first.iterdir())}
        other = {path.name: sha256(path) for path in sorted(second.iterdir())}
        if sums != other:
            differing = sorted(name for name in sums | other if sums.get(name) != other.get(name))
            sys.exit(f"Two builds differ in: {', '.join(differing)}")
        shutil.rmtree(out / PACKAGES, ignore_errors=True)
        (out / PACKAGES).mkdir(parents=True)
        for path in first.iterdir():
            shutil.copy(path, out / PACKAGES)
    document = sbom(ROOT, sums)
    (out / "sbom.cdx.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    listed = {f"{PACKAGES}/{name}": value for name, value in sums.items()}
    listed["sbom.cdx.json"] = sha256(out / "sbom.cdx.json")
    lines = "".join(f"{value}  {name}\n" for name, value in listed.items())
    (out / "SHA256SUMS").write_text(lines, encoding="utf-8")
    print(
        f"two builds are the same, of {len(document['components'])} dependencies:\n{lines}", end=""
    )


def commit_time(root: Path) -> int:
    """The seconds since 1970 of the last commit, which dates all files of the build."""
    command = ["git", "-C", str(root), "log", "-1", "--format=%ct"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def copy(root: Path, target: Path) -> None:
    """The files that git tracks, as they are in the working tree."""
    command = ["git", "-C", str(root), "ls-files", "-z"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, target / name)


def build(source: Path, out: Path, epoch: int, options: dict[str, str]) -> None:
    """The wheel and the source distribution of ``source``, in ``out``."""
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "SOURCE_DATE_EPOCH": str(epoch), **options},
        umask=0o077 if options else 0o022,
    )


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sbom(root: Path, sums: dict[str, str]) -> dict[str, Any]:
    """The project and the versions of ``constraints.txt`` as a CycloneDX document.

    Without a time and a serial number, so that the same commit gives the same bytes. Packages that
    the library itself names are required; all others come with an extra, a tool or each other.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {canonical(each) for each in project["dependencies"]}
    pins = re.findall(
        r"^([\w.\-]+)==([^\s;]+)", (root / "constraints.txt").read_text("utf-8"), re.MULTILINE
    )
    hashes = [
        {"alg": "SHA-256", "content": value}
        for name, value in sums.items()
        if name.endswith(".whl")
    ]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                **component(project["name"], project["version"], "library"),
                "licenses": [{"license": {"id": project["license"]}}],
                "hashes": hashes,
            }
        },
        "components": [
            {
                **component(name, version, "library"),
                "scope": "required" if canonical(name) in required else "optional",
            }
            for name, version in pins
        ],
    }


def component(name: str, version: str, kind: str) -> dict[str, str]:
    """A package of PyPI."""
    purl = f"pkg:pypi/{canonical(name)}@{version}"
    return {"type": kind, "name": name, "version": version, "purl": purl, "bom-ref": purl}


def canonical(requirement: str) -> str:
    """The name in a requirement such as ``ray[client]>=2``, as PyPI spells it."""
    name = re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
