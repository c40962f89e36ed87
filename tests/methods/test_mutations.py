"""Planted faults that the laws must catch: each is a change of one place in a copy of the source.

The faults are those found in released federated LoRA code: a rank guessed from sizes, V for V',
state that a checkpoint misses, a scale counted twice or not at all, a transposed residual, rounds
missed, bytes that are not bytes, inputs changed, weights on both factors, padding on the wrong
axis.
"""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAWS = [
    "tests/laws/test_laws.py",
    "tests/methods/test_claims.py",
    "tests/methods/test_hetlora.py",
]

FAULTS = {
    "rank guessed from sizes": (
        "lowrank/factors.py",
        "        return self.B.shape[1]\n",
        "        return min(self.B.shape)\n",
    ),
    "V where V' belongs": (
        "lowrank/routes/qr.py",
        "right.expand(Vt[:rank].T)",
        "right.expand(Vt[:, :rank])",
    ),
    "state that a checkpoint misses": (
        "federation/checkpoint.py",
        '"per_client": {name: dict(values) for name, values in state.per_client.items()},',
        '"per_client": {},',
    ),
    "a checkpoint that misses what clients have merged": (
        "federation/checkpoint.py",
        'described["merged_until"],',
        "{},",
    ),
    "scale of a sketch not taken out again": (
        "method/averaging.py",
        "scale = change.rank / last.rank if sketched else 1.0",
        "scale = 1.0",
    ),
    "weights on both factors": (
        "lowrank/sums.py",
        "B = torch.cat([f.B.to(dtype) for _, f in self.terms], dim=1)",
        "B = torch.cat([weight * f.B.to(dtype) for weight, f in self.terms], dim=1)",
    ),
    "residual of the wrong sign": (
        "methods/fedexlora.py",
        "(-1.0, factors[module])",
        "(1.0, factors[module])",
    ),
    "missed rounds are not sent again": (
        "method/merge_log.py",
        "for round, update in self.updates.items() if round > last}",
        "for round, update in self.updates.items() if last < round == max(self.updates)}",
    ),
    "bytes that are not bytes": (
        "wire/adapters.py",
        'tensors[f"{module}.A"] = factors.A.detach().to(dtype).contiguous()',
        'tensors[f"{module}.A"] = factors.A.detach().contiguous()',
    ),
    "inputs changed": (
        "methods/flexfold.py",
        "Factors(last.B.double() * share, last.A.double())",
        "Factors(last.B.mul_(share), last.A.double())",
    ),
    "weights by nothing": (
        "method/averaging.py",
        "return tuple(float(upload.examples) for upload in uploads)",
        "return (1.0,) * len(uploads)",
    ),
    "rarity of ranks forgotten": (
        "method/averaging.py",
        "w / totals[:rank].clamp_min(1e-300) for",
        "w + 0 * totals[:rank] for",
    ),
    "the rest is forgotten in the mean": (
        "methods/flexfold.py",
        "        share[rank:] += weight\n",
        "        share[rank:] += 0 * weight\n",
    ),
    "padding on the wrong side": (
        "method/averaging.py",
        "B[:, : f.rank] += weight * f.B.double()",
        "B[:, -f.rank :] += weight * f.B.double()",
    ),
    "the untrained half is averaged too": (
        "methods/rolora.py",
        "Factors(mean.B, last.A) if",
        "Factors(mean.B, 0.5 * last.A) if",
    ),
    "terms of another client": (
        "method/handout.py",
        "ids[module] = tuple(sorted(order[: client.ranks[module]].tolist()))",
        "ids[module] = tuple(range(client.ranks[module]))",
    ),
    "a private half leaves home": (
        "methods/fedsalora.py",
        'return turn.trained.restricted("A")',
        "return turn.trained",
    ),
}
"""By name: a file below src/flexlora, a text in it, and the faulty text that replaces it.

A change of that text in the source needs the same change here: ``test_a_fault_applies``.
"""


def planted(fault: str, package: Path) -> str:
    """The source text with this fault."""
    file, right, wrong = FAULTS[fault]
    text = (package / file).read_text(encoding="utf-8")
    count = text.count(right)
    assert count == 1, (
        f"The text that the fault {fault!r} replaces is {count} times in {file}, not once: "
        f"{right!r}. Change its entry in FAULTS to the source as it is now."
    )
    return text.replace(right, wrong)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_applies(fault):
    """The changed file is still Python, and another program than before."""
    package = ROOT / "src" / "flexlora"
    before = (package / FAULTS[fault][0]).read_text(encoding="utf-8")
    assert ast.dump(ast.parse(planted(fault, package))) != ast.dump(ast.parse(before))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_laws_catch(fault, tmp_path):
    source = tmp_path / "src"
    shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
    path = source / "flexlora" / FAULTS[fault][0]
    path.write_text(planted(fault, source / "flexlora"), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *LAWS]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, f"The fault was not caught:\n{done.stdout[-2000:]}"
    assert "FAILURES" in done.stdout or "ERRORS" in done.stdout
