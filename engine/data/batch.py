"""A micro-batch as torch tensors on the CPU, made from rows of the corpus.

Everything that training asks of a row travels with it: where it came from, what it weighs, which documents share
it. Invariant: a batch always has B rows; a row that stands for nothing has weight 0, sample id -1 and padding.
Moving it to a device is the caller's business.

B batch (rows), T time (sequence length).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.data.dataset import TokenDataset
from engine.data.objectives import Attention, causal
from engine.data.packing import pack

NO_SAMPLE = (-1, -1, -1)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data rank."""

    inputs: dict[str, torch.Tensor]
    """What the model takes, by its keywords: `tokens_BT` (int64); `targets_BT` (int64, meaningful where the weight is
    not 0); `weights_BT` (float32 weight of each target in the loss, the row's weight included; 0 is no target);
    `segments_BT` (int32 number of the document within its row, from 0; absent where documents see each other)."""
    weights: tuple[float, ...]
    """Weight of all targets by loss: this micro-batch's part of each denominator."""
    samples_B3: torch.Tensor
    """int64 (epoch, window, slot) of each row; -1 for a row that stands for nothing."""
    row_weights_B: torch.Tensor
    """float32 weight of each row, already in `weights_BT`."""
    domains_B: torch.Tensor
    """int32 number of the row's domain in the mixture; 0 while there is but one."""
    sources: tuple[str, ...]
    """Shard and row that each row came from, for messages and ledgers; empty where it stands for nothing."""
    document_lengths: tuple[torch.Tensor, ...]
    """int32 inputs of each document of each row, padding last; each adds up to T."""

    @property
    def num_rows(self) -> int:
        return self.samples_B3.shape[0]


def make_batch(
    dataset: TokenDataset,
    places: np.ndarray,
    samples: np.ndarray,
    sequence_length: int,
    attention: Attention,
    num_rows: int,
) -> Batch:
    """The micro-batch of the rows at `places` (rows, 2), filled up to `num_rows` with rows of weight 0.

    `samples` (rows, 3) are their addresses. Raises `DataError` where a shard is damaged.
    """
    padding_id = dataset.index.eos_id
    tokens_BT = np.full((num_rows, sequence_length), padding_id, np.int64)
    targets_BT = np.full((num_rows, sequence_length), padding_id, np.int64)
    weights_BT = np.zeros((num_rows, sequence_length), np.float32)
    segments_BT = np.zeros((num_rows, sequence_length), np.int32) if attention == "document" else None
    samples_B3 = np.full((num_rows, 3), NO_SAMPLE, np.int64)
    samples_B3[: len(samples)] = samples
    sources, lengths = [""] * num_rows, [np.array([sequence_length], np.int32)] * num_rows
    for b, (number, row_number) in enumerate(places.tolist()):
        shard = dataset.shard(number)
        row = pack(shard, row_number, sequence_length)
        tokens_BT[b], targets_BT[b], weights_BT[b] = causal(row, attention, padding_id)
        if segments_BT is not None:
            segments_BT[b] = row.segments()
        sources[b], lengths[b] = f"{shard.name}:{row_number}", row.document_lengths()
    inputs = {"tokens_BT": tokens_BT, "targets_BT": targets_BT, "weights_BT": weights_BT}
    if segments_BT is not None:
        inputs["segments_BT"] = segments_BT
    return Batch(
        inputs={name: torch.from_numpy(array) for name, array in inputs.items()},
        weights=(float(weights_BT.sum(dtype=np.float64)),),
        samples_B3=torch.from_numpy(samples_B3),
        row_weights_B=(torch.arange(num_rows) < len(places)).float(),
        domains_B=torch.zeros(num_rows, dtype=torch.int32),
        sources=tuple(sources),
        document_lengths=tuple(torch.from_numpy(item) for item in lengths),
    )
