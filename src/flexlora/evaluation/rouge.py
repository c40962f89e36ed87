"""Rouge-L for text in any script."""

from __future__ import annotations

import unicodedata
from typing import Final

from rouge_score.rouge_scorer import RougeScorer

_UNSPACED: Final = (
    "CJK",
    "IDEOGRAPHIC",
    "HIRAGANA",
    "KATAKANA",
    "THAI ",
    "LAO ",
    "KHMER ",
    "MYANMAR ",
)
"""How Unicode's names begin in scripts that write no space between words."""

_JOINERS: Final = "\u00ad\u200c\u200d"


class UnicodeTokenizer:
    """Cuts text into the words that Rouge compares, in any script.

    A word is a run of letters, marks and digits (Unicode's categories L, M and N), after
    normalisation (NFKC) and case folding; all else separates. Scripts that write no space
    between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) are cut into characters.
    Soft hyphens, joiners and variation selectors are left out. Nothing is stemmed.

    Differs: rouge_score's default keeps ``a-z0-9`` of the lowered text and nothing else, so
    that Hindi or Chinese has no words and scores 0, and "naïve" is two. On ASCII text the
    two are equal (the default without its stemmer).
    """

    def tokenize(self, text: str) -> list[str]:
        """The words in order."""
        # Folding can undo the normal form, and the normal form can bring new capitals.
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        return text.translate({ord(c): _spaced(c) for c in set(text)}).split()


def rouge_l(reference: str, answer: str) -> float:
    """Rouge-L's F-measure in 0..1: the harmonic mean of precision and recall of the longest
    common subsequence of words (Lin 2004, section 3), over each text as a whole.

    It is 0 where either text has no word in it, such as ":-)", even if they are equal. Cost:
    words of one times words of the other, about 0.1 microseconds each.
    """
    return float(_SCORER.score(reference, answer)["rougeL"].fmeasure)


def _spaced(character: str) -> str:
    """The character as it should stand: by itself, within a word, as a gap, or not at all."""
    name = unicodedata.name(character, "")
    if character in _JOINERS or name.startswith("VARIATION SELECTOR"):
        return ""
    if unicodedata.category(character)[0] not in "LMN":
        return " "
    return f" {character} " if name.startswith(_UNSPACED) else character


_SCORER: Final = RougeScorer(["rougeL"], tokenizer=UnicodeTokenizer())
