"""Robustness of a fine-tuned model: what is left of its measure when the text has small faults.

Each operator changes a share of a text's words (of Chinese: of its characters), drawn from the seed, the operator and
the number of the example alone, so that any two models see the same faults. Operators of letters are those of Belinkov
and Bisk 2018 (Synthetic and Natural Noise Both Break Neural Machine Translation, section 3.2): two letters change
places, a letter is a neighbour's on the keyboard; a letter that is left out or doubled, and lost case and punctuation,
are ours. A label is taken to stay right, which holds for single faults and not for every text.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from engine.evaluate.labelled import Evaluated, predict_examples
from engine.evaluate.subject import Subject
from engine.tasks.kind import Predictions

SHARE = 0.1
"""Share of the words that get a fault."""
_PURPOSE = int.from_bytes(b"faults")
_PARTS = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)?|[\u3400-\u9fff]|\s+|.", re.DOTALL)
"""A word of Latin letters, one Chinese character, blanks, or any other character."""
_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_PUNCTUATION = re.compile(r"[.,;:!?\"'()\[\]。，；：！？、“”‘’（）《》]")  # noqa: RUF001

Fault = Callable[[str, np.random.Generator], str]


def _swapped(word: str, draw: np.random.Generator) -> str:
    if len(word) < 2:
        return word
    place = int(draw.integers(len(word) - 1))
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


def _left_out(word: str, draw: np.random.Generator) -> str:
    place = int(draw.integers(len(word)))
    return word[:place] + word[place + 1 :]


def _doubled(word: str, draw: np.random.Generator) -> str:
    place = int(draw.integers(len(word)))
    return word[: place + 1] + word[place:]


def _mistyped(word: str, draw: np.random.Generator) -> str:
    place = int(draw.integers(len(word)))
    near = _neighbours(word[place].lower())
    if not near:
        return word
    letter = near[int(draw.integers(len(near)))]
    return word[:place] + (letter.upper() if word[place].isupper() else letter) + word[place + 1 :]


def _neighbours(letter: str) -> str:
    for row in _KEYS:
        if (place := row.find(letter)) >= 0:
            return row[max(0, place - 1) : place] + row[place + 1 : place + 2]
    return ""


OF_WORDS: dict[str, Fault] = {
    "letters change places": _swapped,
    "letter left out": _left_out,
    "letter doubled": _doubled,
    "neighbouring key": _mistyped,
}
OF_TEXTS: dict[str, Callable[[str], str]] = {
    "lower case": str.lower,
    "no punctuation": lambda text: _PUNCTUATION.sub("", text),
}


def faulty(text: str, operator: str, seed: int, number: int) -> str:
    """Return a text with the faults of an operator; example `number` of a set always has the same ones.

    A text of which nothing would be left stays as it is.
    """
    if operator in OF_TEXTS:
        found = OF_TEXTS[operator](text)
        return found if found.strip() else text
    draw = _stream(operator, seed, number)
    parts = _PARTS.findall(text)
    # characters of Chinese change places with the one behind them: alone they have nothing to change
    if operator == "letters change places":
        parts = _pairs(parts)
    words = [place for place, part in enumerate(parts) if part[0].isalpha()]
    if not words:
        return text
    for place in _chosen(words, draw):
        parts[place] = OF_WORDS[operator](parts[place], draw)
    return "".join(parts) if "".join(parts).strip() else text


def _stream(operator: str, seed: int, number: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, _PURPOSE, zlib.crc32(operator.encode()), number]))


def _chosen(places: list[int], draw: np.random.Generator) -> list[int]:
    """Return the places that get a fault, one at least where there are any."""
    count = min(max(1, round(SHARE * len(places))), len(places))
    return draw.choice(places, size=count, replace=False).tolist() if places else []


def _pairs(parts: list[str]) -> list[str]:
    """Return the parts with every two Chinese characters that follow one another as one part."""
    found: list[str] = []
    for part in parts:
        if found and len(found[-1]) == 1 == len(part) and "\u3400" <= found[-1] <= "\u9fff" and part >= "\u3400":
            found[-1] += part
        else:
            found.append(part)
    return found


def robustness_of(subject: Subject, evaluated: Evaluated, seed: int = 0) -> dict[str, Any]:
    """Return the main measure of a set as it is and with each operator's faults, and how far it falls."""
    measure = evaluated.kind.main_measure
    before = evaluated.predictions.measures()[measure.name]
    rows = []
    for operator in (*OF_WORDS, *OF_TEXTS):
        examples = with_faults(evaluated.examples, operator, seed)
        predictions = predict_examples(subject, evaluated.kind, evaluated.objective, examples)
        after = predictions.measures()[measure.name]
        fall = (
            None if before is None or after is None else before - after if measure.higher_is_better else after - before
        )
        changed = _changed(evaluated.predictions, predictions)
        rows.append({"operator": operator, measure.name: after, "fall": fall, "changed": changed})
    return {"set": evaluated.name, "measure": measure.name, "before": before, "seed": seed, "operators": rows}


def with_faults(examples: Any, operator: str, seed: int) -> Any:
    """Return examples whose texts have the faults of an operator: of pairs both texts, and of questions these.

    Words with labels keep their number and their labels.
    """
    if hasattr(examples, "words"):
        return _with_faulty_words(examples, operator, seed)
    changes: dict[str, Any] = {}
    begin = 0
    for name in ("texts", "pairs", "questions"):
        if texts := getattr(examples, name, None):
            # numbers of second texts go on behind those of first ones, so that both draw their own faults
            changes[name] = [faulty(text, operator, seed, begin + number) for number, text in enumerate(texts)]
            begin += len(texts)
    return replace(examples, **changes)


def _with_faulty_words(examples: Any, operator: str, seed: int) -> Any:
    """Return examples of words, with faults in some; their texts and spans follow."""
    texts, words = [], []
    for number, (text, spans) in enumerate(zip(examples.texts, examples.words, strict=True)):
        changed = _faulty_words([text[start:end] for start, end in spans], operator, seed, number)
        found, placed, last = "", [], 0
        for (start, end), word in zip(spans, changed, strict=True):
            found += text[last:start]
            placed.append(type(spans[0])(len(found), len(found) + len(word)))
            found, last = found + word, end
        texts.append(found + text[last:])
        words.append(placed)
    return replace(examples, texts=texts, words=words)


def _faulty_words(words: list[str], operator: str, seed: int, number: int) -> list[str]:
    """Return the words with the faults of an operator; none is lost."""
    if operator in OF_TEXTS:
        return [OF_TEXTS[operator](word) or word for word in words]
    draw = _stream(operator, seed, number)
    places = [place for place, word in enumerate(words) if word[:1].isalpha()]
    found = list(words)
    for place in _chosen(places, draw):
        found[place] = OF_WORDS[operator](words[place], draw) or words[place]
    return found


def _changed(before: Predictions, after: Predictions) -> float:
    """Return the share of the examples whose prediction is another one."""
    pairs = list(zip(before.rows(), after.rows(), strict=True))
    return sum(one["predicted"] != other["predicted"] for one, other in pairs) / max(1, len(pairs))
