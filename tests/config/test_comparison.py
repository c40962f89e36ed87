"""The table [compare] of a config, variants on the command line, and values put into a config."""

import re
from pathlib import Path

import pytest

from flexlora.config.comparison import ComparisonSettings, read_comparison, varied, with_values
from flexlora.errors import ConfigError

TABLE = """
[compare]
methods = ["FlexLoRA", "hetlora"]
seeds = 2

[compare.settings.hetlora]
keep = 0.9
training.learning_rate = 1e-3
"training.schedule" = "constant"

[compare.variants.rank8]
ranks.rank = 8

[compare.variants.mixed]
ranks.distribution = { small = 0.5, large = 0.5 }
data.partition.kind = "iid"
"""


def read(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_text(text)
    return read_comparison(path)


def test_the_table_is_read_with_dotted_keys(tmp_path):
    found = read(tmp_path, TABLE)
    assert (found.methods, found.seeds) == (("FlexLoRA", "hetlora"), 2)
    assert found.settings == {
        "hetlora": {
            "keep": 0.9,
            "training.learning_rate": 1e-3,
            "training.schedule": "constant",
        }
    }
    assert found.variants["rank8"] == {"ranks.rank": 8}
    assert found.variants["mixed"] == {
        "ranks.distribution": {"small": 0.5, "large": 0.5},
        "data.partition.kind": "iid",
    }


def test_a_config_without_the_table_compares_methods_only(tmp_path):
    assert read(tmp_path, "seed = 3\n") == ComparisonSettings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("compare = 3", "is 3; it is a table"),
        ("[compare]\nmethod = ['a']", "unknown key 'method'. Valid keys: methods, seeds"),
        ("[compare]\nmethods = 'flexlora'", "methods is 'flexlora'; give a list"),
        ("[compare]\nseeds = 0", "seeds is 0; give a whole number"),
        ("[compare]\nseeds = true", "seeds is True"),
        ("[compare]\nvariants = ['a']", "it has a table for each name"),
        ("[compare.variants]\nrank8 = 8", "it has a table for each name"),
        ("[compare.variants.b]\nseed = 8", "'seed' is set by the comparison itself"),
        ("[compare.variants.b]\nmethod.keep = 0.5", "by --option METHOD.KEY=VALUE"),
    ],
)
def test_a_wrong_table_is_one_sentence(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    assert message in str(error.value)


def test_every_combination_of_values_is_a_variant():
    assert varied(["ranks.rank=4,8", "training.schedule=linear,constant"]) == {
        "rank=4, schedule=linear": {"ranks.rank": 4, "training.schedule": "linear"},
        "rank=4, schedule=constant": {"ranks.rank": 4, "training.schedule": "constant"},
        "rank=8, schedule=linear": {"ranks.rank": 8, "training.schedule": "linear"},
        "rank=8, schedule=constant": {"ranks.rank": 8, "training.schedule": "constant"},
    }
    assert list(varied(["training.learning_rate=1e-3, 1e-4"]).values()) == [
        {"training.learning_rate": 1e-3},
        {"training.learning_rate": 1e-4},
    ]
    (name,) = varied(["ranks.distribution={small=0.5, large=0.5}"])
    assert name == "distribution=small:0.5,large:0.5"
    assert varied([]) == {}


@pytest.mark.parametrize("text", ["ranks.rank", "=4", "ranks.rank=", "method.name=a,b"])
def test_what_cannot_be_varied_is_refused(text):
    with pytest.raises(ConfigError, match="--vary"):
        varied([text])


def test_a_rank_replaces_the_rank_types_and_nothing_else():
    ranks = {"types": {"a": {}}, "distribution": {"a": 1.0}, "clients": {"x": "a"}}
    content = {"ranks": ranks, "training": {"epochs": 2}}
    changed = with_values(content, {"ranks.rank": 8, "training.learning_rate": 0.5})
    assert changed == {"ranks": {"rank": 8}, "training": {"epochs": 2, "learning_rate": 0.5}}
    assert content["ranks"] is ranks and len(ranks) == 3
    assert with_values(content, {"ranks.distribution": "uniform"})["ranks"] == {
        **ranks,
        "distribution": "uniform",
    }
    assert with_values({"ranks": {"rank": 8}}, {"ranks.distribution": "normal"})["ranks"] == {
        "distribution": "normal"
    }


def test_the_documented_table_is_valid(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "comparing.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    found = read(tmp_path, block)
    assert found.methods and found.seeds and found.settings["hetlora"]["keep"] == 0.9
    assert list(found.variants) == ["rank8", "mixed"]
