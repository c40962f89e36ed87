"""From rows to tokens: corpora, partitions, prompts, and packed token ids."""

from flexlora.data.columns import Columns
from flexlora.data.corpus import Corpus, Example, split_rows
from flexlora.data.layout import Layout, inspect_table
from flexlora.data.packing import Forest, Pack, first_fit, join, pack, packs, steps
from flexlora.data.partition import by_key
from flexlora.data.prompt import Prompt, named
from flexlora.data.sources import sources_of
from flexlora.data.tokens import Int32s, Tokens, TokenStore, encode, shorten

__all__ = [
    "Columns",
    "Corpus",
    "Example",
    "Forest",
    "Int32s",
    "Layout",
    "Pack",
    "Prompt",
    "TokenStore",
    "Tokens",
    "by_key",
    "encode",
    "first_fit",
    "inspect_table",
    "join",
    "named",
    "pack",
    "packs",
    "shorten",
    "sources_of",
    "split_rows",
    "steps",
]
