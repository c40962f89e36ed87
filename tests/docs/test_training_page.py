"""docs/training.md: its file of jobs, its keys and its Python code."""

import re
from pathlib import Path

import flexlora
from flexlora import config
from flexlora.training import adapters

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)[1]


def test_the_file_of_jobs_is_valid(tmp_path):
    path = tmp_path / "jobs.toml"
    path.write_text(block("toml"), encoding="utf-8")
    file = config.load_jobs(path)
    assert [job.rank for job in file.jobs] == [8, 32, 8]
    assert [job.training.epochs for job in file.jobs] == [2, 2, 5]


def test_every_key_of_a_job_is_in_the_table_with_its_default():
    rows = dict(re.findall(r"^\| `(\w+)` \| (\S*).* \|$", PAGE, re.MULTILINE))
    assert list(rows) == list(config.JobSettings.model_fields)
    for name, field in config.JobSettings.model_fields.items():
        default = rows[name].strip("`").strip("|")
        if field.is_required():
            assert default == "required"
        elif name not in ("targets", "training"):
            assert default == str(field.default), name


def test_the_python_code_runs(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    row = '{"instruction": "the cat", "input": "a", "output": "red", "client": "north"}\n'
    (tmp_path / "rows.jsonl").write_text(row * 3, encoding="utf-8")
    monkeypatch.setattr(adapters, "_loaded", lambda name: base)
    code = block("python").replace("rank=32", "rank=16")  # of a tiny model
    exec(compile(code, "docs/training.md", "exec"), {})
    assert (tmp_path / "adapters" / "south" / "adapter_config.json").is_file()
    assert flexlora.check(tmp_path / "adapters" / "north").alike
