"""Parameter groups of one pipeline stage: by weight decay, division over tensor ranks, ties, optimizer and rate.

Split and replicated parameters are apart so that the gradient norm counts every element once, and a tied weight's own
group lets ZeRO cut its optimizer state alike on all of its stages (see `ParameterGroup`). Hyperparameters are recorded
by parameter name, so a checkpoint never depends on the number or order of groups.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch

from engine.config.schema.optimizer import OptimizerConfig
from engine.config.schema.stage import RunStage
from engine.errors import ConfigError
from engine.optim.muon import Muon
from engine.parallel.sharding import ParameterSpec
from engine.parallel.state import ParameterGroup


def weight_decay(name: str, config: OptimizerConfig) -> float:
    """Return the weight decay of one parameter, by its logical name."""
    exempt = any(fnmatch.fnmatchcase(name, pattern) for pattern in config.no_decay)
    return 0.0 if exempt else config.weight_decay


def rate_factors(name: str, run_stages: Sequence[RunStage]) -> tuple[float, ...]:
    """Return the factor of the learning rate of one parameter, by its logical name, in each run stage."""
    # Factors of all matching patterns multiply, so that their order in the file does not matter.
    return tuple(
        math.prod(
            factor for pattern, factor in run_stage.learning_rate_factors.items() if fnmatch.fnmatchcase(name, pattern)
        )
        for run_stage in run_stages
    )


def refuse_unmatched(run_stages: Sequence[RunStage], names: Iterable[str]) -> None:
    """Refuse a pattern that matches none of the model's parameters.

    Raises:
        ConfigError: naming each such pattern.
    """
    known = list(names)
    unmatched = [
        f"stages.{number}.learning_rate_factors: the pattern {pattern!r} matches no parameter"
        for number, run_stage in enumerate(run_stages)
        for pattern in run_stage.learning_rate_factors
        if not fnmatch.filter(known, pattern)
    ]
    if unmatched:
        raise ConfigError(
            "\n  ".join(unmatched),
            f"patterns of parameters' names, such as {known[0]}, {known[-1]}",
            "correct the pattern: `layers.0.*` means the first layer",
        )


def by_muon(spec: ParameterSpec, config: OptimizerConfig) -> bool:
    """Return True if Muon updates a parameter: the matrix of a linear layer; not embeddings, heads, norms or biases."""
    return config.name == "muon" and len(spec.shape) == 2 and spec.sharding.role in ("column", "row")


def parameter_groups(
    specs: Iterable[ParameterSpec],
    config: OptimizerConfig,
    tied: Mapping[str, tuple[int, ...]] | None = None,
    partial: Container[str] = (),
    run_stages: Sequence[RunStage] = (),
) -> list[ParameterGroup]:
    """Divide the stage's parameters into groups, none of them empty.

    `tied` gives the stages of parameters that other stages hold too; ties of different stages share no group. Each
    tensor rank computes a part of the gradient of `partial` ones. Parameters of one group have the same factor of the
    learning rate in each of the `run_stages`, so that groups stay as they are from one to the next.
    """
    stages = tied or {}
    grouped: dict[tuple[float, bool, tuple[int, ...], bool, bool, tuple[float, ...]], list[ParameterSpec]] = {}
    for spec in specs:
        key = (
            weight_decay(spec.name, config),
            spec.sharding.dim is None,
            stages.get(spec.name, ()),
            spec.name in partial,
            by_muon(spec, config),
            rate_factors(spec.name, run_stages),
        )
        grouped.setdefault(key, []).append(spec)
    for (_, _, holders, _, _, _), members in grouped.items():
        if holders:
            # A stage's own order of parameters depends on its chunks; by name their offsets are equal on all stages.
            members.sort(key=lambda spec: spec.name)
    # Sorted by key, so that the groups of tied weights come in one order on all stages: their gradients are summed by
    # one collective per group (`WholeGradients`).
    return [
        ParameterGroup(tuple(members), decay, replicated, holders, summed, matrices, factors)
        for (decay, replicated, holders, summed, matrices, factors), members in sorted(grouped.items())
    ]


def make_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.AdamW:
    """Make AdamW or Muon over groups that carry their own weight decay."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.epsilon,
        "weight_decay": config.weight_decay,
        "fused": True,
    }
    if config.name == "muon":
        return Muon(groups, config.momentum, **settings)
    return torch.optim.AdamW(groups, **settings)
