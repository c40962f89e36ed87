"""Whether two versions of this library compute the same, to the bit.

    python benchmarks/identical.py BASE            # a commit, against the working tree
    python benchmarks/identical.py BASE --only flora hetlora

Each version runs the same short federations in a process of its own, on the same machine, with
the same threads and the same number of clients at a time. Compared are every tensor of every
round's adapter and, from the journal, all losses, token counts and scores; the norm of an update
may differ in its last digit, as the order of its sum may. A change that only moves or renames code
must leave all of them as they were.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
SMOKE = "configs/smoke.toml"
SHORT = (
    *("data.clients=5", "data.unseen_clients=1", "federation.cohort=4", "data.max_tokens=192"),
    *("evaluation.seen_clients=2", "evaluation.unseen_clients=1", "evaluation.max_new_tokens=8"),
)
MIXED = ("ranks.distribution=uniform",)
EQUAL = ("ranks.distribution=", "ranks.rank=6")
RUNS = {
    "smoke": (),
    "flora": (*SHORT, *MIXED, "method.name=flora"),
    "flexfold": (*SHORT, *MIXED, "method.name=flexfold"),
    "hetlora": (*SHORT, *MIXED, "method.name=hetlora"),
    "fedit": (*SHORT, *EQUAL, "method.name=fedit"),
}
"""What each run changes of ``configs/smoke.toml``."""

SAME = {
    "client": ("client", "examples", "tokens", "steps", "loss_total", "loss_tokens"),
    "round": ("cohort", "received", "loss_total", "loss_tokens"),
    "evaluation": ("adapter", "clients"),
}
"""By type of event, the fields that must be equal; seconds and bytes of messages may differ."""
NEARLY_SAME, ROUNDING = {"round": "update_norm"}, 1e-13
"""A field that may differ by rounding, and by how much of its size."""


def main() -> None:
    """Run both versions and exit with 1 where they differ."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("base", help="the commit to compare the working tree with")
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS))
    parser.add_argument("--keep", type=Path, help="keep BASE's runs here, for the next call")
    arguments = parser.parse_args()
    with TemporaryDirectory(prefix="flexlora-identical-") as temporary:
        folder = Path(temporary)
        tree = _checked_out(arguments.base, folder / "tree")
        before = (arguments.keep or folder) / f"before-{_hash(arguments.base)}"
        config = _config_of(tree, folder / "smoke.toml")
        try:
            differ = [
                name
                for name in arguments.only
                if not _same(name, config, tree, before, folder / "after")
            ]
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
    if differ:
        sys.exit(f"Different: {', '.join(differ)}.")


def _hash(commit: str) -> str:
    command = ["git", "rev-parse", "--short=12", commit]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout[:12]


def _checked_out(commit: str, tree: Path) -> Path:
    command = ["git", "worktree", "add", "--quiet", "--detach", str(tree), commit]
    subprocess.run(command, cwd=ROOT, check=True)
    return tree


def _config_of(tree: Path, target: Path) -> Path:
    """BASE's config for both versions, as it may not know the keys of a later one."""
    text = (tree / SMOKE).read_text(encoding="utf-8")
    target.write_text(text.replace("../../", f"{ROOT.parent}/"), encoding="utf-8")
    return target


def _same(name: str, config: Path, tree: Path, before: Path, after: Path) -> bool:
    """Whether one of ``RUNS`` is the same in both versions; says what is not."""
    for source, target in ((tree, before / name), (ROOT, after / name)):
        if not (target / "finished").exists():
            shutil.rmtree(target, ignore_errors=True)
            _run(name, config, source, target)
            (target / "finished").touch()
    faults = _differences(before / name, after / name)
    print(f"{name}: {'; '.join(faults) or 'the same to the bit'}", flush=True)
    return not faults


def _run(name: str, config: Path, source: Path, target: Path) -> None:
    changes = [*RUNS[name], "run.threads=2", "run.clients_at_once=2", "federation.rounds=2"]
    command = [sys.executable, "-m", "flexlora", "run", str(config), "--folder", str(target)]
    for change in changes:
        command += ["--set", change]
    environment = {**os.environ, "PYTHONPATH": str(source / "src")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed in {source}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def _differences(before: Path, after: Path) -> list[str]:
    tensors = [_tensors(folder) for folder in (before, after)]
    faults = [f"{path} differs" for path in tensors[0] if tensors[0][path] != tensors[1].get(path)]
    if tensors[0].keys() != tensors[1].keys() or not tensors[0]:
        faults.append(f"{len(tensors[0])} and {len(tensors[1])} tensors of other names")
    events = [_events(folder) for folder in (before, after)]
    if len(events[0]) != len(events[1]):
        faults.append(f"{len(events[0])} and {len(events[1])} events")
    faults += [f"{a} became {b}" for a, b in zip(*events, strict=False) if not _alike(a, b)]
    return faults[:5]


def _alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    norms = [event.pop("nearly", 0.0) for event in (dict(a), dict(b))]
    rest = [{k: v for k, v in event.items() if k != "nearly"} for event in (a, b)]
    return rest[0] == rest[1] and abs(norms[0] - norms[1]) <= ROUNDING * abs(norms[0])


def _tensors(folder: Path) -> dict[str, bytes]:
    """Every tensor of every round's adapter, as its bytes."""
    found = {}
    for path in sorted(folder.glob("rounds/*/adapter/adapter_model.safetensors")):
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118
                found[f"{path.parent.parent.name}/{name}"] = file.get_tensor(name).tobytes()
    return found


def _events(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {"event": line["event"], "nearly": line.get(NEARLY_SAME.get(line["event"], ""), 0.0)}
        | {name: line[name] for name in SAME[line["event"]]}
        for line in lines
        if line["event"] in SAME
    ]


if __name__ == "__main__":
    main()
