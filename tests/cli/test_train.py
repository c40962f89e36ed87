"""The command ``flexlora train``: its words, its files, and how it goes on."""

import json
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from flexlora import peft_format
from flexlora.training import Training, adapters, loop
from support import commands, models

JOBS = """
[model]
name = "model"

[defaults]
rank = 4
data = { path = "rows.parquet", prompt = "plain", max_tokens = 32, cache = "tokens" }
training = { learning_rate = 0.02, batch_examples = 4 }

[[job]]
name = "north"
where.client = "client0"

[[job]]
name = "south"
rank = 6
where.client = "client1"
targets = ["q_proj", "v_proj"]
training.epochs = 3

[[job]]
name = "all"
rank_pattern = { down_proj = 9 }
seed = 3
training.optimizer = "sgd"
"""


@pytest.fixture
def call(monkeypatch, capsys, tmp_path, model_folder):
    """A function that runs ``flexlora words`` beside the rows and the jobs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model_folder)
    pq.write_table(models.corpus().table, tmp_path / "rows.parquet")
    (tmp_path / "jobs.toml").write_text(JOBS, encoding="utf-8")
    return lambda *words: commands.call(monkeypatch, capsys, *words)


def test_each_job_is_a_line_and_a_folder(call):
    code, out, err = call("train", "jobs.toml")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 4
    assert any(line.startswith("south: 9 steps, 279 tokens, loss ") for line in lines)
    assert all(" s: runs/jobs/" in line for line in lines[:3])
    assert lines[3].startswith("3 adapters trained in ")
    assert lines[3].endswith("results: runs/jobs/summary.json")
    for name, rank, modules in (("north", 4, 14), ("south", 6, 4), ("all", 9, 14)):
        adapter = peft_format.read(Path("runs/jobs") / name)
        assert max(adapter.ranks.values()) == rank and len(adapter.layers) == modules
    summary = json.loads(Path("runs/jobs/summary.json").read_text())
    assert [row["name"] for row in summary["jobs"]] == ["north", "south", "all"]


def test_the_same_command_trains_only_what_is_new(call):
    assert call("train", "jobs.toml", "--out", "out").code == 0
    path = Path("jobs.toml")
    path.write_text(JOBS + '\n[[job]]\nname = "west"\nwhere.client = "client2"\n', encoding="utf-8")
    result = call("train", "jobs.toml", "--out", "out")
    assert result.code == 0 and result.out.count(": trained before, loss ") == 3
    assert "1 adapter trained in 0 s, 3 trained before" in result.out
    path.write_text(JOBS.replace("epochs = 3", "epochs = 2"), encoding="utf-8")
    result = call("train", "jobs.toml", "--out", "out")
    assert result.code == 2 and result.out == ""
    assert "out/south holds the adapter of another job 'south' (it differs in tr" in result.err


def test_an_interrupt_says_how_many_are_done_and_the_same_command_goes_on(call, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    add, passes = loop._add_gradients, []

    def interrupted(*words):
        passes.append(0)
        if len(passes) == 4:
            raise KeyboardInterrupt
        add(*words)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_add_gradients", interrupted)
        result = call("train", "jobs.toml", "--set", "run.at_once=3")
    assert result.code == 130 and result.out.count("\n") == 1
    assert result.err == ("\nstopped; 1 of 3 jobs are done, the same command trains the others\n")
    assert "2 adapters trained in 0 s, 1 trained before" in call("train", "jobs.toml").out
    signal.signal(signal.SIGINT, before)


def test_a_job_that_diverges_is_told_and_the_others_are_trained(call):
    wild = JOBS.replace('optimizer = "sgd"', 'optimizer = "sgd"\ntraining.learning_rate = 1e30')
    Path("jobs.toml").write_text(wild, encoding="utf-8")
    result = call("train", "jobs.toml")
    assert result.code == 1
    assert "all: failed: The training loss of job 'all' is nan at step 2; lower" in result.out
    assert "2 adapters trained in 0 s, 1 failed; results" in result.out
    Path("jobs.toml").write_text(JOBS, encoding="utf-8")
    assert call("train", "jobs.toml").out.count("trained before, loss") == 2


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("rank = 6", "rank = 17", "job 'south': the rank 17 is above 16, the smaller side of"),
        ('"client1"', '"client8"', "where asks for rows whose client is 'client8'"),
        ('["q_proj", "v_proj"]', '["query"]', "job 'south': targets names 'query', but model has"),
        ("down_proj = 9", "down = 9", "job 'all': rank_pattern names 'down', which no module"),
        ('"all"', '"North"', "Two jobs are named 'North', apart from capitals"),
        ('"all"', '"a/b"', "A job's name is 'a/b'; it is the name of a folder"),
        ('cache = "tokens"', 'format = "tabel"', "data.format is 'tabel'. Did you mean 'table'?"),
        ("seed = 3", 'data.cache = "other"', "data.cache differs from job to job"),
        ("rows.parquet", "nothing.parquet", "nothing.parquet"),
    ],
)
def test_what_does_not_fit_is_one_sentence_and_nothing_is_written(call, old, new, sentence):
    assert old in JOBS
    Path("jobs.toml").write_text(JOBS.replace(old, new), encoding="utf-8")
    result = call("train", "jobs.toml")
    assert result.code == 2 and result.err.startswith("error: ") and sentence in result.err
    assert "Traceback" not in result.err and not Path("runs").exists()


def test_rows_that_are_cut_are_told_once_for_each_job(call):
    result = call("train", "jobs.toml", "--set", "defaults.data.max_tokens=8")
    assert result.code == 0
    assert result.out.count("rows are longer than data.max_tokens = 8") == 3


def test_the_file_of_jobs_gives_what_python_gives(call):
    call("train", "jobs.toml")
    (result,) = adapters.train_adapters(
        "model",
        [
            adapters.Job(
                "south",
                "rows.parquet",
                rank=6,
                targets=["q_proj", "v_proj"],
                where={"client": "client1"},
                training=Training(learning_rate=0.02, batch_examples=4, epochs=3),
                prompt="plain",
                max_tokens=32,
            )
        ],
        "runs/jobs",
    )
    assert not result.is_new  # the identity of the job is the same
