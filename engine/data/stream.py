"""The stream of samples that a run stage trains on: its position, and everything that decides the next samples.

Invariant: which samples a step trains on depends on (sources and their weights, objective, seed, sequence length,
window_shards, samples before it, samples left out) alone, never on the ranks, the micro-batch size or restarts; each
sample comes exactly once per epoch of its source, but for those that a rollback or a damaged shard left out. Every rank
holds a `Stream`, also one that reads no token. Its state is a few integers. Nothing here reads tokens or needs torch:
`engine.data.loader` reads what a stream names.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial, reduce
from operator import or_
from typing import Any, NamedTuple

import numpy as np

from engine.config.batch_ramp import Ramp
from engine.config.rules.data import MOST_SOURCES
from engine.config.schema.data import Attention, PackingName
from engine.config.schema.objective import ObjectiveConfig
from engine.data.mixed_order import Cursor, Interval, MixedOrder, Samples, merged
from engine.data.objectives.joined import JoinedSampler
from engine.data.objectives.replayed import completed, replayed_sampler
from engine.data.objectives.sampling import Sampler, make_sampler
from engine.data.order.length_order import VERSION as LENGTH_ORDER_VERSION
from engine.data.order.length_order import LengthOrder
from engine.data.order.sample_order import START, VERSION, CountRows, Order, SampleId, SampleOrder
from engine.data.row_lengths import needed_lengths
from engine.data.shards.damage import Damage
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.tombstones import Tombstones
from engine.data.shares import Shares, ShareTable
from engine.data.source import Source, WeightedDataset, source_seed
from engine.data.stream_state import (
    Progress,
    State,
    change_of_tombstones,
    check_identity,
    identity_of_mixture,
    progress_of,
    short_hash,
)
from engine.errors import DataError
from engine.logs import logger

_log = logger(__name__)

MOST_LOST = 16
"""Most damaged shards that a run does without: more are no accident, and the state must stay small."""


class Step(NamedTuple):
    """The samples of one step that is to come, and how far the stream has come before and after it."""

    before: Progress
    samples: Samples
    after: Progress


class Stream:
    """The global batches over one data set or a mixture of them, epoch after epoch."""

    def __init__(
        self,
        parts: TokenDataset | Sequence[WeightedDataset],
        sequence_length: int,
        global_batch_size: int | Ramp,
        seed: int,
        window_shards: int,
        attention: Attention,
        packing: PackingName = "concatenate",
        objective: ObjectiveConfig | None = None,
        table: ShareTable | None = None,
        row_lengths: tuple[int, ...] = (),
    ) -> None:
        """Open the stream at its beginning; the shares of the sources are those of `table`, or their constant weights.
        `row_lengths` are lengths below `sequence_length` that the rows of a step may have.

        Raises:
            DataError: a data set holds not one sample, or lacks what the objective needs.
        """
        self.parts = (WeightedDataset(parts),) if isinstance(parts, TokenDataset) else tuple(parts)
        assert len(self.parts) <= MOST_SOURCES, "resolve() lets no more pass"
        self.sequence_length, self.seed, self.window_shards = sequence_length, seed, window_shards
        self.attention: Attention = attention
        self.packing: PackingName = packing
        self.row_lengths = row_lengths
        self.objective = objective or ObjectiveConfig()
        self.batches = Ramp((global_batch_size,)) if isinstance(global_batch_size, int) else global_batch_size
        sources = self._open_sources(())
        for source in sources:
            source.refuse_empty()
        # `limit` of a source with `epochs` counts the rows of all its shards; best fit then reads all document offsets
        # here
        table = table or ShareTable(((0, tuple(part.weight for part in self.parts)),))
        self._shares = Shares.from_start(table, [source.limit() for source in sources], self.batches)
        self._order = MixedOrder(sources, self._shares.mixture, self._join())
        self._progress = Progress(Cursor(0, (START,) * len(self.parts)), 0, (0,) * len(self.parts))
        self._lost: tuple[Damage, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Hash of the contents of the data sets, whatever their location."""
        found = [part.dataset.fingerprint for part in self.parts]
        return found[0] if len(found) == 1 else hashlib.sha256(" ".join(found).encode()).hexdigest()[:32]

    @property
    def tombstones(self) -> Tombstones:
        """Forgotten documents of all data sets, as known when they were opened."""
        return reduce(or_, (part.dataset.tombstones for part in self.parts))

    def samples_per_epoch(self) -> int:
        """Return the samples of one epoch of all sources. Where packing decides their number, reads all offsets."""
        return sum(self.samples_by_source())

    def samples_by_source(self) -> list[int]:
        """Return the samples of one epoch of each source. Reads as `samples_per_epoch`."""
        return [int(source.count(np.arange(source.dataset.num_shards)).sum()) for source in self._order.sources]

    @property
    def num_samples(self) -> int | None:
        """Length of the whole stream; None without end."""
        return self._order.mixing.num_samples

    @property
    def order(self) -> MixedOrder:
        """The order of all samples; another object after every change of what is left out or lost."""
        return self._order

    @property
    def progress(self) -> Progress:
        """Progress of the stream; `advance_to` takes it, on a clone, too."""
        return self._progress

    @property
    def samples(self) -> int:
        """Samples trained on so far by the whole run."""
        return self._progress.samples

    @property
    def position(self) -> int:
        """Samples passed so far: those trained on and those left out."""
        return self._progress.cursor.position

    @property
    def steps_done(self) -> int:
        """Steps done so far."""
        return self.batches.steps(self.samples)

    @property
    def batch_size(self) -> int:
        """Samples of the next step."""
        return self.batches.size(self.steps_done)

    def drawn(self) -> dict[str, int]:
        """Return the samples passed so far by source; empty where there is but one."""
        if len(self.parts) == 1:
            return {}
        return {part.label: count for part, count in zip(self.parts, self.mix(self.position), strict=True)}

    def trained(self) -> dict[str, int]:
        """Return the samples trained on so far by source: those passed but for those left out or lost. Empty where
        there is but one source."""
        if len(self.parts) == 1:
            return {}
        counts = zip(self.parts, self.mix(self.position), self._progress.passed_over, strict=True)
        return {part.label: passed - passed_over for part, passed, passed_over in counts}

    def mix(self, position: int) -> list[int]:
        """Return the samples of each source before a position: from the one on at which the weights in force began
        (0, but for a run that has gone on with other weights), and at most `num_samples`."""
        return self._order.mixing.counts(position).tolist()

    @property
    def shares(self) -> ShareTable:
        """Shares of the sources over the steps of the run stage."""
        return self._shares.table

    @cached_property
    def replay_rows(self) -> int:
        """Samples of one pass over the replayed data. Where packing decides their number, reads all its offsets."""
        return self.samples_by_source()[-1]

    @property
    def left_out(self) -> tuple[Interval, ...]:
        """The samples that the run leaves out, by position: disjoint, in order."""
        return self._order.left_out

    def leave_out(self, first: int, end: int) -> None:
        """Skip samples at positions [first, end), as far as they are still to come."""
        # an interval may reach back behind the position: those samples are trained on, and stay counted as such
        self._order = replace(self._order, left_out=merged([*self.left_out, (first, end)]))

    @property
    def lost(self) -> tuple[Damage, ...]:
        """The shards that the run does without, each from the sample on that was next when it was lost."""
        return self._lost

    def lose(self, damage: Damage) -> None:
        """Do without a damaged shard from the next sample on. Every rank that holds this stream calls it alike.

        Raises:
            DataError: more than `MOST_LOST` shards are damaged, none is left, or what is left cannot be counted.
        """
        source = self._order.sources[damage.source]
        if len(self._lost) == MOST_LOST:
            raise DataError(
                f"more than {MOST_LOST} shards are damaged, the last in {source.dataset.location}",
                f"{MOST_LOST} at most",
                "look at the disk, and restore the shards from a copy",
            )
        # without its rows a shard counts as empty, which would renumber the slots of a window that has begun
        source.refuse_mid_window(damage, self._progress.cursor.addresses[damage.source])
        # sorted and without repetition: ranks that meet two damages in different orders save equal states
        lost = tuple(sorted({*self._lost, damage}))
        sources = self._open_sources(lost)
        sources[damage.source].refuse_empty()
        self._lost, self._order = lost, replace(self._order, sources=sources)

    def draw(self, most_steps: int) -> list[Step]:
        """Return the next step, or up to so many of one size, as far as no source leaves its window before the last
        one; the stream itself stays where it is.

        Raises:
            DataError: the data ends before the first of them does.
        """
        before, found = self._progress, []
        for samples, cursor in self._order.take_steps(before.cursor, self._sizes(before.samples, most_steps)):
            passed_over = self._passed_over(before, samples, cursor)
            after = Progress(cursor, before.samples + samples.size, passed_over)
            found.append(Step(before, samples, after))
            before = after
        return found

    def _sizes(self, samples: int, most: int) -> list[int]:
        """Return the sizes of the next steps after so many samples: up to `most` of one size."""
        # the ramp follows the samples trained on, not the position: samples that are left out do not move it
        step = self.batches.steps(samples)
        size = self.batches.size(step)
        if self.batches.samples(step) != samples:  # inside of a step, of a ramp that was changed meanwhile
            return [size]
        sizes = (self.batches.size(step + number) for number in range(most))
        return list(itertools.takewhile(lambda other: other == size, sizes))

    def advance_to(self, progress: Progress) -> None:
        """Continue after a step of this stream or of a clone."""
        self._progress = progress

    def row_length(self, samples: Samples) -> int:
        """Return the tokens of the rows of a step with these samples."""
        if not self.row_lengths:
            return self.sequence_length
        rows_N2 = self._order.shard_rows(samples)
        return int(needed_lengths(self.parts[0].dataset, self.row_lengths, self.sequence_length, rows_N2).max())

    def skip(self) -> None:
        """Advance by one global batch."""
        self.advance_to(self.draw(1)[0].after)

    def coming_shards(self) -> list[tuple[TokenDataset, int]]:
        """Return the remote shards of the windows in use and of those after them, as (data set, shard number) in the
        order of their use."""
        found: list[tuple[TokenDataset, int]] = []
        addresses = self._progress.cursor.addresses
        # the windows in use of all sources first, then the next ones: shards are fetched in this order
        for ahead in (0, 1):
            for source, address in zip(self._order.sources, addresses, strict=True):
                if source.dataset.is_remote:
                    numbers = source.order.shards_ahead(address, ahead).tolist()
                    found += [(source.dataset, number) for number in numbers if number not in source.lost]
        return found

    def next_sample_ids(self, count: int) -> list[SampleId]:
        """Return the addresses of the next `count` samples, each in its source; they stay the next ones."""
        return [SampleId(*row) for row in self._next(count).addresses_N3.tolist()]

    def sample_hash(self, count: int) -> str:
        """Return a short hash of the next `count` samples: their addresses, and source, shard and row of each."""
        taken = self._next(count)
        columns = [taken.addresses_N3, self._order.shard_rows(taken)]
        if len(self.parts) > 1:
            columns.append(taken.sources_N[:, None])
        content = np.concatenate(columns, axis=1).astype("<i8").tobytes()  # little-endian on every machine
        return hashlib.sha256(self.fingerprint.encode() + content).hexdigest()[:16]

    def state(self) -> State:
        """Return the position of the next sample, and all that must not have changed when this is restored."""
        return {
            "position": self.position,
            "samples": self.samples,
            "addresses": [list(address) for address in self._progress.cursor.addresses],
            "left_out": [list(interval) for interval in self.left_out],
            "lost": [[*damage[:2], int(damage.counted)] for damage in self._lost],
            # no key where all are 0, as in states that were written before the key existed
            **({"passed_over": list(self._progress.passed_over)} if any(self._progress.passed_over) else {}),
            # likewise no key where nothing is forgotten
            **({"tombstones": [len(found), found.hash]} if len(found := self.tombstones) else {}),
        } | {**self._shares.state(self.position), **self._identity()}

    def change_shares(self, table: ShareTable) -> None:
        """Draw by another table from the next sample on; nothing of the stream may be read ahead."""
        self._shares = self._shares.changed(table, self.position)
        self._order = replace(self._order, mixing=self._shares.mixture)

    def restore(self, state: State, table: ShareTable | None = None) -> None:
        """Go on at a saved state; O(shards) and one window of each source, whatever the position.

        With another `table` than the state's, that one is in force from here on. None means the stream's own.

        Raises:
            DataError: the state belongs to other data, another order, or is damaged; nothing has changed then.
        """
        check_identity(state, self._identity(), self.parts)
        changed = change_of_tombstones(state, self.tombstones, self.parts)
        try:
            # everything is built and checked before the first assignment: a refused state changes nothing
            lost = tuple(Damage(int(source), int(shard), bool(counted)) for source, shard, counted in state["lost"])
            sources = self._open_sources(lost)
            left_out = merged((int(first), int(end)) for first, end in state["left_out"])
            progress = progress_of(state, sources)
            # what was drawn stays; another table is in force from here on
            shares = (replace(self._shares, table=table) if table else self._shares).restored(state)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"the saved loader state is damaged: {error}", "the state as saved", "resume from another checkpoint"
            ) from error
        self._lost, self._shares, self._progress = lost, shares, progress
        self._order = MixedOrder(sources, shares.mixture, self._join(), left_out)
        if changed:
            _log.warning("changed since this run was started: %s", changed)

    def clone(self) -> Stream:
        """Return another stream that stands where this one does, over the same opened data sets, for another thread."""
        # orders remember blocks and windows, which no two threads may write; everything else never changes in place
        other = copy.copy(self)
        other._order = replace(self._order, sources=self._open_sources(self._lost), joined=self._join())
        return other

    def _passed_over(self, before: Progress, samples: Samples, after: Cursor) -> tuple[int, ...]:
        """Return `Progress.passed_over` after the samples that were taken between two positions."""
        if len(self.parts) == 1 or not (self._lost or self.left_out):
            return before.passed_over
        # positions passed less samples taken, (K,)
        counts, taken_K = self._order.mixing.counts, np.bincount(samples.sources_N, minlength=len(self.parts))
        passed_K = counts(after.position) - counts(before.cursor.position) - taken_K
        return tuple((np.array(before.passed_over) + passed_K).tolist())

    def _next(self, count: int) -> Samples:
        return self._order.take(self._progress.cursor, count)[0]

    def _open_sources(self, lost: tuple[Damage, ...]) -> tuple[Source, ...]:
        """Return the sources without the shards that are lost, sharing nothing but the opened data sets."""
        samplers = [self._sampler(part) for part in self.parts]
        if any(part.objective is not None for part in self.parts):
            samplers = completed(samplers)
        return tuple(
            Source(number, part, sampler, self._make_order(part, source_seed(self.seed, part.name)), lost)
            for number, (part, sampler) in enumerate(zip(self.parts, samplers, strict=True))
        )

    def _join(self) -> JoinedSampler | None:
        """Return one sampler for all sources of a mixture, where the objective allows it."""
        if len(self.parts) == 1 or not JoinedSampler.serves(self.objective, self.packing):
            return None
        seeds = [source_seed(self.seed, part.name) for part in self.parts]
        sets = [part.dataset for part in self.parts]
        return JoinedSampler(sets, self.sequence_length, seeds, self.attention, self.objective)

    def _sampler(self, part: WeightedDataset) -> Sampler:
        given = part.dataset, self.sequence_length, source_seed(self.seed, part.name), self.attention
        if part.objective is not None:
            return replayed_sampler(*given, part.objective, self.objective)
        return make_sampler(*given, self.packing, self.objective)

    def _make_order(self, part: WeightedDataset, seed: int) -> Callable[[CountRows], Order]:
        """Return the function that makes the order of a source, given one that counts the rows of shards."""
        given: dict[str, Any] = {"seed": seed, "window_shards": self.window_shards}
        if not self.row_lengths:
            return partial(SampleOrder, part.dataset.num_shards, **given)
        lengths_of = partial(needed_lengths, part.dataset, self.row_lengths, self.sequence_length)
        given |= {"lengths_of": lengths_of, "step_samples": self.batches.largest}
        return partial(LengthOrder, part.dataset.num_shards, **given)

    def _identity(self) -> State:
        identity = {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "window_shards": self.window_shards,
            "attention": self.attention,
            "packing": self.packing,
            "objective": f"{self.objective.name} {short_hash(self.objective.model_dump())}",
        }
        if self.row_lengths:
            identity |= {"row_lengths": list(self.row_lengths), "length_order": LENGTH_ORDER_VERSION}
        return identity | (identity_of_mixture(self.parts) if len(self.parts) > 1 else {})
