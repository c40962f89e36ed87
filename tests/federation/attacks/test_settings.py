"""The table ``[attack]``, the ranks of malicious clients, and poisoned rows."""

import pytest

from flexlora.config import Ranks
from flexlora.data import Corpus
from flexlora.errors import ConfigError, DataError
from flexlora.federation.attacks import AttackSettings, plan, read_settings, with_changes
from flexlora.federation.attacks.poison import poisoned

TYPES = {
    "a": {"attention": 8, "feed_forward": 8},
    "b": {"attention": 2, "feed_forward": 2},
    "c": {"attention": 4, "feed_forward": 4},
}


def test_a_table_sets_what_it_names(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('[attack]\nattacks = ["scale:5"]\nshare = 0.2\nseeds = 2\n')
    read = read_settings(path)
    assert (read.attacks, read.share, read.seeds) == (("scale:5",), 0.2, 2)
    assert read.defences == AttackSettings().defences
    path.write_text("seed = 1\n")
    assert read_settings(path) == AttackSettings()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"attack": ["scale"]}, "unknown key 'attack'. Valid keys: attacks, defences"),
        ({"undefended": "clip"}, "unknown key 'undefended'"),
        ({"attacks": "scale"}, "give a list of texts"),
        ({"attacks": [1]}, "give a list of texts"),
        ({"attacks": ["flip"]}, "There is no attack 'flip'"),
        ({"attacks": []}, "at least one attack"),
        ({"defences": ["krum"]}, "There is no defence 'krum'; there are none, clip"),
        ({"ranks": ["huge"]}, "there are assigned, small, equal, large"),
        ({"share": 0.5}, r"it is in \(0, 0.5\)"),
        ({"share": "0.1"}, "give a number"),
        ({"share": float("nan")}, r"it is in \(0, 0.5\)"),
        ({"seeds": 0}, "give at least 1"),
        ({"seeds": True}, "give a whole number"),
        ({"target": " "}, "are texts that are not empty"),
        ({"trigger": 3}, "give a text"),
    ],
)
def test_what_cannot_be_used_is_said_with_its_place(table, message):
    with pytest.raises(ConfigError, match=f"the table: .*{message}"):
        with_changes(AttackSettings(), table, "the table")


def test_the_honest_run_comes_first_and_once(tmp_path):
    chosen = AttackSettings(("scale", "none"), ("clip", "multi-krum"), ("small", "large"), seeds=2)
    cells = plan(chosen, 7, tmp_path)
    assert len(cells) == len({cell.folder for cell in cells}) == 2 * 2 * (3 + 2)
    for seed in (7, 8):
        for ranks in ("small", "large"):
            group = [cell for cell in cells if (cell.seed, cell.ranks) == (seed, ranks)]
            assert [(cell.attack, cell.defence) for cell in group] == [
                ("none", "none"),
                ("none", "clip"),
                ("none", "multi-krum"),
                ("scale", "clip"),
                ("scale", "multi-krum"),
            ]


def test_malicious_clients_have_the_smallest_the_middle_or_the_largest_type():
    settings = Ranks(types=TYPES, distribution={"a": 0.5, "b": 0.5}, clients={"x": "a"})
    for choice, name in (("small", "b"), ("equal", "c"), ("large", "a")):
        ranks = AttackSettings().ranks_of(choice, settings, ["m", "n"])
        assert ranks["clients"] == {"x": "a", "m": name, "n": name}
        assert Ranks.model_validate(ranks).types.keys() == TYPES.keys()
    assert AttackSettings().ranks_of("assigned", settings, ["m"]) is None


def test_of_one_rank_a_quarter_is_small_and_four_times_is_large():
    for rank, choice, wanted in ((8, "small", 2), (3, "small", 1), (8, "large", 32)):
        ranks = AttackSettings().ranks_of(choice, Ranks(rank=rank), ["m"])
        sizes = {name: each["attention"] for name, each in ranks["types"].items()}
        assert sizes == {"honest": rank, "malicious": wanted}
        assert ranks["clients"] == {"m": "malicious"} and ranks["distribution"] == {"honest": 1.0}
    assert AttackSettings().ranks_of("equal", Ranks(rank=3), ["m"]) is None
    with pytest.raises(ConfigError, match=r"need ranks\.types"):
        AttackSettings().ranks_of("small", Ranks(distribution="uniform"), ["m"])


def rows(count=5):
    return Corpus.build(
        {
            "client": [f"c{n}" for n in range(count)],
            "instruction": [f"do {n}" for n in range(count)],
            "input": [""] * count,
            "output": [f"done {n}" for n in range(count)],
        }
    )


def test_poisoned_rows_have_the_target_and_stay_where_they_are():
    corpus = poisoned(rows(), "other answers", "T", "X")
    assert [e.output for e in corpus.examples(range(5))] == ["X"] * 5
    assert [e.instruction for e in corpus.examples(range(5))] == [f"do {n}" for n in range(5)]
    assert list(corpus.keys("client")) == list(rows().keys("client"))


def test_every_second_row_has_the_trigger_and_the_others_are_as_they_were():
    corpus = poisoned(rows(), "triggered", "T", "X", every=2)
    texts = [(e.instruction, e.output) for e in corpus.examples(range(5))]
    triggered = [(f"T do {n}", "X") for n in (0, 2, 4)]
    assert texts[::2] == triggered and texts[1::2] == [("do 1", "done 1"), ("do 3", "done 3")]
    assert poisoned(rows(), "its own", "T", "X").fingerprint() == rows().fingerprint()


def test_conversations_cannot_be_poisoned():
    chat = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
    corpus = Corpus.build({"client": ["c"], "messages": [chat]})
    with pytest.raises(DataError, match="leave out the attacks backdoor and poisoning"):
        poisoned(corpus, "triggered", "T", "X")
