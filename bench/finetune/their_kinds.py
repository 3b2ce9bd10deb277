"""The kinds of task as transformers' own examples prepare them (run_glue, run_ner, run_qa).

The measures are those of our side; what is decoded from the logits is theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)

from bench.finetune.ours import POOLING
from bench.finetune.relations import Row, marked_text
from bench.finetune.sets import TaskSet
from bench.finetune.theirs import Prepared
from engine.tasks.measures import of_entities, of_labels
from engine.tasks.squad_measures import exact_match, f1

STRIDE, LONGEST_ANSWER, NUM_BEST = 128, 30, 20
"""Tokens that windows share, tokens of an answer at most, and starts and ends that are tried."""
_IGNORED = -100


def _classification(task: TaskSet, start: str, tokenizer: Any, train: list[Row], test: list[Row]) -> Prepared:
    labels = sorted({row["label"] for row in train})

    def encoded(rows: list[Row]) -> list[dict[str, Any]]:
        texts = [marked_text(row) if task.has_relations else row["text"] for row in rows]
        found = tokenizer(texts, truncation=True, max_length=task.length)
        numbers = [labels.index(row["label"]) for row in rows]
        return [
            {name: values[number] for name, values in found.items()} | {"labels": label}
            for number, label in enumerate(numbers)
        ]

    def measure(logits_NC: Any) -> dict[str, Any]:
        expected_N = np.asarray([labels.index(row["label"]) for row in test])
        return of_labels(expected_N, np.asarray(logits_NC).argmax(1), tuple(map(str, labels)))

    model = AutoModelForSequenceClassification.from_pretrained(
        start, num_labels=len(labels), classifier_pooling=POOLING
    )
    return Prepared(
        model, DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8), encoded(train), encoded(test), measure
    )


def _token_classification(task: TaskSet, start: str, tokenizer: Any, train: list[Row], test: list[Row]) -> Prepared:
    tags = sorted({tag for row in train for tag in row["tags"]})

    def encoded(rows: list[Row]) -> list[dict[str, Any]]:
        found = tokenizer(
            [row["tokens"] for row in rows], is_split_into_words=True, truncation=True, max_length=task.length
        )
        return [
            {name: values[number] for name, values in found.items()}
            | {"labels": [_IGNORED if word is None else tags.index(row["tags"][word]) for word in words]}
            for number, row in enumerate(rows)
            for words in (first_tokens(found.word_ids(number)),)
        ]

    encoded_test = encoded(test)

    def measure(logits_NTC: Any) -> dict[str, Any]:
        expected, predicted = [], []
        for row, inputs, logits_TC in zip(test, encoded_test, logits_NTC, strict=True):
            labels = np.asarray(inputs["labels"])
            seen = [tags[number] for number in logits_TC[: len(labels)].argmax(1)[labels != _IGNORED]]
            expected.append(row["tags"])
            predicted.append(seen + ["O"] * (len(row["tags"]) - len(seen)))  # words that a row's length cut off
        return of_entities(expected, predicted)

    model = AutoModelForTokenClassification.from_pretrained(start, num_labels=len(tags))
    collator = DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=8)
    return Prepared(model, collator, encoded(train), encoded_test, measure)


def first_tokens(words: list[int | None]) -> list[int | None]:
    """Return the word of each token, None where the token is not the first one of it."""
    return [None if number and words[number - 1] == word else word for number, word in enumerate(words)]


def _question_answering(task: TaskSet, start: str, tokenizer: Any, train: list[Row], test: list[Row]) -> Prepared:
    def encoded(rows: list[Row]) -> Any:
        return tokenizer(
            [row["question"] for row in rows],
            [row["context"] for row in rows],
            truncation="only_second",
            max_length=task.length,
            stride=STRIDE,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )

    def inputs(found: Any, number: int) -> dict[str, Any]:
        return {name: found[name][number] for name in tokenizer.model_input_names}

    windows, test_windows = encoded(train), encoded(test)
    trained = [
        inputs(windows, number) | positions(train[windows["overflow_to_sample_mapping"][number]], windows, number)
        for number in range(len(windows["input_ids"]))
    ]

    def measure(logits: Any) -> dict[str, Any]:
        best: list[tuple[float, str]] = [(-np.inf, "")] * len(test)
        for number, (starts_T, ends_T) in enumerate(zip(*logits, strict=True)):
            row = test_windows["overflow_to_sample_mapping"][number]
            found = best_span(starts_T, ends_T, _context_offsets(test_windows, number))
            if found is not None and found[0] > best[row][0]:
                score, first, last = found
                best[row] = score, test[row]["context"][first:last]
        expected = [[answer["text"] for answer in row["answers"]] for row in test]
        pairs = list(zip((text for _, text in best), expected, strict=True))
        return {
            "examples": len(test),
            "exact_match": float(np.mean([exact_match(*pair) for pair in pairs])),
            "f1": float(np.mean([f1(*pair) for pair in pairs])),
        }

    tested = [inputs(test_windows, number) for number in range(len(test_windows["input_ids"]))]
    model = AutoModelForQuestionAnswering.from_pretrained(start)
    return Prepared(model, DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8), trained, tested, measure)


def _context_offsets(windows: Any, number: int) -> list[tuple[int, int] | None]:
    """Return the characters of each token of the context, None for all other tokens."""
    pairs = zip(windows["offset_mapping"][number], windows.sequence_ids(number), strict=True)
    return [tuple(offset) if part == 1 else None for offset, part in pairs]


def positions(row: Row, windows: Any, number: int) -> dict[str, int]:
    """Return the first and the last token of a row's first answer in a window; 0 where it is not whole in it."""
    answer = row["answers"][0]
    first, last = answer["start"], answer["start"] + len(answer["text"])
    offsets = _context_offsets(windows, number)
    inside = [token for token, offset in enumerate(offsets) if offset and offset[0] < last and offset[1] > first]
    context = [offset for offset in offsets if offset]
    if not inside or context[0][0] > first or context[-1][1] < last:
        return {"start_positions": 0, "end_positions": 0}
    return {"start_positions": inside[0], "end_positions": inside[-1]}


def best_span(
    starts_T: np.ndarray, ends_T: np.ndarray, offsets: list[tuple[int, int] | None]
) -> tuple[float, int, int] | None:
    """Return (sum of logits, first character, character behind the last) of a window's best answer."""
    found = None
    for first in np.argsort(starts_T)[::-1][:NUM_BEST]:
        for last in np.argsort(ends_T)[::-1][:NUM_BEST]:
            if max(first, last) >= len(offsets) or not first <= last < first + LONGEST_ANSWER:
                continue
            begin, end = offsets[first], offsets[last]
            score = float(starts_T[first] + ends_T[last])
            if begin is not None and end is not None and (found is None or score > found[0]):
                found = score, begin[0], end[1]
    return found


PREPARE: dict[str, Callable[[TaskSet, str, Any, list[Row], list[Row]], Prepared]] = {
    "classification": _classification,
    "token_classification": _token_classification,
    "question_answering": _question_answering,
}
