"""Ingredients: a tiny tokenizer made in memory, and a small corpus."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from flexlora.data.corpus import Corpus

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(chat_template=CHAT, adds_bos=False, added=()):
    """Byte-level BPE without a download; every text can be encoded and decoded."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", *added]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the sum of one and two", "name the colour"], trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        chat_template=chat_template,
    )


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


def small_corpus(rows=17, clients=3):
    return Corpus.build(
        {
            "client": [f"c{row % clients}" for row in range(rows)],
            "category": ["sums" if row % 2 else "names" for row in range(rows)],
            "split": [("train", "validation", "test")[row % 5 % 3] for row in range(rows)],
            "instruction": [f"Task {row % clients}." for row in range(rows)],
            "input": [f"input {row} " * (row % 4) for row in range(rows)],
            "output": [f"out {row}" for row in range(rows)],
        }
    )


@pytest.fixture
def corpus():
    return small_corpus()
