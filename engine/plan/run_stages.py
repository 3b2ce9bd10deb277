"""The pipeline's cut and the layers that recompute, chosen once for all run stages of a run. Pure arithmetic.

The model is built once, so neither can change from one run stage to the next. The cut is balanced for the rows of the
run stage that needs the most memory. The layers that recompute are as many as the most demanding run stage needs under
that cut. Training asks here as the plan does.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from engine.config.kept_moments import kept_moments
from engine.config.objectives import RowLengths, has_segments, held_lengths, row_lengths
from engine.config.resolve import Layout, num_micro_batches
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import RunStage
from engine.plan.cut import ModelChunk, entries_of, layers_of, stage_chunks, tied_stages
from engine.plan.frozen import frozen_entries, layers_kept
from engine.plan.hardware import GIB
from engine.plan.memory import Memory, activation_bytes, stage_memory
from engine.plan.parts import Device
from engine.plan.pipeline import in_flight

StageChunks = Sequence[Sequence[ModelChunk]]
"""Chunks of every pipeline stage."""


@dataclass(frozen=True)
class PipelineCut:
    """Assignment of the model to the pipeline stages, the same in every run stage."""

    chunks: StageChunks
    recomputed: tuple[Sequence[int], ...]
    """Global numbers of the layers of each pipeline stage that recompute their activations."""
    ties: Mapping[str, tuple[int, ...]]
    """Pipeline stages of every parameter that several of them hold, by logical name."""


def pipeline_cut(config: RunConfig, layout: Layout, device: Device) -> PipelineCut:
    """Return the cut of a run in a layout that `resolve` or `examine` gave.

    `device` is what the ranks compute on; it has no part in the choice of the chunks, which `plan` and training on any
    device have in common.
    """
    lengths = cut_lengths(config, layout)
    chunks = stage_chunks(config.model, layout.pipe, config.parallel.chunks_per_stage, lengths)
    return PipelineCut(
        chunks=chunks,
        recomputed=_recomputed(config, layout, chunks, device),
        ties=tied_stages(config.model, layout.pipe, config.parallel.chunks_per_stage, lengths),
    )


@lru_cache(maxsize=1024)
def cut_lengths(config: RunConfig, layout: Layout) -> RowLengths:
    """Return the row lengths that the pipeline is cut for: those of the run stage that needs the most memory.

    What a run stage needs depends on the cut: another one moves layers, and with them weights and moments, between
    ranks. So a cut is wanted under which the run stage that it is made for does need the most; of several such cuts the
    one that needs the least, and where there is none, the one that needs the least of all. Where the fullest ranks of
    two run stages need the same, the memory of all ranks decides.
    """
    lengths = list(dict.fromkeys(row_lengths(run_stage) for run_stage in config.stages))
    if len(lengths) == 1 or layout.pipe * config.parallel.chunks_per_stage == 1:
        return lengths[0]

    def rating(tried: RowLengths) -> tuple[bool, tuple[int, int]]:
        needed = _bytes_needed(config, layout, tried)
        most = max(needed.values())
        # False first: cuts under which the run stage that they are made for is the one that needs the most.
        return needed[tried] < most, most

    return min(lengths, key=rating)


def recomputed_layers(config: RunConfig, layout: Layout, stage: int, device: Device) -> Sequence[int]:
    """Return the global numbers of the layers of a pipeline stage that recompute their activations on a device.

    As in Megatron-LM's block method these are the first layers of the stage; the others keep everything.
    """
    return pipeline_cut(config, layout, device).recomputed[stage]


def pipeline_memory(
    config: RunConfig,
    run_stage: RunStage,
    layout: Layout,
    chunks: StageChunks,
    recomputed: Sequence[Sequence[int]],
    device: Device,
) -> list[Memory]:
    """Return the memory of one rank of every pipeline stage during a run stage."""
    muon = config.optimizer.name == "muon"
    entries_by_stage = [entries_of(config.model, held) for held in chunks]
    return [
        stage_memory(
            config.model,
            config.parallel,
            config.precision,
            entries,
            layers=layers_of(held),
            recomputed=recomputed[stage],
            data_size=layout.data * layout.sequence,
            lengths=held_lengths(run_stage, config.parallel),
            segments=has_segments(run_stage.data.attention, run_stage.objective),
            in_flight=_alive(config, run_stage, layout, stage, len(held)),
            has_head=any(chunk.last for chunk in held),
            device=device,
            single_moments=trained_matrices(config, run_stage, layout, held) if muon else 0,
            added_moments=len(kept_moments(config, run_stage)),
            soft_targets=_soft_targets(config, run_stage, layout) if any(chunk.last for chunk in held) else 0,
            frozen=frozen_entries(config.model, tuple(held), run_stage.freeze).local_numel(layout.tensor),
            kept=layers_kept(config.model, held, run_stage.freeze),
        )
        for stage, (held, entries) in enumerate(zip(chunks, entries_by_stage, strict=True))
    ]


def _soft_targets(config: RunConfig, run_stage: RunStage, layout: Layout) -> int:
    """Return the likeliest tokens that a rank with the head keeps of a step: some of each prediction of its rows."""
    distillation, parallel = run_stage.regularization.distillation, config.parallel
    if distillation is None:
        return 0
    micro_batches = num_micro_batches(run_stage.batches.largest, parallel, layout.data)
    predicted = held_lengths(run_stage, parallel).predicted // layout.sequence
    return micro_batches * parallel.micro_batch_size * predicted * distillation.top_k


def trained_matrices(config: RunConfig, run_stage: RunStage, layout: Layout, held: Sequence[ModelChunk]) -> int:
    """Return the local elements of a pipeline stage that Muon would update during a run stage."""
    frozen = frozen_entries(config.model, tuple(held), run_stage.freeze)
    return entries_of(config.model, held).linear.local_numel(layout.tensor) - frozen.linear.local_numel(layout.tensor)


def passes_alive(config: RunConfig, run_stage: RunStage, layout: Layout, stage: int, num_chunks: int) -> int:
    """Return the forward passes of a chunk that a pipeline stage keeps alive at the peak, in the largest batch."""
    micro_batches = num_micro_batches(run_stage.batches.largest, config.parallel, layout.data)
    return in_flight(config.parallel.schedule, stage, layout.pipe, num_chunks, micro_batches)


def _alive(config: RunConfig, run_stage: RunStage, layout: Layout, stage: int, num_chunks: int) -> Fraction:
    """Micro-batches of all layers of the pipeline stage that are alive: passes of chunks, divided by the chunks.

    Stage 0 of 4 with two chunks per stage holds 11 passes of a chunk, 5 1/2 micro-batches of its layers."""
    return Fraction(passes_alive(config, run_stage, layout, stage, num_chunks), num_chunks)


def _bytes_needed(config: RunConfig, layout: Layout, lengths: RowLengths) -> dict[RowLengths, tuple[int, int]]:
    """Return (bytes of the fullest GPU, sum over a GPU of every pipeline stage) by the row lengths of each run stage.

    The cut is the one for rows of `lengths`. Of run stages with equal rows the larger figures count."""
    chunks = stage_chunks(config.model, layout.pipe, config.parallel.chunks_per_stage, lengths)
    recomputed = _recomputed(config, layout, chunks, "cuda")
    needed: dict[RowLengths, tuple[int, int]] = {}
    for run_stage in config.stages:
        memory = pipeline_memory(config, run_stage, layout, chunks, recomputed, "cuda")
        totals = [rank.total for rank in memory]
        own = row_lengths(run_stage)
        needed[own] = max(needed.get(own, (0, 0)), (max(totals), sum(totals)))
    return needed


def _recomputed(config: RunConfig, layout: Layout, chunks: StageChunks, device: Device) -> tuple[Sequence[int], ...]:
    """Return the layers of every pipeline stage that recompute: the most that any run stage needs."""
    found = []
    for stage, held in enumerate(chunks):
        counts = (_num_recomputed(config, run_stage, layout, stage, held, device) for run_stage in config.stages)
        # The first layers, so that the ones of the less demanding run stages are among those of the most demanding one.
        found.append(layers_of(held)[: max(counts)])
    return tuple(found)


def _num_recomputed(
    config: RunConfig, run_stage: RunStage, layout: Layout, stage: int, held: Sequence[ModelChunk], device: Device
) -> int:
    """Return the number of layers of a pipeline stage that a run stage alone would recompute."""
    parallel, layers = config.parallel, layers_of(held)
    if parallel.recompute == "none":
        return 0
    if parallel.activation_gib is None:
        wanted = parallel.recompute_layers
        return len(layers) if wanted is None else min(wanted, len(layers))
    lengths = held_lengths(run_stage, parallel)
    segments = has_segments(run_stage.data.attention, run_stage.objective)
    alive = _alive(config, run_stage, layout, stage, len(held))
    budget = parallel.activation_gib * GIB

    def fits(count: int) -> bool:
        """Return True if the activations keep to the budget with so many layers recomputed.

        Monotone, so a bisection finds the fewest: each layer more spares at least what its second run adds, as no
        fewer than one micro-batch is alive.
        """
        needed = activation_bytes(
            config.model, parallel, config.precision, layers, layers[:count], lengths, segments, alive, device
        )
        return needed <= budget

    return bisect_left(range(len(layers)), True, key=fits)
