"""A data owner's machine: its rows, its turns, and what a server cannot make it do."""

import errno
import json
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flexlora import model, peft_format, wire
from flexlora.data import Columns
from flexlora.data.corpus import Corpus
from flexlora.deployment.node import node
from flexlora.deployment.node.capacity import Capacity
from flexlora.deployment.node.node import Node, NodeConfig
from flexlora.deployment.node.own_rows import own_rows
from flexlora.federation.client_turn import METRICS
from flexlora.lowrank.factors import Adapter, Factors
from flexlora.method.interface import (
    Download,
    FreshAdapters,
    Upload,
)
from flexlora.storage import sha256, sum_file
from support import models
from support.node_server import NAME, RANK, RUN, Server, own_file, owner, settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("node")
    models.save(folder / "model")
    own_file(folder)
    return folder


@pytest.fixture(scope="module")
def loaded() -> dict[str, model.Base]:
    return {}


@pytest.fixture(autouse=True)
def quick(monkeypatch, loaded):
    """The same model is read from the disk once, and nothing waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    models.load_once(monkeypatch, loaded)


@pytest.fixture
def server(folder, tmp_path) -> Server:
    return Server(tmp_path, settings(folder))


@pytest.fixture
def here(folder, tmp_path) -> Node:
    return Node(owner(folder, tmp_path / "state"))


@pytest.fixture
def turns(monkeypatch) -> list[int]:
    """The rounds that were trained."""
    trained, take = [], node.turn

    def counted(job, place):
        trained.append(job.round)
        return take(job, place)

    monkeypatch.setattr(node, "turn", counted)
    return trained


def same(one: Upload, other: Upload) -> bool:
    """Whether two uploads are equal to the bit, but for what the clock said."""
    facts = [{**upload.metrics, "seconds": 0.0} for upload in (one, other)]
    if facts[0] != facts[1] or one.adapter.keys() != other.adapter.keys():
        return False
    return all(
        torch.equal(f.B, other.adapter[m].B) and torch.equal(f.A, other.adapter[m].A)
        for m, f in one.adapter.items()
    )


def fault(said: dict) -> str:
    assert set(said) == {"error"}
    return said["error"]


# Enrolling


def test_a_node_says_who_it_is_and_what_it_can_do(server, here):
    assert server.enrolled(here) == {
        "client": NAME,
        "holdout": 0,
        "examples": 10,
        "attention": 3,
        "feed_forward": 3,
        "tokens_per_second": None,
        "device": "cpu",
        "kept": False,
    }


def test_a_rank_is_within_the_servers_limit(folder, tmp_path):
    most = Node(owner(folder, tmp_path / "state", capacity=Capacity(99)))
    said = Server(tmp_path, settings(folder)).enrolled(most)
    assert (said["attention"], said["feed_forward"]) == (5, 5)


def test_an_answer_is_fit_for_json(server, here):
    said = server.enrolled(here)
    assert json.loads(json.dumps(said, allow_nan=False)) == said


@pytest.mark.parametrize("told", [None, "", "{}", "[" * 10**4, 7, ["x"]])
def test_ill_formed_terms_are_refused(here, told):
    said, data = here.handle({"kind": "enrol", "terms": told}, b"")
    assert "The server's run specification cannot be read" in fault(said) and data == b""


def test_a_method_that_is_not_there_is_refused(server, here):
    told = json.dumps({**json.loads(server.told), "method": {"name": "flexlore"}})
    said, _ = here.handle({"kind": "enrol", "terms": told}, b"")
    assert "There is no method 'flexlore'. Did you mean 'flexlora'?" in fault(said)


@pytest.mark.parametrize("kind", [None, "shell", "", 3, ["turn"], {"turn": 1}])
def test_what_is_not_known_is_refused(server, here, kind):
    said, _ = here.handle({**server.header(1), "kind": kind}, server.download(1))
    assert "unknown kind" in fault(said)
    assert server.enrolled(here)["client"] == NAME


# The model is the owner's choice


@pytest.mark.parametrize("form", ["absolute", "relative", "parent"])
def test_a_path_that_the_server_names_is_refused(folder, tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "model", tmp_path / "private")
    name = {
        "absolute": str(tmp_path / "private"),
        "relative": "private",
        "parent": f"../{tmp_path.name}/private",
    }[form]
    told = json.loads(Server(tmp_path, settings(folder)).told)
    told["model"]["name"] = name
    at = Node(owner(folder, tmp_path / "state", model=None))
    said, _ = at.handle({"kind": "enrol", "terms": json.dumps(told)}, b"")
    assert "by a local path" in fault(said) and "--model" in fault(said)


def test_a_server_does_not_learn_which_files_exist(folder, tmp_path, server):
    said = []
    for name in (folder / "mine.jsonl", folder / "theirs.jsonl"):
        told = json.loads(server.told)
        told["model"]["name"] = str(name)
        at = Node(owner(folder, tmp_path / "state", model=None))
        answer, _ = at.handle({"kind": "enrol", "terms": json.dumps(told)}, b"")
        said.append(fault(answer).replace(name.name, "NAME"))
    assert said[0] == said[1]


def test_the_owners_model_is_taken_whatever_the_server_names(folder, tmp_path):
    told = json.loads(Server(tmp_path, settings(folder)).told)
    told["model"]["name"] = "somebody/else"
    at = Node(owner(folder, tmp_path / "state"))
    said, _ = at.handle({"kind": "enrol", "terms": json.dumps(told)}, b"")
    assert said["client"] == NAME


def test_the_owners_device_is_taken_whatever_the_server_names(folder, tmp_path):
    told = json.loads(Server(tmp_path, settings(folder)).told)
    told["model"]["device"] = "cuda:7"
    at = Node(owner(folder, tmp_path / "state"))
    said, _ = at.handle({"kind": "enrol", "terms": json.dumps(told)}, b"")
    assert said["device"] == "cpu"


# Turns


def test_a_turn_trains_on_the_owners_rows(server, here, turns):
    upload = server.opened(server.turn(here, 1))
    assert turns == [1]
    assert (upload.client, upload.round, upload.examples) == (NAME, 1, 10)
    assert set(METRICS) <= upload.metrics.keys() and upload.metrics["steps"] == 3
    assert upload.adapter.ranks == server.ranks
    assert any(f.B.any() for f in upload.adapter.values())


def test_a_redelivered_job_is_answered_from_the_disk(server, here, turns):
    download = server.download(1)
    first = here.handle(server.header(1), download)
    again = here.handle(server.header(1), download)
    assert turns == [1] and first == again


def test_a_redelivered_job_is_answered_after_a_restart(server, here, turns):
    download = server.download(1)
    first = here.handle(server.header(1), download)
    again = Node(here.config).handle(server.header(1), download)
    assert turns == [1] and first == again


def test_another_download_of_the_same_round_is_trained(server, here, turns):
    """A server that lost its last round hands out another one."""
    first = server.turn(here, 1)
    _, other = here.handle(server.header(1), server.download(1))  # the state has moved on
    assert turns == [1, 1]
    assert not same(server.opened(first), server.opened(other))


def test_the_last_upload_alone_is_kept(server, here):
    for number in (1, 2, 3):
        server.turn(here, number)
    kept = sorted((here.config.state / RUN).glob("upload-*"))
    assert len(kept) == 2 and kept[1] == sum_file(kept[0])  # beside it
    assert kept[0].name.startswith("upload-00003-")


@pytest.mark.parametrize(
    "changes",
    [
        {"client": "client1"},
        {"client": None},
        {"client": [NAME]},
        {"round": 0},
        {"round": -1},
        {"round": True},
        {"round": 1.0},
        {"round": "1"},
        {"round": "../../x"},
        {"round": None},
    ],
)
def test_a_job_of_another_client_or_of_no_round_is_refused(server, here, turns, changes):
    said, data = here.handle(server.header(1, **changes), server.download(1))
    assert "The request is for client" in fault(said) and f"this is client {NAME!r}" in fault(said)
    assert data == b"" and turns == []
    assert not list((here.config.state / RUN).glob("upload-*"))


def test_a_download_that_is_none_is_refused_and_the_next_is_trained(server, here, turns):
    for payload in (b"", b"\x80\x04pickle", server.download(1)[:-5], server.download(1)[8:]):
        said, data = here.handle(server.header(1), payload)
        assert fault(said).startswith("The message") and data == b""
    server.turn(here, 1)


def test_a_download_for_another_model_is_refused(server, here):
    strange = Adapter({"model.layers.9.mlp.up_proj": Factors(torch.ones(4, 2), torch.ones(2, 3))})
    payload = wire.encode_download(Download(strange), torch.float32)
    said, _ = here.handle(server.header(1), payload)
    assert "has no adapted layer of that name" in fault(said)
    server.turn(here, 1)


def test_a_full_disk_is_said_and_the_next_turn_works(server, here, monkeypatch, turns):
    payload = server.download(1)

    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(node, "write_summed", full)
        said, data = here.handle(server.header(1), payload)
        assert "a file: No space left on device. Free some space" in fault(said) and data == b""
    assert here.handle(server.header(1), payload)[0] == {"round": 1}
    assert turns == [1, 1]


def test_nothing_stays_of_a_turn_that_found_the_disk_full(server, here, monkeypatch):

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    server.turn(here, 1)
    for number in (2, 3):  # each round has a file of its own name
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            said, _ = here.handle(server.header(number), server.download(number))
            assert "No space left" in fault(said)
    server.turn(here, 4)
    left = sorted(path.name for path in (here.config.state / RUN).iterdir())
    assert [name for name in left if name.startswith(".upload")] == []


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory"), KeyError(1)])
def test_whatever_goes_wrong_is_said_with_its_kind(server, here, monkeypatch, error):

    def broken(job, place):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(node, "turn", broken)
        said, data = here.handle(server.header(1), server.download(1))
    assert fault(said).startswith(f"{type(error).__name__}:") and data == b""
    server.turn(here, 1)


# What the owner has decided


def test_a_rank_above_the_owners_means_is_refused(server, here, turns):
    assert server.enrolled(here)["attention"] == RANK
    server.ranks = dict.fromkeys(server.shapes, 16)
    large = FreshAdapters(server.shapes, 1).common(server.ranks)
    payload = wire.encode_download(Download(large), torch.float32)
    said, _ = here.handle(server.header(1), payload)
    assert "rank" in fault(said) and turns == []


def test_a_rank_above_the_owners_means_is_refused_where_it_is_all_that_travels(folder, tmp_path):
    """FLoRA hands out no numbers, and the client draws them itself."""
    server = Server(tmp_path, settings(folder, "flora"))
    here = Node(owner(folder, tmp_path / "state"))
    server.client = replace(server.client, ranks=dict.fromkeys(server.shapes, 16))
    said, _ = here.handle(server.header(1), server.download(1))
    assert "train rank 16 in" in fault(said) and f"its limit is rank {RANK}" in fault(said)


def test_modules_that_the_owner_leaves_out_are_not_trained(folder, tmp_path, server, turns):
    capacity = Capacity(RANK, modules="feed_forward")
    here = Node(owner(folder, tmp_path / "state", capacity=capacity))
    assert server.enrolled(here)["attention"] == 0
    said, _ = here.handle(server.header(1), server.download(1))
    assert "self_attn.k_proj', which its --modules exclude." in fault(said)
    assert turns == []


def test_what_a_client_keeps_to_itself_is_its_owners_alone(server, here):
    """Its rows lie there as tokens, beside its private halves."""
    server.turn(here, 1)
    assert stat.S_IMODE(here.config.state.stat().st_mode) & 0o077 == 0


def test_nothing_is_written_outside_of_the_state(server, here, tmp_path):
    before = {path for path in tmp_path.rglob("*") if here.config.state not in path.parents}
    server.turn(here, 1)
    after = {path for path in tmp_path.rglob("*") if here.config.state not in path.parents}
    assert {path.name for path in after - before} <= {"state", "upload-0"}


# A node that goes on


@pytest.mark.parametrize("method", ["flexlora", "flora", "fedsalora", "flexfold"])
def test_a_restarted_node_gives_the_same_bytes(folder, tmp_path, method):
    """Merged updates and private halves are on the disk, and nothing else is needed."""
    found = []
    for name, restarts in (("stays", False), ("restarts", True)):
        place = tmp_path / name
        place.mkdir()
        server = Server(place, settings(folder, method))
        mine = owner(folder, place / "state")
        at = Node(mine)
        uploads = []
        for number in (1, 2, 3):
            if restarts:
                at = Node(mine)
            uploads.append(server.opened(server.turn(at, number)))
        found.append(uploads)
    assert all(same(one, other) for one, other in zip(*found, strict=True))
    assert not same(found[0][0], found[0][2])


@pytest.mark.parametrize(("method", "kept"), [("flexlora", False), ("fedsalora", True)])
def test_a_node_says_whether_it_has_kept_something(folder, tmp_path, method, kept):
    server = Server(tmp_path, settings(folder, method))
    mine = owner(folder, tmp_path / "state")
    server.turn(Node(mine), 1)
    assert server.enrolled(Node(mine))["kept"] is kept


def test_private_halves_change_what_is_learnt(folder, tmp_path):
    """So that the test above would see it if they were lost."""
    server = Server(tmp_path, settings(folder, "fedsalora"))
    mine = owner(folder, tmp_path / "state")
    server.turn(Node(mine), 1)
    download = server.download(2)
    _, with_it = Node(mine).handle(server.header(2), download)
    shutil.rmtree(mine.state)
    _, without = Node(mine).handle(server.header(2), download)
    assert not same(server.opened(with_it), server.opened(without))


def test_a_node_that_lost_what_it_had_merged_says_so(folder, tmp_path, turns):
    server = Server(tmp_path, settings(folder, "flora"))
    mine = owner(folder, tmp_path / "state")
    at = Node(mine)
    for number in (1, 2, 3):
        server.turn(at, number)
    shutil.rmtree(mine.state / RUN / "private")
    said, data = at.handle(server.header(4), server.download(4))
    assert (
        said["forgot"] is True and "base updates of rounds [1, 2] are not complete" in said["error"]
    )
    assert data == b"" and len(server.opened(server.turn_again(at, 4)).adapter) == 14


@pytest.mark.parametrize("fault", ["lost", "empty"])
def test_a_node_that_lost_some_of_what_it_had_merged_says_so(folder, tmp_path, fault):
    server = Server(tmp_path, settings(folder, "flora"))
    mine = owner(folder, tmp_path / "state")
    at = Node(mine)
    for number in (1, 2, 3):
        server.turn(at, number)
    entry = mine.state / RUN / "private" / "merged" / "00001.safetensors"
    entry.unlink()
    if fault == "empty":  # the power was gone before it was on the disk
        entry.touch()
    said, _ = at.handle(server.header(4), server.download(4))
    assert said.get("forgot") is True
    server.turn_again(at, 4)


def test_two_runs_have_places_of_their_own(folder, tmp_path, turns):
    mine = owner(folder, tmp_path / "state")
    at = Node(mine)
    for name in ("0" * 16, "1" * 16):
        place = tmp_path / name
        place.mkdir()
        server = Server(place, settings(folder, "fedsalora"), name)
        server.turn(at, 1)
    assert turns == [1, 1]
    for name in ("0" * 16, "1" * 16):
        assert (mine.state / name / "private" / "kept").is_dir()


def test_new_terms_of_the_same_run_are_taken(folder, tmp_path):
    server = Server(tmp_path, settings(folder))
    at = Node(owner(folder, tmp_path / "state"))
    server.turn(at, 1)
    told = json.loads(server.told)
    told["training"]["max_steps"] = 1
    server.told = json.dumps(told)
    assert server.opened(server.turn(at, 2)).metrics["steps"] == 1


# Rows


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(number: int, **more) -> dict:
    return {"instruction": "the cat", "input": f"sees {number}", "output": "red", **more}


def rows_of(data: Path, **options) -> list[str]:
    """The inputs of the rows that an owner of this file would train on."""
    return texts(own_rows(data, **options), "input")


def texts(corpus: Corpus, column: str) -> list[str]:
    return corpus.table[column].to_pylist()


def test_all_rows_of_a_file_without_owners_or_splits(tmp_path):
    assert rows_of(write(tmp_path / "a.jsonl", [row(1), row(2)])) == ["sees 1", "sees 2"]


def test_what_may_be_missing(tmp_path):
    """A file without inputs, in each format."""
    write(tmp_path / "a.jsonl", [{"prompt": "", "output": "red"}, {"prompt": "", "output": "blue"}])
    (tmp_path / "a.csv").write_text("prompt,output\n,red\n,blue\n")
    rows = '[{"prompt": null, "output": "red"}, {"prompt": "", "output": "blue"}]'
    (tmp_path / "a.json").write_text(rows)
    for suffix in ("jsonl", "csv", "json"):
        corpus = own_rows(tmp_path / f"a.{suffix}")
        assert texts(corpus, "output") == ["red", "blue"]
        assert texts(corpus, "input") == texts(corpus, "instruction") == ["", ""]


def test_an_output_may_not_be_missing(tmp_path):
    with pytest.raises(ValueError, match=r"no column for the response.*join`, --columns"):
        rows_of(write(tmp_path / "a.jsonl", [{"instruction": "a", "reply": "b"}]))


def test_columns_may_have_other_names(tmp_path):
    data = write(tmp_path / "a.jsonl", [{"question": "a", "answer": "b", "input": "not this"}])
    columns = Columns(instruction="question", input="", output="answer")
    corpus = own_rows(data, columns)
    assert texts(corpus, "output") == ["b"] and texts(corpus, "input") == [""]


def test_rows_of_several_clients_are_refused(tmp_path):
    data = write(tmp_path / "a.jsonl", [row(n, client=f"c{n}") for n in range(5)])
    with pytest.raises(ValueError, match=r"rows of 5 clients \(c0, c1, c2, .*--rows-of NAME"):
        rows_of(data)


def test_rows_of_one_client_need_no_choice(tmp_path):
    data = write(tmp_path / "a.jsonl", [row(n, client="somebody") for n in range(2)])
    assert rows_of(data) == ["sees 0", "sees 1"]


def test_the_rows_of_one_of_several_may_be_chosen(tmp_path):
    data = write(tmp_path / "a.jsonl", [row(n, client=f"c{n % 3}") for n in range(7)])
    assert rows_of(data, rows_of="c1") == ["sees 1", "sees 4"]
    with pytest.raises(ValueError, match=r"has no rows of client 'c9'"):
        rows_of(data, rows_of="c9")


def test_choosing_among_clients_needs_a_column_that_names_them(tmp_path):
    data = write(tmp_path / "a.jsonl", [row(n, owner=f"c{n % 3}") for n in range(7)])
    with pytest.raises(ValueError, match="client"):
        rows_of(data, rows_of="c1")


def test_of_a_split_file_the_rows_to_train_on_and_to_validate_are_taken(tmp_path):
    splits = ["train", "test", "validation", "train"]
    data = write(tmp_path / "a.jsonl", [row(n, split=s) for n, s in enumerate(splits)])
    assert rows_of(data) == ["sees 0", "sees 2", "sees 3"]
    made = Node(NodeConfig("mine", data, tmp_path))
    for share, held in ((0.0, []), (0.5, [1])):
        assert made._divided(SimpleNamespace(holdout_share=share, seed=3)) == ([0, 2], held)


def test_rows_are_of_the_client_and_of_the_split(tmp_path):
    rows = [row(n, client=f"c{n % 2}", split="test" if n < 4 else "train") for n in range(8)]
    assert rows_of(write(tmp_path / "a.jsonl", rows), rows_of="c1") == ["sees 5", "sees 7"]


def test_no_row_to_train_on_is_said(tmp_path):
    data = write(tmp_path / "a.jsonl", [row(n, split="test") for n in range(2)])
    with pytest.raises(ValueError, match="no training rows; check the values of its split column"):
        rows_of(data)


@pytest.mark.parametrize("name", ["none.jsonl", "none.parquet", "none.csv"])
def test_a_file_that_is_not_there_is_said(tmp_path, name):
    with pytest.raises(ValueError, match=r"There is no file '.*none"):
        rows_of(tmp_path / name)


def test_a_file_of_an_unknown_kind_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("red")
    with pytest.raises(ValueError, match="neither JSON nor a table"):
        rows_of(tmp_path / "a.txt")


# Evaluating, and the finished adapter


def agreed(server: Server, **changes) -> str:
    """The server's run specification with other fields."""
    return json.dumps({**json.loads(server.told), **changes})


def evaluation(server: Server, **changes) -> dict:
    terms = agreed(server, holdout_share=0.3)
    usual = {"kind": "evaluate", "terms": terms, "client": NAME, "round": 1, "rows": 2}
    return {**usual, **changes}


def adapter_bytes(server: Server) -> bytes:
    return wire.encode(server.state.model, {"kind": "adapter"}, torch.float32)


def test_an_evaluation_returns_numbers_alone(server, here):
    said, data = here.handle(evaluation(server), adapter_bytes(server))
    assert set(said) == {"round", "examples", "loss_total", "loss_tokens"} and data == b""
    assert said["round"] == 1 and said["examples"] == 2
    assert said["loss_total"] > 0 < said["loss_tokens"]
    again, _ = here.handle(evaluation(server), adapter_bytes(server))
    assert again == said


def test_held_out_rows_do_not_train(server, here, folder, tmp_path):
    said, _ = here.handle({"kind": "enrol", "terms": agreed(server, holdout_share=0.3)}, b"")
    assert (said["examples"], said["holdout"]) == (7, 3)
    other = Node(owner(folder, tmp_path / "other", holdout=0.5))
    said, _ = other.handle({"kind": "enrol", "terms": agreed(server, holdout_share=0.3)}, b"")
    assert (said["examples"], said["holdout"]) == (5, 5)


def test_an_owner_may_take_no_part_in_evaluations(server, folder, tmp_path):
    mine = Node(owner(folder, tmp_path / "mine", holdout=0.0))
    said, _ = mine.handle({"kind": "enrol", "terms": agreed(server, holdout_share=0.3)}, b"")
    assert (said["examples"], said["holdout"]) == (10, 0)
    said, _ = mine.handle(evaluation(server), adapter_bytes(server))
    assert "holds out no rows and evaluates nothing" in fault(said)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": 0}, "an evaluation on 0 rows"),
        ({"rows": "all"}, "an evaluation on 'all' rows"),
        ({"rows": True}, "an evaluation on True rows"),
        ({"round": -1}, "in round -1"),
        ({"client": "other"}, "is for client 'other'"),
    ],
)
def test_an_evaluation_of_another_form_is_refused(server, here, changes, words):
    said, _ = here.handle(evaluation(server, **changes), adapter_bytes(server))
    assert words in fault(said)


def test_an_adapter_of_another_model_is_not_evaluated(server, here):
    module, factors = next(iter(server.state.model.items()))
    wrong = Adapter({module: Factors(factors.B[:-1], factors.A)})
    data = wire.encode(wrong, {"kind": "adapter"}, torch.float32)
    assert "in the base model of this client it is" in fault(
        here.handle(evaluation(server), data)[0]
    )


def stored(server: Server, digest: str, **changes) -> dict:
    return {"kind": "store", "terms": server.told, "digest": digest, "rounds": 3, **changes}


@pytest.fixture
def digest(server, tmp_path) -> str:
    """That of the server's own file."""
    peft_format.write(server.state.model, tmp_path / "at-the-server")
    return sha256(tmp_path / "at-the-server" / peft_format.WEIGHTS)


def test_the_finished_adapter_is_written_and_confirmed(server, here, digest, tmp_path):
    """Also by a client that was restarted and has not enrolled."""
    said, data = here.handle(stored(server, digest), adapter_bytes(server))
    out = tmp_path / "state" / "adapter"
    assert data == b"" and said["digest"] == digest == sha256(out / peft_format.WEIGHTS)
    assert said == {"client": NAME, "rounds": 3, "digest": digest}
    assert here.published == str(here.config.model)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert not list((tmp_path / "state" / RUN).glob("finished*"))
    assert here.handle(stored(server, digest), adapter_bytes(server))[0] == said
    assert here.handle({"kind": "over"}, b"") == ({}, b"")


def test_the_owner_decides_where_it_is_written_and_at_which_rank(server, folder, digest, tmp_path):
    mine = owner(folder, tmp_path / "mine", out=tmp_path / "out", own_rank=True)
    mine = replace(mine, capacity=Capacity(2, modules="attention"))
    said, _ = Node(mine).handle(stored(server, digest), adapter_bytes(server))
    assert said["digest"] == digest
    ranks = peft_format.read(tmp_path / "out").ranks
    assert set(ranks.values()) == {2} and all("self_attn" in module for module in ranks)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"digest": "ab" * 32}, "The adapter that arrived has the SHA-256"),
        ({"rounds": 0}, "an adapter of 0 rounds"),
        ({"rounds": None}, "an adapter of None rounds"),
        ({"terms": "{}"}, "run specification cannot be read"),
    ],
)
def test_a_finished_adapter_of_another_form_is_refused(
    server, here, digest, tmp_path, changes, words
):
    said, _ = here.handle({**stored(server, digest), **changes}, adapter_bytes(server))
    assert words in fault(said)
    assert not (tmp_path / "state" / "adapter").exists()
