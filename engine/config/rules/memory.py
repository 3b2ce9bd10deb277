"""Rules of what a layout does about memory and of the axes along a row's time: part of `engine.config.resolve`."""

from __future__ import annotations

from engine.config.objectives import row_lengths
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import RunStage
from engine.errors import ConfigError, PalimpsestError


def check_recompute(config: RunConfig, problems: list[PalimpsestError]) -> None:
    """A number of layers or a budget of bytes says how many layers recompute: one of them, and how."""
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
    """Optimizer state in host memory is what ZeRO shards, and what the host can update."""
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


def check_time(key: str, stage: RunStage, config: RunConfig, problems: list[PalimpsestError]) -> None:
    """Ranks that share the time of a row divide its length. That of a decoder's rows follows from it: they are filled
    up (`engine.config.objectives.held_lengths`)."""
    parallel = config.parallel
    ranks, length = parallel.time_ranks, row_lengths(stage).tokens
    if length % ranks:
        problems.append(
            ConfigError(
                f"{key}.sequence_length = {length} does not divide by the {ranks} ranks that share the time of a row "
                f"(parallel.sequence = {parallel.sequence}, {parallel.shared_by} tensor ranks by sequence_parallel)",
                f"a multiple of {ranks}",
                "change the length, parallel.sequence or parallel.tensor",
            )
        )


def check_heads(config: RunConfig, problems: list[PalimpsestError]) -> None:
    """Ranks of the sequence axis share the heads of a tensor rank while they see whole rows."""
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
