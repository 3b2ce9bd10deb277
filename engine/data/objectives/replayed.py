"""Rows of text that is replayed beside a task: an objective of pretraining in one run stage with that of a task.

All rows of a micro-batch have the inputs of both kinds, so that every rank runs the same modules on the same shapes,
whichever rows it has: a row of one kind has weight 0 for the other's targets. Invariant: what a row's own objective
makes of it is unchanged.

B batch (rows), T sequence length (of the decoder, where there is one).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.config.objectives import OBJECTIVES, REPLAYED
from engine.config.schema.data import Attention
from engine.config.schema.objective import ObjectiveConfig
from engine.data.objectives.rows import SampledRows
from engine.data.objectives.sampling import Sampler, make_sampler
from engine.data.shards.dataset import TokenDataset

_OF_HEADS = ("masked_", "targets_", "weights_")
"""Beginnings of the names of the inputs that a head over the vocabulary gets."""
_OF_DECODERS = ("decoder_tokens_BT", "decoder_segments_BT", "targets_BT", "weights_BT")


def replayed_sampler(
    dataset: TokenDataset,
    sequence_length: int,
    seed: int,
    attention: Attention,
    objective: ObjectiveConfig,
    task: ObjectiveConfig,
) -> Sampler:
    """Return the sampler of text that is replayed with an objective beside that of a task.

    Raises:
        DataError: the shards lack what the objective needs.
    """
    sampler = make_sampler(dataset, sequence_length, seed, attention, "concatenate", objective)
    return _ReplayedSampler(sampler, task)


def completed(samplers: Sequence[Sampler]) -> list[Sampler]:
    """Return samplers of several objectives, each with rows that have the inputs of all of them."""
    nothing = np.empty((0, 3), np.int64), np.empty((0, 2), np.int64)
    # a padding row has weight 0 everywhere, and so what a row of another objective needs
    padding = [sampler.make(*nothing, 1) for sampler in samplers]
    inputs = {name: row for rows in reversed(padding) for name, row in rows.inputs.items()}
    return [_CompletedSampler(sampler, inputs) for sampler in samplers]


class _ChangedSampler:
    """A sampler whose rows are changed after they are made."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self.count, self.rows_of, self.ranges = sampler.count, sampler.rows_of, sampler.ranges


class _ReplayedSampler(_ChangedSampler):
    """Rows of text whose targets count for the loss of the task's head, and go to the head over the vocabulary."""

    def __init__(self, sampler: Sampler, task: ObjectiveConfig) -> None:
        super().__init__(sampler)
        self._task, self._has_head = task, OBJECTIVES[task.name].has_head

    def make(self, samples_B3: np.ndarray, shard_rows: np.ndarray, num_rows: int) -> SampledRows:
        made = self._sampler.make(samples_B3, shard_rows, num_rows)
        given = dict(made.inputs)
        if "tokens_BT" in given:  # T5's encoder has tokens_BS, and segments of its own
            # Rows of a task always have segments (`has_segments`), and a pipeline's stages are built for them. A causal
            # row whose documents see each other has none: one segment hides nothing.
            given.setdefault("segments_BT", np.zeros(given["tokens_BT"].shape, np.int32))
        if not self._has_head:  # the head over the vocabulary is the task's own
            inputs = {name: self._lengthened(name, array) for name, array in given.items()}
            return SampledRows(inputs, made.weights, made.documents)
        inputs = {REPLAYED + name if name.startswith(_OF_HEADS) else name: array for name, array in given.items()}
        (weights_B,) = made.weights.values()
        return SampledRows(inputs, {self._task.name: weights_B}, made.documents)

    def _lengthened(self, name: str, array_BT: np.ndarray) -> np.ndarray:
        """Return a decoder's rows as long as those of the task's answers, with targets of weight 0 behind them."""
        missing = self._task.answer_length - array_BT.shape[1]
        if not self._task.answer_length or name not in _OF_DECODERS or missing <= 0:
            return array_BT
        # padding sees what the last token sees: a query without a key would have a softmax of NaN
        how = "edge" if name == "decoder_segments_BT" else "constant"
        return np.pad(array_BT, ((0, 0), (0, missing)), how)


class _CompletedSampler(_ChangedSampler):
    """Rows of one objective with the inputs of all of them."""

    def __init__(self, sampler: Sampler, padding: dict[str, np.ndarray]) -> None:
        super().__init__(sampler)
        self._padding = padding

    def make(self, samples_B3: np.ndarray, shard_rows: np.ndarray, num_rows: int) -> SampledRows:
        made = self._sampler.make(samples_B3, shard_rows, num_rows)
        missing = {
            # (1, ...) -> (B, ...)
            name: np.repeat(row, num_rows, axis=0)
            for name, row in self._padding.items()
            if name not in made.inputs
        }
        return SampledRows(made.inputs | missing, made.weights, made.documents)
