"""What an admitted client may answer: it is lost or refused with a reason, and the run goes on."""

import contextlib
import io
import json
import tracemalloc

import pytest

pytest.importorskip("flwr", reason="needs flexlora[flower]")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from rich.console import Console

from flexlora.cli import progress
from flexlora.config.ranks import RankType
from flexlora.deployment.flower import records
from flexlora.deployment.flower.grid import FlowerTransport
from flexlora.deployment.server.limits import RankLimits
from flexlora.deployment.server.registry import ClientRegistry
from flexlora.deployment.server.run_files import ARRIVALS
from flexlora.deployment.server.supervisor import _ConsoleLines
from flexlora.federation.client_turn import TurnRequest
from flexlora.federation.transport import Lost, Query, Reply, TransportEvent, WaitPolicy
from flexlora.journal import LossKind
from flexlora.journal.record import Record
from support import flower

ASH, BIRCH = 2**63, 2**63 + 1
ENROLLED = {"client": "ash", "examples": 7, "attention": 3, "feed_forward": 3, "device": "cpu"}
MOST_BYTES = 100


def header(text: str) -> RecordDict:
    return RecordDict({"flexlora.header": ConfigRecord({"json": text})})


def told(**fields) -> RecordDict:
    return header(json.dumps(fields))


def packed(dtype="uint8", shape=(3,), stype=records.STYPE, data=b"abc", name="flexlora"):
    array = ArrayRecord({name: Array(dtype, shape, stype, data)})
    return RecordDict({**header('{"round": 1}'), "flexlora.payload": array})


TEXTS = {
    "half a surrogate": "\ud800",
    "an escape code": "\x1b[2J\x1b[31m",
    "a forged line": "x\nround 9: loss 0.001 FORGED\r\nround 10: loss 0",
    "a separator": "x\u2028round 9\u2029\x85",
    "a reversed line": "\u202egnp",
    "NUL": "\0",
    "piled accents": "e" + "\u0301" * 10_000,
    "a long one": "x" * 60_000,
    "no width": "\u200b\ufeff\u3164",
}

CONTENTS = {
    **{f"error: {name}": told(error=text) for name, text in TEXTS.items()},
    **{
        f"error as {type(value).__name__}": told(error=value)
        for value in (None, 7, 1.5, True, ["\ud800"], {"\ud800": "\n"})
    },
    "no records": RecordDict(),
    "another record": RecordDict({"\x1b[31m": ConfigRecord({"a": 1})}),
    "one record more": RecordDict({**header("{}"), "x" * 1000: ConfigRecord({"a": b"bytes"})}),
    "a header of bytes": RecordDict({"flexlora.header": ConfigRecord({"json": b"{}"})}),
    "a header of lists": RecordDict({"flexlora.header": ConfigRecord({"json": ["{}", "{}"]})}),
    "a second text": RecordDict({"flexlora.header": ConfigRecord({"json": "{}", "more": "{}"})}),
    "a header of metrics": RecordDict({"flexlora.header": MetricRecord({"json": 1})}),
    "an array as header": RecordDict({"flexlora.header": packed()["flexlora.payload"]}),
    "no JSON": header("{"),
    "a list": header("[1]"),
    "deep lists": header("[" * 10**5),
    "deep objects": header('{"error":' * 10**4),
    "a deep error": header('{"error":' + "[" * 30_000 + "]" * 30_000 + "}"),
    "12 MB": header('{"error":"' + "x" * 12_000_000 + '"}'),
    "many lists": header('{"error":[' + "[]," * 3_000_000 + "[]]}"),
    "a long number": header('{"round":' + "9" * 5001 + "}"),
    "unknown keys": told(x=1),
    "a key that forges": told(**{"\n\x1b[2J\ud800": 1}),
    "another dtype": packed(dtype="float64\n\x1b"),
    "another shape": packed(shape=(4,)),
    "two dimensions": packed(shape=(1, 3)),
    "a shape below zero": packed(shape=(-3,)),
    "another stype": packed(stype="numpy.ndarray"),
    "another array": packed(name="\ud7ff"),
    "too large": packed(shape=(MOST_BYTES + 1,), data=bytes(MOST_BYTES + 1)),
    "a payload of numbers": RecordDict(
        {**header("{}"), "flexlora.payload": MetricRecord({"a": 1})}
    ),
}


def federation(folder) -> FlowerTransport:
    def honest(name):
        def answer(request, payload):
            if request["kind"] == "enrol":
                return {**ENROLLED, "client": name, "holdout": 2}, b""
            data = name.encode() if request["kind"] == "turn" else b""
            return {"round": request["round"]}, data

        return answer

    nodes = {n: flower.Scripted(n, honest(c)) for n, c in ((ASH, "ash"), (BIRCH, "birch"))}
    registry = ClientRegistry(folder, RankLimits(RankType(5, 5), {}), ["m.self_attn.q_proj"], False)
    return FlowerTransport(flower.FakeGrid(nodes), registry, "{}", 1, 0.001)


def answering(kind, content):
    """Ash answers requests of a kind with this content."""

    def spoil(message, node):
        request, _ = records.opened(message.content)
        if node.number != ASH or request["kind"] != kind:
            return None
        return Message(content, reply_to=message)

    return spoil


def jobs(round=1):
    return [TurnRequest(name, round, b"download", MOST_BYTES) for name in ("ash", "birch")]


@pytest.fixture(autouse=True)
def known():
    flower.identified()


def all_shown(folder, events) -> str:
    """What of these events reaches the journal, the terminal and the server's console."""
    out = io.StringIO()
    console = Console(file=io.TextIOWrapper(io.BytesIO(), "ascii"), width=80)
    with progress.Display(console, lines=False) as display:
        for event in events:
            facts = event.facts if isinstance(event, TransportEvent) else vars(event)
            facts = {k: v for k, v in facts.items() if k not in ("data", "lost_base")}
            name = event.event if isinstance(event, TransportEvent) else "lost"
            written = Record(folder).append(name, round=1, **facts)
            display.follow([written] if name == "lost" else [])
    console.file.flush()
    out.write(console.file.buffer.getvalue().decode("ascii"))
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        lines = _ConsoleLines(folder / ARRIVALS)
        lines.offset_bytes = 0
        lines.print_new()
    return out.getvalue() + errors.getvalue() + Record(folder).path.read_text("utf-8")


def assert_harmless(shown: str) -> None:
    shown.encode("utf-8")
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert "\u0301" * 4 not in shown and len(shown) < 20_000
    lines = shown.split("\n")
    assert not any(line.lstrip().startswith(("round 9", "round 10")) for line in lines)


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_whatever_answers_a_turn_is_a_loss_with_a_code(tmp_path, content):
    made = federation(tmp_path)
    made.wait_for_clients(2)
    made.grid.spoil = answering("turn", content)
    events = list(made.exchange(jobs(), WaitPolicy()))
    found = {e.client: e for e in events if isinstance(e, Reply | Lost)}
    assert isinstance(found["ash"], Lost)
    assert found["ash"].kind in (LossKind.INVALID_UPLOAD, LossKind.CLIENT_ERROR)
    assert found["ash"].reason.isprintable() and len(found["ash"].reason) <= 500
    assert found["birch"] == Reply("birch", b"birch")
    assert_harmless(all_shown(tmp_path, [found["ash"]]))
    made.grid.spoil = None
    made.wait_for_clients(2)  # after an error of its own it is asked again who it is
    again = list(made.exchange(jobs(2), WaitPolicy()))
    assert {e.client for e in again if isinstance(e, Reply)} == {"ash", "birch"}


ENROLMENTS = {
    **{name: content for name, content in CONTENTS.items() if name not in ("too large",)},
    **{f"client: {name}": told(**{**ENROLLED, "client": text}) for name, text in TEXTS.items()},
    **{
        f"{key} as {value!r:.20}": told(**{**ENROLLED, key: value})
        for key in ("client", "examples", "attention", "feed_forward", "holdout")
        for value in (None, True, 1.5, -1, float("nan"), float("inf"), [], {}, 10**400)
    },
    "examples of 1e400": header(json.dumps(ENROLLED).replace("7", "1e400")),
    "a list as device": told(**{**ENROLLED, "device": [[]] * 3_000_000}),
    "a deep device": header('{"device":' + "[" * 30_000 + "]" * 30_000 + "}"),
}


@pytest.mark.parametrize("content", ENROLMENTS.values(), ids=ENROLMENTS)
def test_whatever_answers_an_enrolment_is_a_refusal(tmp_path, content):
    made = federation(tmp_path)
    made.grid.spoil = answering("enrol", content)
    made.wait_for_clients(1)
    events = list(made.exchange(jobs()[1:], WaitPolicy()))
    while ASH not in made._rejected:
        made.wait_for_clients(1)
    events += made._take_events()
    refusals = [e for e in events if isinstance(e, TransportEvent) and e.event == "refused"]
    assert len(refusals) == 1 and Reply("birch", b"birch") in events
    assert_harmless(all_shown(tmp_path, refusals))
    assert "ash" not in made.registry


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_device_is_shown_as_one_short_line(tmp_path, text):
    made = federation(tmp_path)
    content = told(**{**ENROLLED, "device": text, "tokens_per_second": True})
    made.grid.spoil = answering("enrol", content)
    made.wait_for_clients(2)
    joined = [e for e in made._take_events() if e.event == "joined"]
    assert_harmless(all_shown(tmp_path, joined))
    assert len(made.registry.entries["ash"].device) <= 40
    assert made.registry.entries["ash"].tokens_per_second is None


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_whatever_answers_an_evaluation_keeps_nobody_from_it(tmp_path, content):
    made = federation(tmp_path)
    made.wait_for_clients(2)
    made.grid.spoil = answering("evaluate", content)
    queries = [Query(name, 1, b"adapter", {"rows": 2}) for name in ("ash", "birch")]
    found = {e.client: e for e in made.evaluate(queries, WaitPolicy()) if hasattr(e, "client")}
    assert found["birch"].facts == {"round": 1}
    if isinstance(found["ash"], Lost):
        assert_harmless(all_shown(tmp_path, [found["ash"]]))


@pytest.mark.parametrize("reason", TEXTS.values(), ids=TEXTS)
def test_flowers_own_errors_of_a_node_are_shown_as_one_line(tmp_path, reason):
    made = federation(tmp_path)
    made.wait_for_clients(2)
    made.grid.spoil = lambda message, node: (
        flower.failed(message, 2, reason) if node.number == ASH else None
    )
    (lost,) = [e for e in made.exchange(jobs()[:1], WaitPolicy()) if isinstance(e, Lost)]
    assert lost.kind is LossKind.UNREACHABLE and len(lost.reason) <= 500
    assert_harmless(all_shown(tmp_path, [lost]))


def test_a_large_header_costs_no_memory(tmp_path):
    made = federation(tmp_path)
    made.grid.spoil = answering("enrol", CONTENTS["many lists"])
    tracemalloc.start()
    made.wait_for_clients(1)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 5 * 2**20
