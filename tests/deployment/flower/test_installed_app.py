"""A node runs the installed app and no other, and takes no larger message than its owner does."""

import hashlib
import inspect
import io
import logging
import sys
import zipfile
from dataclasses import dataclass, field, replace

import pytest

pytest.importorskip("flwr", reason="needs flexlora[flower]")

import httpx
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import fleet_http_connection, main, start_client_internal
from flwr.supernode.cli import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.runtime import run_clientapp

from flexlora.deployment.flower import client_app, installed_app, local_users, node_processes
from flexlora.deployment.flower.installed_app import InstalledApp
from flexlora.deployment.flower.local_users import OwnUserOnly
from flexlora.deployment.flower.supernode import refusal
from support import flower

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern")  # of Flower's own

NODE, RUN = 5, 77
MOST_BYTES = 2**20
TAKE = start_client_internal._pull_and_store_message


@pytest.fixture(scope="module")
def app() -> InstalledApp:
    return InstalledApp.built()


def bundle(**files: str) -> bytes:
    """An archive of these files."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        for name, text in files.items():
            opened.writestr(name, text)
    return archive.getvalue()


@dataclass
class Server:
    """What a SuperNode sees of a server: one message of a run, whose app has ``content``."""

    content: bytes
    run: dict = field(default_factory=dict)
    payload: bytes = b"rows"
    downloads: int = 0
    confirmed: int = 0

    def functions(self) -> dict:
        flower.identified()
        TaskIdentity.run_id = RUN
        arrays = ArrayRecord({"flexlora": Array("uint8", (len(self.payload),), "s", self.payload)})
        content = RecordDict({"h": ConfigRecord({"json": "{}"}), "p": arrays})
        message = Message(content, NODE, "query")
        message.metadata.__dict__["_message_id"] = message.object_id
        self.objects = {id: o.deflate() for id, o in get_all_nested_objects(message).items()}
        tree = get_object_tree(message)
        return {
            "receive": lambda: (remove_content_from_message(message), tree),
            "get_run": self.get_run,
            "get_fab": self.get_fab,
            "pull_object": lambda run, id: self.objects[id],
            "confirm_message_received": lambda run, id: self.confirm(),
        }

    def get_run(self, id: int) -> Run:
        named = {
            "fab_id": "flexlora/flexlora-app",
            "fab_version": "1.0.0",
            "fab_hash": hashlib.sha256(self.content).hexdigest(),
            "override_config": {"folder": "/of/the/server"},
        }
        return replace(Run.create_empty(id), **{**named, **self.run})

    def get_fab(self, hash: str, run: int) -> Fab:
        self.downloads += 1
        return Fab(hash, self.content, {})

    def confirm(self) -> None:
        self.confirmed += 1


@pytest.fixture
def node(monkeypatch, tmp_path, app):
    """A SuperNode that takes one message: the state afterwards, its errors, and the refusal."""
    monkeypatch.setattr(start_client_internal, "_pull_and_store_message", TAKE)
    installed_app.run_it_alone(app, MOST_BYTES, tmp_path)

    def take(server: Server):
        store = ObjectStoreFactory()
        state = NodeStateFactory(store).state()
        state.set_node_id(NODE)
        taken = start_client_internal._pull_and_store_message(
            state=state,
            object_store=store.store(),
            node_config={},
            trusted_entities=None,
            **server.functions(),
        )
        errors = [each.error for each in state.get_messages_legacy(is_reply=True)]
        return Taken(taken, state, errors, refusal(tmp_path))

    return take


@dataclass
class Taken:
    run: int | None
    state: object
    errors: list[Error]
    refusal: str | None


def test_the_servers_own_app_is_the_installed_one(node, app):
    server = Server(app.fab.content)
    taken = node(server)
    assert (taken.run, taken.errors, taken.refusal) == (RUN, [], None)
    assert server.downloads == 0 and server.confirmed == 1
    assert taken.state.get_fab(app.fab.hash_str).content == app.fab.content
    assert taken.state.get_run(RUN).override_config == {}


def test_an_app_that_was_compressed_otherwise_is_the_same(node, app):
    with zipfile.ZipFile(io.BytesIO(app.fab.content)) as own:
        texts = {name: own.read(name).decode() for name in own.namelist()}
    server = Server(bundle(**texts))
    assert server.content != app.fab.content
    taken = node(server)
    assert (taken.run, taken.errors) == (RUN, [])
    # The installed one is run all the same.
    assert taken.state.get_fab(app.fab.hash_str).content == app.fab.content
    assert taken.state.get_fab(taken.state.get_run(RUN).fab_hash) is not None


HOSTILE = "open('/tmp/hostile', 'w')\n"


@pytest.fixture
def altered(app):
    """The installed app with files changed, added or named twice."""
    with zipfile.ZipFile(io.BytesIO(app.fab.content)) as own:
        texts = {name: own.read(name).decode() for name in own.namelist()}
    client = "flexlora_app/client.py"
    longer = {**texts, client: HOSTILE + texts[client]}
    same_length = {**texts, client: "#" * len(texts[client])}
    twice = io.BytesIO(bundle(**texts))
    with pytest.warns(UserWarning), zipfile.ZipFile(twice, "a") as archive:
        archive.writestr(client, texts[client])
    return {
        "longer": bundle(**longer),
        "same length": bundle(**same_length),
        "one more file": bundle(**texts, **{"flexlora_app/more.py": HOSTILE}),
        "a name twice": twice.getvalue(),
        "no archive": b"\x80\x04pickle",
        "empty": b"",
        "a bomb": bundle(**{"pyproject.toml": "#" * 10**7}),
    }


@pytest.mark.parametrize(
    "name",
    ["longer", "same length", "one more file", "a name twice", "no archive", "empty", "a bomb"],
)
def test_another_app_is_refused_again_and_again(node, altered, name):
    for _ in range(2):
        taken = node(Server(altered[name]))
        (error,) = taken.errors
        assert error.code == ErrorCode.INVALID_FAB and error.reason == taken.refusal
        assert taken.refusal.startswith("The server runs another app than the one that is install")
        assert taken.run == RUN and taken.state.get_run(RUN) is None


def test_a_bundle_under_the_installed_apps_hash_is_not_used(node, app, altered):
    """The server says the right hash and has other bytes: they are not even asked for."""
    server = Server(altered["longer"], run={"fab_hash": app.fab.hash_str})
    taken = node(server)
    assert (taken.run, server.downloads) == (RUN, 0)
    assert taken.state.get_fab(app.fab.hash_str).content == app.fab.content


@pytest.mark.parametrize("kind", sorted(set(TaskType) - {TaskType.SERVER_APP}))
def test_a_run_of_another_of_flowers_programs_is_refused(node, app, kind):
    taken = node(Server(app.fab.content, run={"primary_task_type": kind}))
    assert len(taken.errors) == 1 and "a program of Flower's other than" in taken.refusal


def test_what_a_server_calls_its_app_is_no_path(node, app):
    named = {"fab_id": "../../x", "fab_version": "/../../etc", "override_config": {"any": "y" * 9}}
    taken = node(Server(app.fab.content, run=named))
    run = taken.state.get_run(RUN)
    assert (run.fab_id, run.fab_version) == ("flexlora/flexlora-app", "1.0.0")
    assert taken.errors == [] and run.override_config == {}


def test_a_message_above_the_owners_limit_is_refused_and_the_next_is_taken(node, app):
    taken = node(Server(app.fab.content, payload=bytes(MOST_BYTES + 1)))
    assert len(taken.errors) == 1 and "more than 1 MiB" in taken.refusal
    assert "--memory" in taken.refusal
    assert node(Server(app.fab.content)).errors == []


def test_equal_parts_of_a_message_are_counted_as_often_as_they_are_named(monkeypatch):
    """Flower sends equal parts once: 5 MiB can stand for any number of bytes."""
    monkeypatch.setattr(Array, "inflate", Array.inflate)
    array = Array("uint8", (3 * 5242880,), "s", bytes(3 * 5242880))
    parts = array.slice_array() if hasattr(array, "slice_array") else None
    content, children = array.deflate(), array.children or parts
    assert len(children) == 1
    node_processes.limit_arrays(12 * 2**20)
    assert len(Array.inflate(content, children).data) == 3 * 5242880
    with pytest.raises(ValueError, match="more than 12 MiB"):
        Array.inflate(content, children)


@pytest.mark.parametrize("size", [32 * 2**20 + 1, 10**9])
def test_a_response_is_read_no_further_than_its_limit(size):
    read = 0

    def parts():
        nonlocal read
        for _ in range(-(-size // 2**16)):
            read += 2**16
            yield bytes(2**16)

    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=parts()))
    with (
        httpx.Client(
            transport=transport, event_hooks={"response": [node_processes.limit_response]}
        ) as client,
        pytest.raises(httpx.ReadError, match="more than 33554432 bytes"),
    ):
        client.get("http://server")
    assert read <= 32 * 2**20 + 2**16


def test_the_limits_are_those_of_the_supernodes_connection(monkeypatch):
    monkeypatch.setattr(fleet_http_connection, "FleetHttpClient", FleetHttpClient)
    node_processes.limit_responses()
    connection = fleet_http_connection.FleetHttpClient.from_server_address("x:1", True, None, [])
    assert connection._client.event_hooks["response"] == [node_processes.limit_response]
    assert connection._client.headers["accept-encoding"] == "identity"
    connection.close()


def test_other_users_do_not_reach_the_port_of_the_processes(monkeypatch):
    monkeypatch.setattr(main, "create_app", main.create_app)
    node_processes.keep_others_out()
    guarded = main.create_app()
    assert isinstance(guarded, OwnUserOnly) and not guarded.open_to_nodes
    assert guarded.find_owner is not None or not local_users.can_tell()
    # Flower looks for it there when it starts.
    module = sys.modules[flower_supernode.__module__]
    assert "from flwr.supernode.main import" in inspect.getsource(module)


def test_a_compressed_response_is_refused():
    transport = httpx.MockTransport(
        lambda request: httpx.Response(200, headers={"content-encoding": "gzip"}, content=b"")
    )
    with (
        httpx.Client(
            transport=transport, event_hooks={"response": [node_processes.limit_response]}
        ) as client,
        pytest.raises(httpx.DecodingError),
    ):
        client.get("http://server")


def test_text_of_a_servers_begins_no_line_of_the_log():
    record = logging.LogRecord("flwr", 20, "x", 1, "[RUN %s]", ("a\n12:00 forged\x1b[31m",), None)
    assert node_processes.printable(record)
    assert record.getMessage() == "[RUN a\n    12:00 forged?[31m]"


def test_the_process_of_a_message_loads_nothing_of_the_bundle(monkeypatch):
    for name in ("install_from_fab", "install_app_dependencies", "get_load_client_app_fn"):
        monkeypatch.setattr(run_clientapp, name, getattr(run_clientapp, name))
    installed_app.answer_with_it()
    assert run_clientapp.install_from_fab(b"anything", skip_prompt=True) is None
    load = run_clientapp.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
    assert load("x/y", "../..", "0" * 64) is client_app.app


# What is replaced is Flower's: a version without it must not go unnoticed.


def test_flower_has_what_a_node_replaces():
    assert list(inspect.signature(TAKE).parameters) == [
        "state",
        "object_store",
        "node_config",
        "receive",
        "get_run",
        "get_fab",
        "pull_object",
        "confirm_message_received",
        "trusted_entities",
    ]
    loop = inspect.getsource(start_client_internal.start_client_internal)
    assert loop.count("_pull_and_store_message(") == 1
    process = inspect.getsource(run_clientapp.run_clientapp)
    for call in ("install_from_fab(", "install_app_dependencies(", "get_load_client_app_fn("):
        assert process.count(call) == 1
    # No other way to an app's code in the two programs.
    for module in (start_client_internal, run_clientapp):
        text = inspect.getsource(module)
        assert not any(word in text for word in ("importlib", "exec(", "load_app(", "runpy"))


@pytest.mark.parametrize("name", ["_pull_and_store_message", "_insert_message"])
def test_a_flower_without_them_starts_no_node(monkeypatch, tmp_path, app, name):
    monkeypatch.delattr(start_client_internal, name)
    with pytest.raises(Exception, match=f"no flwr.supernode.start_client_internal.{name}"):
        installed_app.run_it_alone(app, MOST_BYTES, tmp_path)
