"""Answers at the SuperLink: their declared sizes are looked at before they are fetched."""

import json
from dataclasses import dataclass, field, replace

import pytest

pytest.importorskip("flwr", reason="needs flexlora[flower]")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.superlink.grid import HttpGrid

from flexlora.deployment.flower import inbox, records
from flexlora.deployment.flower.answers import Answer, NoAnswer
from flexlora.deployment.flower.inbox import CHUNK_BYTES, FlowerInbox
from flexlora.journal import LossKind
from flexlora.seeds import rng
from support import flower

ID = "request"
SMALL = "objects of an answer beside its chunks"


@dataclass
class Store:
    """The SuperLink's objects of one answer, by the calls of Flower's client."""

    objects: dict[str, bytes]
    tree: ObjectTree
    root: str
    absent: set[str] = field(default_factory=set)
    pulled: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    announced: int = 0

    def PullMessages(self, request):
        self.announced += 1
        answer = PullAppMessagesResponse()
        if self.announced == 1:
            message = answer.messages_list.add()
            message.metadata.message_id, message.metadata.reply_to_message_id = self.root, ID
            answer.message_object_trees.add().CopyFrom(self.tree)
        return answer

    def PullObject(self, request):
        self.pulled.append(request.object_id)
        found = request.object_id in self.objects
        there = found and request.object_id not in self.absent
        content = self.objects[request.object_id] if there else b""
        return PullObjectResponse(
            object_found=found, object_available=there, object_content=content
        )

    def ConfirmMessageReceived(self, request):
        self.deleted.append(request.message_object_id)


def store(content: RecordDict | Error) -> Store:
    flower.identified()
    asked = Message(RecordDict(), dst_node_id=7, message_type="query")
    message = Message(content, reply_to=asked)
    objects = get_all_nested_objects(message)
    contents = {id: made.deflate() for id, made in objects.items()}
    return Store(contents, get_object_tree(message), message.object_id)


def at(store: Store) -> FlowerInbox:
    grid = HttpGrid(insecure=True, token="a token")
    grid._client = store
    from flwr.supercore.run import Run

    grid.set_run(Run.create_empty(1))
    return FlowerInbox(grid)


def answer(data: bytes, **declared) -> RecordDict:
    array = {"dtype": "uint8", "shape": (len(data),), "stype": records.STYPE, **declared}
    return records.record({"round": 1}, ArrayRecord({records.NAME: Array(data=data, **array)}))


def changed(store: Store, kind: str, change) -> Store:
    """The store with another body of its object of a kind, under the same id."""
    ids = [id for id, content in store.objects.items() if content.startswith(kind.encode() + b" ")]
    head, body = store.objects[ids[0]].split(b"\0", 1)
    body = json.dumps(change(json.loads(body))).encode()
    head = b" ".join([*head.split(b" ")[:2], str(len(body)).encode()])
    return replace(store, objects={**store.objects, ids[0]: head + b"\0" + body})


def chunks(store: Store) -> set[str]:
    return {id for id, content in store.objects.items() if content.startswith(b"ArrayChunk ")}


DATA = bytes(range(256)) * (CHUNK_BYTES // 256) + b"the rest"


@pytest.mark.parametrize("data", [DATA, b"", b"x", bytes(3 * CHUNK_BYTES)], ids=len)
def test_an_answer_is_taken_once_and_deleted_there(data):
    """Also with equal chunks, which Flower stores once."""
    held = store(answer(data))
    here = at(held)
    assert here.take(ID, len(data)) == Answer({"round": 1}, data)
    assert held.deleted == [held.root]
    assert here.take(ID, len(data)) is None and held.announced == 2


def test_an_answer_without_a_payload_and_an_error_of_flowers():
    assert at(store(records.record({"round": 1}))).take(ID, 0) == Answer({"round": 1})
    found = at(store(Error(2, "no\nway\ud7ff" * 300))).take(ID, 0)
    assert isinstance(found, NoAnswer) and found.kind is LossKind.UNREACHABLE
    assert found.reason.startswith("Flower's error 2: no way") and len(found.reason) <= 500


LIES = {
    "larger than asked for": store(answer(DATA)),
    "the same chunk a thousand times": changed(
        store(answer(DATA)), "Array", lambda told: {**told, "arraychunk_ids": [0] * 1000}
    ),
    "two dimensions": store(answer(DATA, shape=(2, 7))),
    "a size below zero": store(answer(DATA, shape=(-1,))),
    "no size": changed(store(answer(DATA)), "Array", lambda told: {**told, "shape": None}),
    "a size of true": changed(store(answer(b"x")), "Array", lambda told: {**told, "shape": [True]}),
    "a long size": changed(store(answer(b"x")), "Array", lambda told: {**told, "shape": [10**400]}),
    "no chunks": changed(store(answer(b"x")), "Array", lambda told: {**told, "arraychunk_ids": 7}),
    "another list": changed(store(answer(b"x")), "Array", lambda told: [told]),
}


@pytest.mark.parametrize("held", LIES.values(), ids=LIES)
def test_no_chunk_of_a_lie_is_fetched(held):
    here = at(held)
    found = here.take(ID, 1000)
    assert isinstance(found, NoAnswer) and found.kind is LossKind.INVALID_UPLOAD
    assert found.reason.isprintable() and len(found.reason) <= 500
    assert not chunks(held) & set(held.pulled)
    assert held.deleted == [held.root] and here._arriving == {}


def test_a_payload_is_no_larger_than_it_declares():
    """What is fetched beyond is one chunk."""
    here = at(held := store(answer(DATA, shape=(len(DATA) - 1,))))
    found = here.take(ID, 2**30)
    assert isinstance(found, NoAnswer) and "more than the" in found.reason
    found = at(held := store(answer(DATA, shape=(7,)))).take(ID, 1000)
    assert isinstance(found, NoAnswer) and len(chunks(held) & set(held.pulled)) == 1
    held = store(answer(DATA, shape=(len(DATA) + 1,)))
    found = at(held).take(ID, 2**30)
    assert isinstance(found, NoAnswer) and found.kind is LossKind.INVALID_UPLOAD


def many(count: int) -> Store:
    held = store(answer(b"x"))
    for number in range(count):
        held.tree.children.add(object_id=f"{number:064x}")
    return held


def without(kind: str) -> Store:
    held = store(answer(DATA))
    gone = {id for id, text in held.objects.items() if text.startswith(kind.encode() + b" ")}
    return replace(held, objects={id: t for id, t in held.objects.items() if id not in gone})


def swapped(kind: str, other: str) -> Store:
    """One object in the place of another."""
    held = store(answer(DATA))
    first, second = (
        next(id for id, text in held.objects.items() if text.startswith(k.encode() + b" "))
        for k in (kind, other)
    )
    return replace(held, objects={**held.objects, first: held.objects[second]})


def filled(kind: str, content: bytes) -> Store:
    held = store(answer(DATA))
    id = next(id for id, text in held.objects.items() if text.startswith(kind.encode() + b" "))
    return replace(held, objects={**held.objects, id: content})


def head(kind: str) -> bytes:
    return kind.encode() + b"  9\0"


KINDS = ("Message", "RecordDict", "ConfigRecord", "ArrayRecord", "Array", "ArrayChunk")
BROKEN = {
    "many objects": many(100),
    **{f"no {kind}": without(kind) for kind in KINDS},
    **{
        f"{other} as {kind}": swapped(kind, other)
        for kind in KINDS
        for other in KINDS
        if kind != other
    },
    **{
        f"a large {kind}": filled(kind, kind.encode() + b"  9\0" + bytes(2**19))
        for kind in KINDS[:5]
    },
    **{f"an empty {kind}": filled(kind, b"") for kind in KINDS},
    **{f"text as {kind}": filled(kind, b"\xff\x00\x1b\n") for kind in KINDS},
    **{
        f"deep {kind}": filled(kind, kind.encode() + b"  9\0" + b"[" * 10**5) for kind in KINDS[1:5]
    },
    "a record more": store(RecordDict({**answer(b"x"), "x\n": ConfigRecord({"a": 1})})),
    "two arrays": store(
        RecordDict(
            {
                **records.record({}),
                records.PAYLOAD: ArrayRecord(
                    {n: Array("uint8", (1,), records.STYPE, b"x") for n in ("a", "b")}
                ),
            }
        )
    ),
}


@pytest.mark.parametrize("held", BROKEN.values(), ids=BROKEN)
def test_whatever_is_at_the_superlink_is_no_error_of_the_server(held):
    here = at(replace(held, pulled=[], deleted=[]))
    found = here.take(ID, len(DATA))
    assert isinstance(found, NoAnswer) and found.reason.isprintable()
    assert len(found.reason) <= 500 and here._arriving == {}
    assert here.grid._client.deleted[:1] == [held.root]


def test_an_answer_on_its_way_keeps_no_other_one_waiting(monkeypatch):
    """Flower itself would wait for it, for hours."""
    now = [100.0]
    monkeypatch.setattr(inbox.time, "monotonic", lambda: now[0])
    held = store(answer(DATA))
    held.absent = set(held.objects)
    here = at(held)
    assert here.take(ID, len(DATA)) is None and held.pulled == [held.root]
    held.absent = {max(chunks(held))}
    held.pulled.clear()
    for _ in range(50):  # its chunks are not fetched again and again
        assert here.take(ID, len(DATA)) is None
    assert len(chunks(held) & set(held.pulled)) <= 2 and len(held.pulled) < 12
    held.absent = set()
    now[0] += 1.1
    assert here.take(ID, len(DATA)) == Answer({"round": 1}, DATA)
    assert held.announced == 1


def test_an_answer_that_is_given_up_is_lost():
    """Flower deletes an answer of which nothing has come for three minutes."""
    held = store(answer(DATA))
    held.absent = set(held.objects)
    here = at(held)
    assert here.take(ID, len(DATA)) is None
    held.objects = {}
    assert here.take(ID, len(DATA)) == NoAnswer("Its answer was not sent to the end.", is_away=True)


def mutated(held: Store, generator) -> Store:
    """Some bytes of some objects changed, cut, doubled or swapped with those of others."""
    objects = dict(held.objects)
    ids = list(objects)
    for _ in range(generator.integers(1, 4)):
        id = ids[generator.integers(len(ids))]
        content = bytearray(objects[id])
        place = int(generator.integers(len(content) + 1))
        match generator.integers(6):
            case 0 if content:
                content[place % len(content)] = generator.integers(256)
            case 1:
                del content[place:]
            case 2:
                content[place:place] = content[: generator.integers(200)]
            case 3:
                content[place:place] = objects[ids[generator.integers(len(ids))]][:300]
            case 4:
                numbers = (b"-1", b"1e400", b"9" * 5000, b"NaN", b"[" * 3000, b'"\\ud800"', b"null")
                content[place : place + 1] = numbers[generator.integers(len(numbers))]
            case _:
                other = ids[generator.integers(len(ids))].encode()
                content[place : place + 64] = other
        objects[id] = bytes(content)
    return replace(held, objects=objects, pulled=[], deleted=[])


@pytest.mark.parametrize("count", [400, pytest.param(40_000, marks=pytest.mark.trust)])
def test_answers_changed_at_random_are_no_error_of_the_server(count):
    generator = rng(5, "answers", count)
    data = bytes(range(200)) * 10
    held = store(records.record({"round": 1, "error": "é"}, records.payload(data)))
    refused = 0
    for _ in range(count):
        found = at(mutated(held, generator)).take(ID, len(data))
        if isinstance(found, NoAnswer):
            refused += 1
            assert found.reason.isprintable() and len(found.reason) <= 500
        else:
            assert len(found.payload) <= len(data)
            assert (found.error or "").isprintable()
    assert refused > count / 2


def test_flower_has_what_this_is_built_on():
    """Its own grid is recognised, and so are the calls by which it fetches."""
    from flwr.supercore.inflatable import inflatable_utils
    from flwr.supercore.runtime import RuntimeHttpClient

    assert isinstance(inbox.of(HttpGrid(insecure=True, token="a token")), FlowerInbox)
    for call in ("PullMessages", "PullObject", "ConfirmMessageReceived"):
        assert callable(getattr(RuntimeHttpClient, call))
    assert set(KINDS) <= inflatable_utils.inflatable_class_registry.keys()
    from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE

    assert FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE == CHUNK_BYTES
