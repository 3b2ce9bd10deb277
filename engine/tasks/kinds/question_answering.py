"""Extractive question answering: the first and the last token of the answer in a context.

A row is a question and a window of its context; windows of a long context share `objective.stride` tokens. Where a
window does not hold the whole answer both labels are position 0 ([CLS] where there is one), which stands for "no
answer", as in transformers' example for SQuAD and Devlin et al. 2019, section 4.3.

Legend: n tokens of a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding

from engine.config.schema.data import ColumnsConfig
from engine.config.schema.objective import ObjectiveConfig, ObjectiveName
from engine.data.objectives.examples import END, SECOND, START
from engine.data.shards.dataset import TokenDataset
from engine.errors import DataError
from engine.tasks.answers import AnswerExamples, read_answers
from engine.tasks.encode import notes
from engine.tasks.framing import Framing
from engine.tasks.kind import EncodedRow, MainMeasure
from engine.tasks.measures import Measures
from engine.tasks.squad_measures import exact_match, f1

NUM_BEST = 20
"""Ends of an answer that are tried in each window: so many with the largest logits."""
SHOWN = 3
"""Answers in the file of predictions."""
NOWHERE = (0, 0)
"""Labels of a window without the answer."""


class Candidate(NamedTuple):
    """A possible answer: the sum of both logits, and its characters in the context."""

    score: float
    start: int
    end: int


@dataclass(frozen=True)
class Answered:
    """A question with the answers that were found, best first, and the score of having none."""

    note: Mapping[str, Any]
    candidates: list[Candidate]
    no_answer_score: float

    def text(self, candidate: Candidate) -> str:
        """Return the text of an answer."""
        return self.note["context"][candidate.start : candidate.end]

    @property
    def expected(self) -> list[str]:
        """Texts of the answers expected; empty where there is none."""
        return [self.note["context"][start:end] for start, end in self.note["answers"]]


@dataclass(frozen=True)
class AnswerPredictions:
    """The questions of a data set, in its order."""

    answered: list[Answered]
    no_answer: bool
    """True if a question may have no answer."""

    def predicted(self, one: Answered) -> Candidate | None:
        """Return the answer to a question. None means that its context has none."""
        best = one.candidates[0] if one.candidates else None
        return None if best is None or (self.no_answer and one.no_answer_score > best.score) else best

    def measures(self) -> Measures:
        """Return exact match and F1, over all questions and, with questions without an answer, of either sort."""
        scored = [(bool(one.expected), *self._score(one)) for one in self.answered]
        found: Measures = {"examples": len(scored), "exact_match": 0.0, "f1": 0.0}
        for sort, wanted in (("", (True, False)), ("_with_answer", (True,)), ("_without_answer", (False,))):
            some = [(exact, overlap) for has, exact, overlap in scored if has in wanted]
            if some and (not sort or self.no_answer):
                exact, overlap = (float(np.mean(values)) for values in zip(*some, strict=True))
                found |= {f"exact_match{sort}": exact, f"f1{sort}": overlap}
        return found

    def _score(self, one: Answered) -> tuple[float, float]:
        best = self.predicted(one)
        text = "" if best is None else one.text(best)
        return exact_match(text, one.expected), f1(text, one.expected)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield each question with the answer predicted, its characters, those expected, and the next best."""
        for one in self.answered:
            best = self.predicted(one)
            exact, overlap = self._score(one)
            yield {
                "id": one.note["id"],
                "question": one.note["question"],
                "predicted": "" if best is None else one.text(best),
                "start": None if best is None else best.start,
                "end": None if best is None else best.end,
                "expected": one.expected,
                "exact_match": exact,
                "f1": round(overlap, 6),
                "best": [{"text": one.text(each), "score": round(each.score, 6)} for each in one.candidates[:SHOWN]],
            }


class QuestionAnswering:
    """Finds the answer to a question in its context."""

    name: ObjectiveName = "question_answering"
    main_measure = MainMeasure("f1", higher_is_better=True)

    def require_packages(self) -> None:
        """Do nothing: the measures are an official script's rule, which no package has offline."""

    def read(self, location: str, columns: ColumnsConfig) -> AnswerExamples:
        return read_answers(location, columns)

    def labels(self, parts: Mapping[str, AnswerExamples], named: tuple[str, ...]) -> tuple[str, ...]:
        if not any(parts["train"].answers):
            raise DataError(
                f"no question of {parts['train'].location} has an answer", "answers", "check data.columns.answers"
            )
        return named

    def head(self, labels: tuple[str, ...]) -> dict[str, Any]:
        return {"task": self.name, "num_labels": 2}

    def encode(
        self, examples: AnswerExamples, objective: ObjectiveConfig, framing: Framing, length: int
    ) -> Iterator[EncodedRow]:
        _require_answers(examples, objective)
        windows = framing.windows(examples.questions, examples.contexts, length, objective.stride, examples.location)
        for number, found in enumerate(windows):
            answers = examples.answers[number]
            spans = [_labels(window, answers[0]) if answers else NOWHERE for window in found]
            if answers:
                _require_whole(examples, number, found, objective)
            for window, (start, end) in zip(found, spans, strict=True):
                note: dict[str, Any] = {"first": (first := _first_of_context(window))}
                # Offsets of the context's tokens, which stand together; the second text begins with them.
                note["offsets"] = [_trimmed(examples.contexts[number], *window.offsets[at]) for at in _context(window)]
                if window is found[0]:
                    note |= {"id": examples.ids[number], "question": examples.questions[number]}
                    note |= {"context": examples.contexts[number], "answers": answers}
                yield EncodedRow(np.array(window.ids, np.int64), {START: start, END: end, SECOND: first}, note=note)

    def decode(
        self, logits: Sequence[np.ndarray], dataset: TokenDataset, objective: ObjectiveConfig
    ) -> AnswerPredictions:
        answered: list[Answered] = []
        for note, logits_T2 in zip(notes(dataset.folder), logits, strict=True):
            candidates = _candidates(note, logits_T2, objective.longest_answer)
            nowhere = float(logits_T2[0].sum())
            if "id" in note:  # the first window of a question
                answered.append(Answered(note, candidates, nowhere))
                continue
            # Over the windows of a question: the best candidates, and the lowest score of there being no answer.
            before = answered[-1]
            together = sorted({*before.candidates, *candidates}, key=lambda one: (-one.score, one.start, one.end))
            answered[-1] = Answered(before.note, together[:NUM_BEST], min(before.no_answer_score, nowhere))
        return AnswerPredictions(answered, objective.no_answer)


def _context(window: Encoding) -> list[int]:
    """Return the positions of the context's tokens."""
    return [position for position, sequence in enumerate(window.sequence_ids) if sequence == 1]


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Return a token's characters without the blanks around them, which some tokenizers count as its own."""
    token = text[start:end]
    return start + len(token) - len(token.lstrip()), end - len(token) + len(token.rstrip())


def _first_of_context(window: Encoding) -> int:
    return window.sequence_ids.index(1)


def _labels(window: Encoding, answer: Sequence[int]) -> tuple[int, int]:
    """Return the positions of the first and the last token of an answer; `NOWHERE` if the window does not hold all."""
    start, end = answer
    inside = _context(window)
    if window.offsets[inside[0]][0] > start or window.offsets[inside[-1]][1] < end:
        return NOWHERE
    covering = [at for at in inside if window.offsets[at][0] < end and start < window.offsets[at][1]]
    return (covering[0], covering[-1]) if covering else NOWHERE


def _require_whole(
    examples: AnswerExamples, number: int, windows: Sequence[Encoding], objective: ObjectiveConfig
) -> None:
    """Raise `DataError` where a token holds more than the answer (no prediction could be right), or no window all."""
    start, end = examples.answers[number][0]
    context = examples.contexts[number]
    labelled = [(window, spans) for window in windows if (spans := _labels(window, (start, end))) != NOWHERE]
    if not labelled:
        raise DataError(
            f"row {number + 1} of {examples.location}: no window of the context holds the whole answer "
            f"{context[start:end]!r:.60}",
            "answers that are shorter than what neighbouring windows share",
            "raise objective.stride or sequence_length, or drop the row",
        )
    for window, (first, last) in labelled:
        token_start, token_end = window.offsets[first][0], window.offsets[last][1]
        covered = context[token_start:token_end]
        if covered.strip() != context[start:end] and objective.cut_answers == "refuse":
            raise DataError(
                f"row {number + 1} of {examples.location}: the tokenizer cuts the answer {context[start:end]!r:.60}: "
                f"its tokens hold {covered!r:.60}",
                "answers of whole tokens",
                "mend or drop the row; or set objective.cut_answers=cover, which takes the tokens that hold all of it",
            )


def _require_answers(examples: AnswerExamples, objective: ObjectiveConfig) -> None:
    if objective.no_answer:
        return
    absent = [row for row, answers in enumerate(examples.answers, start=1) if not answers]
    if absent:
        raise DataError(
            f"row {absent[0]} of {examples.location} has no answer, as {len(absent)} rows have",
            "an answer in every context, or objective.no_answer: true",
            "drop the rows, or let the model learn that a context may have no answer",
        )


def _candidates(note: Mapping[str, Any], logits_T2: np.ndarray, longest: int) -> list[Candidate]:
    """Return a window's best answers of `longest` tokens at the most, with both ends among the `NUM_BEST` likeliest."""
    first, offsets = note["first"], note["offsets"]
    context_T2 = logits_T2[first : first + len(offsets)]
    # stable, so that of equal logits the first counts, on every machine
    starts, ends = (np.argsort(-context_T2[:, side], kind="stable")[:NUM_BEST].tolist() for side in (0, 1))
    found = [
        Candidate(float(context_T2[start, 0] + context_T2[end, 1]), offsets[start][0], offsets[end][1])
        for start, end in itertools.product(starts, ends)
        if start <= end < start + longest
    ]
    return sorted(found, key=lambda one: (-one.score, one.start, one.end))[:NUM_BEST]
