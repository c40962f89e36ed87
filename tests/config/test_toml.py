"""Reading and writing TOML; what may stand in a config is tested in ``test_experiment``."""

import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.config import Experiment, dump, load, parse, rank_table
from flexlora.config.toml import read_table
from flexlora.errors import ConfigError

CONFIGS = sorted(
    path
    for path in (Path(__file__).parents[2] / "configs").glob("*.toml")
    if path.stem != "jobs"  # of another form
)

TEXT = """\
[model]
name = "some/base"
targets = ["q_proj"]

[data]
path = "/rows.jsonl"
columns = { client = "hospital", category = "", split = "" }

[ranks]
distribution = { small = 0.5, large = 0.5 }
types.small = { attention = 3, feed_forward = 0 }
types.large = { attention = 5, feed_forward = 7 }
clients = { "st-mary's.of \\"x\\"" = "small" }

[method]
name = "flexlora"
split = "balanced"

[federation]
rounds = 2
fraction = 0.3
deadline_seconds = 1e-5

[training]
learning_rate = 1e-7
clip_norm = 1e30
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "some.toml"
    path.write_text(text, encoding="utf-8")
    return path


# --- writing -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_the_same_after_writing_and_reading(path, tmp_path):
    experiment = load(path)
    assert load(written(tmp_path, dump(experiment))) == experiment


def test_columns_that_are_not_there_are_written_as_empty_text(tmp_path):
    experiment = load(written(tmp_path, TEXT))
    text = dump(experiment)
    columns = tomllib.loads(text)["data"]["columns"]
    assert columns == {"client": "hospital", "category": "", "split": ""}
    assert load(written(tmp_path, text)) == experiment


def test_a_journals_form_of_a_config_gives_the_same_text(tmp_path):
    experiment = load(written(tmp_path, TEXT))
    assert dump(json.loads(experiment.model_dump_json())) == dump(experiment)


def test_keys_without_a_value_are_left_out_at_any_depth():
    content = {"seed": 5, "model": {"revision": None, "name": "a"}, "method": {"a": [1, None]}}
    assert tomllib.loads(dump(content)) == {"seed": 5, "model": {"name": "a"}, "method": {"a": [1]}}


SCALARS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.booleans(),
)
TABLES = st.recursive(
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), SCALARS),
    lambda inner: st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
        st.one_of(SCALARS, st.lists(SCALARS, max_size=3), inner),
        max_size=4,
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=100)
@given(TABLES)
def test_any_tables_are_the_same_after_writing_and_reading(content):
    assert tomllib.loads(dump(content)) == content


# --- reading -------------------------------------------------------------------------------


def test_a_file_may_be_named_by_text(tmp_path):
    path = written(tmp_path, TEXT)
    experiment = load(str(path))
    assert experiment == load(path) and isinstance(experiment, Experiment)
    assert rank_table(str(written(tmp_path, "rank = 3")), {}).rank is not None


@pytest.mark.parametrize("path", [None, 3, b"some.toml", {"seed": 1}])
def test_what_is_no_path_is_refused_with_a_sentence(path):
    for read in (load, read_table):
        with pytest.raises(ConfigError, match=r"by its path, as str or Path, .* call parse"):
            read(path)


@pytest.mark.parametrize("content", [None, "some.toml", Path("some.toml"), [1]])
def test_what_is_no_table_is_refused_with_a_sentence(content):
    with pytest.raises(ConfigError, match=r"nested tables, not .* call load"):
        parse(content, "here")


def test_the_source_of_tables_may_be_a_path():
    with pytest.raises(ConfigError, match=r"^some\.toml: the sections \[model\], \[data\]"):
        parse({}, Path("some.toml"))


# --- rank tables ---------------------------------------------------------------------------


def test_a_table_is_read_with_or_without_its_heading(tmp_path):
    path = written(tmp_path, '[ranks]\ndistribution = "normal"\n')
    assert read_table(path) == {"distribution": "normal"}
    path = written(tmp_path, '[clients]\na = "type1"\n')
    assert read_table(path) == {"clients": {"a": "type1"}}


def test_the_clients_of_a_table_come_before_those_of_the_config(tmp_path):
    path = written(tmp_path, '[ranks.clients]\na = "type1"\n')
    assert rank_table(path, {"a": "type2", "b": "type3"}).clients == {"a": "type1", "b": "type3"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnk = 3", "unknown key 'rnk'. Did you mean 'rank'"),
        ('table = "other.toml"', "cannot refer to another one; remove 'table'"),
        ('rank = 3\ndistribution = "normal"', "set ranks.distribution to"),
        ('distribution = "nrmal"', "Did you mean 'normal'"),
    ],
)
def test_a_faulty_table_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        rank_table(written(tmp_path, text), {})


@pytest.mark.parametrize("text", [None, b"ranks = [", b"\xff\xfe"])
def test_a_table_that_cannot_be_read_is_refused(tmp_path, text):
    path = tmp_path / "ranks.toml"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(
        ConfigError,
        match=r"ranks\.toml (cannot be read|is not valid TOML)|ranks\.toml, line 1, is not",
    ):
        read_table(path)


# --- prompt templates ----------------------------------------------------------------------


def test_a_prompt_template_is_read_from_its_file(tmp_path, monkeypatch):
    (tmp_path / "mine.jinja").write_text("Q: {{ instruction }}\nA: ", encoding="utf-8")
    text = TEXT.replace('path = "/rows.jsonl"', 'path = "/rows.jsonl"\nprompt = "mine.jinja"')
    experiment = load(written(tmp_path, text))
    assert experiment.data.prompt == "Q: {{ instruction }}\nA: "
    assert load(written(tmp_path, dump(experiment))) == experiment
    shell = tmp_path / "shell"
    shell.mkdir()
    (shell / "other.j2").write_text("{{ input }}", encoding="utf-8")
    monkeypatch.chdir(shell)
    path = written(tmp_path, text)
    assert load(path, ["data.prompt=other.j2"]).data.prompt == "{{ input }}"
    assert load(path, ["data.prompt={{ input }}!"]).data.prompt == "{{ input }}!"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("none.jinja", "none.jinja' cannot be read: No such file"),
        ("empty.jinja", "has no variable, such as"),
        ("{% for %}", "not a Jinja template"),
        ("alpacca", "no prompt 'alpacca'.*Did you mean 'alpaca'"),
    ],
)
def test_a_prompt_that_is_none_is_refused(tmp_path, prompt, message):
    (tmp_path / "empty.jinja").write_text("Answer.", encoding="utf-8")
    text = TEXT.replace('path = "/rows.jsonl"', f'path = "/rows.jsonl"\nprompt = "{prompt}"')
    with pytest.raises(ConfigError, match=message):
        load(written(tmp_path, text))
