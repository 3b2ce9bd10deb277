"""Prompts with their answers, and dialogues: the examples of conditional generation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.config.schema.data import ColumnsConfig
from engine.errors import DataError
from engine.tasks.dialogues import ROLES, Message
from engine.tasks.records import read_records, text_of, value_of

_MEND = "mend or drop the row"


@dataclass(frozen=True)
class AnswerExamples:
    """The examples of a file: prompts and answers, or else dialogues; one entry of each list per example."""

    location: str
    prompts: list[str]
    answers: list[str]
    dialogues: list[list[Message]]

    def __len__(self) -> int:
        return len(self.dialogues) or len(self.prompts)


def read_answers(location: str, columns: ColumnsConfig) -> AnswerExamples:
    """Read a file or a folder of examples.

    Raises:
        DataError: it cannot be read, a column is missing, or a row has no text, no answer or messages that are none.
    """
    prompts: list[str] = []
    answers: list[str] = []
    dialogues: list[list[Message]] = []
    for row, record in enumerate(read_records(location), start=1):
        if columns.messages is not None:
            dialogues.append(_messages(location, row, value_of(location, row, record, columns.messages)))
            continue
        prompts.append(text_of(location, row, record, columns.prompt))
        answers.append(text_of(location, row, record, columns.answer))
    if not prompts and not dialogues:
        raise DataError(f"{location} holds no example", "one or more", "check the file")
    return AnswerExamples(location, prompts, answers, dialogues)


def _messages(location: str, row: int, value: Any) -> list[Message]:
    """Return a row's messages up to the assistant's last one. Raises `DataError` where they are none."""
    where = f"row {row} of {location}"
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where} has no list of messages: {value!r:.60}", "a list of objects with role and content", _MEND
        )
    found = [_message(f"message {number} in {where}", item) for number, item in enumerate(value, start=1)]
    said = [number for number, message in enumerate(found, start=1) if message["role"] == "assistant"]
    if not said:
        raise DataError(f"{where} has no message of role assistant, so nothing is learned", "an answer", _MEND)
    return found[: said[-1]]


def _message(where: str, item: Any) -> Message:
    if not isinstance(item, Mapping) or not {"role", "content"} <= item.keys():
        raise DataError(f"{where} is {item!r:.60}", "an object with role and content", _MEND)
    role, content = item["role"], item["content"]
    if role not in ROLES:
        raise DataError(f"{where} has role {role!r:.60}", ", ".join(ROLES), "name the roles so")
    if not isinstance(content, str) or not content.strip():
        what = "no text" if not isinstance(content, str) else "an empty text"
        raise DataError(f"{where} has {what} as its content: {content!r:.60}", "text", _MEND)
    return {"role": role, "content": content}
