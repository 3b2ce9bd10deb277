"""A micro-batch as torch tensors on the CPU, made from rows of the corpus.

Everything that training asks of a row travels with it: where it came from, what it weighs, which documents share
it. Invariant: a batch always has B rows; a row that stands for nothing has weight 0, sample id -1 and padding.
Moving it to a device is the caller's business.

B batch (rows), T time (sequence length), S time of an encoder, M most masked tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.data.dataset import TokenDataset
from engine.data.sampling import Sampler

NO_SAMPLE = (-1, -1, -1)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data rank."""

    inputs: dict[str, torch.Tensor]
    """What the model takes, by its keywords; the weight of a row is in the weights of its targets, and 0 is no target.

    Causal: `tokens_BT`, `targets_BT` (int64), `weights_BT` (float32). Masked: `tokens_BT`, `masked_BM` (positions),
    `targets_BM` (int64), `weights_BM`; with pairs also `token_types_BT`, `pair_targets_B` (int64), `pair_weights_B`.
    Span corruption: `tokens_BS`, `decoder_tokens_BT`, `targets_BT` (int64), `weights_BT`. And int32 numbers of the
    document within its row, from 0, padding last: `segments_BT` (`segments_BS`, `decoder_segments_BT`), absent where
    documents see each other and padding is seen by none that counts."""
    weights: dict[str, float]
    """Weight of all targets by loss: this micro-batch's part of each denominator."""
    samples_B3: torch.Tensor
    """int64 (epoch, window, slot) of each row; -1 for a row that stands for nothing."""
    row_weights_B: torch.Tensor
    """float32 weight of each row, already in the weights of its targets."""
    domains_B: torch.Tensor
    """int32 number of the row's domain in the mixture; 0 while there is but one."""
    sources: tuple[str, ...]
    """Shard and row that each row came from, for messages and ledgers; empty where it stands for nothing."""
    document_lengths: tuple[torch.Tensor, ...]
    """int32 places of each document of each row, padding last; each adds up to T (S where there is an encoder)."""

    @property
    def num_rows(self) -> int:
        return self.samples_B3.shape[0]


def make_batch(
    dataset: TokenDataset, sampler: Sampler, places: np.ndarray, samples: np.ndarray, num_rows: int
) -> Batch:
    """The micro-batch of the rows at `places` (rows, 2), filled up to `num_rows` with rows of weight 0.

    `samples` (rows, 3) are their addresses. Raises `DataError` where a shard is damaged.
    """
    made = sampler.make(samples, places, num_rows)
    samples_B3 = np.full((num_rows, 3), NO_SAMPLE, np.int64)
    samples_B3[: len(samples)] = samples
    shards = dataset.index.shards
    sources = [f"{shards[number].tokens.name}:{row}" for number, row in places.tolist()]
    return Batch(
        inputs={name: torch.from_numpy(array) for name, array in made.inputs.items()},
        weights=made.weights,
        samples_B3=torch.from_numpy(samples_B3),
        row_weights_B=(torch.arange(num_rows) < len(places)).float(),
        domains_B=torch.zeros(num_rows, dtype=torch.int32),
        sources=(*sources, *[""] * (num_rows - len(places))),
        document_lengths=tuple(torch.from_numpy(item) for item in made.document_lengths),
    )
