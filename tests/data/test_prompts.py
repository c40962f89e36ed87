import pytest

from flexlora.data import prompts as prompt
from flexlora.data.corpus import Example

from .conftest import byte_tokenizer

PAIR = Example("Add.", "1 and 2", "3")
ALONE = Example("Name a colour.", "", "Red")
TALK = (
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
)
CONVERSATION = Example("", "", "Because.", TALK)


def test_alpaca_is_the_published_template():
    assert prompt.alpaca(PAIR) == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n",
        "3",
    )
    assert prompt.alpaca(ALONE) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nName a colour.\n\n### Response:\n",
        "Red",
    )


def test_braces_in_a_text_stay():
    text, _ = prompt.alpaca(Example("Write {instruction}.", "{input}", ""))
    assert "Write {instruction}.\n\n### Input:\n{input}\n" in text


def test_plain_writes_nothing_of_its_own():
    assert prompt.plain(PAIR) == ("Add.\n1 and 2\n", "3")
    assert prompt.plain(ALONE) == ("Name a colour.\n", "Red")


def test_chat_ends_where_the_assistant_begins(tokenizer):
    write = prompt.named("chat", tokenizer)
    assert write(PAIR) == ("<|user|>Add.\n\n1 and 2<|end|>\n<|assistant|>", "3<|end|>")
    assert write(ALONE)[0] == "<|user|>Name a colour.<|end|>\n<|assistant|>"
    assert write(CONVERSATION) == (
        "<|user|>Hello<|end|>\n<|assistant|>Yes?<|end|>\n<|user|>Why?<|end|>\n<|assistant|>",
        "Because.<|end|>",
    )


def test_chat_reads_the_same_on_every_day():
    dated = byte_tokenizer(
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}"
        "{% endif %}{{ date_string }} {% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert prompt.named("chat", dated)(ALONE)[0] == "26 Jul 2024 Name a colour."


def test_what_does_not_fit_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"no chat template; set model\.name"):
        prompt.named("chat", byte_tokenizer(chat_template=None))
    with pytest.raises(ValueError, match="'alpaca' cannot format a conversation of 4"):
        prompt.alpaca(CONVERSATION)
    with pytest.raises(ValueError, match=r"'plain' cannot .* set data\.prompt to 'chat'"):
        prompt.plain(CONVERSATION)


def test_an_unknown_name_is_refused_with_the_nearest(tokenizer):
    with pytest.raises(ValueError, match=r"no prompt 'alpacca'.*Did you mean 'alpaca'"):
        prompt.named("alpacca", tokenizer)
    assert prompt.named("plain", tokenizer) is prompt.plain
