"""Initial weights depend on seed and name alone, and are distributed as GPT-2's."""

from __future__ import annotations

import math

import pytest
import torch

from engine.models.gpt import specs
from engine.models.initial import initial_value


def by_name(config):
    return {spec.name: spec for spec in specs(config)}


def test_equal_for_equal_seed_and_name_whatever_the_padding(config):
    exact = by_name(config.model_copy(update={"vocab_multiple": 1}))
    for name, spec in by_name(config).items():
        value = initial_value(spec, config, seed=5)
        assert value.dtype == torch.float32
        assert tuple(value.shape) == spec.shape
        assert torch.equal(value[: spec.real_rows], initial_value(exact[name], config, seed=5))
        assert not value[spec.stored_shape[0] :].any(), "padded rows are 0"


def test_other_seeds_and_other_names_give_other_values(config):
    spec = by_name(config)["layers.1.ffn.down_proj.weight"]
    other = by_name(config)["layers.2.ffn.down_proj.weight"]
    value = initial_value(spec, config, seed=5)
    assert not torch.equal(value, initial_value(spec, config, seed=6))
    assert not torch.equal(value, initial_value(other, config, seed=5))


def test_sizes_are_those_of_gpt2(config):
    for name, spec in by_name(config).items():
        value = initial_value(spec, config, seed=0)[: spec.real_rows]
        if name.endswith("bias"):
            assert not value.any()
        elif "norm" in name:
            assert torch.equal(value, torch.ones_like(value))
        else:
            residual = "out_proj" in name or "down_proj" in name
            std = 0.02 / math.sqrt(2 * config.num_layers) if residual else 0.02
            # five standard errors of the deviation and of the mean of n normal draws
            assert abs(value.std().item() / std - 1) < 5 / math.sqrt(2 * value.numel()), name
            assert abs(value.mean().item()) < 5 * std / math.sqrt(value.numel()), name


@pytest.mark.parametrize("config", ["gpt2"], indirect=True)
def test_the_values_are_the_same_on_every_machine(config):
    """Golden: a change here changes every run's start; the stream is numpy's, so no CPU feature moves it."""
    value = initial_value(by_name(config)["layers.0.attention.qkv_proj.weight"], config, seed=1234)
    assert value.flatten()[:3].tolist() == [-0.0035930254962295294, 0.016328278928995132, 0.0023331325501203537]
