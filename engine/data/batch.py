"""A micro-batch as torch tensors on the CPU, made from rows of the corpus.

Everything that training asks of a row travels with it: where it came from, what it weighs, which documents share
it. Invariant: a batch always has B rows; a padding row has weight 0, sample id -1 and padding.
Moving it to a device is not done here.

B batch (rows), T sequence dimension, S sequence dimension of an encoder, M most masked tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Protocol

import numpy as np
import torch

from engine.data.objectives.joined import JoinedSampler
from engine.data.objectives.rows import SampledRows
from engine.data.objectives.sampling import Sampler
from engine.data.shards.damage import Damage, DamagedShard
from engine.data.shards.dataset import TokenDataset

WEIGHTS = "weights_"
"""Part of the names of all inputs that weigh targets, and of no other's."""


class Rows(Protocol):
    """A data set, the sampler that makes its rows, and their weight in the loss."""

    @property
    def dataset(self) -> TokenDataset: ...

    @property
    def loss_weight(self) -> float: ...

    @property
    def sampler(self) -> Sampler: ...


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data rank."""

    inputs: dict[str, torch.Tensor]
    """Tensors for the model, by its keywords; the weight of a row is in the weights of its targets, and 0 is no target.

    Causal: `tokens_BT`, `targets_BT` (int64), `weights_BT` (float32). Masked: `tokens_BT`, `masked_BM` (positions),
    `targets_BM` (int64), `weights_BM`; with pairs also `token_types_BT`, `pair_targets_B` (int64), `pair_weights_B`.
    Span corruption: `tokens_BS`, `decoder_tokens_BT`, `targets_BT` (int64), `weights_BT`. And int32 numbers of the
    document within its row, from 0, padding last: `segments_BS` and `decoder_segments_BT`, or `segments_BT`, absent
    where documents see each other and padding is seen by none that counts."""
    weights: dict[str, float]
    """Weight of all targets by loss: this micro-batch's part of each denominator."""
    row_target_weights: dict[str, np.ndarray]
    """(B,) weight of each row's targets by loss: what `weights` is the sum of."""
    samples_B3: torch.Tensor
    """int64 (epoch, window, slot) of each row; -1 for a padding row."""
    row_weights_B: torch.Tensor
    """float32 weight of each row, already in the weights of its targets."""
    domains_B: torch.Tensor
    """int32 number of the row's domain in the mixture; 0 while there is but one."""
    name_sources: Callable[[], tuple[str, ...]]
    documents: torch.Tensor
    """int32 number of the document of each position within its row, from 0, padding last: (B, T), or (B, S) with an
    encoder."""

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Shard and row that each row came from, for messages and ledgers; empty for a padding row."""
        return self.name_sources()

    @cached_property
    def document_lengths(self) -> tuple[torch.Tensor, ...]:
        """Length of each document of each row, int32, padding last; each adds up to T (S if there is an encoder)."""
        return tuple(torch.bincount(row).int() for row in self.documents)

    def weights_by_domain(self, name: str, num_domains: int) -> np.ndarray:
        """Return the weight of the targets of a loss in the rows of each domain, (num_domains,) fp64."""
        return np.bincount(self.domains_B.numpy(), self.row_target_weights[name], num_domains)

    def cut(self, length: int) -> Batch:
        """Return the batch with rows of `length` tokens, of the encoder where there is one: the rest is padding."""
        if self.documents.shape[1] == length:
            return self
        ending = "_BS" if any(name.endswith("_BS") for name in self.inputs) else "_BT"
        cut = {name: tensor[:, :length].contiguous() for name, tensor in self.inputs.items() if name.endswith(ending)}
        return replace(self, inputs=self.inputs | cut, documents=self.documents[:, :length])

    @property
    def num_rows(self) -> int:
        return self.samples_B3.shape[0]


def reuse_freed_memory() -> None:
    """Let the C library keep the memory of batches that are done with for the next ones.

    glibc returns blocks to the system that are larger than any which it saw freed (mallopt(3), M_MMAP_THRESHOLD), and
    being given fresh pages for each batch takes longer than filling them. So it is shown a large one.
    """
    np.empty(16 << 20, np.uint8)


def make_batches(
    sources: Sequence[Rows],
    domains: np.ndarray,
    samples: np.ndarray,
    shard_rows: np.ndarray,
    num_batches: int,
    num_rows: int,
    joined: JoinedSampler | None = None,
) -> list[Batch]:
    """Return micro-batches of `num_rows`, one behind the other, of the samples (rows, 3) of the sources `domains`
    (rows,), whose shards and rows are `shard_rows` (rows, 2); what is missing at the end are padding rows.

    All rows are made together, by the sampler `joined` of all sources where there is one, and each batch is a view of
    them. Raises `DamagedShard` where a shard is damaged.
    """
    total = num_batches * num_rows
    # once for all batches: numpy's cost per call is paid once, and views cost nothing
    loss_weights_K = np.array([source.loss_weight for source in sources], np.float32)
    row_weights_N = _filled(loss_weights_K[domains], total, 0, np.float32)
    if joined is not None and len(shard_rows):
        made = joined.make(domains, samples, shard_rows, total)
    else:
        made = _made(sources, domains, shard_rows, samples, total)
    if (loss_weights_K != 1).any():
        made = _weighted(made, row_weights_N)
    samples_N3 = _filled(samples, total, -1, np.int64)
    domains_N = _filled(domains, total, 0, np.int32)

    def batch(rows: slice) -> Batch:
        return Batch(
            inputs={name: torch.from_numpy(array[rows]) for name, array in made.inputs.items()},
            weights={name: float(weights_N[rows].sum(dtype=np.float64)) for name, weights_N in made.weights.items()},
            row_target_weights={name: weights_N[rows] for name, weights_N in made.weights.items()},
            samples_B3=torch.from_numpy(samples_N3[rows]),
            row_weights_B=torch.from_numpy(row_weights_N[rows]),
            domains_B=torch.from_numpy(domains_N[rows]),
            name_sources=partial(_names, sources, domains[rows], shard_rows[rows], num_rows),
            documents=torch.from_numpy(made.documents[rows]),
        )

    return [batch(slice(first, first + num_rows)) for first in range(0, total, num_rows)]


def _filled(rows: np.ndarray, num_rows: int, value: int, dtype: type[np.generic]) -> np.ndarray:
    """Return the rows, filled up with the value to (num_rows, ...)."""
    found = np.full((num_rows, *rows.shape[1:]), value, dtype)
    found[: len(rows)] = rows
    return found


def _names(sources: Sequence[Rows], domains: np.ndarray, shard_rows: np.ndarray, num_rows: int) -> tuple[str, ...]:
    """Return `SHARD:ROW` of each row, empty for a padding row."""
    rows = zip(domains.tolist(), shard_rows.tolist(), strict=True)
    shards = [source.dataset.index.shards for source in sources]
    names = [f"{shards[domain][number].tokens.name}:{row}" for domain, (number, row) in rows]
    return (*names, *[""] * (num_rows - len(names)))


def _made(
    sources: Sequence[Rows], domains: np.ndarray, shard_rows: np.ndarray, samples: np.ndarray, num_rows: int
) -> SampledRows:
    """Return the rows as their sources make them, in the order of `shard_rows`."""
    # without samples, source 0 makes the padding rows
    present = (np.unique(domains).tolist() if len(sources) > 1 else []) or [0]
    if len(present) == 1:
        return _of_one(sources, present[0], shard_rows, samples, num_rows)
    which = [np.flatnonzero(domains == domain) for domain in present]
    num_padding = num_rows - len(shard_rows)
    parts = [
        # with the last source come the padding rows
        _of_one(sources, domain, shard_rows[rows], samples[rows], rows.size + (domain == present[-1]) * num_padding)
        for domain, rows in zip(present, which, strict=True)
    ]
    which[-1] = np.append(which[-1], np.arange(len(shard_rows), num_rows))
    # rows of sources (0, 1, 0): which = (0, 2), (1); each part is copied once, to where its rows belong
    return SampledRows(
        {name: _gathered([part.inputs[name] for part in parts], which, num_rows) for name in parts[0].inputs},
        {name: _gathered([part.weights[name] for part in parts], which, num_rows) for name in parts[0].weights},
        _gathered([part.documents for part in parts], which, num_rows),
    )


def _gathered(parts: list[np.ndarray], which: list[np.ndarray], num_rows: int) -> np.ndarray:
    """Return the rows of the parts at their indices, (num_rows, ...)."""
    found = np.empty((num_rows, *parts[0].shape[1:]), np.result_type(*parts))
    for part, rows in zip(parts, which, strict=True):
        found[rows] = part
    return found


def _of_one(
    sources: Sequence[Rows], domain: int, shard_rows: np.ndarray, samples: np.ndarray, num_rows: int
) -> SampledRows:
    try:
        return sources[domain].sampler.make(samples, shard_rows, num_rows)
    except DamagedShard as error:
        # its rows were counted when its window began, so they keep their addresses
        error.damage = Damage(domain, error.number, counted=True)
        raise


def _weighted(made: SampledRows, row_weights_B: np.ndarray) -> SampledRows:
    """Return rows whose targets weigh as the float32 weights of the rows say, times what they weighed."""

    def times(array: np.ndarray) -> np.ndarray:
        return array * row_weights_B.reshape(-1, *[1] * (array.ndim - 1))

    # the denominators, in fp64, take the weights as the targets do: rounded to fp32
    inputs = {name: times(array) if WEIGHTS in name else array for name, array in made.inputs.items()}
    weights = {name: own * row_weights_B.astype(np.float64) for name, own in made.weights.items()}
    return SampledRows(inputs, weights, made.documents)
