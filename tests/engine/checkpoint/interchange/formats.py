"""A run of ours with moments, for conversions to other formats and back."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.checkpoint.load import load_shards, open_checkpoint
from engine.checkpoint.manifest import WEIGHT
from engine.config.schema.run import RunConfig
from engine.parallel.sharding import ParameterSpec
from engine.parallel.state import ParameterShard
from tests.engine.models.tiny import random_weights
from tests.engine.serve.runs import run_config, save

STEP = 5
MOMENTS = ("exp_avg", "exp_avg_sq")
States = dict[str, dict[str, torch.Tensor]]


def save_run(folder: Path, form: str, **sizes: int) -> tuple[RunConfig, States]:
    """A run folder with one checkpoint; its weights and moments by state and parameter."""
    config = run_config(folder, form, folder / "tokenizer")
    config = config.model_copy(update={"model": config.model.model_copy(update=sizes)})
    states = {moment: random_weights(config.model, seed) for seed, moment in enumerate(MOMENTS, start=1)}
    states["exp_avg_sq"] = {name: value**2 for name, value in states["exp_avg_sq"].items()}
    save(config, STEP, 0, moments=states)
    return config, {WEIGHT: random_weights(config.model, 0)} | states


def states_of(path: Path) -> States:
    """Weights and moments of a checkpoint of ours, by the load that training uses."""
    manifest = open_checkpoint(path)
    found: States = {state: {} for state in (WEIGHT, *manifest.moments)}
    for name, spec in manifest.specs.items():
        whole = ParameterSpec(name, spec.stored_shape)
        numel = int(torch.Size(spec.stored_shape).numel())
        moments = {moment: torch.empty(numel) for moment in manifest.placements[name].moments if manifest.moments}
        shard = ParameterShard(whole, 0, torch.empty(numel), moments)
        load_shards(path, manifest, [shard])
        found[WEIGHT][name] = shard.weight.view(whole.shape)
        for moment, values in shard.moments.items():
            found[moment][name] = values.view(whole.shape)
    return found


def check_equal(found: States, expected: States) -> None:
    """Assert that both have the same states of the same parameters, bit for bit."""
    assert found.keys() == expected.keys()
    for state, values in expected.items():
        assert found[state].keys() == values.keys(), state
        for name, value in values.items():
            assert torch.equal(found[state][name], value), f"{state} {name}"
