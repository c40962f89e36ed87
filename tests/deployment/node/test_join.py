"""What `flexlora join` prints, and what it refuses before anything starts."""

import json
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs flexlora[flower]")

from flexlora.deployment.node import join as joining
from flexlora.deployment.node.node import NodeConfig
from flexlora.errors import ConfigError


class Stopped(Exception):
    """Ends the loop that restarts the SuperNode."""


@dataclass
class EndedSuperNode:
    """A SuperNode that ends at once."""

    code: int
    lines: str = ""
    log: Path = Path("state/flower/supernode.log")
    starts: int = 0

    @property
    def ended(self) -> int:
        return self.code

    def start(self) -> None:
        self.starts += 1

    def last_lines(self, count: int) -> str:
        return self.lines


@pytest.fixture
def printed(monkeypatch):
    """The lines of a SuperNode that ends with a code and a log, once."""

    def stop(seconds):
        raise Stopped

    monkeypatch.setattr(joining.time, "sleep", stop)

    def run(address: str, code: int, lines: str = "") -> list[str]:
        said: list[str] = []
        with pytest.raises(Stopped):
            joining._run_supernode(EndedSuperNode(code, lines), address, said.append)
        return said

    return run


@pytest.fixture
def listening():
    """The address of a server that accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_it_is_printed_that_it_connects(printed, listening):
    assert printed(listening, 1)[0] == f"connecting to {listening} ..."


def test_a_server_that_does_not_answer_is_reported(printed):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    first = printed(address, 1)[0]
    assert first == f"no server answers at {address} (Connection refused); trying until one does"


@pytest.mark.parametrize(
    ("code", "log", "reason"),
    [
        (305 % 256, "", "does not know this node's key (yet); send your NAME.pub"),
        (1, "ssl: CERTIFICATE_VERIFY_FAILED: unable to get", "ca.crt is of another server"),
        (1, "Traceback", "ended with code 1, as it does when the server revokes the key; see "),
    ],
)
def test_why_the_supernode_ended_is_printed(printed, listening, code, log, reason):
    last = printed(listening, code, log)[-1]
    assert reason in last and last.endswith("Trying again in 5 s.")


@pytest.mark.parametrize(
    ("response", "line"),
    [
        ((8, 8, None), "joined with 30 examples, up to rank 8"),
        ((4, 0, 120.4), "joined with 30 examples, up to attention rank 4, feed-forward rank 0, "),
    ],
)
def test_ranks_are_named_by_their_modules(response, line):
    attention, feed_forward, speed = response
    said = joining._enrolment_line(
        {
            "examples": 30,
            "attention": attention,
            "feed_forward": feed_forward,
            "tokens_per_second": speed,
        }
    )
    assert said.startswith(line)
    assert speed is None or said.endswith("120 tokens/s")


def config(tmp_path: Path, **changes) -> NodeConfig:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    return NodeConfig("ash", rows, tmp_path / "state", **changes)


@pytest.mark.parametrize("address", ["localhost", "https://127.0.0.1:8090", "127.0.0.1:0"])
def test_an_address_of_another_form_is_refused(tmp_path, address):
    with pytest.raises(ConfigError, match=r"join takes HOST:PORT such as .*:8090, not '"):
        joining.join(address, config(tmp_path), object(), print)
    assert not (tmp_path / "state").exists()


def test_a_device_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(joining.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"--device is 'cuda:0', but .*--device cpu"):
        joining.join("127.0.0.1:8090", config(tmp_path, device="cuda:0"), None, print)
    assert not (tmp_path / "state").exists()
