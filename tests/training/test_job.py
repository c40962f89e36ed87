"""What a job is: its rows, its modules and ranks, and what is refused."""

import json
import math
from dataclasses import replace

import pytest
import torch

from flexlora import Columns, Corpus, Training
from flexlora.errors import AdapterError, ConfigError, DataError
from flexlora.method import FreshAdapters
from flexlora.training.job import Job
from support import models

ROWS = models.corpus()
A = Job("a", ROWS, prompt="plain", max_tokens=32)


def last_names(ranks) -> set[str]:
    return {module.rpartition(".")[2] for module in ranks}


# --- rows ----------------------------------------------------------------------------------


def test_only_rows_for_training_are_used():
    splits = ROWS.keys("split").tolist()
    assert len(A.corpus()) == splits.count("train") < len(ROWS)
    without = Corpus.build({"instruction": ["a"], "input": ["b"], "output": ["c"]})
    assert len(replace(A, rows=without).corpus()) == 1


def test_where_chooses_the_rows_of_a_client_or_a_category():
    of = {
        column: replace(A, where={column: value}).corpus()
        for column, value in (("client", "client2"), ("category", "odd"))
    }
    assert set(of["client"].keys("client")) == {"client2"}
    assert set(of["category"].keys("client")) == {"client1", "client3", "client5"}
    both = replace(A, where={"client": "client2", "category": "even"})
    assert both.corpus().fingerprint() == of["client"].fingerprint()


def test_rows_may_be_a_file_or_dicts_with_other_columns(tmp_path):
    rows = [{"q": "the cat", "a": "sees"}, {"q": "the dog", "a": "red"}, {"q": "one", "a": "two"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    columns = Columns(instruction="q", input="", output="a")
    one = replace(A, rows=str(path), columns=columns).corpus()
    two = replace(A, rows=rows, columns=columns).corpus()
    assert len(one) == 3 and one.fingerprint() == two.fingerprint()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rows": []}, "job 'a': The rows are nothing"),
        ({"rows": 3}, "job 'a': The rows are a int; give a list of dicts"),
        ({"rows": "/nowhere/rows.csv"}, "job 'a': .*'/nowhere/rows.csv'"),
        (
            {"where": {"client": "client9"}},
            "job 'a': where asks for rows whose client is 'client9', and there are none; there "
            "are 'client0', 'client1'",
        ),
        (
            {"where": {"client": "client0", "category": "odd"}},
            "job 'a': where asks for rows whose category is 'odd'",
        ),
        (
            {"rows": ROWS.select(ROWS.keys("split") == "test")},
            "job 'a' has no rows to train on; see its where, and the column split",
        ),
        (
            {"rows": [{"instruction": "a", "output": "b"}], "where": {"client": "x"}},
            "job 'a': .*client",
        ),
    ],
    ids=["nothing", "number", "file", "client", "category", "split", "column"],
)
def test_rows_that_are_not_there_are_refused_with_the_job(changes, sentence):
    with pytest.raises(DataError, match=sentence):
        replace(A, **changes).corpus()


# --- modules and ranks ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "count", "names"),
    [
        (None, 14, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("all-linear", 14, None),
        (["q_proj", "v_proj"], 4, {"q_proj", "v_proj"}),
        (["layers.1.mlp.up_proj"], 1, {"up_proj"}),
        (("model.layers.0.self_attn.o_proj", "down_proj"), 3, {"o_proj", "down_proj"}),
        (r".*\.0\..*(gate|up)_proj", 2, {"gate_proj", "up_proj"}),
    ],
    ids=["default", "all", "names", "path", "path and name", "pattern"],
)
def test_targets_choose_modules_as_in_peft(base, targets, count, names):
    ranks = replace(A, targets=targets, rank=5).ranks(base)
    assert len(ranks) == count and set(ranks.values()) == {5}
    assert names is None or last_names(ranks) == names
    assert list(ranks) == [module for module in base.shapes if module in ranks]


def test_the_first_pattern_that_matches_decides(base):
    pattern = {r"layers\.1\.mlp\.down_proj": 3, "down_proj": 9, "k_proj": 2}
    ranks = replace(A, rank=4, rank_pattern=pattern).ranks(base)
    assert ranks["model.layers.0.mlp.down_proj"] == 9
    assert ranks["model.layers.1.mlp.down_proj"] == 3
    assert ranks["model.layers.1.self_attn.k_proj"] == 2
    assert ranks["model.layers.1.self_attn.q_proj"] == 4


def test_the_start_is_that_of_a_run_of_the_same_seed(base):
    job = replace(A, rank=3, rank_pattern={"up_proj": 7}, seed=5)
    ranks = job.ranks(base)
    start, common = job.start(base, ranks), FreshAdapters(base.shapes, 5).common(ranks)
    for module, f in start.items():
        assert f.rank == ranks[module] and not f.B.any()
        assert torch.equal(f.A, common[module].A) and torch.equal(f.B, common[module].B)


def test_a_rank_may_be_as_large_as_the_module_and_no_larger(base):
    small = "model.layers.0.self_attn.k_proj"
    assert base.shapes[small] == (16, 32)
    assert replace(A, rank=16).ranks(base)[small] == 16
    with pytest.raises(
        ConfigError,
        match=rf"job 'a': the rank 17 is above 16, the smaller side of {small} \(16 x 32\); lower",
    ):
        replace(A, rank=17).ranks(base)
    fits = replace(A, rank=32, rank_pattern={"k_proj": 16, "v_proj": 16})
    assert fits.ranks(base)["model.layers.0.mlp.up_proj"] == 32


@pytest.mark.parametrize(
    ("changes", "kind", "sentence"),
    [
        ({"targets": ["q_proj", "query"]}, ConfigError, "names 'query', but .* some of down_proj"),
        ({"targets": []}, ConfigError, "names 'nothing'"),
        ({"targets": "q_proj"}, ConfigError, "names 'q_proj', .* give a list of some of"),
        ({"targets": "lm_head"}, ConfigError, "names 'lm_head'"),
        ({"targets": "(((a+)+)+"}, AdapterError, "job 'a': targets"),
        ({"targets": "["}, AdapterError, "job 'a': targets"),
        ({"rank_pattern": {"query": 4}}, ConfigError, "rank_pattern names 'query', which no"),
        (
            {"targets": ["q_proj"], "rank_pattern": {"v_proj": 4}},
            ConfigError,
            "rank_pattern names 'v_proj', .* its modules are called q_proj",
        ),
        ({"rank_pattern": {"(": 4}}, AdapterError, "job 'a': rank_pattern"),
    ],
    ids=str,
)
def test_modules_that_are_not_there_are_refused(base, changes, kind, sentence):
    with pytest.raises(kind, match=sentence):
        replace(A, **changes).ranks(base)


# --- values --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        *(
            ({"name": name}, "A job's name is .*; it is the name of a folder")
            for name in ("", "..", ".a", "a/b", "a\\b", "a\n", "a b", "é", "a" * 101, None, 3)
        ),
        ({"rank": 0}, "job 'a': rank is 0; give a whole number of at least 1"),
        ({"rank": True}, "rank is True"),
        ({"rank": 2.0}, r"rank is 2\.0"),
        ({"rank": math.nan}, "rank is nan"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] is 0"),
        ({"max_tokens": 7}, "max_tokens is 7; give a whole number of at least 8"),
        ({"seed": -1}, "seed is -1"),
        ({"training": {"epochs": 2}}, r"training is .*; give flexlora.Training\(...\)"),
        ({"columns": {"input": "x"}}, r"columns is .*; give flexlora.Columns\(...\)"),
        ({"targets": 3}, "targets is 3; give a list of names"),
        ({"targets": ["q_proj", 3]}, r"targets is \['q_proj', 3\]; give a list of names"),
        ({"rank_pattern": None}, "rank_pattern is None; give a dict"),
        ({"rank_pattern": {3: 4}}, "rank_pattern is {3: 4}; give a dict"),
        ({"where": "north"}, "where is 'north'; give a dict"),
        ({"prompt": None}, "prompt is None; give a name"),
        ({"training": Training(round_decay=0.9)}, "round_decay is 0.9, and a job has no rounds"),
        ({"where": {"split": "test"}}, "where names the column 'split'; give one of client, cat"),
        ({"prompt": "alpacca"}, "There is no prompt 'alpacca'.*Did you mean 'alpaca'"),
        ({"prompt": "nowhere.jinja"}, "'nowhere.jinja' cannot be read"),
    ],
    ids=str,
)
def test_values_that_cannot_be_used_are_refused(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        replace(A, **changes)


def test_a_prompt_may_be_a_template_in_a_file(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{{ instruction }}: {{ output }}", encoding="utf-8")
    assert replace(A, prompt=str(path)).template == "{{ instruction }}: {{ output }}"
