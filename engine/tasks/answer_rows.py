"""Prompts and answers as rows of tokens, and what is cut where they are too long.

Prompt and answer are split into tokens one by one, so that training sees the tokens of a prompt that the model is asked
with, and an answer's own tokens. The end of the text stands behind the last answer of a row, unless a chat template
wrote it there. What is too long is cut by one rule, and told:

1. A dialogue loses its first rounds, but not the messages of the system.
2. A decoder's prompt loses its beginning, T5's its end, down to half of a row.
3. The answer loses its end, its end of text with it. It is never empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from engine.errors import DataError
from engine.logs import logger
from engine.tasks.answer_examples import AnswerExamples
from engine.tasks.dialogues import Message, Round
from engine.tasks.framing import Framing
from engine.tasks.kind import EncodedRow

log = logger(__name__)
_AT_ONCE = 1024

TokenRound = tuple[list[int], list[int]]
"""Tokens of a prompt, and of the answer to it."""


@dataclass
class Cuts:
    """Counts of what was cut in the examples of a file."""

    dialogues: int = 0
    rounds: int = 0
    prompts: int = 0
    most: int = 0
    """Tokens that the prompt lost which lost most."""
    answers: int = 0

    def tell(self, location: str) -> None:
        """Log what was cut, if anything was, once in a process."""
        told = [f"{self.dialogues:,} dialogues lost {self.rounds:,} first rounds"] if self.dialogues else []
        told += [f"{self.prompts:,} prompts lost up to {self.most:,} tokens"] if self.prompts else []
        told += [f"{self.answers:,} answers lost their end"] if self.answers else []
        if told:
            _warn(f"{location}: examples are longer than a row (stages.0.sequence_length): {', '.join(told)}")


@cache
def _warn(message: str) -> None:
    # examples are encoded twice: to find the longest row, and to write them
    log.warning(message)


class AnswerRows:
    """Makes the rows of the examples of a file, for rows of `length` tokens, in T5 with answers of `answer_length`
    (0: as long as they are)."""

    def __init__(self, examples: AnswerExamples, framing: Framing, length: int, answer_length: int) -> None:
        self._examples, self._framing = examples, framing
        self._length, self._answer_length = length, answer_length
        self._eos_id = framing.tokenizer.eos_id
        self._is_t5 = framing.model.family == "t5"
        self._cuts = Cuts()

    def __iter__(self) -> Iterator[EncodedRow]:
        """Yield the rows. Raises `DataError` where an example cannot be encoded."""
        rows = self._of_dialogues() if self._examples.dialogues else self._of_texts()
        for number, found in rows:
            if not all(prompt and answer for prompt, answer in found):
                raise self._error(number, "has a prompt or an answer without a token", "text that the tokenizer spells")
            fitting = self._last_rounds(found)
            yield self._encoded(fitting if len(fitting) > 1 else [self._fitted(number, *fitting[0])])
        self._cuts.tell(self._examples.location)

    def _of_texts(self) -> Iterator[tuple[int, list[TokenRound]]]:
        tokenizer, examples, end = self._framing.tokenizer, self._examples, [self._eos_id]
        behind = end if self._is_t5 else []
        for first in range(0, len(examples), _AT_ONCE):
            rows = slice(first, first + _AT_ONCE)
            prompts, answers = tokenizer.encode(examples.prompts[rows]), tokenizer.encode(examples.answers[rows])
            for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), start=first + 1):
                # an empty one stays empty, and is told
                found = [one.tolist() + end_ if one.size else [] for one, end_ in ((prompt, behind), (answer, end))]
                yield number, [(found[0], found[1])]

    def _of_dialogues(self) -> Iterator[tuple[int, list[TokenRound]]]:
        for number, messages in enumerate(self._examples.dialogues, start=1):
            try:
                yield from ((number, row) for row in self._rows_of(messages))
            except DataError as error:
                raise self._error(number, f"cannot be written: {error.wrong}", error.allowed, error.remedy) from error

    def _rows_of(self, messages: Sequence[Message]) -> list[list[TokenRound]]:
        """Return the rows of a dialogue: one, or in T5 and where the template needs it one for each answer."""
        template = self._framing.chat
        for message in messages:
            if (spelt := template.special_token_in(message["content"])) is not None:
                raise DataError(
                    f"a message of role {message['role']} spells the special token {spelt!r}",
                    "text, which the model's users could not tell from the token either",
                    "mend or drop the row",
                )
        if self._is_t5:
            return self._rows_of_t5(messages)
        rows, lost = [], 0
        while True:
            rows = [self._tokens(row) for row in template.rounds(messages)]
            shorter = _without_first_round(messages)
            is_long = len(rows) == 1 and sum(len(p) + len(a) for p, a in rows[0]) > self._length
            if not is_long or shorter is None:
                break
            messages, lost = shorter, lost + 1
        self._cuts.dialogues += lost > 0
        self._cuts.rounds += lost
        return rows

    def _tokens(self, row: list[Round]) -> list[TokenRound]:
        flat = self._framing.chat.ids([text for found in row for text in found])
        found = list(zip(flat[::2], flat[1::2], strict=True))
        prompt, answer = found[-1]
        return [*found[:-1], (prompt, answer if answer[-1:] == [self._eos_id] else [*answer, self._eos_id])]

    def _rows_of_t5(self, messages: Sequence[Message]) -> list[list[TokenRound]]:
        """Return a row for each answer: the dialogue before it, and its text."""
        template, end = self._framing.chat, [self._eos_id]
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        prompts = template.ids([template.ask(messages[:number]) for number in numbers])
        answers = self._framing.tokenizer.encode([messages[number]["content"] for number in numbers])
        return [[(prompt + end, answer.tolist() + end)] for prompt, answer in zip(prompts, answers, strict=True)]

    def _last_rounds(self, rounds: list[TokenRound]) -> list[TokenRound]:
        """Return the last rounds that fit a row together, or the last one alone."""
        lengths = np.array([len(prompt) + len(answer) for prompt, answer in rounds])
        # tokens from each round on: lengths 3, 4, 2 are 9, 6, 2
        fit = np.cumsum(lengths[::-1])[::-1] <= self._length
        first = min(int(np.count_nonzero(~fit)), len(rounds) - 1)
        self._cuts.dialogues += first > 0
        self._cuts.rounds += first
        return rounds[first:]

    def _fitted(self, number: int, prompt: list[int], answer: list[int]) -> TokenRound:
        """Return a round, cut to a row."""
        if self._is_t5:
            fitting = prompt if len(prompt) <= self._length else [*prompt[: self._length - 1], self._eos_id]
            most = self._answer_length or len(answer)
        else:
            self._refuse_no_room(number, len(prompt))
            fitting = prompt[-max(self._length - len(answer), self._length // 2, 1) :]
            most = self._length - len(fitting)
        self._cuts.prompts += len(fitting) < len(prompt)
        self._cuts.most = max(self._cuts.most, len(prompt) - len(fitting))
        self._cuts.answers += most < len(answer)
        return fitting, answer[:most]

    def _encoded(self, rounds: Sequence[TokenRound]) -> EncodedRow:
        parts = [part for one in rounds for part in one]
        lengths = np.array([len(part) for part in parts])
        ids = np.array([token for part in parts for token in part], np.int64)
        num_decoder_tokens = len(parts[-1]) if self._is_t5 else 0
        return EncodedRow(ids, parts=np.cumsum(lengths) - lengths, num_decoder_tokens=num_decoder_tokens)

    def _refuse_no_room(self, number: int, num_tokens: int) -> None:
        """Raise `DataError` for a prompt that fills all of a model's positions, where rows are as long as these."""
        positions = self._framing.model.max_positions
        if num_tokens >= self._length >= positions:
            raise self._error(
                number,
                f"has a prompt of {num_tokens:,} tokens with model.max_positions = {positions:,}",
                f"{positions - 1:,} tokens at the most, which leave room for an answer",
                "shorten the prompt, drop the row, or set a smaller stages.0.sequence_length: prompts that are longer "
                "then lose their beginning",
            )

    def _error(self, number: int, wrong: str, allowed: str, remedy: str = "mend or drop the row") -> DataError:
        return DataError(f"row {number} of {self._examples.location} {wrong}", allowed, remedy)


def _without_first_round(messages: Sequence[Message]) -> list[Message] | None:
    """Return a dialogue without its first answer and what led to it; None where it has but one answer."""
    numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    # a dialogue may go on with further answers of the assistant (calls of tools): a round begins with the user
    begins = [number for number, message in enumerate(messages) if message["role"] == "user" and number > numbers[0]]
    if not begins or begins[0] > numbers[-1]:
        return None
    system = [message for message in messages[: begins[0]] if message["role"] == "system"]
    return [*system, *messages[begins[0] :]]
