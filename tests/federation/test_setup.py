import dataclasses
import tracemalloc

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from flexlora.data.corpora import table
from flexlora.data.corpus import Corpus
from flexlora.federation import setup
from flexlora.federation.rounds import run
from flexlora.federation.setup import prepare
from support import models


@pytest.fixture
def ready(folder, monkeypatch):
    """Prepares an experiment; the model is loaded once, for it does not change."""

    def ready(corpus=None, **changes):
        settings = models.settings(folder, **changes)
        return prepare(settings, models.corpus() if corpus is None else corpus)

    return ready


ONE = {"rank": 3, "types": None, "distribution": None}


def no_client(rows: int = 40) -> Corpus:
    draw = np.random.default_rng(2)
    return Corpus.build(
        {
            "category": [("odd", "even", "big")[row % 3] for row in range(rows)],
            "instruction": ["the cat sees"] * rows,
            "input": [" ".join(draw.choice(models.WORDS, 2 + row % 5)) for row in range(rows)],
            "output": [models.WORDS[row % 7] for row in range(rows)],
        }
    )


def test_clients_are_those_of_the_data_with_their_training_rows(ready):
    found = ready()
    corpus = models.corpus()
    clients, splits = corpus.keys("client"), corpus.keys("split")
    assert list(found.clients) == sorted(set(clients))
    for id, client in found.clients.items():
        rows = np.flatnonzero((clients == id) & (splits == "train"))
        assert list(found.runtime.rows[id]) == rows.tolist()
        assert client.examples == len(rows)
        assert client.id == id
        assert client.rank_type in found.clients.kinds


def test_ranks_are_by_type_and_module(ready):
    found = ready()
    for client in found.clients.values():
        kinds = {
            "small": (2, 2),
            "wide": (2, 5),
            "large": (3, 3),
        }[client.rank_type]
        assert client.ranks["model.layers.0.self_attn.q_proj"] == kinds[0]
        assert client.ranks["model.layers.1.mlp.up_proj"] == kinds[1]
        assert set(client.ranks) == set(found.base.shapes)
    assert found.clients.counts == {"small": 3, "wide": 1, "large": 2}
    assert found.ranks["model.layers.0.self_attn.q_proj"] == 3
    assert found.ranks["model.layers.1.mlp.up_proj"] == 5


def test_a_fresh_adapter_is_lora_s_start_at_the_largest_ranks(ready):
    found = ready()
    fresh = found.fresh()
    assert fresh.ranks == found.ranks
    for module, factors in fresh.items():
        assert factors.shape == found.base.shapes[module]
        assert not factors.B.any()
        assert factors.A.dtype == torch.float32
        bound = factors.shape[1] ** -0.5
        assert 0.5 * bound < float(factors.A.abs().max()) <= bound
    again = found.fresh()
    assert all(torch.equal(fresh[m].A, again[m].A) for m in fresh)
    first, second = (fresh[f"model.layers.{i}.self_attn.q_proj"].A for i in (0, 1))
    assert not torch.equal(first, second)


def test_unseen_clients_never_train(ready):
    found = ready(data={"unseen_clients": 2})
    assert len(found.unseen) == 2
    assert not set(found.unseen) & set(found.clients)
    assert set(found.unseen) | set(found.clients) == {f"client{i}" for i in range(6)}
    seen = {question.client for question in found.questions if question.seen}
    never = {question.client for question in found.questions if not question.seen}
    assert never == set(found.unseen)
    assert len(seen) == 2 and seen <= set(found.clients)


def test_questions_are_test_rows(ready):
    found = ready(evaluation={"rows_per_client": 99, "seen_clients": 99})
    corpus = models.corpus()
    tested = np.flatnonzero(corpus.keys("split") == "test")
    assert len(found.questions) == len(tested)
    assert [q.example for q in found.questions] == corpus.examples(tested)


def test_only_who_trains_counts_as_seen(ready):
    """A client without a training row is in nobody's cohort."""
    whole = models.corpus()
    keep = (whole.keys("client") != "client2") | (whole.keys("split") == "test")
    found = ready(whole.select(keep), evaluation={"seen_clients": 99})
    assert "client2" not in found.clients
    assert {q.client for q in found.questions if q.seen} <= set(found.clients)


def test_as_many_clients_as_asked_for(ready):
    found = ready(data={"clients": 4, "unseen_clients": 1})
    assert len(found.clients) == 3
    assert len(found.unseen) == 1
    other = ready(data={"clients": 4, "unseen_clients": 1}, seed=12)
    assert set(found.clients) != set(other.clients)


@pytest.mark.parametrize(
    ("partition", "clients"),
    [
        ({"kind": "iid", "clients": 5}, list("01234")),
        ({"kind": "dirichlet", "clients": 4, "alpha": 0.3}, list("0123")),
        ({"kind": "shards", "clients": 3, "shards_per_client": 2}, list("012")),
        ({"kind": "category"}, ["odd", "even", "big"]),
    ],
)
def test_data_without_clients_is_dealt_out(ready, partition, clients):
    found = ready(no_client(), data={"partition": partition})
    assert list(found.clients) == clients
    rows = np.concatenate([found.runtime.rows[id] for id in found.clients])
    assert len(set(rows.tolist())) == len(rows)
    tested = {question.client for question in found.questions}
    assert tested <= set(clients)
    assert 0.75 * 40 <= len(rows) <= 0.9 * 40


def test_a_partition_of_natural_clients_leaves_the_unseen_out(ready):
    found = ready(data={"unseen_clients": 2, "partition": {"kind": "iid", "clients": 3}})
    assert list(found.clients) == ["0", "1", "2"]
    owners = models.corpus().keys("client")
    trained = {owners[row] for rows in found.runtime.rows.values() for row in rows}
    assert trained.isdisjoint(found.unseen)
    assert len(trained) == 4


def test_the_seed_decides_everything_and_alone(ready):
    one, same, other = (ready(data={"unseen_clients": 2}, seed=seed) for seed in (3, 3, 8))
    assert one.clients.types == same.clients.types != other.clients.types
    assert one.unseen == same.unseen
    assert [q.example for q in one.questions] == [q.example for q in same.questions]
    module = next(iter(one.base.shapes))
    assert torch.equal(one.fresh()[module].A, same.fresh()[module].A)
    assert not torch.equal(one.fresh()[module].A, other.fresh()[module].A)


@pytest.mark.parametrize(
    ("federation", "size"),
    [
        ({"cohort": 4}, 4),
        ({"cohort": 99}, 99),
        ({"cohort": None, "fraction": 0.5}, 3),
        ({"cohort": None, "fraction": 0.05}, 1),
        ({"cohort": None, "fraction": 1.0}, 6),
    ],
)
def test_cohorts_are_a_number_or_a_fraction(ready, federation, size):
    assert ready(federation=federation).cohort_size == size


def test_fractions_that_name_a_whole_number_give_it(ready):
    """0.29 x 100 is 28.999999999999996 in floating point."""
    found = ready(federation={"cohort": None, "fraction": 0.29})
    hundred = {f"c{i}": found.clients["client0"] for i in range(100)}
    assert dataclasses.replace(found, clients=hundred).cohort_size == 29


def test_one_rank_for_all(ready):
    found = ready(ranks=ONE)
    assert {client.rank_type for client in found.clients.values()} == {"rank3"}
    assert set(found.ranks.values()) == {3}


def test_ranks_by_client(ready):
    clients = {f"client{i}": "type1" for i in range(5)} | {"client5": "type2"}
    found = ready(ranks={"types": None, "distribution": None, "clients": clients})
    assert found.clients["client5"].ranks["model.layers.0.mlp.up_proj"] == 30
    assert found.clients["client0"].ranks["model.layers.0.mlp.up_proj"] == 8


def test_ranks_from_a_table(ready, tmp_path):
    table = tmp_path / "ranks.toml"
    table.write_text(
        '[ranks]\ndistribution = { tiny = 0.5, big = 0.5 }\nclients = { client0 = "big" }\n'
        "[ranks.types]\ntiny = { attention = 1, feed_forward = 2 }\n"
        "big = { attention = 4, feed_forward = 4 }\n"
    )
    found = ready(ranks={"types": None, "distribution": None, "table": str(table)})
    assert found.clients["client0"].rank_type == "big"
    assert sorted(found.clients.counts.values()) == [2, 4] or found.clients.counts == {
        "tiny": 3,
        "big": 3,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnk = 3", "'rnk'"),
        ("rank = 0", "'rank'"),
        ('rank = "3"', "'rank'"),
        ('rank = 3\ndistribution = "uniform"', "rank"),
        ('table = "other.toml"', "table"),
        ("", r"ranks\.toml"),
        ('distribution = "unifrm"', "Did you mean 'uniform'"),
    ],
)
def test_a_table_is_checked_as_the_config_is(ready, tmp_path, text, message):
    table = tmp_path / "ranks.toml"
    table.write_text(text)
    with pytest.raises(ValueError, match=message):
        ready(ranks={"types": None, "distribution": None, "table": str(table)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "fedit"}}, "needs one rank for all clients.* 3 small"),
        ({"data": {"unseen_clients": 6}}, "unseen_clients is 6"),
        ({"ranks": {"distribution": {"small": 0.5}}}, "must add up to 1"),
        ({"ranks": {"distribution": {"huge": 1.0}}}, "names the type 'huge'"),
        ({"ranks": {"clients": {"nobody": "small"}}}, "client 'nobody'"),
        ({"ranks": {"types": None, "distribution": "normal", "clients": {"x": "type1"}}}, "'x'"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_loaded(
    ready, monkeypatch, changes, message
):
    def load(source):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(setup.Experiment.model_fields["model"].annotation, "load", load)
    with pytest.raises(ValueError, match=message):
        ready(**changes)


def test_fedit_takes_clients_of_one_rank(ready):
    assert ready(method={"name": "fedit"}, ranks=ONE).method.title.startswith("FedIT")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"no column 'client'.*\{ kind = \"iid\", clients = 4 \}\.$"),
        (
            {"unseen_clients": 2, "partition": {"kind": "iid", "clients": 3}},
            "so data.unseen_clients = 2 cannot choose among its clients; remove it",
        ),
        ({"clients": 2, "partition": {"kind": "iid", "clients": 3}}, "so data.clients = 2 cannot"),
        (
            {"clients": 2, "unseen_clients": 3, "partition": {"kind": "iid", "clients": 3}},
            "data.unseen_clients = 3 and data.clients = 2 cannot.*remove them",
        ),
    ],
)
def test_what_needs_clients_is_refused_without_them(ready, data, message):
    with pytest.raises(ValueError, match=message):
        ready(no_client(), data=data)


def test_a_partition_by_category_needs_categories(ready):
    whole = models.corpus()
    bare = Corpus(whole.table.drop_columns(["category"]))
    with pytest.raises(ValueError, match=r"set data\.columns\.category"):
        ready(bare, data={"partition": {"kind": "category"}})


def test_data_without_a_training_row_is_refused(ready):
    whole = models.corpus()
    with pytest.raises(ValueError, match="No client has a training row"):
        ready(whole.select(whole.keys("split") == "test"))


def test_threads_are_set(ready):
    ready(run={"threads": 1})
    assert torch.get_num_threads() == 1


def written(path, clients: int, rows: int = 10):
    """A federation in a file: all clients the same, so that only their number differs."""
    one = models.corpus(1, rows).table
    names = np.repeat([f"client-{i:05d}" for i in range(clients)], rows)
    whole = Corpus(one.take(np.tile(np.arange(rows), clients))).with_column(
        "client", names.tolist()
    )
    pq.write_table(whole.table, path)
    return path


def test_a_source_is_read_once(folder, tmp_path, monkeypatch):
    path = written(tmp_path / "rows.parquet", 7)
    settings = models.settings(folder, data={"path": str(path), "clients": 5, "unseen_clients": 2})
    first = prepare(settings)
    monkeypatch.setattr(table, "read", lambda *given: pytest.fail("The source was read again."))
    again = prepare(settings)
    assert list(again.clients) == list(first.clients) and len(first.clients) == 3
    assert again.unseen == first.unseen
    assert again.questions == first.questions
    for id in first.clients:
        assert again.runtime.rows[id].tolist() == first.runtime.rows[id].tolist()


def test_a_source_gives_what_its_corpus_gives(folder, tmp_path):
    path = written(tmp_path / "rows.parquet", 7)
    settings = models.settings(folder, data={"path": str(path), "clients": 5, "unseen_clients": 2})
    mapped, read = prepare(settings), prepare(settings, table.read(path))
    assert dict(mapped.clients) == dict(read.clients)
    assert mapped.questions == read.questions
    assert np.array_equal(mapped.runtime.store.ids, read.runtime.store.ids)


def test_a_source_that_is_not_there_is_named(folder, tmp_path):
    settings = models.settings(folder, data={"path": str(tmp_path / "rows.parquet")})
    with pytest.raises(ValueError, match=r"There is no file '.*rows\.parquet'"):
        prepare(settings)


def test_a_client_more_costs_little(folder, tmp_path):
    """Bytes for each further client of eight training rows: preparing, prepared, in a round.

    Its name, its two places and its rank type take 145, its rows 64. A round's own are those
    of a list of all clients at most.
    """
    bytes = {}
    for clients in (200, 2000):
        path = written(tmp_path / f"{clients}.parquet", clients)
        settings = models.settings(
            folder, data={"path": str(path)}, federation={"rounds": 1, "cohort": 3}
        )
        prepare(settings)
        tracemalloc.start()
        ready = prepare(settings)
        held, preparing = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        assert len(list(run(ready, tmp_path / str(clients)))) > 3
        _, in_round = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        bytes[clients] = np.array([preparing, held, in_round - held])
    more = (bytes[2000] - bytes[200]) / 1800
    assert (more < [650, 250, 40]).all(), more


def test_the_notices_of_a_prepared_run_are_in_its_journal(ready, tmp_path):
    noted = dataclasses.replace(ready(), notices=("Layer 3 is not adapted.",))
    start = next(iter(run(noted, tmp_path / "run")))
    assert start["notices"] == ["Layer 3 is not adapted."]
