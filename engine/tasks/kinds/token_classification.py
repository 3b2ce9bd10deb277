"""Token classification: a label for each word, such as the entity that it is a part of (BIO).

The first token of a word carries its label; the others have none. The rows' texts are those that `AutoTokenizer` is
given with the exported model, so that pipelines see what training saw.

Legend: n tokens of a row, C labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Encoding

from engine.config.schema.data import ColumnsConfig
from engine.config.schema.objective import ObjectiveConfig, ObjectiveName
from engine.data.objectives.examples import LABEL
from engine.data.shards.dataset import TokenDataset
from engine.errors import DataError
from engine.extras import need
from engine.logs import logger
from engine.tasks.encode import notes
from engine.tasks.framing import Framing
from engine.tasks.kind import EncodedRow, MainMeasure
from engine.tasks.measures import Measures, of_entities
from engine.tasks.words import OUTSIDE, Span, WordExamples, inside_without_begin, read_words

log = logger(__name__)
NO_TOKEN, NO_LABEL = -1, -1
"""Position of a word without a token: it is cut off, or made of nothing that the tokenizer keeps; and the label of a
token that has none."""


@dataclass(frozen=True)
class WordPredictions:
    """The words of each row, and the tags expected and predicted."""

    notes: list[dict[str, Any]]
    predicted: list[list[str]]

    def measures(self) -> Measures:
        """Return seqeval's measures of entities, and the number of words that the model did not see."""
        unseen = sum(position == NO_TOKEN for note in self.notes for position in note["positions"])
        return of_entities([note["tags"] for note in self.notes], self.predicted) | {"unseen_words": unseen}

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield words with the tags expected and predicted, and the entities predicted as spans of characters."""
        for note, predicted in zip(self.notes, self.predicted, strict=True):
            text, spans = note["text"], [Span(*span) for span in note["words"]]
            yield {
                "text": text,
                "words": [text[slice(*span)] for span in spans],
                "expected": note["tags"],
                "predicted": predicted,
                "entities": [
                    {"start": start, "end": end, "label": label, "text": text[start:end]}
                    for label, start, end in entities_of(predicted, spans)
                ],
            }


def entities_of(tags: Sequence[str], spans: Sequence[Span]) -> Iterator[tuple[str, int, int]]:
    """Yield (type, first character, character behind the last) of the entities that seqeval counts in tags."""
    get_entities = need("seqeval.metrics.sequence_labeling", "measuring entities", "tasks").get_entities
    for label, first, last in get_entities(list(tags)):
        yield label, spans[first].start, spans[last].end


class TokenClassification:
    """Predicts a label for each word of a text."""

    name: ObjectiveName = "token_classification"
    main_measure = MainMeasure("f1", higher_is_better=True)

    def require_packages(self) -> None:
        need("seqeval", "measuring entities", "tasks")

    def read(self, location: str, columns: ColumnsConfig) -> WordExamples:
        return read_words(location, columns)

    def labels(self, parts: Mapping[str, WordExamples], named: tuple[str, ...]) -> tuple[str, ...]:
        found = {part: {tag for tags in examples.tags for tag in tags} for part, examples in parts.items()}
        # O is number 0, then the types by name, of each of them B before I
        labels: tuple[str, ...] = named or tuple(sorted(found["train"], key=lambda tag: (tag != OUTSIDE, tag[2:], tag)))
        for part, examples in parts.items():
            _require_known(labels, examples, found[part])
            if begun := sum(map(inside_without_begin, examples.tags)):
                log.warning(
                    "%s: %d entities begin with I- and not with B-; they are measured as entities (seqeval's default)",
                    examples.location,
                    begun,
                )
        if absent := [name for name in labels if name not in found["train"]]:
            raise DataError(
                f"{parts['train'].location} has no example of label {', '.join(absent)}",
                "examples of every label in objective.labels",
                "leave the label out, or add examples of it",
            )
        if len(labels) == 1:
            raise DataError(
                f"every word of {parts['train'].location} has tag {labels[0]!r}",
                "words of two labels or more",
                "check data.columns.tags (or entities)",
            )
        return labels

    def head(self, labels: tuple[str, ...]) -> dict[str, Any]:
        return {"task": self.name, "num_labels": len(labels)}

    def encode(
        self, examples: WordExamples, objective: ObjectiveConfig, framing: Framing, length: int
    ) -> Iterator[EncodedRow]:
        numbers = {name: number for number, name in enumerate(objective.labels)}
        framed = framing.encodings(examples.texts, None, length)
        for row, found in enumerate(framed):
            text, spans, tags = examples.texts[row], examples.words[row], examples.tags[row]
            positions = word_positions(found, text, spans)
            _require_whole_entities(examples, row, found, positions)
            labels_T = np.full(len(found.ids), NO_LABEL, np.int64)
            for word, position in enumerate(positions):
                if position != NO_TOKEN and labels_T[position] == NO_LABEL:
                    labels_T[position] = numbers[tags[word]]
            note = {"text": text, "words": spans, "tags": tags, "positions": positions}
            yield EncodedRow(np.array(found.ids, np.int64), {LABEL: labels_T}, note=note)

    def decode(
        self, logits: Sequence[np.ndarray], dataset: TokenDataset, objective: ObjectiveConfig
    ) -> WordPredictions:
        found = notes(dataset.folder)
        predicted = [
            _tags(note["positions"], logits_TC.argmax(1), objective.labels)
            for note, logits_TC in zip(found, logits, strict=True)
        ]
        return WordPredictions(found, predicted)


def word_positions(found: Encoding, text: str, spans: Sequence[Span]) -> list[int]:
    """Return the position of each word's first token; words of one token share it."""
    # characters "ab c": words 0 0 - 1
    words = np.full(len(text), NO_TOKEN, np.int64)
    for number, span in enumerate(spans):
        words[slice(*span)] = number
    positions = [NO_TOKEN] * len(spans)
    for position, (start, end) in enumerate(found.offsets):
        if found.special_tokens_mask[position]:
            continue
        for number in np.unique(words[start:end]).tolist():
            if number != NO_TOKEN and positions[number] == NO_TOKEN:
                positions[number] = position
    return positions


def _tags(positions: Sequence[int], numbers_T: np.ndarray, labels: Sequence[str]) -> list[str]:
    """Return the tag of each word; one without a token is outside, one that shares its token goes on with it."""
    tags = list[str]()
    before = NO_TOKEN
    for position in positions:
        tag = OUTSIDE if position == NO_TOKEN else labels[int(numbers_T[position])]
        if position == before != NO_TOKEN and tag.startswith("B-"):
            tag = f"I-{tag[2:]}"
        tags.append(tag)
        before = position
    return tags


def _require_whole_entities(examples: WordExamples, row: int, found: Encoding, positions: Sequence[int]) -> None:
    """Raise `DataError` where a token holds words of which not all are in the same entity, or outside of any."""
    tags = examples.tags[row]
    for word in range(1, len(positions)):
        shares = positions[word] != NO_TOKEN and positions[word] == positions[word - 1]
        if shares and tags[word] != (OUTSIDE if tags[word - 1] == OUTSIDE else f"I-{tags[word - 1][2:]}"):
            token = examples.texts[row][slice(*found.offsets[positions[word]])]
            raise DataError(
                f"row {row + 1} of {examples.location}: the tokenizer makes one token of {token!r}, whose words have "
                f"the tags {tags[word - 1]} and {tags[word]}",
                "tokens that an entity does not cut",
                "put a blank there, mend the span, or start from a model whose tokenizer splits the words",
            )


def _require_known(labels: Sequence[str], examples: WordExamples, found: set[str]) -> None:
    """Raise `DataError` at the first row with a tag that is not among the labels."""
    if found <= {*labels}:
        return
    row, tag = next((row, tag) for row, tags in enumerate(examples.tags, start=1) for tag in tags if tag not in labels)
    raise DataError(
        f"row {row} of {examples.location} has tag {tag!r}, which is not among those of the training data",
        ", ".join(labels),
        "mend the row, name all labels in objective.labels, or give the training data examples of it",
    )
