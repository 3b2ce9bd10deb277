"""Initial weights depend on seed and name alone, and are distributed as GPT-2's."""

from __future__ import annotations

import math

import pytest
import torch

from engine.checkpoint.interchange.huggingface import from_huggingface
from engine.models.families import family
from engine.models.gpt import specs
from engine.models.initial import initial_value
from tests.engine.models.task_forms import FORMS, with_head
from tests.engine.models.tiny import T5_FORMS, random_weights, twin


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


HEADS = ("classifier.weight", "pooler.weight")


@pytest.mark.parametrize("task", ["classification", "token_classification", "question_answering"])
@pytest.mark.parametrize("form", FORMS)
def test_the_head_of_a_task_starts_as_that_of_transformers(form, task):
    labels = 2 if task == "question_answering" else 60
    config = with_head(form, task, labels)
    torch.manual_seed(1)
    fresh = type(model := twin(config, random_weights(config)))(model.config)
    _, theirs = from_huggingface(fresh)
    specs = {spec.name: spec for spec in family(config).specs(config)}
    # a head that answers questions is small: the draws of many seeds
    for name in {*HEADS} & specs.keys():
        ours = torch.cat([initial_value(specs[name], config, seed)[: specs[name].real_rows] for seed in range(20)])
        expected, count = theirs[name].std().item(), theirs[name].numel()
        # five standard errors of a deviation of n draws, theirs, whose n is the smaller one
        assert abs(ours.std().item() / expected - 1) < 5 / math.sqrt(2 * count), name
        assert abs(ours).max().item() / ours.std().item() < 3 or "modern" not in form


def test_t5_starts_with_deviations_of_its_own():
    """Fan-in everywhere, so that what a layer makes has size 1; queries smaller, since scores are not scaled."""
    config = T5_FORMS["t5-v1.1"].model_copy(update={"hidden_size": 64, "feed_forward_size": 256, "head_size": 36})
    heads = 4 * 36
    expected = {
        "embed_tokens.weight": [(500, 1.0)],
        "lm_head.weight": [(500, 1 / 8)],
        "encoder_positions.weight": [(16, 1 / 8)],
        "layers.1.attention.qkv_proj.weight": [(heads, 1 / 8 / 6), (heads, 1 / 8), (heads, 1 / 8)],
        "layers.4.cross_attention.q_proj.weight": [(heads, 1 / 8 / 6)],
        "layers.4.cross_attention.kv_proj.weight": [(2 * heads, 1 / 8)],
        "layers.4.cross_attention.out_proj.weight": [(64, 1 / 12)],
        "layers.4.ffn.gate_up_proj.weight": [(512, 1 / 8)],
        "layers.0.ffn.down_proj.weight": [(64, 1 / 16)],
    }
    by_name = {spec.name: spec for spec in family(config).specs(config)}
    for name, blocks in expected.items():
        value = initial_value(by_name[name], config, seed=0)[: by_name[name].real_rows]
        for (_, std), block in zip(blocks, value.split([rows for rows, _ in blocks]), strict=True):
            assert abs(block.std().item() / std - 1) < 5 / math.sqrt(2 * block.numel()), name


@pytest.mark.parametrize("config", ["gpt2"], indirect=True)
def test_the_values_are_the_same_on_every_machine(config):
    """Golden: a change here changes every run's start; the stream is numpy's, so no CPU feature moves it."""
    value = initial_value(by_name(config)["layers.0.attention.qkv_proj.weight"], config, seed=1234)
    assert value.flatten()[:3].tolist() == [-0.0035930254962295294, 0.016328278928995132, 0.0023331325501203537]
