"""SQuAD's measures of answers: exact match and F1 of an answer's words, the best over all answers expected.

The rule is that of the official evaluation script (Rajpurkar et al. 2016, `evaluate-v1.1.py`): lower case, no marks, no
articles, blanks as one. Text with Chinese characters is measured as MLQA's script does (Lewis et al. 2020,
`mlqa_evaluation_v1.py`): each Chinese character is a word, and marks of all scripts go.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from engine.tasks.words import CHINESE

_MARKS = frozenset(string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CHINESE = re.compile(f"([{CHINESE}])")


def answer_words(text: str) -> list[str]:
    """Return the words of an answer that are compared."""
    is_mark: Callable[[str], bool] = _MARKS.__contains__
    if _CHINESE.search(text):
        is_mark = lambda letter: letter in _MARKS or unicodedata.category(letter).startswith("P")  # noqa: E731
        text = _CHINESE.sub(r" \1 ", text)
    kept = "".join(letter for letter in text.lower() if not is_mark(letter))
    return _ARTICLES.sub(" ", kept).split()


def exact_match(predicted: str, expected: Sequence[str]) -> float:
    """Return 1 if the answer is one of those expected, else 0; without any, the empty answer is right."""
    return float(any(answer_words(predicted) == answer_words(one) for one in expected or [""]))


def f1(predicted: str, expected: Sequence[str]) -> float:
    """Return the largest F1 of the words of the answer and of one of those expected."""
    return max(_f1(answer_words(predicted), answer_words(one)) for one in expected or [""])


def _f1(predicted: Sequence[str], expected: Sequence[str]) -> float:
    if not predicted or not expected:  # SQuAD 2.0: no answer agrees with no answer alone
        return float(predicted == expected)
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected))
