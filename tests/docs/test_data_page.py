"""docs/data.md shows what the code does."""

import re
from pathlib import Path

import pytest

import flexlora
from data.conftest import byte_tokenizer
from data.test_chat import CHATML
from flexlora.data import Corpus, fields_of, named
from flexlora.data.columns import OTHER_NAMES
from flexlora.data.corpora import objects
from flexlora.data.corpus import SPLITS, Example
from flexlora.data.sources import SPLIT_NAMES

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLE = Example("Translate to French.", "Good morning", "Bonjour")


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("place", "name"), [(0, "alpaca"), (1, "plain"), (2, "chat")])
def test_the_prompts_are_those_of_the_code(place, name):
    tokenizer = byte_tokenizer(CHATML, added=("<|im_start|>", "<|im_end|>"))
    prompt, response = named(name, tokenizer)(EXAMPLE)
    assert blocks("text")[place] == prompt
    assert response == ("Bonjour<|im_end|>" if name == "chat" else "Bonjour")
    assert "the response is `Bonjour<|im_end|>`" in PAGE


def test_the_template_of_the_page_works():
    (template,) = blocks("jinja")
    assert fields_of(template) == ["hospital"]
    example = Example("Why?", "Old.", "So.", fields={"hospital": "St Mary"})
    assert named(template, byte_tokenizer())(example) == (
        "St Mary asks: Why?\nNotes: Old.\n\nAnswer: ",
        "So.",
    )


def test_the_names_of_columns_and_splits_are_those_of_the_code():
    listed = PAGE.split("| column | common other names |")[1].split("\n\n")[0]
    rows = [line.split("|")[1:3] for line in listed.splitlines()[2:]]
    names = {re.findall("`(.*?)`", key)[0]: re.findall("`(.*?)`", value) for key, value in rows}
    assert names == {name: list(OTHER_NAMES[name]) for name in names}
    (line,) = [line for line in PAGE.splitlines() if line.startswith("| `split` |")]
    shown = set(re.findall("`(.*?)`", line)) - {"split"}
    assert shown == (set(SPLIT_NAMES) | set(SPLITS)) - {"training", "testing"}


def test_the_rows_of_the_page_are_read():
    (code,) = blocks("python")
    rows = code.split("rows = ")[1].split("prepared")[0]
    space: dict = {}
    exec(f"rows = {rows}", space)
    corpus = objects.read(space["rows"])
    assert isinstance(corpus, Corpus) and corpus.example(1).output == "Gute Nacht"
    assert callable(flexlora.prepare)
