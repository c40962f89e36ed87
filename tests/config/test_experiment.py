import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.config.experiment import Experiment
from flexlora.config.ranks import DISTRIBUTIONS
from flexlora.errors import ConfigError
from flexlora.federation.compose import load, parse

CONFIGS = sorted(
    path
    for path in (Path(__file__).parents[2] / "configs").glob("*.toml")
    if path.stem != "jobs"  # of another form
)

TEXT = """\
seed = 1

[model]
name = "some/base"

[data]
path = "rows.jsonl"
partition = { kind = "natural" }

[ranks]
rank = 8

[method]
name = "flexlora"

[training]
learning_rate = 1e-3

[federation]
rounds = 2
cohort = 3

[evaluation]
every = 1

[run]
threads = 1
"""


@pytest.fixture
def read(tmp_path):
    def read(*changes: str, text: str = TEXT) -> Experiment:
        path = tmp_path / "some.toml"
        path.write_text(text)
        return load(path, changes)

    return read


def refused(read, *changes: str, text: str = TEXT) -> str:
    with pytest.raises(ConfigError) as caught:
        read(*changes, text=text)
    return str(caught.value)


def test_what_stands_in_the_file_is_read(read):
    experiment = read()
    assert (experiment.seed, experiment.model.name, experiment.ranks.rank) == (1, "some/base", 8)
    assert (experiment.federation.rounds, experiment.federation.cohort) == (2, 3)
    assert experiment.training.learning_rate == 1e-3
    assert experiment.evaluation.every == 1
    assert experiment.run.threads == 1


def test_what_does_not_stand_there_has_its_default(read):
    experiment = read()
    assert experiment.training.batch_examples == 16
    assert experiment.training.alpha == 16.0
    assert experiment.data.columns.client is None
    assert experiment.federation.wire_dtype == "float32"
    assert experiment.options() == {}


def test_paths_are_relative_to_the_file_and_those_of_changes_to_the_working_folder(
    read, tmp_path, monkeypatch
):
    shell = tmp_path / "shell"
    shell.mkdir()
    monkeypatch.chdir(shell)
    assert read().data.path == str(tmp_path / "rows.jsonl")
    assert read("data.path=../mine.csv").data.path == str(tmp_path / "mine.csv")
    assert read('data={path="mine.csv"}').data.path == str(shell / "mine.csv")
    assert read("data.prompt=chat").data.path == str(tmp_path / "rows.jsonl")
    assert read("ranks.table=../t.toml", text=TEXT.replace("rank = 8", "")).ranks.table == str(
        tmp_path / "t.toml"
    )


def test_the_name_of_a_data_set_on_the_hub_is_no_path(read):
    assert read('data.format="hub"', "data.path=org/set").data.path == "org/set"


def test_there_are_configs():
    assert len(CONFIGS) >= 4


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_and_can_be_stored(path):
    experiment = load(path)
    again = parse(json.loads(experiment.model_dump_json()), "config.json")
    assert again == experiment


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_changes_that_a_config_advertises_work(path):
    lines = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for line in lines:
        # As a shell passes them on: without the quotes.
        changes = [re.sub("[\"']", "", c) for c in re.findall(r"--set (\S+)", line)]
        if changes:
            load(path, changes)


# --- unknown keys --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "key", "nearest"),
    [
        ("sed=3", "sed", "seed"),
        ("model.nme=1", "model.nme", "model.name"),
        ("data.pth=1", "data.pth", "data.path"),
        ("data.columns.inpt=1", "data.columns.inpt", "data.columns.input"),
        ("data.partition.clents=3", "data.partition.clents", "data.partition.clients"),
        ("ranks.rnk=3", "ranks.rnk", "ranks.rank"),
        ("training.learning_rte=1", "training.learning_rte", "training.learning_rate"),
        ("federation.round=3", "federation.round", "federation.rounds"),
        ("evaluation.evry=1", "evaluation.evry", "evaluation.every"),
        ("evaluation.batch_token=1", "evaluation.batch_token", "evaluation.batch_tokens"),
        ("run.thread=1", "run.thread", "run.threads"),
    ],
)
def test_unknown_keys_are_named_with_the_nearest(read, change, key, nearest):
    message = refused(read, change)
    assert f"unknown key '{key}'. Did you mean '{nearest}'? Valid keys: " in message
    assert message.split("Valid keys: ")[1].count(",") >= 2


def test_an_unknown_key_of_a_rank_type_too(read):
    types = "distribution = { small = 1.0 }\n[ranks.types.small]\nattention = 3\nfed_forward = 2"
    message = refused(read, text=TEXT.replace("rank = 8", types))
    assert (
        "'ranks.types.small.fed_forward'. Did you mean 'ranks.types.small.feed_forward'" in message
    )
    assert "Valid keys: attention, feed_forward." in message


def test_an_unknown_option_of_the_method(read):
    message = refused(read, "method.splt=left")
    assert "The method 'flexlora' has no option 'splt'. Did you mean 'split'?" in message
    message = refused(read, 'method.name="hetlra"')
    assert "There is no method 'hetlra'. Did you mean 'hetlora'?" in message


@pytest.mark.parametrize(
    ("old", "new", "line", "key"),
    [
        ("seed = 1", "sed = 1", 1, "sed"),
        ('name = "some/base"', 'name = "a"\nnme = "b"', 5, "model.nme"),
        ("rounds = 2", "rounds = 2.5", 20, "federation.rounds"),
        ("cohort = 3", '"cohrt" = 3', 21, "federation.cohrt"),
        ("threads = 1", "threads = 'two'", 27, "run.threads"),
        ("[run]\nthreads = 1", "[ run ] # here\n  thread = 1", 27, "run.thread"),
        ('kind = "natural"', 'kind = "natual"', 8, "data.partition.kind"),
        ("learning_rate = 1e-3", "learning_rate = true", 17, "training.learning_rate"),
    ],
)
def test_faults_have_the_file_the_line_and_the_key(read, tmp_path, old, new, line, key):
    text = TEXT.replace(old, new)
    assert text != TEXT
    message = refused(read, text=text)
    assert any(
        fault.startswith(f"{tmp_path}/some.toml, line {line}: ") and f"'{key}'" in fault
        for fault in message.splitlines()
    ), message


def test_all_faults_are_told_at_once(read):
    message = refused(read, "seed=-1", "federation.rounds=0", "training.lr=3")
    assert len(message.splitlines()) == 3


def test_a_missing_section_or_key_is_named(read):
    assert "'model.name' is missing" in refused(read, text=TEXT.replace('name = "some/base"', ""))
    message = refused(read, text=TEXT.replace("rounds = 2", ""))
    assert "line 19: 'federation.rounds' is missing" in message
    assert "'federation' is missing" in refused(read, text=TEXT.split("[federation]")[0])


def test_options_of_a_method_without_a_name_are_those_of_the_default(read):
    settings = read(text=TEXT.replace('name = "flexlora"', 'split = "left"'))
    assert settings.method == {"name": "flexlora", "split": "left"}


# --- ill-typed and out of range ------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        "seed=-1",
        "seed=1.5",
        "model.name=3",
        "model.dtype=float99",
        "model.quantize=8bit",
        "model.targets=q_proj",
        "model.targets=[1]",
        "data.max_tokens=7",
        "data.prompt=alpca",
        "data.format=csv",
        "data.unseen_clients=-1",
        "data.share=1.5",
        "data.partition.alpha=0",
        "ranks.rank=0",
        "ranks.rank=8.5",
        "ranks.rank='8'",
        "method=fedit",
        "method.split=centre",
        "method.weights=exmples",
        "method.precision=float16",
        "training.optimizer=adam",
        "training.schedule=lineer",
        "training.scaling=rslora",
        "training.learning_rate=fast",
        "training.learning_rate=-0.1",
        "training.learning_rate=nan",
        "training.alpha=0",
        "training.epochs=0",
        "training.epochs=1.5",
        "training.max_steps=0",
        "training.batch_examples=0",
        "training.pack_tokens=0",
        "training.prompt_loss=1",
        "federation.rounds=0",
        "federation.rounds=true",
        "federation.cohort=0",
        "federation.wire_dtype=int8",
        "evaluation.every=-1",
        "evaluation.seen_clients=-1",
        "evaluation.unseen_clients=-1",
        "evaluation.rows_per_client=0",
        "evaluation.max_new_tokens=0",
        "evaluation.base=1",
        "run.threads=0",
        "run.keep_adapters=some",
    ],
)
def test_ill_typed_values_are_refused_with_their_key(read, change):
    key = change.partition("=")[0]
    assert key.rpartition(".")[2] in refused(read, change)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["federation.fraction=0.5"], "either federation.cohort or federation.fraction"),
        (["data.partition.kind=iid"], "'iid' needs data.partition.clients"),
        (["data.partition.kind=dirichlet"], "'dirichlet' needs data.partition.clients"),
        (["ranks.distribution=uniform"], 'set ranks.distribution to ""'),
        (["ranks.table=t.toml"], 'set ranks.table to ""'),
        (["ranks.clients.anna=type1"], "ranks.clients"),
        (["ranks.types.small.attention=3", "ranks.types.small.feed_forward=2"], "ranks.types"),
    ],
)
def test_choices_that_exclude_each_other_are_refused(read, changes, message):
    """And none is silently left out of account."""
    assert message in refused(read, *changes)


def test_choices_that_are_missing_are_refused(read):
    assert "give one of ranks.rank" in refused(read, text=TEXT.replace("rank = 8", ""))
    assert "either federation.cohort" in refused(read, text=TEXT.replace("cohort = 3", ""))
    assert "needs data.path" in refused(read, text=TEXT.replace('path = "rows.jsonl"', ""))
    text = TEXT.replace('path = "rows.jsonl"', 'format = "procedural"')
    assert read(text=text).data.path is None


def test_an_unknown_distribution_is_refused_with_the_nearest(read):
    message = refused(read, 'ranks.distribution="unifrm"', text=TEXT.replace("rank = 8", ""))
    assert "Did you mean 'uniform'?" in message


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_papers_distributions_can_be_named(read, name):
    experiment = read(f"ranks.distribution={name}", text=TEXT.replace("rank = 8", ""))
    assert experiment.ranks.distribution == name


def test_columns_named_with_nothing_are_not_there(read):
    experiment = read('data.columns.split=""', "data.columns.client=owner")
    assert experiment.data.columns.split == ""
    assert experiment.data.columns.client == "owner"


# --- changes from the command line ---------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("training.learning_rate=3", 3.0),
        ("training.learning_rate = 3e-5", 3e-5),
        ("training.optimizer=sgd", "sgd"),
        ('training.optimizer="sgd"', "sgd"),
        ("training.prompt_loss=true", True),
        ("training.max_steps=4", 4),
    ],
)
def test_changes_are_toml_or_else_text(read, change, value):
    experiment = read(change)
    (key,) = re.findall(r"^training\.(\w+)", change)
    assert getattr(experiment.training, key) == value
    assert type(getattr(experiment.training, key)) is type(value)


def test_lists_and_sections_can_be_set(read):
    assert read('model.targets=["q_proj", "v_proj"]').model.targets == ("q_proj", "v_proj")
    assert read("data.partition={kind='iid', clients=3}").data.partition.clients == 3


def test_the_last_change_wins(read):
    assert read("seed=2", "seed=3").seed == 3


@pytest.mark.parametrize("change", ["seed", "=3", "training.=3", ""])
def test_what_is_no_change_is_refused(read, change):
    assert "--set takes KEY=VALUE" in refused(read, change)


def test_a_value_is_no_section(read):
    assert "'seed' is a value, not a section" in refused(read, "seed.x=3")


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=12), st.text(max_size=12))
def test_no_change_ever_fails_but_with_a_sentence(key, value):
    path = Path(__file__).parents[2] / "configs" / "smoke.toml"
    try:
        load(path, [f"{key}={value}", f"method.{key}={value}"])
    except ConfigError as error:
        assert str(error)


# --- files ---------------------------------------------------------------------------------


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml cannot be read: No such file"):
        load(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("data", [b"seed = ", b"\xff\xfe", b"[a]\n[a]\n"])
def test_a_file_that_is_no_toml(tmp_path, data):
    path = tmp_path / "some.toml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"some\.toml(, line \d,)? is not valid TOML"):
        load(path)


def test_an_experiment_is_the_same_after_storing(read):
    """A run is resumed from its stored config."""
    experiment = read("training.clip_norm=1e30", "training.learning_rate=1e-7")
    assert parse(json.loads(experiment.model_dump_json()), "config.json") == experiment
    json.dumps(experiment.model_dump(mode="json"), allow_nan=False)  # as the journal has it
