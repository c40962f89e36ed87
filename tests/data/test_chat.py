"""Chat templates: where the response begins, how it ends, and what is refused.

The templates are written anew in the manner of well-known models.
"""

import pytest

from flexlora.data import encode, named
from flexlora.data.corpus import Example
from flexlora.errors import ConfigError, DataError

from .conftest import byte_tokenizer

PAIR = Example("Add.", "1 and 2", " 3\n")
TALK = (
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
)
CONVERSATION = Example("", "", "Because.", TALK)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not "
    "supported') }}{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 "
    "== 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last and '<think>' not in m.content %}"
    "<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') if not loop.last else m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% else %}<|assistant|>{{ m.content.split('</think>')[-1].lstrip('\n') }}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
WORDS = (
    "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


def made(template, *added, adds_bos=False):
    tokenizer = byte_tokenizer(template, adds_bos=adds_bos, added=added)
    return named("chat", tokenizer), tokenizer


@pytest.mark.parametrize(
    ("template", "added", "prompt", "response", "end"),
    [
        (
            CHATML,
            ("<|im_start|>", "<|im_end|>"),
            "<|im_start|>user\nAdd.\n\n1 and 2<|im_end|>\n<|im_start|>assistant\n",
            " 3\n<|im_end|>",
            "<|im_end|>",
        ),
        (
            GEMMA,
            ("<start_of_turn>", "<end_of_turn>"),
            "<|begin|><start_of_turn>user\nAdd.\n\n1 and 2<end_of_turn>\n<start_of_turn>model\n",
            "3<end_of_turn>",
            "<end_of_turn>",
        ),
        (
            LLAMA3,
            ("<|start|>", "<|stop|>", "<|eot_id|>"),
            "<|begin|><|start|>user<|stop|>\n\nAdd.\n\n1 and 2<|eot_id|>"
            "<|start|>assistant<|stop|>\n\n",
            "3<|eot_id|>",
            "<|eot_id|>",
        ),
        # The space before the answer is the answer's, as a model writes it.
        (LLAMA2, (), "<|begin|>[INST] Add.\n\n1 and 2 [/INST]", "  3\n <|end|>", "<|end|>"),
        # The conversation's own end comes after that of the turn, and is not the turn's.
        (
            PHI3,
            ("<|stop|>",),
            "<|user|>\nAdd.\n\n1 and 2<|stop|>\n<|assistant|>\n",
            " 3\n<|stop|>",
            "<|stop|>",
        ),
        # A block before the answer is the prompt's: it is the same in every row.
        (
            QWEN3,
            ("<|im_start|>", "<|im_end|>"),
            "<|im_start|>user\nAdd.\n\n1 and 2<|im_end|>\n<|im_start|>assistant\n"
            "<think>\n\n</think>\n\n",
            " 3\n<|im_end|>",
            "<|im_end|>",
        ),
        (R1, (), "<|begin|><|user|>Add.\n\n1 and 2<|assistant|>", " 3\n<|end|>", "<|end|>"),
        # Without an end of its own a turn ends with the tokenizer's end.
        (WORDS, (), "USER: Add.\n\n1 and 2\nASSISTANT: ", " 3\n", None),
        # Nor is a marker that the tokenizer splits an end at which generation could stop.
        (
            CHATML,
            (),
            "<|im_start|>user\nAdd.\n\n1 and 2<|im_end|>\n<|im_start|>assistant\n",
            " 3\n",
            None,
        ),
    ],
)
def test_a_response_ends_as_the_template_ends_a_turn(template, added, prompt, response, end):
    format, tokenizer = made(template, *added)
    assert format(PAIR) == (prompt, response)
    assert format.end == (None if end is None else tokenizer.convert_tokens_to_ids(end))
    ids = encode(PAIR, format, tokenizer, 999)
    last = tokenizer.eos_token if end is None else end
    assert ids.response[-1] == tokenizer.convert_tokens_to_ids(last)
    assert tokenizer.decode(ids.ids) == prompt + response + ("<|end|>" if end is None else "")


@pytest.mark.parametrize("template", [CHATML, LLAMA3, LLAMA2, PHI3, QWEN3, R1, WORDS])
def test_the_last_answer_of_a_conversation_is_the_response(template):
    added = ("<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>", "<|eot_id|>")
    format, tokenizer = made(template, *added)
    prompt, response = format(CONVERSATION)
    assert "Yes?" in prompt and "Because" not in prompt
    assert response.startswith("Because.") or response.startswith(" Because.")
    assert encode(CONVERSATION, format, tokenizer, 999).response[-1] == (
        tokenizer.eos_token_id if format.end is None else format.end
    )


def test_thoughts_in_the_data_are_learnt():
    thought = "<think>\nHm.\n</think>\n\n3"
    example = Example("Add.", "", thought)
    prompt, response = made(QWEN3, "<|im_start|>", "<|im_end|>")[0](example)
    assert prompt.endswith("<|im_start|>assistant\n") and response == f"{thought}<|im_end|>"
    prompt, response = made(R1)[0](example)
    assert prompt.endswith("<|assistant|><think>\n") and response == "Hm.\n</think>\n\n3<|end|>"


def test_what_a_template_writes_before_answers_is_said():
    assert made(CHATML, "<|im_end|>")[0].notices == ()
    (notice,) = made(QWEN3, "<|im_end|>")[0].notices
    assert r"writes '<think>\n\n</think>\n\n' before an answer" in notice
    (notice,) = made(R1)[0].notices
    assert r"asks with '<think>\n', which it leaves out" in notice


def test_the_beginning_is_the_templates():
    for template, count in ((CHATML, 0), (LLAMA3, 1)):
        format, tokenizer = made(template, adds_bos=True)
        ids = encode(PAIR, format, tokenizer, 999).ids.tolist()
        assert ids.count(tokenizer.bos_token_id) == count


@pytest.mark.parametrize(
    ("messages", "said", "remedy"),
    [
        (
            ({"role": "system", "content": "Be kind."}, *TALK),
            "System role not supported",
            "put the text of the system message at the start of the first user message",
        ),
        (
            (TALK[0], *TALK),
            "Conversation roles must alternate",
            "join messages of the same role that follow each other",
        ),
    ],
)
def test_a_conversation_that_the_template_refuses_is_said_with_its_row(messages, said, remedy):
    format, tokenizer = made(GEMMA)
    with pytest.raises(DataError) as refusal:
        encode(Example("", "", "Because.", messages), format, tokenizer, 99)
    text = str(refusal.value)
    assert text.startswith(f"Row 1 ('{messages[0]['content']}'): The chat template of")
    assert f'"{said}"' in text and remedy in text and "\n" not in text


def test_a_template_that_fails_is_said():
    failing = "{% for m in messages %}{{ m.content }}{{ m.nothing.more }}{% endfor %}"
    with pytest.raises(ConfigError, match=r"cannot format the conversation.*set data.prompt to"):
        made(failing)
    with pytest.raises(ConfigError, match="writes an assistant's answer 2 times"):
        made("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}")
    with pytest.raises(ConfigError, match="writes an assistant's answer 0 times"):
        made("{{ messages[0].content }}")


def test_a_developer_is_the_system_unless_the_template_knows_it():
    messages = ({"role": "developer", "content": "x"}, *TALK)
    example = Example("", "", "Because.", messages)
    assert "<|im_start|>system\nx" in made(CHATML)[0](example)[0]
    knows = "{# developer #}" + CHATML
    assert "<|im_start|>developer\nx" in made(knows)[0](example)[0]


def test_tools_and_calls_go_to_the_template():
    template = (
        "{% if tools %}{{ tools[0].function.name }};{% endif %}{% for m in messages %}"
        "<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}CALL "
        "{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = (TALK[0], {"role": "assistant", "content": "", "tool_calls": [call]})
    tools = ({"type": "function", "function": {"name": "add"}},)
    prompt, response = made(template)[0](Example("", "", "", messages, tools))
    assert prompt == "add;<|user|>Hello<|end|>\n<|assistant|>"
    assert response == 'CALL add {"a": 1}<|end|>'


def test_a_template_that_writes_answers_in_another_place_is_refused():
    template = (
        "{% if add_generation_prompt %}ask {% endif %}{% for m in messages %}{{ m.content }}<|end|>"
        "{% endfor %}"
    )
    format, tokenizer = made(template)
    with pytest.raises(DataError, match=r"Row 1 .*what the answer is cannot be told"):
        encode(PAIR, format, tokenizer, 99)
