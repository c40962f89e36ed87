import time
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from flexlora.evaluation.rouge import UnicodeTokenizer, rouge_l

DEFAULT = RougeScorer(["rougeL"], use_stemmer=False)

ascii_text = st.text(st.characters(max_codepoint=127), max_size=60)
few_words = st.lists(
    st.sampled_from(["a", "b-c", "c's", "D_9", ",e!", "7.5", "Ab"]), max_size=12
).map(" ".join)


def words(text: str) -> list[str]:
    return UnicodeTokenizer().tokenize(text)


def default_rouge_l(reference: str, answer: str) -> float:
    return float(DEFAULT.score(reference, answer)["rougeL"].fmeasure)


@settings(deadline=None)
@given(ascii_text)
def test_ascii_words_are_the_default_tokenizers(text):
    assert words(text) == DEFAULT._tokenizer.tokenize(text)


@settings(deadline=None)
@given(ascii_text | few_words, ascii_text | few_words)
def test_ascii_scores_are_rouge_scores_own(reference, answer):
    assert rouge_l(reference, answer) == default_rouge_l(reference, answer)


def longest_common(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + longest_common(a[:-1], b[:-1])
    return max(longest_common(a[:-1], b), longest_common(a, b[:-1]))


@settings(deadline=None)
@given(*[st.lists(st.sampled_from(["हिन्दी", "né", "中", "x"]), max_size=6)] * 2)
def test_the_score_is_the_definitions(reference, answer):
    expected = 0.0
    if common := longest_common(reference, answer):
        precision, recall = common / len(answer), common / len(reference)
        expected = 2 * precision * recall / (precision + recall)
    assert rouge_l(" ".join(reference), " ".join(answer)) == pytest.approx(expected)


@settings(deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_any_text_has_a_score_and_the_order_of_the_two_is_no_matter(a, b):
    score = rouge_l(a, b)
    assert 0 <= score <= 1
    assert score == pytest.approx(rouge_l(b, a))
    assert rouge_l(a, a) == (1 if words(a) else 0)


@settings(deadline=None)
@given(st.text(max_size=60), st.sampled_from(["NFC", "NFD"]))
def test_words_do_not_depend_on_how_accents_are_encoded(text, form):
    assert words(unicodedata.normalize(form, text)) == words(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The naïve CAFÉ-owner", ["the", "naïve", "café", "owner"]),
        ("हिन्दी में लिखिए।", ["हिन्दी", "में", "लिखिए"]),
        ("我爱 GPT4。", ["我", "爱", "gpt4"]),
        ("カタカナとひらがな", list("カタカナとひらがな")),
        ("ｶﾞ Ａ１", ["ガ", "a1"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("ไทย", ["ไ", "ท", "ย"]),
        ("Straße STRASSE", ["strasse", "strasse"]),
        ("می\u200cشود co\u00adop", ["میشود", "coop"]),
        ("ℌ2 ǰ ", ["h2", "ǰ"]),
        ("❤\ufe0f 😀 :-)", []),
        ("snake_case 3.14", ["snake", "case", "3", "14"]),
    ],
)
def test_words_in_many_scripts(text, expected):
    assert words(text) == expected


def test_the_default_would_score_hindi_and_chinese_zero():
    for reference, answer in [("हिन्दी में लिखिए", "हिन्दी में"), ("我爱你", "我你")]:
        assert default_rouge_l(reference, answer) == 0
        assert rouge_l(reference, answer) == pytest.approx(0.8)


def test_a_thousand_pairs_of_a_paragraph_take_under_three_seconds():
    draw = np.random.default_rng(0)
    vocabulary = [f"wörd{number}" for number in range(97)]
    texts = [" ".join(draw.choice(vocabulary, size)) for size in draw.integers(5, 90, 2000)]
    started = time.process_time()
    scores = [rouge_l(*pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
    assert time.process_time() - started < 3
    assert 0.02 < np.mean(scores) < 0.5
