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
"""The beginnings of Unicode character names in scripts without spaces between words."""

_JOINERS: Final = "\u00ad\u200c\u200d"


class UnicodeTokenizer:
    """Splits text into the words that Rouge compares, in any script.

    A word is a run of letters, marks and digits (Unicode's categories L, M and N), after
    normalisation (NFKC) and case folding; all other characters separate words. Scripts without
    spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) are split into
    characters. Soft hyphens, joiners and variation selectors are removed. There is no stemming.

    Differs: rouge_score's default only keeps ``a-z0-9`` of the lower-cased text, so that Hindi
    or Chinese has no words and scores 0, and "naïve" is two words. On ASCII text the two are
    equal (the default without its stemmer).
    """

    def tokenize(self, text: str) -> list[str]:
        """The words in order."""
        # Folding can undo the normal form, and the normal form can bring new capitals.
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        return text.translate({ord(c): _spaced(c) for c in set(text)}).split()


def rouge_l(reference: str, answer: str) -> float:
    """Rouge-L's F-measure in 0..1: the harmonic mean of precision and recall of the longest
    common subsequence of words (Lin 2004, section 3), over each text as a whole.

    It is 0 if one of the texts has no word, such as ":-)", even if they are equal. Cost: about
    0.1 microseconds times the product of the numbers of words.
    """
    return float(_SCORER.score(reference, answer)["rougeL"].fmeasure)


def _spaced(character: str) -> str:
    """The replacement of a character: itself, itself between spaces, a space, or nothing."""
    name = unicodedata.name(character, "")
    if character in _JOINERS or name.startswith("VARIATION SELECTOR"):
        return ""
    if unicodedata.category(character)[0] not in "LMN":
        return " "
    return f" {character} " if name.startswith(_UNSPACED) else character


_SCORER: Final = RougeScorer(["rougeL"], tokenizer=UnicodeTokenizer())
