"""A tiny random model with a tokenizer of words, in a folder as any model is."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "the",
    "a",
    "cat",
    "dog",
    "sees",
    "and",
]
SPECIAL = ["<unk>", "<s>", "</s>"]


def words_tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def save(path: Path) -> Path:
    """A model whose published decoding settings would change what it writes."""
    config = transformers.LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = transformers.LlamaForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(
        repetition_penalty=3.0,
        do_sample=True,
        temperature=0.7,
        max_length=7,
        eos_token_id=[2, 3],
    )
    model.save_pretrained(path)
    words_tokenizer().save_pretrained(path)
    return path
