"""Prompt templates of a user's own."""

import pytest

from flexlora.data import encode, fields_of, named
from flexlora.data.corpora.table import read
from flexlora.data.corpus import Example
from flexlora.errors import ConfigError, DataError

from .conftest import byte_tokenizer

PAIR = Example("Add.", "1 and 2", "3", fields={"tone": "kind"})
TALK = Example(
    "", "", "b", ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
)


@pytest.mark.parametrize(
    ("template", "prompt", "response", "whole"),
    [
        # Without the output the response follows the template.
        ("Q: {{ instruction }}\nA:", "Q: Add.\nA:", "3", "Q: Add.\nA:3<|end|>"),
        (
            "Q: {{ instruction }}{% if input %} {{ input }}{% endif %}\nA: {{ output }}",
            "Q: Add. 1 and 2\nA: ",
            "3",
            "Q: Add. 1 and 2\nA: 3<|end|>",
        ),
        # What follows the output is learnt, up to the first special token.
        (
            "{{ instruction }}={{ output }};\n",
            "Add.=",
            "3;",
            "Add.=3;<|end|>",
        ),
        (
            "{{ bos_token }}<|user|>{{ input }}<|assistant|>{{ output }}{{ eos_token }}\n",
            "<|begin|><|user|>1 and 2<|assistant|>",
            "3<|end|>",
            "<|begin|><|user|>1 and 2<|assistant|>3<|end|>",
        ),
        ("{{ tone }}: {{ instruction }} ", "kind: Add. ", "3", "kind: Add. 3<|end|>"),
    ],
)
def test_the_response_begins_where_the_output_stands(template, prompt, response, whole):
    tokenizer = byte_tokenizer()
    write = named(template, tokenizer)
    assert write(PAIR) == (prompt, response)
    assert tokenizer.decode(encode(PAIR, write, tokenizer, 99).ids) == whole


def test_a_template_of_messages_is_a_chat_template():
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|end|>{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant] {% endif %}"
    write = named(template, byte_tokenizer(chat_template=None))
    assert write(TALK) == ("[user] a<|end|>[assistant] ", "b<|end|>")
    assert fields_of(template) == []


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ instruction }", r"not a Jinja template: .*\(line 1\)"),
        ("{{ output }}{{ output }}", "writes output 2 times"),
        ("{{ output | upper }}", "writes output 0 times"),
        ("{{ colour }}", "'colour' is undefined.*the columns tone, instruction, input"),
        ("{{ instruction.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ 1 / 0 }}{{ instruction }}", "division by zero"),
    ],
)
def test_what_a_template_cannot_do_is_refused(template, message):
    with pytest.raises((ConfigError, DataError), match=message) as refusal:
        encode(PAIR, named(template, byte_tokenizer()), byte_tokenizer(), 99)
    assert "\n" not in str(refusal.value)


def test_a_conversation_needs_messages():
    with pytest.raises(ConfigError, match="cannot format a conversation of 2 messages"):
        named("{{ instruction }}", byte_tokenizer())(TALK)


def test_other_columns_of_the_data_are_read_for_a_template(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b", "tone": "kind", "year": 1999}\n' * 2)
    template = "{{ tone }} {{ year }}: {{ instruction }}"
    assert fields_of(template) == ["tone", "year"] and fields_of("alpaca") == []
    corpus = read(path, fields=fields_of(template))
    assert named(template, byte_tokenizer())(corpus.example(1)) == ("kind 1999: a", "b")
    with pytest.raises(DataError, match=r"uses colour, but .*rows.jsonl' has no such column"):
        read(path, fields=["colour"])
