"""Rules of an adapter: its targets are there, and its method fits the model, the layout and the rows.

Part of `engine.config.resolve`, which reports every problem at once.
"""

from __future__ import annotations

import fnmatch

from engine.config.adapter_targets import all_targets, parts_of
from engine.config.objectives import OBJECTIVES
from engine.config.schema.adapter import (
    AdaLoRAConfig,
    BottleneckConfig,
    PrefixConfig,
    TargetedAdapter,
    VirtualTokensConfig,
)
from engine.config.schema.model import ModelConfig
from engine.config.schema.run import RunConfig
from engine.config.virtual_tokens import METHODS_WITHOUT, text_positions
from engine.errors import ConfigError, PalimpsestError


def check_adapter(model: ModelConfig, problems: list[PalimpsestError]) -> None:
    """Add the rules of a model's adapter that hold in every run."""
    if isinstance(model.adapter, TargetedAdapter):
        _check_targets(model, model.adapter, problems)
    if isinstance(model.adapter, VirtualTokensConfig):
        _check_form(model, model.adapter, problems)


def _check_targets(model: ModelConfig, adapter: TargetedAdapter, problems: list[PalimpsestError]) -> None:
    if isinstance(adapter, BottleneckConfig):
        parts = parts_of(model)
        problems += [
            ConfigError(
                f"model.adapter.targets: the pattern {pattern!r} matches no part of a layer",
                ", ".join(parts),
                "correct the pattern",
            )
            for pattern in adapter.targets
            if not fnmatch.filter(parts, pattern)
        ]
        return
    targets = all_targets(model)
    problems += [
        ConfigError(
            f"model.adapter.targets: the pattern {pattern!r} matches no matrix of a layer",
            ", ".join(target.key for target in targets),
            "correct the pattern; forms whose files have queries, keys and values in one matrix have qkv",
        )
        for pattern in adapter.targets
        if not any(target.matches(pattern) for target in targets)
    ]


def _check_form(model: ModelConfig, adapter: VirtualTokensConfig, problems: list[PalimpsestError]) -> None:
    """Add the rules of virtual tokens: rows of one text, whose attention can see all of them."""
    if model.family == "t5":
        problems.append(
            ConfigError(
                f"model.adapter.method = {adapter.method} with model.family = t5: an encoder-decoder has two rows that "
                "virtual tokens could stand in front of",
                "a model of family bert or gpt",
                f"use {METHODS_WITHOUT}",
            )
        )
    elif isinstance(adapter, PrefixConfig) and any(model.reach(n) is not None for n in range(model.num_layers)):
        problems.append(
            ConfigError(
                "model.adapter.method = prefix with local attention: tokens of such a layer see those near them, and a "
                "prefix is near the first ones alone",
                "a model whose layers all see whole rows",
                f"use {METHODS_WITHOUT}",
            )
        )


def check_rank_allocation(config: RunConfig, problems: list[PalimpsestError]) -> None:
    """Add the rules of AdaLoRA: a schedule over one run stage, and gradients that no other method changes."""
    adapter = config.model.adapter
    if not isinstance(adapter, AdaLoRAConfig):
        return
    method = "model.adapter.method = adalora"
    if adapter.rank >= adapter.initial_rank:
        problems.append(
            ConfigError(
                f"model.adapter.rank = {adapter.rank} with model.adapter.initial_rank = {adapter.initial_rank}",
                "a mean rank at the end that is lower than the initial one",
                "raise model.adapter.initial_rank (theirs is 1.5 times the rank), or use lora",
            )
        )
    if adapter.warmup_share + adapter.final_share >= 1:
        problems.append(
            ConfigError(
                f"model.adapter.warmup_share = {adapter.warmup_share} and model.adapter.final_share = "
                f"{adapter.final_share} leave no steps in which ranks are chosen",
                "shares whose sum is below 1",
                "lower one of them",
            )
        )
    if len(config.stages) > 1:
        problems.append(
            ConfigError(
                f"{method} with {len(config.stages)} run stages: its schedule runs over one",
                "one run stage",
                "use lora, or leave out what makes several run stages, such as unfreezing",
            )
        )
    elif any(run_stage.regularization.mixout is not None for run_stage in config.stages):
        problems.append(
            ConfigError(
                f"{method} with stages.0.regularization.mixout: both change the gradients of a step",
                "one of them",
                "remove stages.0.regularization.mixout, or use lora",
            )
        )


def check_virtual_tokens(config: RunConfig, problems: list[PalimpsestError]) -> None:
    """Add the rules that join virtual tokens with the layout, and with the rows of each run stage."""
    adapter, model = config.model.adapter, config.model
    if not isinstance(adapter, VirtualTokensConfig):
        return
    method = f"model.adapter.method = {adapter.method}"
    if config.parallel.sequence > 1:
        problems.append(
            ConfigError(
                f"{method} with parallel.sequence = {config.parallel.sequence}: the ranks that share a row would each "
                "put virtual tokens in front of their slice of it",
                "parallel.sequence 1",
                f"use tensor, pipe or ZeRO, or {METHODS_WITHOUT}",
            )
        )
    if adapter.method == "prompt" and config.parallel.shared_by > 1:
        problems.append(
            ConfigError(
                f"{method} with parallel.sequence_parallel: tensor ranks hold equal slices of a row between the "
                "blocks, and a prompt makes rows longer behind the embedding",
                "parallel.sequence_parallel false",
                f"leave it out, or use prefix, {METHODS_WITHOUT}",
            )
        )
    for index, run_stage in enumerate(config.stages):
        name, longest = f"stages.{index}", text_positions(model)
        if not OBJECTIVES[run_stage.objective.name].is_task or run_stage.data.packing == "best_fit":
            problems.append(
                ConfigError(
                    f"{method} with {name}.objective = {run_stage.objective.name} and {name}.data.packing = "
                    f"{run_stage.data.packing}: rows hold several documents, and virtual tokens would stand in front "
                    "of the first one alone",
                    "a task, with packing concatenate: one example in a row",
                    f"leave {name}.data.packing out, or use {METHODS_WITHOUT}",
                )
            )
        if run_stage.replayed_objective is not None:
            problems.append(
                ConfigError(
                    f"{method} with {name}.replay.objective: rows of text hold several documents, and virtual tokens "
                    "would stand in front of the first one alone",
                    "a task without replayed text",
                    f"leave {name}.replay out, or use {METHODS_WITHOUT}",
                )
            )
        if longest < run_stage.sequence_length <= model.longest_row:
            problems.append(
                ConfigError(
                    f"{name}.sequence_length = {run_stage.sequence_length} with model.adapter.virtual_tokens = "
                    f"{adapter.virtual_tokens} is more than the {model.longest_row} positions of the model",
                    f"1 to {longest}" if longest > 0 else f"fewer virtual tokens than {model.longest_row}",
                    f"shorten {name}.sequence_length, or take fewer virtual tokens",
                )
            )
