"""The results of a benchmark: measurements, claims that hold or fail, and the environment."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SHARED = Path(__file__).parents[1] / "../shared/data/natural-instructions"


@dataclass(frozen=True)
class Claim:
    """A measured number and its claimed bound.

    A claim that is not ``asserted`` is only reported: at reduced sizes ratios are meaningless.
    """

    text: str
    measured: float
    bound: float
    at_least: bool
    asserted: bool = True

    @property
    def kept(self) -> bool:
        """Whether the bound holds; it does not for NaN."""
        if self.at_least:
            return self.measured >= self.bound
        return self.measured <= self.bound

    @property
    def sentence(self) -> str:
        """The claim, the measured number, and the verdict."""
        sign = ">=" if self.at_least else "<="
        verdict = "kept" if self.kept else "MISSED"
        note = "" if self.asserted else " (reported, not asserted at this size)"
        return f"{self.text}: {self.measured:.4g} {sign} {self.bound:g}, {verdict}{note}."


@dataclass(frozen=True)
class Table:
    """Rows under headings, for the Markdown page."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[object]]

    def markdown(self) -> str:
        """The table in GitHub's Markdown."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        body = "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)
        return f"### {self.title}\n\n{body}\n"


def setting(threads: int) -> dict[str, Any]:
    """The environment of a measurement: hardware, load, versions, date, threads and command.

    It includes the load average because timings on a busy machine are worthless.
    """
    packages = ("flexlora", "torch", "numpy", "transformers", "peft", "accelerate")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *_options()]),
        "cpu": _proc("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "ram_gib": round(int(_proc("/proc/meminfo", "MemTotal").split()[0]) / 2**20, 1),
        "threads": threads,
        "load_at_start": round(os.getloadavg()[0], 2),
        "os": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in packages},
    }


def _options() -> list[str]:
    """The command's options; of absolute paths the last part alone, as they are this machine's."""
    return [Path(each).name if Path(each).is_absolute() else each for each in sys.argv[1:]]


def finish(
    name: str,
    place: Mapping[str, Any],
    measurements: Mapping[str, Any],
    tables: Sequence[Table],
    claims: Sequence[Claim],
) -> int:
    """Write ``results/<name>.json`` and ``.md``, print the page; 1 if a claim was missed."""
    RESULTS.mkdir(exist_ok=True)
    whole = {
        "setting": place,
        "claims": [asdict(claim) | {"kept": claim.kept} for claim in claims],
        "measurements": measurements,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    page = _page(name, place, tables, claims)
    (RESULTS / f"{name}.md").write_text(page, encoding="utf-8")
    print(page)
    missed = [claim for claim in claims if claim.asserted and not claim.kept]
    for claim in missed:
        print(f"A claim was missed. {claim.sentence}", file=sys.stderr)
    return 1 if missed else 0


def status_kib(field: str) -> int:
    """A field of ``/proc/self/status`` such as VmHWM (the peak resident set), in KiB.

    Raises:
        ValueError: the system is not Linux.
    """
    if not Path("/proc/self/status").exists():
        raise ValueError("Peak memory is read from /proc/self/status; run this on Linux.")
    return int(_proc("/proc/self/status", field).split()[0])


def data_file(given: Path | None, default: str) -> Path:
    """The given file, or the default file beside the repository.

    Raises:
        ValueError: there is no such file.
    """
    path = given or SHARED / default
    if not path.is_file():
        raise ValueError(f"There is no file '{path}' to measure with; give one with --data.")
    return path


def _page(
    name: str, place: Mapping[str, Any], tables: Sequence[Table], claims: Sequence[Claim]
) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in place["versions"].items() if v)
    intro = (
        f"{place['cpu']}, {place['cores']} cores, {place['ram_gib']} GiB, {place['os']}, "
        f"{place['threads']} threads, load {place['load_at_start']} at the start. {versions}. "
        f"{place['date']}. `{place['command']}`"
    )
    kept = "\n".join(f"- {claim.sentence}" for claim in claims)
    body = "\n".join(table.markdown() for table in tables)
    return f"## {name}\n\n{intro}\n\n{kept}\n\n{body}"


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _proc(path: str, field: str) -> str:
    """The value of the first ``field: value`` line of a file in /proc, or "unknown"."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return "0 unknown"
    parts = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in parts if key.strip() == field), "0 unknown")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
