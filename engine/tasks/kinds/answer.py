"""Conditional generation: the answer to a prompt, or those of the assistant in a dialogue."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.atomic import write_atomically
from engine.config.schema.data import ColumnsConfig
from engine.config.schema.objective import ObjectiveConfig, ObjectiveName
from engine.data.objectives.answer import rounds
from engine.data.shards.dataset import TokenDataset
from engine.data.tokenizer.files import MODEL_FILE
from engine.serve.answers import answer
from engine.serve.held_out import held_out_loss
from engine.serve.language_model import from_trained
from engine.serve.new_folder import new_folder
from engine.serve.source import Trained
from engine.tasks.answer_examples import AnswerExamples, read_answers
from engine.tasks.answer_rows import AnswerRows
from engine.tasks.dialogues import PLAIN, TEMPLATE_FILE, own_template
from engine.tasks.framing import Framing
from engine.tasks.kind import EncodedRow, MainMeasure
from engine.tasks.measures import Measures
from engine.tasks.text_measures import of_texts, require_packages


@dataclass(frozen=True)
class AnswerPredictions:
    """Greedy answers beside the expected ones, one for each answer of the examples."""

    prompts: list[str]
    expected: list[str]
    predicted: list[str]
    loss: float
    """Mean loss of the tokens of the expected answers, in nats."""

    def measures(self) -> Measures:
        """Return exact matches, BLEU, chrF, ROUGE and the loss."""
        return of_texts(self.expected, self.predicted) | {"loss": self.loss}

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield prompt, expected and predicted answer."""
        for prompt, expected, predicted in zip(self.prompts, self.expected, self.predicted, strict=True):
            yield {"prompt": prompt, "expected": expected, "predicted": predicted}


class Answer:
    """Writes the answer to a prompt."""

    name: ObjectiveName = "answer"
    main_measure = MainMeasure("loss", higher_is_better=False)

    def require_packages(self) -> None:
        require_packages()

    def read(self, location: str, columns: ColumnsConfig) -> AnswerExamples:
        return read_answers(location, columns)

    def tokenizer(self, tokenizer: Path, examples: AnswerExamples, folder: Path) -> Path:
        """Return a copy that has the plain chat template, where dialogues need one and the tokenizer has none."""
        if not examples.dialogues or own_template(tokenizer) is not None:
            return tokenizer
        if tokenizer.resolve() != folder.resolve() and not (folder / MODEL_FILE).is_file():
            with new_folder(folder) as partial:
                shutil.copytree(tokenizer, partial, dirs_exist_ok=True)
        write_atomically(folder / TEMPLATE_FILE, PLAIN)
        return folder

    def labels(self, parts: Mapping[str, AnswerExamples], named: tuple[str, ...]) -> tuple[str, ...]:
        del parts
        return named

    def head(self, labels: tuple[str, ...]) -> dict[str, Any] | None:
        del labels
        return None

    def encode(
        self, examples: AnswerExamples, objective: ObjectiveConfig, framing: Framing, length: int
    ) -> Iterator[EncodedRow]:
        return iter(AnswerRows(examples, framing, length, objective.answer_length))

    def decode(
        self, logits: Sequence[np.ndarray], dataset: TokenDataset, objective: ObjectiveConfig
    ) -> AnswerPredictions:
        raise AssertionError("answers are generated (`generate`), and whoever decodes logits asks `Objective.has_head`")

    def generate(self, trained: Trained, dataset: TokenDataset) -> AnswerPredictions:
        """Return the model's greedy answers to the prompts of a data set, none longer than the longest expected one.

        Raises:
            DataError: the data does not serve the stage.
            CheckpointError: the checkpoint is damaged.
        """
        language_model = from_trained(trained)
        if torch.cuda.is_available():
            language_model.model.to(torch.device("cuda", torch.cuda.current_device()))  # pyright: ignore[reportArgumentType]
        asked = [parts for number in range(dataset.num_shards) for parts in _parts(dataset, number)]
        prompts, answers = [prompt for prompt, _ in asked], [expected for _, expected in asked]
        predicted = answer(language_model, prompts, max(map(len, answers)))

        def texts(ids: Sequence[np.ndarray]) -> list[str]:
            return [language_model.tokenizer.decode(one, skip_special_tokens=True) for one in ids]

        loss = held_out_loss(trained.checkpoint, dataset)
        return AnswerPredictions(texts(prompts), texts(answers), texts(predicted), loss)


def _parts(dataset: TokenDataset, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield what the model sees before each answer of a shard, and the answer, int64."""
    shard = dataset.shard(number)
    assert shard.sentences is not None, "training on it has checked that"
    found = rounds(shard.sentences)
    # the document of each round: its prompt begins at the document's first token or behind it
    owners_R = np.searchsorted(shard.documents, found.prompts_R, side="right") - 1
    firsts_R = shard.documents[owners_R]
    for first, answer_at, end in zip(firsts_R.tolist(), found.answers_R.tolist(), found.ends_R.tolist(), strict=True):
        yield shard.tokens[first:answer_at].astype(np.int64), shard.tokens[answer_at:end].astype(np.int64)
