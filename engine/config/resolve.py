"""Rules that join several fields, and the layout they lead to: every problem is found before any is reported.

`check` needs no world size and runs on a login node; `layout` adds the number of ranks. Nothing is written back
into the configuration: what follows from it is the value `Layout`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine.config.rules.adapter import check_rank_allocation, check_virtual_tokens
from engine.config.rules.checkpoint import check_keeping
from engine.config.rules.data import check_mixture
from engine.config.rules.evaluation import check_alarm, check_early_stopping, check_questions
from engine.config.rules.initial import check_initial
from engine.config.rules.model import check_model, divisors, listed
from engine.config.rules.objective import check_objective
from engine.config.rules.parallel import (
    check_gather_within,
    check_heads,
    check_offload,
    check_pipeline,
    check_recompute,
    check_sequence,
    check_zero,
)
from engine.config.rules.regularization import check_regularization
from engine.config.rules.reservoir import check_reservoir
from engine.config.rules.stage import check_optimizer, check_run_stages, check_schedule, check_stability, ramp_problems
from engine.config.rules.tables import check_replay, check_weights_table
from engine.config.schema.model import ModelConfig
from engine.config.schema.parallel import ParallelConfig
from engine.config.schema.run import LaunchConfig, RunConfig
from engine.config.schema.stage import RunStage
from engine.errors import ConfigError, PalimpsestError, report


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes for one world, outermost first."""

    pipe: int
    data: int
    sequence: int
    tensor: int

    @property
    def world_size(self) -> int:
        return self.pipe * self.data * self.sequence * self.tensor

    def __str__(self) -> str:
        return f"pipe {self.pipe} x data {self.data} x sequence {self.sequence} x tensor {self.tensor}"


def resolve(config: RunConfig, world_size: int, others: Sequence[PalimpsestError] = ()) -> Layout:
    """Return the layout of `config` on `world_size` ranks.

    `others` are problems that rules of higher rooms have found, for the same report.

    Raises:
        ConfigError: every rule that the configuration or the world breaks, in one report.
    """
    layout, problems = examine(config, world_size)
    if problems := [*problems, *others]:
        raise report(problems, f"this run cannot start on {world_size} rank{'s' if world_size > 1 else ''}")
    assert layout is not None
    return layout


def examine(config: RunConfig, world_size: int) -> tuple[Layout | None, list[PalimpsestError]]:
    """Return the layout on `world_size` ranks (None where none fits) and every rule that stands in its way."""
    problems = check(config)
    layout, others = find_layout(config, world_size)
    return layout, problems + others


def find_layout(config: RunConfig, world_size: int) -> tuple[Layout | None, list[PalimpsestError]]:
    """Return the layout on `world_size` ranks (None where none fits) and the broken rules that depend on it."""
    problems: list[PalimpsestError] = []
    layout = _layout(config.parallel, world_size, problems)
    if layout is not None:
        check_gather_within(config.parallel, layout.data * layout.sequence, problems)
        for index, stage in enumerate(config.stages):
            _check_batch(index, stage, config, layout.data, problems)
    return layout, problems


def check(config: RunConfig) -> list[PalimpsestError]:
    """Return every rule that the configuration breaks whatever the world size."""
    problems: list[PalimpsestError] = []
    check_model(config.model, problems)
    _check_parallel(config, problems)
    check_recompute(config, problems)
    check_offload(config, problems)
    check_heads(config, problems)
    check_virtual_tokens(config, problems)
    check_rank_allocation(config, problems)
    check_optimizer(config, problems)
    check_stability(config, problems)
    check_keeping(config, problems)
    check_alarm(config, problems)
    check_early_stopping(config, problems)
    check_questions(config, problems)
    check_initial(config, problems)
    _check_limits(config.launch, problems)
    for index, stage in enumerate(config.stages):
        check_sequence(f"stages.{index}", stage, config, problems)
        _check_stage(index, stage, config.model, problems)
    check_run_stages(config, problems)
    check_replay(config, problems)
    check_reservoir(config, problems)
    check_regularization(config, problems)
    return problems


def num_micro_batches(batch_size: int, parallel: ParallelConfig, data_size: int) -> int:
    """Return the micro-batches that each data rank runs in a step of `batch_size` samples.

    The last ones are filled up with padding rows, of weight 0 (`elastic.pad_batch`)."""
    # Rounded up: 10 samples in micro-batches of 2 on 3 ranks are 2 micro-batches each, with 2 rows of weight 0.
    return -(-batch_size // (parallel.micro_batch_size * data_size))


def _check_limits(launch: LaunchConfig, problems: list[PalimpsestError]) -> None:
    """Add the rule that collectives wait for longer than one rank may take to start or to save."""
    longest = max(launch.start_limit_seconds, launch.save_limit_seconds)
    if launch.collective_limit_seconds <= longest:
        problems.append(
            ConfigError(
                f"launch.collective_limit_seconds = {launch.collective_limit_seconds:g} with "
                f"launch.start_limit_seconds = {launch.start_limit_seconds:g} and "
                f"launch.save_limit_seconds = {launch.save_limit_seconds:g}: ranks would give up waiting for one that "
                "starts or saves",
                f"more than {longest:g} seconds",
                "raise launch.collective_limit_seconds, or lower the other two",
            )
        )


def _check_parallel(config: RunConfig, problems: list[PalimpsestError]) -> None:
    model, parallel = config.model, config.parallel
    check_pipeline(model, parallel, problems)
    check_zero(parallel, problems)
    divided = {"model.num_heads": model.num_heads}
    if model.num_kv_heads != model.num_heads:
        divided["model.num_kv_heads"] = model.num_kv_heads
    # Each of these is a dimension that tensor ranks split evenly: heads, feed-forward columns, vocabulary rows.
    divided |= {
        "model.feed_forward_size": model.feed_forward_size,
        "the padded vocabulary": model.padded_vocab_size,
    }
    undivided = [f"{key} = {value}" for key, value in divided.items() if value % parallel.tensor]
    if undivided:
        problems.append(
            ConfigError(
                f"parallel.tensor = {parallel.tensor} does not divide {' and '.join(undivided)}",
                # Whatever divides all of them divides their greatest common divisor.
                f"parallel.tensor one of {listed(divisors(math.gcd(*divided.values())))}",
                "change parallel.tensor or the model",
            )
        )
    if parallel.zero_stage == 0 and config.precision.dtype == "bf16":
        problems.append(
            ConfigError(
                "parallel.zero_stage = 0 with precision.dtype = bf16: DeepSpeed's wrapper for it computes a wrong "
                "gradient norm under a pipeline",
                "zero_stage 1, 2 or 3 with bf16, or zero_stage 0 with fp32",
                "set parallel.zero_stage=1: the same numbers, less memory",
            )
        )
    if config.precision.dtype == "fp32" and config.precision.reduce_dtype == "bf16":
        problems.append(
            ConfigError("precision.reduce_dtype = bf16 with precision.dtype = fp32", "fp32", "set reduce_dtype to fp32")
        )


def _check_stage(index: int, stage: RunStage, model: ModelConfig, problems: list[PalimpsestError]) -> None:
    key = f"stages.{index}"
    problems += [
        ConfigError(
            f"{key}.{name} is a key of task files", "a task file of `palimpsest finetune`", f"write {instead} here"
        )
        for name, instead in {"layer_decay": "learning_rate_factors", "unfreezing": "several stages"}.items()
        if getattr(stage, name) is not None
    ]
    if stage.sequence_length > model.longest_row:
        scaled = "" if model.longest_row == model.max_positions else " x model.rope_scaling.factor"
        problems.append(
            ConfigError(
                f"{key}.sequence_length = {stage.sequence_length} is more than "
                f"model.max_positions{scaled} = {model.longest_row}",
                f"1 to {model.longest_row}",
            )
        )
    check_mixture(key, stage.data, problems)
    check_weights_table(key, stage, problems)
    check_objective(key, stage, model, problems)
    # Neither or both; without a length the rules below cannot count steps.
    if (stage.duration.steps is None) == (stage.duration.tokens is None):
        problems.append(ConfigError(f"{key}.duration", "exactly one of steps and tokens"))
        return
    in_ramp = ramp_problems(key, stage)
    problems += in_ramp
    if not in_ramp:
        check_schedule(key, stage, problems)


def _layout(parallel: ParallelConfig, world_size: int, problems: list[PalimpsestError]) -> Layout | None:
    fixed = parallel.pipe * parallel.tensor * parallel.sequence
    # 0 where the world is too small for the other axes; the product then differs from the world as well.
    data = parallel.data or world_size // fixed
    if data < 1 or data * fixed != world_size:
        shape = f"pipe {parallel.pipe} x tensor {parallel.tensor}"
        if parallel.sequence > 1:
            shape += f" x sequence {parallel.sequence}"
        allowed = f"{data * fixed} ranks" if parallel.data else f"a multiple of {fixed} ranks"
        if parallel.data:
            shape += f" x data {parallel.data}"
        problems.append(
            ConfigError(f"a world of {world_size} does not fit {shape}", allowed, "change the world or the layout")
        )
        return None
    return Layout(pipe=parallel.pipe, data=data, sequence=parallel.sequence, tensor=parallel.tensor)


def _check_batch(
    index: int, stage: RunStage, config: RunConfig, data_size: int, problems: list[PalimpsestError]
) -> None:
    unit = config.parallel.micro_batch_size * data_size
    keys = {f"stages.{index}.batch_ramp.{n}.size": entry.size for n, entry in enumerate(stage.batch_ramp)}
    keys[f"stages.{index}.global_batch_size"] = stage.global_batch_size
    if config.elastic.pad_batch:
        # Padding evens out the last micro-batches, but a rank with padding rows alone has nothing to train on.
        if small := {key: size for key, size in keys.items() if size < data_size}:
            problems.append(
                ConfigError(
                    f"{_named(small)} leaves some of {data_size} data ranks without a sample",
                    f"at most {min(small.values())} data ranks",
                    "start fewer ranks, or use more of them for parallel.pipe or parallel.tensor",
                )
            )
    elif uneven := {key: size for key, size in keys.items() if size % unit}:
        is_no = "is no multiple" if len(uneven) == 1 else "are no multiples"
        problems.append(
            ConfigError(
                f"{_named(uneven)} {is_no} of micro_batch_size {config.parallel.micro_batch_size} x data {data_size}",
                f"a multiple of {unit}",
                "change parallel.micro_batch_size or the number of data ranks, or set elastic.pad_batch=true; the "
                "global batch belongs to the run",
            )
        )


def _named(sizes: dict[str, int]) -> str:
    return " and ".join(f"{key} = {size}" for key, size in sizes.items())
