"""Which columns are read if a config names none, some, or wrong ones."""

import pytest

from flexlora.data import Columns
from flexlora.data.columns import choose, toml
from flexlora.errors import DataError


def chosen(*names, needs=(), **columns):
    return choose(Columns(**columns), names, "'f.csv'", needs)


@pytest.mark.parametrize(
    ("names", "sources"),
    [
        # The README's four columns, an Alpaca file, and files without one of the optional ones.
        (
            ("instruction", "input", "output", "client"),
            {n: n for n in ("instruction", "input", "output", "client")},
        ),
        (("instruction", "output"), {"instruction": "instruction", "output": "output"}),
        (("input", "output", "split"), {n: n for n in ("input", "output", "split")}),
        (("messages", "client"), {"messages": "messages", "client": "client"}),
        # Common other names.
        (("id", "conversations"), {"messages": "conversations"}),
        (("prompt", "completion"), {"instruction": "prompt", "output": "completion"}),
        (("question", "answer"), {"instruction": "question", "output": "answer"}),
        (
            ("instruction", "context", "response", "category"),
            {
                "instruction": "instruction",
                "input": "context",
                "output": "response",
                "category": "category",
            },
        ),
        (("Instruction ", "OUTPUT"), {"instruction": "Instruction ", "output": "OUTPUT"}),
        # The formatted prompt of some Alpaca files is not an instruction.
        (
            ("instruction", "input", "output", "prompt"),
            {n: n for n in ("instruction", "input", "output")},
        ),
    ],
)
def test_common_files_need_no_names(names, sources):
    assert chosen(*names).sources == sources


def test_names_that_are_given_go_first():
    names = ("question", "input", "answer", "output", "client")
    read = chosen(*names, instruction="question", output="answer", client="")
    assert read.sources == {"instruction": "question", "input": "input", "output": "answer"}
    assert chosen(*names, instruction="input", output="answer").sources == {
        "instruction": "input",
        "output": "answer",
        "client": "client",
    }


def test_other_names_are_said_and_standard_ones_are_not():
    assert chosen("instruction", "output").notices == ()
    (notice,) = chosen("question", "answer").notices
    assert "'question' is read as the instruction and 'answer' is read as the output" in notice
    (notice,) = chosen("system", "instruction", "output").notices
    assert "'system' is not read" in notice
    assert chosen("tools", "messages").tools == "tools"


def test_all_missing_names_are_named_at_once():
    with pytest.raises(DataError) as refusal:
        chosen("hospitl", "frage", "antwort", client="hospital", output="answer")
    text = str(refusal.value)
    assert "'answer' (data.columns.output), 'hospital' (data.columns.client)" in text
    assert "hospitl, frage, antwort" in text and "Did you mean 'hospitl'?" in text


@pytest.mark.parametrize(
    ("names", "columns", "message"),
    [
        (("frage", "antwort"), {}, r"no column for the prompt .* and the response to learn"),
        (("text",), {}, r"columns are text\. .*columns = \{ instruction = \"PROMPT\""),
        (("instruction", "outputs"), {}, "Did you mean 'outputs'.*output = \"outputs\""),
        (("question", "prompt", "answer"), {}, "several columns that may be the instruction"),
        (("messages", "output"), {}, r"data.columns = \{ messages = \"messages\" \} or"),
        (
            ("instruction", "output", "output"),
            {},
            "2 columns 'output'.*which one is the output",
        ),
        (("messages", "output"), {"messages": "messages", "output": "output"}, "names both"),
        (("instruction", "output"), {"output": "", "messages": ""}, 'sets both to ""'),
    ],
)
def test_what_is_not_clear_is_refused_with_what_to_write(names, columns, message):
    with pytest.raises(DataError, match=message):
        chosen(*names, **columns)


def test_a_column_that_the_partition_needs_is_asked_for():
    with pytest.raises(DataError) as refusal:
        chosen("instruction", "output", "user_id", needs=("client",))
    text = str(refusal.value)
    assert "Did you mean 'user_id'?" in text and "Set data.columns.client" in text
    assert 'data.partition = { kind = "iid", clients = 4 }' in text
    with pytest.raises(DataError, match=r'data.columns.category is ""'):
        chosen("instruction", "output", needs=("category",), category="")


def test_a_duplicate_that_is_not_read_does_no_harm():
    assert "output" in chosen("instruction", "output", "note", "note").sources


def test_columns_are_written_as_toml():
    assert toml(Columns(output="answer", client="")) == '{ output = "answer", client = "" }'
