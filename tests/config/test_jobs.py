"""Files of jobs: defaults, single jobs, and what is wrong with which line."""

from pathlib import Path

import pytest

from flexlora.config import JobFile, load_jobs
from flexlora.errors import ConfigError

TEXT = """
[model]
name = "model"

[defaults]
rank = 4
targets = ["q_proj"]
data = { path = "rows.jsonl", prompt = "plain", columns = { input = "question" } }

[defaults.training]
learning_rate = 0.02
batch_examples = 4

[[job]]
name = "first"
where.client = "north"

[[job]]
name = "second"
rank = 6
targets = '.*up_proj'
rank_pattern = { up_proj = 9 }
data.columns = { output = "answer" }
data.max_tokens = 64

[job.training]
optimizer = "sgd"
learning_rate = 0.1
"""


@pytest.fixture
def load(tmp_path):
    """The jobs of a text, as a file ``jobs.toml`` in ``tmp_path``."""

    def read(text: str, *changes: str) -> JobFile:
        path = tmp_path / "jobs.toml"
        path.write_text(text, encoding="utf-8")
        return load_jobs(path, changes)

    return read


def faults(load, text: str, *changes: str) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        load(text, *changes)
    return str(refused.value).splitlines()


def test_a_job_has_the_defaults_that_it_does_not_give(load, tmp_path):
    first, second = load(TEXT).jobs
    assert (first.name, first.rank, first.targets, first.rank_pattern) == (
        "first",
        4,
        ("q_proj",),
        {},
    )
    assert first.where == {"client": "north"} and second.where == {}
    assert (first.training.optimizer, first.training.learning_rate) == ("adamw", 0.02)
    assert (second.training.optimizer, second.training.learning_rate) == ("sgd", 0.1)
    assert second.training.batch_examples == 4
    assert second.rank == 6 and second.targets == ".*up_proj"
    assert second.rank_pattern == {"up_proj": 9}
    assert (second.data.columns.input, second.data.columns.output) == ("question", "answer")
    assert second.data.max_tokens == 64 and first.data.max_tokens == 512
    assert first.data.path == second.data.path == str(tmp_path / "rows.jsonl")
    assert load(TEXT).model.name == "model" and load(TEXT).run.at_once is None


def test_jobs_share_nothing_that_one_could_change_for_another(load):
    first, second = load(TEXT.replace('where.client = "north"', 'data.prompt = "alpaca"')).jobs
    assert (first.data.prompt, second.data.prompt) == ("alpaca", "plain")


def test_changes_are_of_the_model_the_defaults_and_the_run(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    changes = ("defaults.rank=5", "defaults.data.path=mine.csv", "run.at_once=3", "model.name=m")
    text = TEXT.replace("data.max_tokens = 64", 'data.path = "own.csv"')
    file = load(text, *changes)
    assert [job.rank for job in file.jobs] == [5, 6]
    # As all paths of a command line, relative to the working folder; a job's to the file.
    assert file.jobs[0].data.path == str(tmp_path.parent / "mine.csv")
    assert file.jobs[1].data.path == str(tmp_path / "own.csv")
    assert file.run.at_once == 3 and file.model.name == "m"
    whole = load(TEXT, 'defaults.data={ path = "mine.csv" }').jobs
    assert {job.data.path for job in whole} == {str(tmp_path.parent / "mine.csv")}
    assert faults(load, TEXT, "defaults.rank=x") == [
        "--set defaults.rank=x: 'rank' is 'x'; give a whole number of at least 1."
    ]
    assert "'job' is a value, not a section" in faults(load, TEXT, "job.rank=3")[0]


@pytest.mark.parametrize(
    ("old", "new", "line", "sentence"),
    [
        ("rank = 4", "rank = 0", 6, "'rank' is 0; give a whole number of at least 1."),
        ("rank = 6", 'rank = "6"', 20, "'rank' is '6'; give"),
        ("rank = 6", "ranks = 6", 20, "unknown key 'ranks'. Did you mean 'rank'?"),
        ("learning_rate = 0.1", "learning_rat = 0.1", 28, "unknown key 'training.learning_rat'"),
        ("learning_rate = 0.1", "learning_rate = -0.1", 28, "training.learning_rate is -0.1"),
        ("learning_rate = 0.02", "learning_rate = -2", 11, "training.learning_rate is -2"),
        ("data.max_tokens = 64", "data.max_tokens = 7", 24, "'data.max_tokens' is 7"),
        ('{ output = "answer" }', '{ outptu = "answer" }', 23, "'data.columns.outptu'"),
        ('{ output = "answer" }', "{ output = inf }", 23, "is inf; give a finite number"),
        ('name = "second"', 'nam = "second"', 19, "unknown key 'nam'. Did you mean 'name'?"),
        ('name = "second"', "", 18, "'name' is missing"),
        ('prompt = "plain"', 'prompt = "plane"', 8, "There is no prompt 'plane'"),
        ("up_proj = 9", 'up_proj = "9"', 22, "'rank_pattern.up_proj' is '9'"),
        ('where.client = "north"', "where.client = 3", 16, "'where.client' is 3"),
        ('where.client = "north"', "data.clients = 3", 14, "data.clients divides rows among"),
        (
            'where.client = "north"',
            'where.split = "x"',
            14,
            "the column 'split'; give one of client",
        ),
        ("data.max_tokens = 64", f'data.path = "{"x" * 300}"', 18, "data.path is 'xxx"),
        ('where.client = "north"', 'data.format = "remote"', 14, "is 'remote'; a job needs rows"),
        ('path = "rows.jsonl", ', "", 14, "data.format 'table' needs data.path"),
        ('name = "model"', 'nam = "model"', 3, "unknown key 'model.nam'"),
    ],
)
def test_a_fault_is_told_with_its_line(load, tmp_path, old, new, line, sentence):
    assert old in TEXT
    said = faults(load, TEXT.replace(old, new, 1))
    assert any(
        each.startswith(f"{tmp_path / 'jobs.toml'}, line {line}: ") and sentence in each
        for each in said
    ), said


def test_a_fault_of_the_defaults_is_told_once_and_all_faults_are_told(load):
    text = TEXT.replace("batch_examples = 4", "batch_examples = 0").replace("rank = 6", "rank = -6")
    said = faults(load, text)
    assert len(said) == 2 and "line 12" in said[0] and "line 20" in said[1]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no jobs; begin each with the line [[job]]"),
        ('[model]\nname = "m"\n', "has no jobs"),
        ('[model]\nname = "m"\n[job]\nname = "a"\n', "a job begins with [[job]], in two pairs"),
        ("job = []\n", "has no jobs"),
        ("job = [1]\n", "has no jobs"),
        ("job = 3\n", "has no jobs"),
        ('defaults = 3\n[[job]]\nname = "a"\n', "defaults is 3; give a section [defaults]"),
        ('[defaults]\nname = "x"\n[[job]]\nname = "a"\n', "defaults.name is given; each job has"),
        ('[[job]]\nname = "a"\n', "'model' is missing"),
        ('[[job]]\nname = "a"\n[jobs]\n', "unknown key 'jobs'. Did you mean 'job'?"),
        ("[federation]\nrounds = 1\n", "is the config of a run, as it has a section federation"),
        ("[[job]\n", "is not valid TOML"),
        ("defaults.data = 3\n[model]\nname = 'm'\n[[job]]\nname = 'a'\n", "'data' is 3; give a"),
        ("[model]\nname = 'm'\n[[job]]\nname = 'a'\n", "'data' is missing"),
        (
            "[model]\nname = 'm'\n[[job]]\nname = 'a'\ntraining = 3\ndata.path = 'x'",
            "'training' is 3",
        ),
    ],
)
def test_what_is_no_file_of_jobs_is_refused(load, text, sentence):
    assert any(sentence in each for each in faults(load, text)), faults(load, text)


def test_files_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"The file of jobs .*none.toml cannot be read"):
        load_jobs(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="it is a folder"):
        load_jobs(str(tmp_path))


def test_the_shipped_file_is_valid():
    file = load_jobs(Path(__file__).parents[2] / "configs" / "jobs.toml")
    assert len(file.jobs) > 2 and len({job.rank for job in file.jobs}) > 1
