"""Questions with answers in a context: the examples of question answering.

A file is JSON lines (CSV, Parquet, a data set's folder) with a question a row, or one of SQuAD's (`data`, `paragraphs`,
`qas`). Answers are told by their text and the number of their first character in the context; both have to agree.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.schema.data import ColumnsConfig
from engine.corpus.sources import text_files
from engine.errors import DataError
from engine.tasks.records import read_records, text_of, value_of
from engine.tasks.words import Span


@dataclass(frozen=True)
class AnswerExamples:
    """The examples of a file, one entry of each list per question."""

    location: str
    ids: list[str]
    questions: list[str]
    contexts: list[str]
    answers: list[list[Span]]
    """Characters of the answers in the context; none where it has no answer."""

    def __len__(self) -> int:
        return len(self.questions)


def read_answers(location: str, columns: ColumnsConfig) -> AnswerExamples:
    """Read a file or a folder of questions.

    Raises:
        DataError: it cannot be read, a column is missing, or an answer is not where it is said to be.
    """
    found = AnswerExamples(location, [], [], [], [])
    names = set[str]()
    for row, record in enumerate(_records(location, columns), start=1):
        name = str(record.get(columns.id, row))
        if name in names:
            raise DataError(
                f"row {row} of {location} has id {name!r}, as a row before it has",
                "an id of its own for each question",
                "mend the ids, or leave them out",
            )
        names.add(name)
        context = text_of(location, row, record, columns.context)
        found.ids.append(name)
        found.questions.append(text_of(location, row, record, columns.question).strip())
        found.contexts.append(context)
        given = _pairs(location, row, value_of(location, row, record, columns.answers))
        found.answers.append([_span(location, row, context, text, start) for text, start in given])
    if not found.questions:
        raise DataError(f"{location} holds no example", "one or more", "check the file")
    return found


def _records(location: str, columns: ColumnsConfig) -> Iterator[Mapping[str, Any]]:
    path = Path(location)
    plain = path.with_suffix("") if path.suffix.lower() in text_files.SUFFIXES else path
    if plain.suffix.lower() == ".json" and not path.is_dir():
        ((_, content, _),) = text_files.whole(location)
        try:
            whole = json.loads(content)
        except ValueError:
            whole = None  # JSON lines under another name
        if isinstance(whole, dict) and isinstance(whole.get("data"), list):
            return _squad(location, whole["data"], columns)
    return read_records(location)


def _squad(location: str, articles: list[Any], columns: ColumnsConfig) -> Iterator[Mapping[str, Any]]:
    """Yield the questions of SQuAD's format (Rajpurkar et al. 2016; 2018 with `is_impossible`) as rows."""
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for one in paragraph["qas"]:
                    yield {
                        columns.id: one["id"],
                        columns.context: paragraph["context"],
                        columns.question: one["question"],
                        # impossible questions may have plausible answers, under another name
                        columns.answers: [] if one.get("is_impossible") else one["answers"],
                    }
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{location} is not SQuAD's format: {error!r}",
            "data, in it paragraphs with context and qas, in these id, question and answers",
            "mend the file, or write a question a line",
        ) from error


def _pairs(location: str, row: int, answers: Any) -> Iterator[tuple[str, int]]:
    """Yield (text, first character) of a row's answers, in either spelling."""
    if isinstance(answers, dict):  # Hugging Face's: {"text": [...], "answer_start": [...]}
        texts, starts = answers.get("text"), answers.get("answer_start", answers.get("start"))
        if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
            answers = [{"text": text, "start": start} for text, start in zip(texts, starts, strict=True)]
    for one in answers if isinstance(answers, list) else [None]:
        one = one if isinstance(one, dict) else {}
        text, start = one.get("text"), one.get("start", one.get("answer_start"))
        if not isinstance(text, str) or not text.strip() or type(start) is not int:
            raise DataError(
                f"row {row} of {location} has answers {answers!r:.80}",
                "a list of objects with text and start (the number of its first character in the context)",
                "mend or drop the row",
            )
        yield text, start


def _span(location: str, row: int, context: str, text: str, start: int) -> Span:
    end = start + len(text)
    if start < 0 or context[start:end] != text:
        elsewhere = context.find(text)
        raise DataError(
            f"row {row} of {location} has answer {text!r:.60} at character {start}, where the context has "
            f"{context[max(start, 0) : max(end, 0)]!r:.60}",
            f"its place, {elsewhere}" if elsewhere >= 0 else "a part of the context",
            "mend start, which counts characters (not bytes) from 0",
        )
    # Blanks around an answer belong to no token.
    return Span(start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip()))
