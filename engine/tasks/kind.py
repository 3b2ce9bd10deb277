"""The protocol of a kind of task: all that differs between kinds outside of the model's head and the sampler.

A kind reads a file of examples, makes rows of tokens of them, and makes predictions of what the model computes for
those rows. It holds no state: one value of each class is in `engine.tasks.kinds.KINDS`. To add one: an entry of
`engine.config.objectives.OBJECTIVES`, the head in `engine.models.task_heads`, a module of `engine.tasks.kinds`, and
tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np

from engine.config.schema.data import ColumnsConfig
from engine.config.schema.objective import ObjectiveConfig, ObjectiveName
from engine.data.shards.dataset import TokenDataset
from engine.tasks.measures import Measures

if TYPE_CHECKING:
    from engine.tasks.framing import Framing


class Examples(Protocol):
    """The examples of a file: a dataclass, whose fields but `location` are all that rows are made of."""

    @property
    def location(self) -> str:
        """File or folder that they were read from."""
        ...

    def __len__(self) -> int: ...


AnyExamples = TypeVar("AnyExamples", bound=Examples)


class MainMeasure(NamedTuple):
    """The measure by which checkpoints of a task are compared."""

    name: str
    """Key of the measures (`Predictions.measures`), whose value is a number or None."""
    higher_is_better: bool


@dataclass(frozen=True)
class EncodedRow:
    """A row as the model sees it: a document of the token shards."""

    ids: np.ndarray
    """(n,) int64, special tokens included."""
    columns: Mapping[str, float | np.ndarray] = field(default_factory=dict)
    """Numbers beside it by the name of their column: one, or (n,) one for each token."""
    parts: np.ndarray | None = field(default=None, kw_only=True)
    """First tokens of its parts, rising from 0, for all rows of a file or for none: the `sentences` of the shards."""
    num_decoder_tokens: int = field(default=0, kw_only=True)
    """Tokens at the end of `ids` that the decoder of T5 has in a row of its own."""
    note: Mapping[str, Any] | None = field(default=None, kw_only=True)
    """Facts that predictions are made with (JSON), for all rows of a file or for none (`engine.tasks.encode.notes`)."""


class Predictions(Protocol):
    """Predictions on the rows of a data set."""

    def measures(self) -> Measures:
        """Return what they are worth: numbers, tables of numbers by name, and None where a number is not defined."""
        ...

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of the file of predictions."""
        ...


class Kind(Protocol[AnyExamples]):
    """One kind of task."""

    name: ObjectiveName
    """Name of its objective."""
    main_measure: MainMeasure

    def require_packages(self) -> None:
        """Raise `EnvironmentProblem` where a package of the measures is missing."""
        ...

    def read(self, location: str, columns: ColumnsConfig) -> AnyExamples:
        """Read a file or a folder of examples. Raises `DataError` at the first wrong row."""
        ...

    def labels(self, parts: Mapping[str, AnyExamples], named: tuple[str, ...]) -> tuple[str, ...]:
        """Return the names of the labels: those `named` in the run file, else those found in `parts["train"]`.

        Checks all parts (`train`, `validation`) against them; a kind without labels returns none.

        Raises:
            DataError: training and validation examples do not fit each other, or the names.
        """
        ...

    def head(self, labels: tuple[str, ...]) -> dict[str, Any] | None:
        """Return `model.task_head`. None means the head over the vocabulary."""
        ...

    def encode(
        self, examples: AnyExamples, objective: ObjectiveConfig, framing: Framing, length: int
    ) -> Iterator[EncodedRow]:
        """Yield the rows of the examples, cut to `length` tokens; `objective.labels` are named.

        Raises:
            DataError: an example cannot be encoded.
        """
        ...

    def decode(self, logits: Sequence[np.ndarray], dataset: TokenDataset, objective: ObjectiveConfig) -> Predictions:
        """Return the predictions on a data set of encoded rows.

        `logits` are those of each row in the data set's order, fp32: (C,), or (n, C) where the head sees tokens.
        """
        ...
