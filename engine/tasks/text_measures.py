"""Measures of generated text against the expected one, by the packages that define them (sacrebleu, rouge-score)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from engine.extras import need
from engine.tasks.measures import Measures

ROUGE = ("rouge1", "rouge2", "rougeL")
Words = Literal["13a", "zh", "char"]
"""Tokenizers of sacrebleu: words of a language with blanks, Chinese, and single characters."""

_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_OTHERS_WITHOUT_BLANKS = re.compile("[\u3040-\u30ff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
"""Japanese kana, Thai, Lao, Burmese and Khmer."""


def require_packages() -> None:
    """Raise `EnvironmentProblem` where a package of the measures is missing: before a run, not at its end."""
    need("sacrebleu", "measuring translations", "tasks")
    need("rouge_score", "measuring summaries", "tasks")


def of_texts(expected: Sequence[str], predicted: Sequence[str]) -> Measures:
    """Return the share of exact matches, BLEU and chrF of the whole (sacrebleu, 0 to 100), and the mean F-measures of
    ROUGE (0 to 1). White space around a text does not count.

    Words are those of the expected texts' language: for Chinese sacrebleu's `zh`, for other languages without blanks
    single characters, else its `13a`. ROUGE takes single characters where there are no blanks, since its own words are
    made of a to z alone.
    """
    sacrebleu = need("sacrebleu", "measuring translations", "tasks")
    expected, predicted = [text.strip() for text in expected], [text.strip() for text in predicted]
    words = words_of(expected)
    matches = sum(one == other for one, other in zip(expected, predicted, strict=True))
    bleu = sacrebleu.corpus_bleu(predicted, [expected], tokenize=words)
    return {
        "examples": len(expected),
        "exact_match": matches / len(expected),
        "bleu": float(bleu.score),
        "bleu_words": words,
        "chrf": float(sacrebleu.corpus_chrf(predicted, [expected]).score),
        **_rouge(expected, predicted, words),
    }


def words_of(texts: Sequence[str]) -> Words:
    """Return the tokenizer for the script that most texts are in."""
    others = sum(_OTHERS_WITHOUT_BLANKS.search(text) is not None for text in texts)
    chinese = sum(_CHINESE.search(text) is not None for text in texts)
    if 2 * others > len(texts):
        return "char"
    return "zh" if 2 * chinese > len(texts) else "13a"


def _rouge(expected: Sequence[str], predicted: Sequence[str], words: Words) -> dict[str, float]:
    scorer = need("rouge_score.rouge_scorer", "measuring summaries", "tasks")
    made = scorer.RougeScorer(list(ROUGE), tokenizer=None if words == "13a" else _Characters())
    found: dict[str, list[Any]] = {name: [] for name in ROUGE}
    for target, prediction in zip(expected, predicted, strict=True):
        for name, score in made.score(target, prediction).items():
            found[name].append(score.fmeasure)
    return {name: float(sum(scores) / len(scores)) for name, scores in found.items()}


class _Characters:
    """Tokenizer of rouge-score that takes runs of Latin letters and digits, and every other character, as a word."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower())
