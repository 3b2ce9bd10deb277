"""Questions with several answers, ranked by likelihood: one row of tokens for each answer, of which the answer counts.

A file has an object a line: `context`, `choices` (the answers as they follow the context, their blank included) and
`gold` (the number of the right one). Tokens are those of lm-evaluation-harness (`TemplateLM._encode_pair` and
`HFLM._loglikelihood_tokens`): context and answer are split together, an answer has the tokens behind those of the
context alone, and what does not fit loses its beginning. So are the measures.

Rows are those of the causal objective, in file order. Each row of a chunk is a domain of its own, so that the sums of
losses by domain, which every layout has, are the likelihoods of single answers.

Legend: B rows, T tokens of a row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from engine.config.schema.data import Attention
from engine.data.batch import Batch
from engine.data.step_groups import micro_batch_rows
from engine.data.tokenizer.folder import TextTokenizer
from engine.errors import DataError


class Answer(NamedTuple):
    """The tokens of a question with one of its answers, and how many of the last ones are the answer's."""

    ids: list[int]
    num_scored: int


@dataclass(frozen=True)
class Questions:
    """The questions of a file."""

    name: str
    choices: list[list[str]]
    gold: list[int]
    answers: list[Answer]
    """All answers of all questions, one question after the other."""

    def measures(self, nats: list[float]) -> dict[str, float]:
        """Return the measures by name; `nats` is the negative log likelihood of each answer.

        `accuracy` takes the likeliest answer, `accuracy_by_length` the likeliest per character, `bits_per_byte` is that
        of the right answers together.
        """
        right = right_by_length = total = num_bytes = 0.0
        first = 0
        for choices, gold in zip(self.choices, self.gold, strict=True):
            logs = -np.array(nats[first : first + len(choices)])
            right += int(logs.argmax()) == gold
            right_by_length += int((logs / [len(choice) for choice in choices]).argmax()) == gold
            total -= logs[gold]
            num_bytes += len(choices[gold].encode())
            first += len(choices)
        return {
            "accuracy": right / len(self.gold),
            "accuracy_by_length": right_by_length / len(self.gold),
            "bits_per_byte": float(total) / math.log(2) / num_bytes,
        }


def read_questions(name: str, path: Path, tokenizer: TextTokenizer) -> Questions:
    """Read a file of questions and split its text.

    Raises:
        DataError: it cannot be read, a line is no question, or an answer has no token.
    """
    choices, gold, answers = [], [], []
    for number, record in _records(path):
        where = f"line {number} of {path}"
        context, given, right = _question(where, record)
        choices.append(given)
        gold.append(right)
        answers += [_answer(where, context, choice, tokenizer) for choice in given]
    if not gold:
        raise DataError(f"{path} holds no question", "a question a line", "check the file")
    return Questions(name, choices, gold, answers)


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}",
            "a file of JSON lines in UTF-8",
            "check evaluation.tasks",
        ) from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise DataError(f"line {number} of {path} is no JSON: {error}", "an object a line") from error


def _question(where: str, record: Any) -> tuple[str, list[str], int]:
    found = record if isinstance(record, dict) else {}
    context, choices, gold = (found.get(key) for key in ("context", "choices", "gold"))
    is_list = isinstance(choices, list) and len(choices) > 1
    if not isinstance(context, str) or not is_list or not all(isinstance(one, str) and one for one in choices or ()):
        raise DataError(
            f"{where} is no question: {str(record)!s:.80}",
            "context (text), choices (two texts or more, none empty) and gold",
            "mend or drop the line",
        )
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices or ()):
        raise DataError(
            f"{where} has gold {gold!r:.40}", f"a number from 0 to {len(choices or ()) - 1}", "mend or drop the line"
        )
    return context, list(choices or ()), gold


def _answer(where: str, context: str, choice: str, tokenizer: TextTokenizer) -> Answer:
    """Return the tokens of an answer behind its context."""
    # blanks at the end of the context go with the answer: "is " + "old" has the tokens "is" and " old"
    stripped = context.rstrip()
    choice = context[len(stripped) :] + choice
    if stripped:
        whole, before = (ids.tolist() for ids in tokenizer.encode([stripped + choice, stripped]))
        behind = whole[len(before) :]
    else:
        before, behind = [tokenizer.eos_id], tokenizer.encode([choice])[0].tolist()
    if not behind:
        raise DataError(
            f"{where}: answer {choice!r:.60} has no token behind its context", "text", "mend or drop the line"
        )
    return Answer(before + behind, len(behind))


class ChoiceSamples:
    """The answers of questions as validation samples (`engine.data.validation.ValidationSamples`)."""

    def __init__(
        self, questions: Questions, length: int, attention: Attention, eos_id: int, rows_of_chunk: int
    ) -> None:
        """Make rows of `length` tokens; `rows_of_chunk` are those of a pass, over all data ranks.

        Raises:
            DataError: an answer alone is longer than a row.
        """
        longest = max(answer.num_scored for answer in questions.answers)
        if longest > length:
            raise DataError(
                f"an answer of evaluation.tasks.{questions.name} has {longest} tokens",
                f"at most the run stage's sequence_length, {length}",
                "drop the question",
            )
        self.questions, self.length, self.attention, self.eos_id = questions, length, attention, eos_id
        self.num_samples = len(questions.answers)
        self.names = tuple(map(str, range(rows_of_chunk)))
        """Names of the domains: the rows of a chunk."""

    def num_batches(self, data_size: int, micro_batch_size: int) -> int:
        """Return the number of micro-batches that each data rank gets."""
        return -(-self.num_samples // (micro_batch_size * data_size))

    def batches(self, data_rank: int, data_size: int, micro_batch_size: int) -> Iterator[Batch]:
        """Yield this data rank's micro-batches; answer n of the file is domain n modulo the rows of a chunk."""
        for rows in micro_batch_rows(self.num_samples, data_rank, data_size, micro_batch_size):
            yield self._batch(rows.tolist(), micro_batch_size)

    def _batch(self, rows: list[int], num_rows: int) -> Batch:
        tokens_BT = np.full((num_rows, self.length), self.eos_id, np.int64)
        targets_BT, weights_BT = tokens_BT.copy(), np.zeros((num_rows, self.length), np.float32)
        documents_BT = np.ones((num_rows, self.length), np.int32)  # padding is a document of its own
        for b, number in enumerate(rows):
            answer = self.questions.answers[number]
            # 7 tokens, 2 of them scored, in rows of 4: tokens 2 3 4 5, targets 3 4 5 6, of which 5 and 6 count
            ids = answer.ids[-(self.length + 1) :]
            size = len(ids) - 1
            tokens_BT[b, :size], targets_BT[b, :size] = ids[:-1], ids[1:]
            weights_BT[b, size - answer.num_scored : size] = 1.0
            documents_BT[b, :size] = 0
        inputs = {"tokens_BT": tokens_BT, "targets_BT": targets_BT, "weights_BT": weights_BT}
        if self.attention == "document":
            inputs["segments_BT"] = documents_BT
        domains_B = np.zeros(num_rows, np.int32)
        domains_B[: len(rows)] = np.array(rows, np.int64) % len(self.names)
        weights_B = weights_BT.sum(1, dtype=np.float64)
        return Batch(
            inputs={name: torch.from_numpy(array) for name, array in inputs.items()},
            weights={"causal": float(weights_B.sum())},
            row_target_weights={"causal": weights_B},
            samples_B3=torch.full((num_rows, 3), -1, dtype=torch.int64),
            row_weights_B=torch.from_numpy((weights_B > 0).astype(np.float32)),
            domains_B=torch.from_numpy(domains_B),
            name_sources=lambda: ("",) * num_rows,
            documents=torch.from_numpy(documents_BT),
        )
