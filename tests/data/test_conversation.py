"""Conversations in the forms of other programs, and what is learnt of them."""

import json

import pytest

from flexlora.data.conversation import Fault, parse, stored

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yo"}


def messages(*given, tools=None):
    return list(parse(list(given), tools).messages)


def test_sharegpt_is_the_same_as_messages():
    given = [
        {"from": "system", "value": "be kind"},
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "yo"},
    ]
    assert messages(*given) == [{"role": "system", "content": "be kind"}, USER, ANSWER]
    assert parse(json.dumps(given)) == parse(given)


def test_conversations_of_arrow_are_read():
    columns = {"from": ["human", "gpt"], "value": ["hi", "yo"]}
    maps = [[("role", "user"), ("content", "hi")], [("role", "assistant"), ("content", "yo")]]
    assert messages(*parse(columns).messages) == messages(*maps) == [USER, ANSWER]


def test_text_parts_are_joined_and_others_refused():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image_url": None}]
    assert messages({**USER, "content": parts}, ANSWER)[0]["content"] == "a\nb"
    image = {"type": "image_url", "image_url": {"url": "x"}}
    with pytest.raises(Fault, match="part of the type 'image_url', and only text"):
        parse([{**USER, "content": [image]}, ANSWER])


def test_further_keys_go_to_the_template_and_nulls_do_not():
    given = {**USER, "name": "bob", "tool_calls": None, "weight": None}
    assert messages(given, ANSWER)[0] == {**USER, "name": "bob"}
    assert messages({"role": "developer", "content": "x"}, USER, ANSWER)[0]["role"] == "developer"


def test_a_conversation_is_cut_at_its_last_answer():
    conversation = parse([USER, ANSWER, USER, USER])
    assert (len(conversation.messages), conversation.messages_cut) == (2, 2)
    assert parse([USER, ANSWER, USER, ANSWER]).earlier_answers == 1
    assert parse([USER]) is None and parse([ANSWER]) is None


def test_an_answer_of_weight_zero_is_not_learnt():
    assert parse([USER, {**ANSWER, "weight": 0}]) is None
    conversation = parse([USER, {**ANSWER, "weight": 1}, USER, {**ANSWER, "weight": 0}])
    assert conversation.messages == (USER, ANSWER) and conversation.messages_cut == 2
    with pytest.raises(Fault, match=r"weight 0.5; it must be 0 \(not learnt\) or 1"):
        parse([USER, {**ANSWER, "weight": 0.5}])


def test_tools_and_calls_have_one_form():
    call = {"name": "add", "arguments": '{"a": 1}'}
    wanted = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    older = {"role": "assistant", "content": None, "function_call": call}
    newer = {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
    sharegpt = {"from": "function_call", "value": json.dumps(call)}
    for given in (older, newer, sharegpt):
        expected = {"role": "assistant", "content": "", "tool_calls": wanted}
        assert messages(USER, given, {"from": "observation", "value": "3"}, ANSWER)[1] == expected
    assert messages(USER, newer, {"role": "function", "content": "3"}, ANSWER)[2]["role"] == "tool"
    described = {"name": "add", "parameters": {}, "strict": None}
    conversation = parse([USER, ANSWER], json.dumps([described]))
    function = {"type": "function", "function": {"name": "add", "parameters": {}}}
    assert conversation.tools == (function,)
    assert stored(conversation.text()) == ((USER, ANSWER), (function,))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("not json", "text that is not JSON"),
        (3, "must be a list"),
        (["hi"], "a message is 'hi'"),
        ([{"content": "a"}, ANSWER], "has no role"),
        ([{"role": "user"}, ANSWER], "has no content"),
    ],
)
def test_what_is_no_conversation_is_refused(value, message):
    with pytest.raises(Fault, match=message):
        parse(value)
