"""What `flexlora join` prints, and what it refuses before anything starts."""

import json
import re
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("flwr", reason="needs flexlora[flower]")

from flexlora.deployment.flower import local_users
from flexlora.deployment.node import join as joining
from flexlora.deployment.node import preflight
from flexlora.deployment.node.node import NodeConfig
from flexlora.deployment.node.preflight import Fault, Greeting
from flexlora.errors import AdapterError, ConfigError, ProtocolError


class Stopped(Exception):
    """Ends the loop that restarts the SuperNode."""


@dataclass
class EndedSuperNode:
    """A SuperNode that ends at once."""

    code: int = 1
    log: Path = Path("state/flower/supernode.log")
    starts: int = 0

    @property
    def ended(self) -> int | None:
        return self.code

    def start(self) -> None:
        self.starts += 1


@dataclass
class Scene:
    """What the server answers when it is asked, and how long the client waits between."""

    answers: list
    pauses: list[float] = field(default_factory=list)

    def greet(self, address, keys):
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def sleep(self, seconds):
        self.pauses.append(seconds)
        if len(self.pauses) == 4:
            raise Stopped


@pytest.fixture
def printed(monkeypatch):
    """The lines of a client whose server gives these answers, and its pauses."""

    def run(*answers, code=1):
        scene, said = Scene(list(answers)), []
        monkeypatch.setattr(joining.preflight, "greet", scene.greet)
        monkeypatch.setattr(joining.time, "sleep", scene.sleep)
        node = joining.LoggedNode(SimpleNamespace(), said.append)
        with pytest.raises(Stopped):
            joining.Connection("host:8090", None, EndedSuperNode(code), node).run()
        return said, scene.pauses

    return run


def test_a_fault_is_printed_once_while_it_lasts(printed):
    said, pauses = printed(Fault("Nothing listens at host:8090."))
    assert said == ["Nothing listens at host:8090. Trying again in 5 s."]
    assert pauses == [5, 5, 5, 5]


def test_a_fault_at_which_no_attempt_helps_ends_it_at_the_start(monkeypatch):
    monkeypatch.setattr(preflight, "greet", lambda *_: Fault("Another server.", is_final=True))
    node = joining.LoggedNode(SimpleNamespace(), print)
    with pytest.raises(ProtocolError, match=r"Another server\."):
        joining.Connection("host:8090", None, EndedSuperNode(), node).run()


def test_once_connected_it_goes_on_whatever_comes(printed):
    said, pauses = printed(Greeting(), Fault("Another server.", is_final=True))
    assert said[0].startswith("connected to host:8090; waiting")
    assert said[1] == "Another server. Trying again in 5 s."
    assert pauses == [5, 10, 20, 20]


def test_notes_of_the_server_are_printed(printed):
    said, _ = printed(Greeting(("the server has flexlora 9",)), Fault("Gone."))
    assert said[1] == "the server has flexlora 9"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (305 % 256, "The server still counts this client as online"),
        (1, "Flower's SuperNode ended with code 1; see state/flower/supernode.log."),
    ],
)
def test_why_the_supernode_ended_is_printed(printed, code, reason):
    said, _ = printed(Greeting(), code=code)
    assert said[1].startswith(reason) and said[1].endswith(" Trying again in 5 s.")


def test_it_ends_once_the_run_is_over(monkeypatch):
    monkeypatch.setattr(preflight, "greet", lambda *_: Greeting())
    node = joining.LoggedNode(SimpleNamespace(), lambda line: None)
    running = EndedSuperNode(None)
    threading.Timer(0.1, node.ended.set).start()
    joining.Connection("host:8090", None, running, node).run()
    assert running.starts == 1


def test_a_client_that_has_the_adapter_does_not_wait_for_a_server_that_is_gone(monkeypatch):
    monkeypatch.setattr(preflight, "greet", lambda *_: Greeting())
    node = joining.LoggedNode(SimpleNamespace(), lambda line: None)
    node.adapter["digest"] = "ab"
    joining.Connection("host:8090", None, EndedSuperNode(3), node).run()


# Lines on requests


@dataclass
class Answers:
    """A node that answers every request alike."""

    answer: dict
    is_enrolled: bool = False

    def handle(self, header, payload):
        return self.answer, b"1234567"


def lines(header: dict, answer: dict, is_enrolled: bool = False) -> list[str]:
    said: list[str] = []
    node = joining.LoggedNode(Answers(answer, is_enrolled), said.append)
    assert node.handle(header, b"12345")[0] is answer
    return said


ENROLLED = {"examples": 30, "attention": 8, "feed_forward": 8, "tokens_per_second": None}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"holdout": 0}, "joined with 30 training rows, up to rank 8; waiting for the server"),
        (
            {"holdout": 7, "attention": 4, "feed_forward": 0, "tokens_per_second": 120.4},
            "joined with 30 training rows, 7 held out for evaluation, up to attention 4, "
            "feed_forward 0, 120 tokens/s; waiting for the server",
        ),
    ],
)
def test_ranks_are_named_by_their_modules(changes, line):
    said = lines({"kind": "enrol"}, {**ENROLLED, **changes})
    assert said[0].startswith("the server has answered; loading the base model")
    assert said[1:] == [line]
    assert lines({"kind": "enrol"}, {**ENROLLED, **changes}, is_enrolled=True) == [line]


def test_a_round_is_named_before_and_after(monkeypatch):
    assert lines({"kind": "turn", "round": 3}, {"round": 3}) == [
        "round 3: training ...",
        "round 3: trained in 0 s, 5 B down, 7 B up",
    ]


def test_an_upload_that_was_not_used_is_no_failure():
    unused = {"2": "enough uploads had arrived before it", "4": "it came after the deadline"}
    said = lines({"kind": "turn", "round": 5, "unused": unused}, {"round": 5})
    assert said[0] == "round 2: upload not used: enough uploads had arrived"
    assert said[1] == "round 4: upload not used: the deadline was over"


@pytest.mark.parametrize("unused", ["\x1b[2J", ["2"], {"\x1b[2J": "x"}, 7])
def test_the_servers_words_are_not_printed(unused):
    said = lines({"kind": "turn", "round": 5, "unused": unused}, {"round": 5})
    assert len(said) == 2 and "\x1b" not in "".join(said)


def test_an_evaluation_is_a_loss_on_rows():
    answer = {"round": 0, "loss_total": 6.0, "loss_tokens": 4, "examples": 1}
    assert lines({"kind": "evaluate"}, answer) == [
        "evaluation before training: loss 1.500 on 1 held-out row"
    ]


def test_the_end_names_the_adapter_and_how_to_load_it(tmp_path):
    adapter = {"rounds": 3, "digest": "ab12", "base": "org/model"}
    made = config(tmp_path)
    said = joining._last_lines(adapter, made)
    assert said[0] == "the federation is finished: 3 rounds"
    assert said[1] == f"adapter: {tmp_path / 'state' / 'adapter'}"
    assert said[2] == "SHA-256: ab12 (the same file as the server's)"
    assert "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('org/model')" in said[3]
    own = joining._last_lines(adapter, config(tmp_path, own_rank=True))
    assert own[2] == "SHA-256: ab12 (of the server's, which was truncated to your rank)"
    assert "took no part in it" in joining._last_lines({}, made)[0]


# Refused before anything starts


def config(tmp_path: Path, **changes) -> NodeConfig:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    return NodeConfig("ash", rows, tmp_path / "state", **changes)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("localhost", "'localhost' has no port; .*: join localhost:8090."),
        ("localhost:", "'localhost:' has no port; .*: join localhost:8090."),
        ("https://127.0.0.1:8090/", "not the URL '.*'; join 127.0.0.1:8090."),
        ("http://server.example", "not the URL 'http://server.example'; join server.example"),
        ("127.0.0.1:0", r"join takes HOST:PORT such as .*:8090, not '"),
        ("127.0.0.1:99999", r"join takes HOST:PORT such as .*:8090, not '"),
    ],
)
def test_an_address_of_another_form_is_refused(tmp_path, address, message):
    with pytest.raises(ConfigError, match=message):
        joining.join(address, config(tmp_path), object(), print)
    assert not (tmp_path / "state").exists()


def test_a_device_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(joining.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"--device is 'cuda:0', but .*--device cpu"):
        joining.join("127.0.0.1:8090", config(tmp_path, device="cuda:0"), None, print)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "xpu:7", ""])
def test_a_device_that_pytorch_does_not_know_is_refused(tmp_path, device):
    with pytest.raises(ConfigError, match=f"--device is '{device}', which PyTorch cannot use"):
        joining.join("127.0.0.1:8090", config(tmp_path, device=device), None, print)


def test_a_folder_with_other_files_is_not_replaced_by_the_adapter(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(AdapterError, match=re.escape("thesis.tex")):
        joining.join("127.0.0.1:8090", config(tmp_path, out=tmp_path / "mine"), None, print)


def test_nothing_that_listens_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    fault = preflight.greet(address, None)
    assert fault.sentence.startswith(f"Nothing listens at {address}: `flexlora serve` is not")
    assert not fault.is_final


@pytest.mark.parametrize("system", ["linux", "another"])
def test_a_system_that_does_not_keep_other_users_out_is_named(tmp_path, monkeypatch, system):
    if system == "another":
        monkeypatch.setattr(local_users, "_TABLE", tmp_path / "tcp")
    notices = ("The file has a column too many.",)
    rows = type("Rows", (), {"notices": notices, "__len__": lambda _: 3})()
    monkeypatch.setattr(joining, "_check", lambda *_: None)
    monkeypatch.setattr(joining, "Node", lambda *_: SimpleNamespace(rows=rows))
    monkeypatch.setattr(joining, "LoggedNode", lambda *_: None)
    monkeypatch.setattr(joining, "scratch", None)
    said = []
    with pytest.raises(TypeError):  # where the processes would start
        joining.join("localhost:1", config(tmp_path), None, said.append)
    assert said[:2] == ["3 rows, kept on this machine", "The file has a column too many."]
    expected = int(not local_users.can_tell())
    assert len(said) == 2 + expected
    assert all("read what the server sends to this client" in each for each in said[2:])
