"""Rules of the layout: pipeline, ZeRO, the memory that a layout saves, and the axes along a row's tokens.

Part of `engine.config.resolve`, which reports every problem at once.
"""

from __future__ import annotations

from engine.config.objectives import row_lengths
from engine.config.schema.model import ModelConfig
from engine.config.schema.parallel import ParallelConfig
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import RunStage
from engine.errors import ConfigError, PalimpsestError


def check_pipeline(model: ModelConfig, parallel: ParallelConfig, problems: list[PalimpsestError]) -> None:
    """Add every rule of the pipeline that the configuration breaks."""
    pipe, chunks_per_stage, num_layers = parallel.pipe, parallel.chunks_per_stage, model.num_layers
    if parallel.schedule == "zb-h1" and not parallel.reduces_per_step:
        problems.append(
            ConfigError(
                "parallel.schedule = zb-h1 with ZeRO-2 or 3 that reduces per micro-batch: DeepSpeed takes every "
                "weight's gradient inside the backward pass, finds None where zb-h1 puts it off, and ends the first "
                "backward pass of the first step with an AttributeError (measured under both)",
                "zb-h1 with zero_stage 0 or 1, or with reduce step",
                "set parallel.reduce=step, or another schedule",
            )
        )
    if pipe > num_layers:
        problems.append(
            ConfigError(f"parallel.pipe = {pipe} is more than model.num_layers = {num_layers}", f"1 to {num_layers}")
        )
    if chunks_per_stage == 1:
        return
    if pipe == 1:
        problems.append(
            ConfigError(
                f"parallel.chunks_per_stage = {chunks_per_stage} with parallel.pipe = 1",
                "chunks_per_stage 1 without a pipeline",
                "leave it out, or set parallel.pipe to 2 or more",
            )
        )
    elif pipe <= num_layers < pipe * chunks_per_stage:
        problems.append(
            ConfigError(
                f"parallel.pipe = {pipe} x parallel.chunks_per_stage = {chunks_per_stage} are more chunks than "
                f"model.num_layers = {num_layers}",
                f"chunks_per_stage 1 to {num_layers // pipe} with this pipe",
            )
        )
    if parallel.schedule != "1f1b":
        problems.append(
            ConfigError(
                f"parallel.chunks_per_stage = {chunks_per_stage} with parallel.schedule = {parallel.schedule}",
                "schedule 1f1b, which interleaves the chunks",
                "set parallel.schedule=1f1b or parallel.chunks_per_stage=1",
            )
        )


def check_zero(parallel: ParallelConfig, problems: list[PalimpsestError]) -> None:
    """Add every rule of gathers and reductions that the configuration breaks."""
    zero_stage = parallel.zero_stage
    if parallel.gather is not None and zero_stage < 3:
        problems.append(
            ConfigError(
                f"parallel.gather = {parallel.gather} with parallel.zero_stage = {zero_stage}: weights stay whole",
                "gather with zero_stage 3",
                "leave it out, or set parallel.zero_stage=3",
            )
        )
    within = parallel.gather_within
    if within is not None and (zero_stage < 3 or parallel.gathers_per_step):
        why = "weights stay whole" if zero_stage < 3 else "each weight is gathered once"
        problems.append(
            ConfigError(
                f"parallel.gather_within = {within} with parallel.zero_stage = {zero_stage} and parallel.gather = "
                f"{parallel.gather}: {why}",
                "gather_within with zero_stage 3 that gathers for every micro-batch",
                "leave it out" if zero_stage == 3 else "leave it out, or set parallel.zero_stage=3",
            )
        )
    if parallel.reduce == "micro_batch" and zero_stage < 2:
        problems.append(
            ConfigError(
                f"parallel.reduce = micro_batch with parallel.zero_stage = {zero_stage}: gradients stay whole",
                "reduce step with zero_stage 0 and 1, step or micro_batch with 2 and 3",
                "leave it out, or set parallel.zero_stage=2: ZeRO-1 that reduces per micro-batch",
            )
        )


def check_gather_within(parallel: ParallelConfig, zero_size: int, problems: list[PalimpsestError]) -> None:
    """Add the rule that the ranks which ZeRO shards over (data x sequence) fall into several equal parts."""
    within = parallel.gather_within
    if within is not None and (zero_size % within or zero_size == within):
        parts = [size for size in range(2, zero_size) if zero_size % size == 0]
        problems.append(
            ConfigError(
                f"parallel.gather_within = {within} does not cut the {zero_size} data x sequence ranks into several "
                "equal parts",
                f"one of {', '.join(map(str, parts))}" if parts else "no gather_within with so few ranks",
                "change it, or leave it out: then every gather goes over all ranks",
            )
        )


def check_recompute(config: RunConfig, problems: list[PalimpsestError]) -> None:
    """Add the rules of recomputation: a number of layers or a budget of bytes, where layers recompute at all."""
    parallel = config.parallel
    given = [key for key in ("recompute_layers", "activation_gib") if getattr(parallel, key) is not None]
    if given and parallel.recompute == "none":
        problems.append(
            ConfigError(
                f"parallel.{given[0]} = {getattr(parallel, given[0])} with parallel.recompute = none",
                "recompute selective or full with it",
                f"set parallel.recompute=full, or leave {given[0]} out",
            )
        )
    if len(given) > 1:
        problems.append(
            ConfigError("parallel.recompute_layers and parallel.activation_gib", "one of them", "leave one out")
        )


def check_offload(config: RunConfig, problems: list[PalimpsestError]) -> None:
    """Add the rules of offloading: ZeRO shards the state, and the host can update it."""
    if config.parallel.offload == "none":
        return
    if config.parallel.zero_stage == 0:
        problems.append(
            ConfigError(
                "parallel.offload = optimizer with parallel.zero_stage = 0: DeepSpeed offloads the copies that ZeRO "
                "makes, and there are none",
                "zero_stage 1, 2 or 3 with offload",
                "set parallel.zero_stage=1: the same numbers",
            )
        )
    if config.optimizer.name == "muon":
        problems.append(
            ConfigError(
                "parallel.offload = optimizer with optimizer.name = muon: matrices are orthogonalised on the "
                "accelerator, and ranks exchange their pieces there",
                "offload with adamw",
                "leave parallel.offload out",
            )
        )


def check_sequence(key: str, stage: RunStage, config: RunConfig, problems: list[PalimpsestError]) -> None:
    """Add the rule that the ranks which share a row's tokens divide its length.

    A decoder's rows need no rule: they are filled up (`engine.config.objectives.held_lengths`).
    """
    parallel = config.parallel
    ranks, length = parallel.sequence_ranks, row_lengths(stage).tokens
    lengths = {f"{key}.sequence_length": length}
    lengths |= {f"{key}.data.row_lengths.{number}": one for number, one in enumerate(stage.data.row_lengths)}
    for name, length in lengths.items():
        if length % ranks == 0:
            continue
        problems.append(
            ConfigError(
                f"{name} = {length} does not divide by the {ranks} ranks that share the time of a row "
                f"(parallel.sequence = {parallel.sequence}, {parallel.shared_by} tensor ranks by sequence_parallel)",
                f"a multiple of {ranks}",
                "change the length, parallel.sequence or parallel.tensor",
            )
        )


def check_heads(config: RunConfig, problems: list[PalimpsestError]) -> None:
    """Add the rule that the ranks of the sequence axis divide the heads of a tensor rank, for attention."""
    model, parallel = config.model, config.parallel
    if parallel.sequence > 1 and model.num_kv_heads % (parallel.tensor * parallel.sequence):
        ranks = f"tensor {parallel.tensor} x sequence {parallel.sequence}"
        problems.append(
            ConfigError(
                f"parallel.sequence = {parallel.sequence}: {ranks} does not divide the {model.num_kv_heads} "
                "key/value heads of the model",
                f"tensor x sequence a divisor of {model.num_kv_heads}",
                "change parallel.sequence, parallel.tensor or model.num_kv_heads",
            )
        )
