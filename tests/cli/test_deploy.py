"""keys, serve, join on the command line: what is wrong is one sentence, and nothing is started."""

import os
import socket
import stat
import subprocess
import sys

import pytest
import torch

pytest.importorskip("flwr", reason="needs flexlora[flower]")

from flexlora import peft_format
from flexlora.cli import deploy, main
from flexlora.data import Columns
from flexlora.deployment import certificates, keys
from flexlora.deployment.node import join as joining
from flexlora.deployment.node import preflight
from flexlora.deployment.node.capacity import Capacity
from flexlora.deployment.node.preflight import Fault, Greeting
from flexlora.deployment.server import server_run
from flexlora.deployment.server.delivery import Ledger, digest_of
from flexlora.journal import Record
from flexlora.lowrank import Factors
from flexlora.storage import write_sealed


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """The exit code, output and errors of ``flexlora words``, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def none(*arguments, **_):
        raise AssertionError(f"started a process: {arguments}")

    monkeypatch.setattr(subprocess, "Popen", none)
    monkeypatch.setattr(preflight, "greet", lambda *_: Greeting())

    def called(*words):
        monkeypatch.setattr(sys, "argv", ["flexlora", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main.main()
        said = capsys.readouterr()
        return stop.value.code or 0, said.out, said.err

    return called


@pytest.fixture
def refused(call):
    """The sentence with which words are refused."""

    def said(*words):
        code, out, err = call(*words)
        assert code == 2, (code, out, err)
        assert "Traceback" not in err and err.startswith("error: ")
        assert err.count("error: ") == 1 and err.rstrip().endswith((".", "`", "]"))
        return err

    return said


CONFIG = """
[model]
name = "somewhere/model"
[data]
format = "remote"
[ranks]
rank = 8
[federation]
rounds = 2
cohort = 3
quorum = 2
[evaluation]
seen_clients = 0
unseen_clients = 0
"""


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "input": "b", "output": "c"}\n')
    return path


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """The server's keys in ``keys``, a node's in ``keys/clinic``."""
    folder = tmp_path_factory.mktemp("held") / "keys"
    certificates.make_server(folder, ["localhost"])
    (folder / "nodes").mkdir(mode=0o700)
    keys.make_node(folder / "clinic", "clinic")
    (folder / "clinic" / "ca.crt").write_bytes((folder / "ca.crt").read_bytes())
    return folder


# serve


def test_serve_wants_keys_or_to_be_told_that_there_are_none(refused, plan, held):
    assert "Give --keys DIR (made by: flexlora keys DIR --host NAME)" in refused("serve", plan)
    assert "--insecure" in refused("serve", plan, "--keys", held, "--insecure")
    assert not (plan.parent / "runs").exists()


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "example.org", "[::]"])
def test_without_keys_nobody_else_can_reach_the_server(refused, plan, host):
    said = refused("serve", plan, "--insecure", "--listen", f"{host}:9001")
    assert "listens only on 127.0.0.1" in said and "flexlora keys" in said
    assert not (plan.parent / "runs").exists()


def test_without_keys_the_default_port_of_all_addresses_is_refused_as_any_other(call, plan):
    code, _, said = call("serve", plan, "--insecure", "--listen", f"0.0.0.0:{deploy.PORT}")
    assert code == 2 and "only on 127.0.0.1" in said


@pytest.mark.parametrize(
    "listen",
    [
        "8090",
        "host",
        "host:",
        "host:0",
        "host:65536",
        "host:-1",
        "host:x",
        "host:８０９０",
        ":8090",
    ],
)
def test_an_address_is_a_host_and_a_port(refused, plan, listen):
    said = refused("serve", plan, "--insecure", "--listen", listen)
    assert f"--listen takes HOST:PORT such as 0.0.0.0:8090, not {listen!r}" in said


def test_serve_wants_a_config_or_a_run(refused, plan, tmp_path):
    assert "Give a CONFIG.toml, or --resume DIR." in refused("serve", "--insecure")
    said = refused("serve", "none.toml", "--insecure")
    assert "none.toml cannot be read" in said
    for extra in ([plan], ["--out", "x"], ["--clients", "2"]):
        said = refused("serve", *extra, "--resume", tmp_path, "--insecure")
        assert "--resume takes the folder of a run" in said


def test_there_must_be_a_served_run_to_resume(refused, tmp_path):
    for folder in ("nowhere", tmp_path):
        said = refused("serve", "--resume", folder, "--insecure")
        assert f"There is no served run to resume in {folder}: it has no serve.json." in said


@pytest.mark.parametrize("file", ["serve.json", "checkpoint.json"])
def test_a_folder_that_holds_a_run_is_not_begun_again(refused, plan, tmp_path, file):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / file).write_text("{}")
    said = refused("serve", plan, "--insecure", "--out", "run")
    assert "run already holds a run; resume it with: flexlora serve --resume run" in said
    assert [path.name for path in (tmp_path / "run").iterdir()] == [file]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("ranks.rank=''", "ranks"),
        ("federation.rounds=0", "'federation.rounds' is 0"),
        ("federation.quorum=4", "federation.quorum 4 is more than federation.cohort 3"),
        ("method.name='flexlore'", "There is no method 'flexlore'"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused_before_anything_is_written(
    refused, plan, change, message
):
    assert message in refused("serve", plan, "--insecure", "--set", change)
    assert not (plan.parent / "runs").exists()


def test_ranks_dealt_by_shares_are_refused(refused, tmp_path):
    path = tmp_path / "shares.toml"
    path.write_text(CONFIG.replace("rank = 8", 'distribution = "uniform"'))
    said = refused("serve", path, "--insecure")
    assert "ranks.distribution assigns ranks to a fixed set of simulated clients" in said
    assert not (tmp_path / "runs").exists()


def test_keys_that_are_not_there_are_found_before_anything_is_written(refused, plan):
    assert "ca.crt is not there" in refused("serve", plan, "--keys", "nowhere")
    assert not (plan.parent / "runs").exists()


@pytest.fixture
def served(monkeypatch):
    """What would be served: the config, the folder, where it listens."""
    given = []
    monkeypatch.setattr(deploy, "_serve", lambda *arguments: given.append(arguments))
    return given


def test_a_run_is_laid_out_and_served(call, plan, served, held, tmp_path):
    code, _, said = call("serve", plan, "--keys", held, "--listen", "[::]:9001", "--set", "seed=7")
    assert code == 0, said
    ((settings, folder, listening, *_),) = served
    assert settings.seed == 7 and str(folder) == "runs/plan"
    assert (listening.host, listening.port, listening.keys) == ("::", 9001, held)
    laid = server_run.ServePlan.read(folder)
    assert laid.clients == 3 and laid.bound is True
    call("serve", "--resume", folder, "--keys", held)
    assert served[1][:2] == (settings, folder)


def test_without_keys_names_are_not_bound_and_loopback_is_listened_on(call, plan, served, tmp_path):
    call("serve", plan, "--insecure", "--out", "run", "--clients", "5")
    laid = server_run.ServePlan.read(tmp_path / "run")
    assert laid.clients == 5 and laid.bound is False
    assert (served[0][2].host, served[0][2].port) == ("127.0.0.1", deploy.PORT)


@pytest.mark.parametrize("clients", ["0", "-1"])
def test_nobody_is_no_number_of_clients(call, plan, served, clients):
    code, _, said = call("serve", plan, "--insecure", "--clients", clients)
    assert code == 2 and "clients" in said and served == []


def test_a_run_begun_without_keys_is_not_gone_on_with_as_if_it_had_them(call, plan, served, held):
    call("serve", plan, "--insecure", "--out", "run")
    code, _, said = call("serve", "--resume", "run", "--keys", held)
    assert code == 2 and "--insecure" in said


def test_a_port_in_use_is_found_before_anything_is_written(refused, plan):
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        said = refused("serve", plan, "--insecure", "--listen", address)
    assert f"The server cannot listen on {address}: Address already in use." in said
    assert "--listen HOST:PORT" in said and not (plan.parent / "runs").exists()


def test_a_finished_run_is_not_served_again_and_stays_finished(call, plan, served, tmp_path):
    """With exit code 0: a service that restarts failed commands must not restart this one."""
    call("serve", plan, "--insecure", "--out", "run")
    Record(tmp_path / "run").append("finish", rounds=2, adapter="run/adapter")
    journal = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    served.clear()
    code, out, _ = call("serve", "--resume", "run", "--insecure")
    assert (code, served) == (0, [])
    assert "the federation is finished: 2 rounds\nadapter: run/rounds/00002/adapter" in out
    assert "--set federation.rounds=3" in out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == journal


def test_a_finished_run_can_have_more_rounds_and_nothing_else(call, plan, served, tmp_path):
    call("serve", plan, "--insecure", "--out", "run")
    Record(tmp_path / "run").append("finish", rounds=2, adapter="run/adapter")
    served.clear()
    for change in ("federation.rounds=2", "seed=4", "federation.rounds=x", "rounds"):
        code, _, err = call("serve", "--resume", "run", "--insecure", "--set", change)
        assert code == 2 and "federation.rounds=" in err
    assert served == [] and server_run.read_config(tmp_path / "run").federation.rounds == 2
    code, out, _ = call("serve", "--resume", "run", "--insecure", "--set", "federation.rounds=5")
    assert code == 0 and out == ""
    ((settings, *_),) = served
    assert settings == server_run.read_config(tmp_path / "run")
    assert settings.federation.rounds == 5


def test_a_finished_run_is_served_for_a_client_that_does_not_have_the_adapter(
    call, plan, served, tmp_path
):
    run = tmp_path / "run"
    call("serve", plan, "--insecure", "--out", "run")
    journal = Record(run)
    journal.append("finish", rounds=2, adapter="run/adapter")
    before = journal.path.read_bytes()
    module = Factors(torch.ones(3, 2), torch.ones(2, 5))
    peft_format.write({"model.layers.0.q_proj": module}, run / "rounds" / "00002" / "adapter")
    entry = {"node": 3, "attention": 2, "feed_forward": 2, "examples": 7, "device": "cpu"}
    entry["tokens_per_second"] = None
    write_sealed(run / "clients.json", {"clients": {"ash": entry, "birch": entry}})
    ledger = Ledger(run, digest_of(run / "rounds" / "00002" / "adapter"))
    ledger.add("ash")
    served.clear()
    code, out, _ = call("serve", "--resume", "run", "--insecure")
    assert code == 0 and len(served) == 1
    assert "clients that have it: ash\nclients that do not have it yet: birch;" in out
    ledger.add("birch")
    code, out, _ = call("serve", "--resume", "run", "--insecure")
    assert code == 0 and len(served) == 1 and "clients that have it: ash, birch\n" in out
    assert journal.path.read_bytes() == before


def test_a_port_in_use_is_refused_before_anything_is_written(refused, plan, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        said = refused("serve", plan, "--insecure", "--out", "run", "--listen", address)
        assert f"The server cannot listen on {address}: Address already in use." in said
        said = refused("serve", plan, "--insecure", "--out", "run", "--status", address)
        assert f"The status page cannot listen on {address}" in said
    assert not (tmp_path / "run").exists()


# join


def test_join_wants_keys_or_to_be_told_that_there_are_none(refused, rows, held):
    said = refused("join", "127.0.0.1:8090", "--data", rows)
    assert "Give --keys DIR, or, for a test on this machine, --insecure and --name." in said
    said = refused(
        "join", "127.0.0.1:8090", "--data", rows, "--keys", held / "clinic", "--insecure"
    )
    assert "Give --keys DIR, or" in said


def test_without_keys_a_client_needs_a_name(refused, rows):
    said = refused("join", "127.0.0.1:8090", "--data", rows, "--insecure")
    assert "Without keys this client needs a --name." in said


@pytest.mark.parametrize("address", ["example.org:8090", "10.0.0.1:8090", "0.0.0.0:8090"])
def test_without_keys_no_other_machine_is_joined(refused, rows, address):
    said = refused("join", address, "--data", rows, "--insecure", "--name", "ash")
    assert f"--insecure is for a server on this machine, not for {address}" in said


@pytest.mark.parametrize("rank", ["0", "-1", "1.5", "many", "", "²", "0x4"])
def test_a_rank_is_auto_or_a_number_above_0(refused, rows, rank):
    words = ["join", "127.0.0.1:8090", "--data", rows, "--insecure", "--name", "ash"]
    said = refused(*words, "--rank", rank)
    assert f"--rank takes auto or a number above 0, not {rank!r}." in said


FORM = "instruction=..., input=..., output=..., messages=..., client=..., category=..., split=..."


@pytest.mark.parametrize("modules", ["mlp", "", "attention,feed_forward", "ALL"])
def test_modules_are_all_or_of_one_kind(refused, rows, modules):
    words = ["join", "127.0.0.1:8090", "--data", rows, "--insecure", "--name", "ash"]
    said = refused(*words, "--modules", modules)
    assert f"--modules takes all, attention, feed_forward, not {modules!r}" in said


@pytest.mark.parametrize("columns", ["output", "outptu=a", "=a", ",", "output=output,"])
def test_columns_are_names_of_a_corpus_with_those_of_the_file(refused, rows, columns):
    words = ["join", "127.0.0.1:8090", "--data", rows, "--insecure", "--name", "ash"]
    said = refused(*words, "--columns", columns)
    assert f"--columns takes {FORM}, separated by commas, not" in said


def test_columns_without_an_output_are_refused(refused, rows):
    words = ["join", "127.0.0.1:8090", "--data", rows, "--insecure", "--name", "ash"]
    assert 'sets both to ""' in refused(*words, "--columns", "output=,messages=")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "none.jsonl"], "There is no file 'none.jsonl'"),
        (["--data", "plan.toml"], "'plan.toml', line 2, is not JSON"),
        pytest.param(
            ["--data", "rows.jsonl", "--columns", "output=answer"],
            "has no column 'answer'",
        ),
        (["--data", "rows.jsonl", "--memory", "0"], "--memory takes a number of GiB above 0"),
        (["--data", "rows.jsonl", "--memory", "-1"], "--memory takes a number of GiB above 0"),
        (["--data", "rows.jsonl", "--seconds", "0"], "seconds is 0.0; give a number above 0"),
    ],
)
def test_what_is_wrong_at_a_client_is_said_before_anything_starts(
    refused, rows, plan, tmp_path, words, message
):
    before = set(tmp_path.iterdir())
    said = refused("join", "127.0.0.1:8090", "--insecure", "--name", "ash", *words)
    assert message in said
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("memory", ["inf", "nan"])
def test_memory_is_a_number_of_gibibytes(refused, rows, memory):
    words = ["join", "127.0.0.1:8090", "--data", rows, "--insecure", "--name", "ash"]
    assert "--memory" in refused(*words, "--memory", memory)


def test_keys_that_are_not_there_are_said(refused, rows, tmp_path, held):
    said = refused("join", "127.0.0.1:8090", "--data", rows, "--keys", "nowhere")
    assert "There is no NAME.key in nowhere; make the node's keys with: flexlora keys" in said
    said = refused(
        "join", "127.0.0.1:8090", "--data", rows, "--keys", held / "clinic", "--name", "x"
    )
    assert "There is no x.key in" in said
    said = refused(
        "join", "127.0.0.1:8090", "--data", rows, "--keys", held / "clinic", "--name", ".."
    )
    assert "'..' cannot be a node's name" in said


@pytest.mark.parametrize("words", [[], ["127.0.0.1:8090"], ["--data", "rows.jsonl"]])
def test_what_is_missing_is_named(call, words):
    code, _, said = call("join", *words)
    assert code == 2 and "Missing" in said


@pytest.fixture
def joined(monkeypatch):
    """What would join: where, who, with which keys."""
    given = []
    monkeypatch.setattr(joining, "join", lambda *arguments: given.append(arguments))
    return given


def test_an_owner_is_what_the_words_say(call, rows, joined, held):
    code, _, said = call(
        *("join", "fed.example.org:8090", "--data", rows, "--keys", held / "clinic"),
        *("--rank", "16", "--memory", "1.5", "--seconds", "600", "--model", "/models/base"),
        *("--device", "cuda:0", "--rows-of", "ward 7"),
    )
    assert code == 0, said
    ((server, owner, found, _),) = joined
    assert server == "fed.example.org:8090" and found.name == "clinic"
    assert (owner.name, owner.data, str(owner.state)) == ("clinic", rows, "flexlora-clinic")
    assert owner.capacity == Capacity(16, int(1.5 * 2**30), 600.0)
    assert (owner.model, owner.device, owner.rows_of) == ("/models/base", "cuda:0", "ward 7")
    assert owner.columns is None


def test_a_server_that_cannot_be_the_right_one_is_named_before_anything_is_loaded(
    call, refused, rows, joined, held, monkeypatch
):
    words = ("join", "fed.example.org:8090", "--data", rows, "--keys", held / "clinic")
    monkeypatch.setattr(preflight, "greet", lambda *_: Fault("Another server.", is_final=True))
    assert "Another server." in refused(*words) and joined == []
    monkeypatch.setattr(preflight, "greet", lambda *_: Fault("Nothing listens."))
    code, out, _ = call(*words)
    assert code == 0 and "Nothing listens." in out and len(joined) == 1


def test_columns_that_are_not_named_are_not_there(call, rows, joined):
    words = ["join", "127.0.0.1:8090", "--data", rows, "--insecure", "--name", "ash"]
    call(*words, "--columns", "output=answer, input = text")
    ((_, owner, _, _),) = joined
    assert owner.columns == Columns(None, "text", "answer", None, None, None, None)


def test_without_words_the_machine_is_measured(call, rows, joined, tmp_path):
    call("join", "127.0.0.1:8090", "--data", rows, "--insecure", "--name", "ash", "--state", "mine")
    ((_, owner, found, _),) = joined
    assert found is None and owner.capacity == Capacity() and owner.columns is None
    assert (owner.name, str(owner.state), owner.device) == ("ash", "mine", "cpu")


# keys


def test_keys_of_nobody_are_refused(refused):
    said = refused("keys", "mine")
    assert "give --host to make the server" in said and "--add to admit a client" in said


def test_a_servers_keys_and_its_nodes_are_made_at_once(call, tmp_path):
    code, out, said = call(
        "keys", "mine", "--host", "localhost", "--node", "ash", "--node", "birch"
    )
    assert code == 0, said
    assert keys.node_keys(tmp_path / "mine" / "nodes").keys() == {"ash", "birch"}
    for name in ("ash", "birch"):
        place = tmp_path / "mine" / name
        assert keys.NodeKey.of(place).name == name
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        assert f"send mine/{name} to client '{name}' over a secure channel" in out
    certificates.ServerKeys.of(tmp_path / "mine")


def test_a_node_may_be_added_where_the_servers_keys_are(call, tmp_path):
    call("keys", "mine", "--host", "localhost")
    call("keys", "mine", "--node", "ash")
    assert keys.node_keys(tmp_path / "mine" / "nodes").keys() == {"ash"}


def test_a_node_may_make_its_own_keys(call, tmp_path):
    code, out, _ = call("keys", "mine", "--node", "ash")
    assert code == 0 and "send mine/ash.pub to the server's owner" in out
    assert sorted(os.listdir(tmp_path / "mine")) == ["ash.key", "ash.pub"]


def test_keys_are_not_overwritten(call, refused, tmp_path):
    call("keys", "mine", "--host", "localhost", "--node", "ash")
    before = {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()}
    assert "server.crt is there already" in refused("keys", "mine", "--host", "localhost")
    assert "ash.key is there already" in refused("keys", "mine", "--node", "ash")
    after = {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize("name", ["..", "a/b", "ca", "server", "", "x" * 65, "-rf"])
def test_a_name_that_fits_no_file_is_refused(refused, tmp_path, name):
    assert "cannot be a node's name" in refused("keys", "mine", f"--node={name}")
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("host", ["http://a.org", "a.org:8090", "10.0.0.256", ""])
def test_a_host_that_is_none_is_refused(refused, tmp_path, host):
    assert "is neither a DNS name nor an IP address" in refused("keys", "mine", f"--host={host}")
    assert not (tmp_path / "mine").exists()
