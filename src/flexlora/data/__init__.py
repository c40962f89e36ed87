"""From rows to tokens: corpora, partitions, prompts, and packed token ids."""

from flexlora.data.columns import Columns
from flexlora.data.corpus import SELECTABLE, Corpus, Example, split_rows
from flexlora.data.encoding import Int32s, Tokens, encode, shorten
from flexlora.data.layout import Layout, inspect_table
from flexlora.data.packing import Forest, Pack, first_fit, join, pack, packs, steps
from flexlora.data.partition import by_key
from flexlora.data.prompt import Prompt
from flexlora.data.prompts import (
    TEMPLATE_SUFFIXES,
    check_name,
    fields_of,
    is_template,
    named,
    template_text,
)
from flexlora.data.sources import sources_of
from flexlora.data.tokens import TokenStore

__all__ = [
    "SELECTABLE",
    "TEMPLATE_SUFFIXES",
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
    "check_name",
    "encode",
    "fields_of",
    "first_fit",
    "inspect_table",
    "is_template",
    "join",
    "named",
    "pack",
    "packs",
    "shorten",
    "sources_of",
    "split_rows",
    "steps",
    "template_text",
]
