"""Releases: built twice to the same bytes, from pinned tools, by pinned actions."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
RELEASE = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text("utf-8"))

BUILDS = all(importlib.util.find_spec(name) for name in ("build", "hatchling"))


@pytest.fixture(scope="module")
def check():
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("release_check", ROOT / "release" / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(not BUILDS, reason="needs release/requirements.txt")
@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs git")
def test_two_builds_are_the_same(tmp_path):
    subprocess.run([sys.executable, ROOT / "release" / "check.py", tmp_path], check=True)
    names = [line.split("  ")[1] for line in (tmp_path / "SHA256SUMS").read_text().splitlines()]
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {*names} == written - {"SHA256SUMS"}
    assert [Path(name).suffix for name in names] == [".whl", ".gz", ".json"]


def test_the_list_of_dependencies_has_every_pinned_version_and_is_the_same_each_time(check):
    document = check.sbom(ROOT, {"flexlora-1-py3-none-any.whl": "0" * 64})
    assert json.dumps(document) == json.dumps(
        check.sbom(ROOT, {"flexlora-1-py3-none-any.whl": "0" * 64})
    )
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").count("==")
    assert len(document["components"]) == pins > 100
    required = {c["name"].lower() for c in document["components"] if c["scope"] == "required"}
    assert {"torch", "safetensors", "pydantic", "rouge_score"} <= {
        n.replace("-", "_") for n in required
    }
    assert all(c["purl"].startswith("pkg:pypi/") for c in document["components"])
    assert document["metadata"]["component"]["hashes"][0]["content"] == "0" * 64


def test_what_builds_a_release_is_pinned_by_hash():
    lines = (ROOT / "release" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    assert {line.split("==")[0] for line in pinned} >= {"build", "hatchling"}
    assert all(
        re.fullmatch(r"[\w-]+==[\w.]+( --hash=sha256:[0-9a-f]{64})+", line) for line in pinned
    )


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_commit(path):
    used = re.findall(r"uses: (\S+)(.*)", path.read_text(encoding="utf-8"))
    assert used
    for action, comment in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), f"{action}: which version is it?"


def test_a_release_is_published_without_a_token_and_with_attestations():
    assert RELEASE["permissions"] == {}
    build, publish = RELEASE["jobs"]["build"], RELEASE["jobs"]["publish"]
    assert build["permissions"] == {"contents": "read"}
    assert publish["permissions"] == {"id-token": "write"} and publish["needs"] == "build"
    assert "secrets." not in json.dumps(RELEASE)
    (step,) = (s for s in publish["steps"] if "pypi-publish" in s["uses"])
    assert step["with"]["attestations"] is True
    assert any("--require-hashes" in s.get("run", "") for s in build["steps"])
    assert any("release/check.py" in s.get("run", "") for s in build["steps"])
