"""This rank's share of the data, as the keywords of its pipeline stage, on its device.

The family names the inputs of a stage; ranks that need none read nothing and only advance the stream. Where there are
several sources, or validation sets, the last stage's rows say which they are of (`DOMAINS`).

Legend: L losses, K domains (sources, or validation sets; 0 where losses are not told apart).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Protocol

import numpy as np
import torch

from engine.config.resolve import num_micro_batches
from engine.config.schema.parallel import ParallelConfig
from engine.config.schema.run import RunConfig
from engine.data.batch import Batch
from engine.data.objectives.draws import dropout_keys
from engine.data.prefetch import Prefetcher
from engine.data.shards.damage import Damage
from engine.data.source import WeightedDataset
from engine.data.stage import check_raised_ratio, run_stage_seed, share_table, stage_stream
from engine.data.stage_validation import OtherValidation, other_samples, replayed_samples_of, samples_of
from engine.data.stream_state import State
from engine.data.validation import ValidationSamples, ValidationSet
from engine.models.dropout import KEYS
from engine.models.heads import SMOOTHING
from engine.parallel.boundary import DOMAINS, Tensors
from engine.parallel.groups import Groups
from engine.parallel.stage import PipelineStageSpec
from engine.train.build import with_rows
from engine.train.sequence_slices import own_part
from engine.train.signals import Stopping

LOOK_SECONDS = 0.2
"""Seconds between two looks at a request to stop, on a rank that waits for data."""
EVALUATION_CHUNK = 8
"""Micro-batches that one evaluation pass sends through the pipeline."""


class EvaluationRows(Protocol):
    """Rows that are evaluated: validation samples, or answers of questions."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the domains that losses are told apart by; empty where there is but one."""
        ...

    def batches(self, data_rank: int, data_size: int, micro_batch_size: int) -> Iterator[Batch]:
        """Yield a data rank's micro-batches."""
        ...

    def num_batches(self, data_size: int, micro_batch_size: int) -> int:
        """Return the number of micro-batches that each data rank gets."""
        ...


class Feed:
    """Batches for one rank; a checkpoint keeps the state of its `stream`. Close it to end its thread."""

    def __init__(
        self,
        training: list[WeightedDataset],
        validation: list[ValidationSet] | None,
        config: RunConfig,
        number: int,
        groups: Groups,
        device: torch.device,
        spec: PipelineStageSpec,
        stop_requested: Callable[[], bool] = lambda: False,
        others: OtherValidation | None = None,
    ) -> None:
        """Make the feed of run stage `number` (from 0); `stop_requested()` is True once this rank is to stop, and
        `others` are the validation sets of the other run stages."""
        self._stop_requested = stop_requested
        self.groups, self.device = groups, device
        self.run_stage = run_stage = config.stages[number]
        self.seed = run_stage_seed(config.seed, number)
        """Seed of the run stage's order, masks and dropout."""
        self.parallel: ParallelConfig = config.parallel
        self.stream = stage_stream(run_stage, training, self.seed)
        self._training = training
        if run_stage.replay is not None and config.evaluation.raised_ratios:
            check_raised_ratio(run_stage, self.stream, config.evaluation.raised_ratios[-1])
        most = config.evaluation.max_samples
        self.validation = None if validation is None else samples_of(run_stage, validation, most)
        others = others or OtherValidation([], [])
        self.earlier = other_samples(run_stage, others.earlier, most)
        """Validation samples of earlier run stages, as this one reads them; None where there are none."""
        self.later = other_samples(run_stage, others.later, most)
        replayed = run_stage.replayed_objective is not None and others.replayed
        self.replayed = replayed_samples_of(run_stage, others.replayed, most) if replayed else None
        """Held-out text for the objective of what the run stage replays; None where there is none."""
        self.losses = spec.losses
        self.domains = tuple(part.label for part in training) if len(training) > 1 else ()
        """Sources whose losses are told apart; none where there is but one."""
        self._has_head = spec.has_head

        @cache
        def spec_of(length: int) -> PipelineStageSpec:
            rows = spec.rows
            return spec if length == rows.length else with_rows(spec, config, replace(rows, length=length))

        self._spec_of = spec_of
        self.row_length = run_stage.sequence_length
        """Tokens of the rows that were read last."""
        self.inputs = spec.inputs
        """Keywords of this rank's chunks that come from the data."""
        self.wait_seconds = 0.0
        """Time that the last `step` waited for data."""
        self._prefetcher: Prefetcher | None = None
        self._before = self.stream.progress

    @property
    def spec(self) -> PipelineStageSpec:
        """Specification of the pipeline stage for the rows that were read last."""
        return self._spec_of(self.row_length)

    @property
    def reads(self) -> bool:
        """True if this rank's stage takes any input from the data."""
        return bool(self.inputs)

    def start(self) -> None:
        """Begin to read ahead; call when the stream stands where training goes on."""
        if self.reads:
            coordinates, layout = self.groups.coordinates, self.groups.layout
            shape = (coordinates.data_rank, layout.data, self.parallel.micro_batch_size)
            gpu = self.device if self.device.type == "cuda" else None
            self._prefetcher = Prefetcher(self.stream, *shape, cut=self._own_inputs, gpu=gpu)

    def step(self) -> tuple[list[Tensors], list[float]]:
        """Return the stage's inputs of the next step, and the weight of this data rank's targets by loss (0 where it
        reads none): L of all rows, then L of each domain's.

        Raises:
            Stopping: a stop was requested before this rank had its data.
        """
        begin = time.perf_counter()
        self._before = self.stream.progress
        # Middle stages under pipeline parallelism: their inputs come from the stage before, but the stream moves on.
        if not self.reads:
            count = num_micro_batches(self.stream.batch_size, self.parallel, self.groups.layout.data)
            step = self.stream.draw(1)[0]
            self.row_length = self.stream.row_length(step.samples)
            self.stream.advance_to(step.after)
            batches: list[Batch] = []
            inputs: list[Tensors] = [{} for _ in range(count)]
        else:
            assert self._prefetcher is not None, "start() comes before step()"
            # A wait without end would not see a signal: a rank whose storage hangs must still stop with the others.
            while not self._prefetcher.wait(LOOK_SECONDS):
                if self._stop_requested():
                    raise Stopping("a signal came while this rank waited for its data")
            batches = self._prefetcher.step()
            self.row_length = self._row_length(batches[0])
            inputs = [batch.inputs for batch in batches]
        self.wait_seconds = time.perf_counter() - begin
        return inputs, self._weights(batches, len(self.domains))

    def quarantine(self, damage: Damage) -> None:
        """Take back the last `step`, whether it failed on this rank or not, and do without a shard from it on.

        Every rank calls it alike. Raises `DataError` where the data cannot do without it.
        """
        # What was read ahead may hold rows of the lost shard, so reading starts again.
        self.close()
        self.stream.advance_to(self._before)
        self.stream.lose(damage)
        self.start()

    def restore(self, state: State, raised: list[tuple[int, float]]) -> None:
        """Put the stream where a state of it says; `raised` are the ratios of replay that alarms have raised, by step.
        Nothing may be read ahead. Raises `DataError` as `Stream.restore`."""
        self.stream.restore(state, share_table(self.run_stage, self._training).raised(raised))

    def raise_replay(self, raised: list[tuple[int, float]]) -> None:
        """Replay by raised ratios from the next step on: what was read ahead is read again."""
        reads_ahead = self._prefetcher is not None
        self.close()
        self.stream.change_shares(share_table(self.run_stage, self._training).raised(raised))
        if reads_ahead:
            self.start()

    def step_back(self) -> None:
        """Make the stream forget the last `step`, on a rank that had its data when another one was told to stop."""
        self.stream.advance_to(self._before)

    def num_validation_chunks(self, samples: EvaluationRows) -> int:
        """Return the number of chunks that `validation_chunks` yields, the same on every rank."""
        # rounded up
        return -(-self._num_validation_batches(samples) // EVALUATION_CHUNK)

    def validation_chunks(self, samples: EvaluationRows) -> Iterator[tuple[list[Tensors], list[float]]]:
        """Yield (inputs, weights) of validation samples, a chunk of micro-batches at a time; `row_length` is that of
        the chunk then. Raises as it reads."""
        data_size, num_rows = self.groups.layout.data, self.parallel.micro_batch_size
        batches = samples.batches(self.groups.coordinates.data_rank, data_size, num_rows)
        left, first = self._num_validation_batches(samples), 0
        while left > 0:
            size = min(EVALUATION_CHUNK, left)
            left -= size
            end = first + size * data_size * num_rows
            chunk = list(islice(batches, size)) if self.reads else []
            self.row_length = self.run_stage.sequence_length
            if self.run_stage.data.row_lengths and isinstance(samples, ValidationSamples):
                self.row_length = samples.row_length(first, end)
                chunk = [batch.cut(self.row_length) for batch in chunk]
            first = end
            names = samples.names
            inputs = [self._moved(batch, names) for batch in chunk] if self.reads else [{} for _ in range(size)]
            yield inputs, self._weights(chunk, len(names))

    def _num_validation_batches(self, samples: EvaluationRows) -> int:
        return samples.num_batches(self.groups.layout.data, self.parallel.micro_batch_size)

    def close(self) -> None:
        """End the reading thread; safe to call twice."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def _own_inputs(self, batch: Batch, step: int | None, validation: tuple[str, ...] = ()) -> Tensors:
        """Return this rank's part of what its stage takes of a batch, on the CPU; keys of dropout and shares of
        smoothed labels in training alone.

        The reading thread calls it, too: nothing that it reads here changes. A validation batch has no `step`, and is
        of the data sets with these names.
        """
        inputs = batch.inputs
        if step is not None and KEYS in self.inputs:
            samples = batch.samples_B3
            if len(self.stream.parts) > 1:  # sources have addresses of their own
                # (B, 3) -> (B, 4)
                samples = torch.cat((batch.domains_B[:, None].long(), samples), dim=1)
            inputs = inputs | {KEYS: torch.from_numpy(dropout_keys(self.seed, step, samples.numpy()))}
        if step is not None and SMOOTHING in self.inputs and (share := self.run_stage.objective.label_smoothing):
            inputs = inputs | {SMOOTHING: share * self._is_example(batch).float()}
        # Cut before the upload: a rank's GPU gets its slice of the sequence and not whole rows.
        taken = {name: tensor for name, tensor in inputs.items() if name in self.inputs}
        own = own_part(taken, self._row_length(batch), self.parallel.sequence_ranks, self.groups.sequence)
        domains = self.domains if step is not None else validation
        return own | ({DOMAINS: batch.domains_B.long()} if domains and self._has_head else {})

    def _is_example(self, batch: Batch) -> torch.Tensor:
        """Return which rows have the objective of the run stage (B,): all but those of text replayed beside a task,
        which is the last source."""
        if self.run_stage.replayed_objective is None:
            return torch.ones_like(batch.domains_B, dtype=torch.bool)
        return batch.domains_B < len(self.stream.parts) - 1

    def _row_length(self, batch: Batch) -> int:
        return batch.documents.shape[1] if self.run_stage.data.row_lengths else self.run_stage.sequence_length

    def _moved(self, batch: Batch, names: tuple[str, ...]) -> Tensors:
        """Return this rank's inputs of a batch of validation sets of these names, on its device."""
        own = self._own_inputs(batch, step=None, validation=names)
        return {name: tensor.to(self.device) for name, tensor in own.items()}

    def _weights(self, batches: list[Batch], num_domains: int) -> list[float]:
        """Return the weight of the targets of all batches, by loss, then by domain and loss: (L + K * L,)."""
        all_L = [sum(batch.weights[name] for batch in batches) for name in self.losses]
        of_KL = np.zeros((num_domains, len(self.losses)))
        for batch in batches if num_domains else ():
            # one (K,) per loss -> (K, L)
            of_KL += np.stack([batch.weights_by_domain(name, num_domains) for name in self.losses], axis=1)
        return [*all_L, *of_KL.ravel().tolist()]
