"""Rotation against its definition in loops, and scaled frequencies against transformers' and formulas of the papers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.checkpoint.interchange.forms import form_of
from engine.config.schema.model import GPTConfig
from engine.config.schema.rotary import Rotary
from engine.models.materialize import whole_model
from engine.models.rotary import rotary_tables, rotate, scaled_frequencies
from tests.engine.models.parity import assert_near
from tests.engine.models.tiny import random_weights, tiny, twin

CPU = torch.device("cpu")
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"type": "linear", "factor": 3.0},
    "dynamic": {"type": "dynamic", "factor": 4.0},
    "llama3": {"type": "llama3", "factor": 8.0, "original_max_positions": 64},
    "llama3-other": {"type": "llama3", "factor": 32.0, "original_max_positions": 512}
    | {"low_freq_factor": 0.5, "high_freq_factor": 9.0},
    "yarn": {"type": "yarn", "factor": 4.0, "original_max_positions": 128},
    "yarn-other": {"type": "yarn", "factor": 1.7, "original_max_positions": 4096, "attention_factor": 0.8}
    | {"beta_fast": 20.5, "beta_slow": 2.0, "truncate": False},
    "yarn-1": {"type": "yarn", "factor": 1.0, "original_max_positions": 64},
}


def their_frequencies(config: GPTConfig, row_length: int) -> tuple[torch.Tensor, float]:
    theirs: Any = form_of(config).their_config(config)
    function = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]]
    return function(theirs, CPU, seq_len=row_length)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("head_size", "theta"), [(16, 1e4), (6, 500000.0), (128, 1e6), (40, 7.5)])
def test_scaled_frequencies_are_those_of_transformers(scaling: str, head_size: int, theta: float):
    """In rows that are shorter than the model's positions, as long, and longer."""
    config = tiny("llama", head_size=head_size, rope_theta=theta, rope_scaling=SCALINGS[scaling])
    assert isinstance(config, GPTConfig)
    rotary = config.rotary(None)
    assert rotary is not None
    for row_length in (7, 128, 129, 500):
        found, factor = scaled_frequencies(rotary, row_length, CPU)
        expected, their_factor = their_frequencies(config, row_length)
        # a handful of operations in fp32, each rounded to 2^-24 of its value
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        assert factor == pytest.approx(their_factor, rel=1e-15)


def test_frequencies_of_llama_3_are_kept_divided_or_between():
    """Llama 3.1 8B: theta 500,000, heads of 128, factor 8 of 8,192 tokens, between 1 and 4 turns."""
    scaling = {"type": "llama3", "factor": 8.0, "original_max_positions": 8192}
    config = tiny("llama", head_size=128, rope_theta=500000.0, rope_scaling=scaling)
    rotary = config.rotary(None)
    assert rotary is not None
    found, _ = scaled_frequencies(rotary, 10, CPU)
    for pair in range(64):
        plain = 500000.0 ** (-2 * pair / 128)
        turns = 8192 * plain / (2 * math.pi)
        share = min(1.0, max(0.0, (turns - 1) / 3))
        assert found[pair].item() == pytest.approx(plain * (share + (1 - share) / 8), rel=1e-6)


def test_dynamic_scaling_begins_behind_the_positions_of_the_model():
    config = tiny("llama", rope_scaling=SCALINGS["dynamic"])
    rotary = config.rotary(None)
    assert rotary is not None
    plain, _ = scaled_frequencies(rotary._replace(scaling=None), 1, CPU)
    assert torch.equal(scaled_frequencies(rotary, 128, CPU)[0], plain)
    # twice the positions: base x (4 x 2 - 3) ^ (16 / 14)
    grown = 1e4 * 5 ** (16 / 14)
    assert scaled_frequencies(rotary, 256, CPU)[0][1].item() == pytest.approx(grown ** (-2 / 16), rel=1e-6)
    assert config.longest_row == 512


@pytest.mark.parametrize("length", [129, 300, 512])
def test_long_rows_of_dynamic_scaling_are_those_of_the_twin(length: int):
    config = tiny("llama", rope_scaling=SCALINGS["dynamic"])
    weights = random_weights(config)
    tokens_BT = torch.arange(length)[None] * 7 % 500
    with torch.no_grad():
        found = whole_model(config, weights)(tokens_BT=tokens_BT)["logits_BTV"]
        assert_near(found, twin(config, weights)(tokens_BT).logits, "logits")


@pytest.mark.parametrize("form", ["llama", "mistral", "qwen2", "qwen3", "pythia"])
@pytest.mark.parametrize("scaling", ["linear", "llama3", "yarn-other"])
def test_every_form_takes_scalings(form: str, scaling: str):
    config = tiny(form, rope_scaling=SCALINGS[scaling])
    weights = random_weights(config)
    tokens_BT = torch.arange(90)[None] * 7 % 500
    with torch.no_grad():
        found = whole_model(config, weights)(tokens_BT=tokens_BT)["logits_BTV"]
        assert_near(found, twin(config, weights)(tokens_BT).logits, "logits")


def test_older_spellings_of_scaling_are_read_as_the_newer_ones():
    """Configurations of before transformers 5: `rope_scaling` with `type`, and the base beside it."""
    config = tiny("llama", rope_theta=100.0, rope_scaling=SCALINGS["yarn"])
    assert isinstance(config, GPTConfig)
    older: dict[str, Any] = {"rope_theta": 100.0, "max_position_embeddings": 128}
    older["rope_scaling"] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    theirs = AutoConfig.for_model("llama", **older)
    found = form_of(config).our_config(theirs, 128)
    assert isinstance(found, GPTConfig)
    assert (found.rope_scaling, found.rope_theta) == (config.rope_scaling, 100.0)


def test_a_part_of_each_head_is_left_as_it_is():
    x_BTHK = torch.randn(2, 5, 2, 10, generator=torch.Generator().manual_seed(0))
    tables = rotary_tables(Rotary(100.0, 4, 5), 5, CPU)
    turned = rotate(x_BTHK, *tables)
    assert torch.equal(turned[..., 4:], x_BTHK[..., 4:])
    assert torch.equal(turned[..., :4], rotate(x_BTHK[..., :4], *tables))


def test_rotation_turns_each_pair_by_position_times_frequency():
    head_size, theta = 6, 100.0
    x_BTHK = torch.randn(1, 5, 2, head_size, generator=torch.Generator().manual_seed(0))
    turned = rotate(x_BTHK, *rotary_tables(Rotary(theta, head_size, 5), 5, CPU))
    for position in range(5):
        for head in range(2):
            for pair in range(3):
                angle = position * theta ** (-2 * pair / head_size)
                low, high = x_BTHK[0, position, head, pair].item(), x_BTHK[0, position, head, pair + 3].item()
                # a rotation of the plane; 6 roundings of values below 4
                assert abs(turned[0, position, head, pair] - (low * math.cos(angle) - high * math.sin(angle))) < 2e-6
                assert (
                    abs(turned[0, position, head, pair + 3] - (high * math.cos(angle) + low * math.sin(angle))) < 2e-6
                )


def test_rotation_keeps_the_dtype():
    x_BTHK = torch.randn(1, 5, 2, 4).bfloat16()
    assert rotate(x_BTHK, *rotary_tables(Rotary(1e4, 4, 5), 5, CPU)).dtype == torch.bfloat16


def test_scores_depend_on_distance_alone():
    """Why rotary positions need no restart at a document: shifting a document moves no score (tables are fp32)."""
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator)
    cos_TR, sin_TR = rotary_tables(Rotary(1e4, 16, 64), 64, CPU)

    def score(query: int, key: int) -> float:
        turned_q = rotate(q, cos_TR[query : query + 1], sin_TR[query : query + 1])
        return (turned_q * rotate(k, cos_TR[key : key + 1], sin_TR[key : key + 1])).sum().item()

    assert abs(score(9, 4) - score(59, 54)) < 1e-4
    assert abs(score(9, 4) - score(9, 5)) > 1e-3
