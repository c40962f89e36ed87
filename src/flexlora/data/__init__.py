"""From rows to tokens: corpora, partitions, prompts, and packed token ids."""

from flexlora.data.corpus import Corpus, Example, split_rows
from flexlora.data.packing import Forest, Pack, first_fit, join, pack, packs, steps
from flexlora.data.partition import by_key
from flexlora.data.prompt import Prompt, named
from flexlora.data.tokens import Int32s, Tokens, TokenStore, encode, shorten

__all__ = [
    "Corpus",
    "Example",
    "Forest",
    "Int32s",
    "Pack",
    "Prompt",
    "TokenStore",
    "Tokens",
    "by_key",
    "encode",
    "first_fit",
    "join",
    "named",
    "pack",
    "packs",
    "shorten",
    "split_rows",
    "steps",
]
