"""Parameter groups of one pipeline stage: by weight decay, division over tensor ranks, ties, optimizer and rate.

Split and replicated parameters are apart so that the gradient norm counts every element once, and a tied weight's own
group lets ZeRO cut its optimizer state alike on all of its stages (see `ParameterGroup`). Hyperparameters are recorded
by parameter name, so a checkpoint never depends on the number or order of groups.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch

from engine.config.adapter_targets import MARK
from engine.config.parameter_patterns import matches, rate_factors, trained_since
from engine.config.schema.optimizer import OptimizerConfig
from engine.config.schema.stage import RunStage
from engine.optim.muon import Muon
from engine.parallel.sharding import ParameterSpec
from engine.parallel.state import ParameterGroup

FROZEN = -1
"""In the place of the run stage since which a parameter is trained."""


def weight_decay(name: str, config: OptimizerConfig) -> float:
    """Return the weight decay of one parameter, by its logical name."""
    return 0.0 if matches(name, config.no_decay) else config.weight_decay


def by_muon(spec: ParameterSpec, config: OptimizerConfig) -> bool:
    """Return True if Muon updates a parameter: the matrix of a linear layer; not embeddings, heads, norms, biases or
    adapters."""
    is_linear = len(spec.shape) == 2 and spec.sharding.role in ("column", "row")
    return config.name == "muon" and is_linear and MARK not in spec.name


def parameter_groups(
    specs: Iterable[ParameterSpec],
    config: OptimizerConfig,
    tied: Mapping[str, tuple[int, ...]] | None = None,
    partial: Container[str] = (),
    run_stages: Sequence[RunStage] = (),
    number: int = 0,
) -> list[ParameterGroup]:
    """Divide the stage's parameters into groups, none of them empty.

    `tied` gives the stages of parameters that other stages hold too; ties of different stages share no group. Each
    tensor rank computes a part of the gradient of `partial` ones. Parameters of one group have the same factor of the
    learning rate in each of the `run_stages`, so that groups stay as they are from one to the next.
    Frozen ones in run stage `number` are groups of their own, and so are those that have been trained since another run
    stage: their moments have seen another number of updates.
    """
    stages = tied or {}
    grouped: dict[tuple[float, bool, tuple[int, ...], bool, bool, tuple[float, ...], int], list[ParameterSpec]] = {}
    for spec in specs:
        key = (
            weight_decay(spec.name, config),
            spec.sharding.dim is None,
            stages.get(spec.name, ()),
            spec.name in partial,
            by_muon(spec, config),
            rate_factors(spec.name, run_stages),
            _since(spec.name, run_stages, number),
        )
        grouped.setdefault(key, []).append(spec)
    for (_, _, holders, *_), members in grouped.items():
        if holders:
            # A stage's own order of parameters depends on its chunks; by name their offsets are equal on all stages.
            members.sort(key=lambda spec: spec.name)
    # Sorted by key, so that the groups of tied weights come in one order on all stages: their gradients are summed by
    # one collective per group (`WholeGradients`).
    return [
        ParameterGroup(
            tuple(members), decay, replicated, holders, summed, matrices, factors, None if since == FROZEN else since
        )
        for (decay, replicated, holders, summed, matrices, factors, since), members in sorted(grouped.items())
    ]


def _since(name: str, run_stages: Sequence[RunStage], number: int) -> int:
    """Return `trained_since`, or `FROZEN`, so that groups can be sorted."""
    since = trained_since(name, run_stages, number) if run_stages else 0
    return FROZEN if since is None else since


def make_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.AdamW:
    """Make AdamW or Muon over groups that carry their own weight decay."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate,  # replaced before every step (`StageEngine.step`)
        "betas": (config.beta1, config.beta2),
        "eps": config.epsilon,
        "weight_decay": config.weight_decay,
        "fused": True,
    }
    if config.name == "muon":
        return Muon(groups, config.momentum, **settings)
    return torch.optim.AdamW(groups, **settings)
