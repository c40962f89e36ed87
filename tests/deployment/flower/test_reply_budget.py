"""What a node may store at the SuperLink."""

import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("flwr", reason="needs flexlora[flower]")

from fastapi import HTTPException
from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse

from flexlora.deployment.flower import reply_budget
from flexlora.deployment.flower.reply_budget import MOST_OBJECT_BYTES, ReplyBudget
from flexlora.deployment.server import run_files

MOST = 10 * 2**20
PER_ANSWER = 3 * (MOST + 2**20)


class Link:
    """Flower's handlers behind a budget."""

    def __init__(self, folder, most=MOST):
        if most is not None:
            run_files.allow_replies(folder, most)
        self.sessions, self.stored = 0, 0
        self.handlers = SimpleNamespace(push_messages=self._push, push_object=self._store)
        ReplyBudget(folder / run_files.REPLY_BYTES).install(self.handlers)

    def _push(self, request, state):
        self.sessions += 1
        reply = PushMessagesResponse(session_id=f"session {self.sessions}")
        answered = request.messages_list[0].metadata.reply_to_message_id
        reply.objects_to_push.extend([] if answered == "nobody asked" else ["object"])
        return reply

    def _store(self, request, state):
        self.stored += len(request.object_content)
        return PushObjectResponse(stored=True)

    def announce(self, node=7, answered="request", objects=3, name="root", root="root", extra=0):
        request = PushMessagesRequest()
        request.node.node_id = node
        message = request.messages_list.add()
        message.metadata.message_id, message.metadata.reply_to_message_id = name, answered
        message.metadata.group_id = "x" * extra
        tree = request.message_object_trees.add(object_id=root)
        for number in range(objects - 1):
            tree.children.add(object_id=str(number))
        return self.handlers.push_messages(request=request, state=None).session_id

    def push(self, session, size, node=7):
        request = PushObjectRequest(session_id=session, object_content=bytes(size))
        request.node.node_id = node
        return self.handlers.push_object(request=request, state=None).stored


def test_an_answer_of_the_size_that_was_asked_for_is_stored(tmp_path):
    link = Link(tmp_path)
    session = link.announce(objects=8)
    assert all(link.push(session, MOST // 2) for _ in range(2))
    assert link.stored == MOST


@pytest.mark.parametrize("again", [False, True])
def test_more_is_not_stored_in_however_many_sessions(tmp_path, again):
    link = Link(tmp_path)
    session = link.announce()
    for _ in range(60):
        session = link.announce() if again else session
        link.push(session, 5 * 2**20)
    assert link.stored <= PER_ANSWER
    # Neither another node nor the answer to another request has less for it.
    assert link.push(link.announce(node=8), 100, node=8)
    assert link.push(link.announce(answered="another"), 100)


def test_unknown_sessions_and_those_of_others_have_a_bound_too(tmp_path):
    link = Link(tmp_path)
    session = link.announce()
    assert not link.push(session, 1, node=8)
    for number in range(60):
        link.push(f"unknown {number}", 5 * 2**20)
    link.push("", 5 * 2**20)
    assert link.stored <= PER_ANSWER


def test_before_a_run_asks_for_uploads_answers_are_small(tmp_path):
    link = Link(tmp_path, most=None)
    session = link.announce()
    for _ in range(20):
        link.push(session, 2**20)
    assert link.stored <= 3 * 2**20
    (tmp_path / run_files.REPLY_BYTES).write_text("no number")
    assert not link.push(session, 2**20)


def test_the_limit_of_a_run_only_grows(tmp_path):
    for most in (7, 5, 9, 1):
        run_files.allow_replies(tmp_path, most)
    assert (tmp_path / run_files.REPLY_BYTES).read_text() == "9"


@pytest.mark.parametrize(
    "how",
    [
        {"objects": 200_000},
        {"extra": 2**20},
        {"root": "another"},
    ],
    ids=str,
)
def test_an_announcement_is_small_and_names_itself(tmp_path, how):
    link = Link(tmp_path)
    with pytest.raises(HTTPException) as error:
        link.announce(**how)
    assert error.value.status_code in (400, 413) and link.sessions == 0


def test_no_or_several_answers_are_no_announcement(tmp_path):
    link = Link(tmp_path)
    several = PushMessagesRequest()
    for _ in range(2):
        several.messages_list.add()
        several.message_object_trees.add()
    for request in (PushMessagesRequest(), several):
        with pytest.raises(HTTPException):
            link.handlers.push_messages(request=request, state=None)


def test_an_object_is_no_larger_than_flowers_chunks(tmp_path):
    link = Link(tmp_path)
    session = link.announce()
    with pytest.raises(HTTPException):
        link.push(session, MOST_OBJECT_BYTES + 1)
    assert link.stored == 0


def test_what_is_remembered_of_nodes_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(reply_budget, "_MOST_REMEMBERED", 5)
    budget = ReplyBudget(None)
    for number in range(20):
        budget._remember(budget._sessions, number, (number, ""))
    assert list(budget._sessions) == [15, 16, 17, 18, 19]


def test_flower_calls_what_this_stands_before():
    """By the module, so that it can be replaced there; and its program runs uvicorn."""
    import inspect

    import uvicorn
    from flwr.superlink import cli
    from flwr.superlink.routers.fleet import router
    from flwr.superlink.servicer.fleet import fleet_handlers

    flower_superlink = sys.modules[cli.flower_superlink.__module__]
    assert router.fleet_handlers is fleet_handlers and flower_superlink.uvicorn is uvicorn
    for handler in (fleet_handlers.push_messages, fleet_handlers.push_object):
        assert list(inspect.signature(handler).parameters) == ["request", "state"]
    source = inspect.getsource(router)
    for call in ("push_messages", "push_object"):
        assert f"fleet_handlers.{call}(request=request, state=state)" in source
    assert "uvicorn.run(\n        app=" in inspect.getsource(flower_superlink)
