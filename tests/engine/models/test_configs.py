"""Every model in `configs/models` is valid and has the size that it says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from engine.config.load import parse_run, read_tree
from engine.config.resolve import check
from engine.config.schema.run import RunConfig
from engine.models.families import family
from tests.engine.models.tiny import MODELS

STAGE = {"data": {"train": "t"}, "sequence_length": 128, "global_batch_size": 2, "duration": {"steps": 1}}


def run_of(path: Path) -> RunConfig:
    """A run of the model with an objective that fits it."""
    model = read_tree(path)["model"]
    objective: Any = "causal"
    if model.get("family") == "bert":
        objective = {"name": "masked", "pairs": "next_sentence" if model.get("pair_head") else "none"}
    if model.get("family") == "t5":
        objective = "span_corruption"
    tree = {"folder": "run", "tokenizer": "tokenizer", "model": model, "stages": [STAGE | {"objective": objective}]}
    return parse_run(tree, path.name)


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.yaml")), ids=lambda path: path.stem)
def test_it_can_be_a_runs_model(path):
    assert check(run_of(path)) == []


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2-124m", 124_439_808),
        ("gpt2-355m", 354_823_168),
        ("gpt2-774m", 774_030_080),
        ("gpt2-1.5b", 1_557_611_200),
        ("llama-1b", 1_100_048_384),
        ("llama-7b", 6_738_415_616),
        ("llama-70b", 68_976_648_192),
        ("llama-3.1-8b", 8_030_261_248),
        ("mistral-7b", 7_241_732_096),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen3-0.6b", 596_049_920),
        ("pythia-160m", 162_322_944),
        ("pythia-1.4b", 1_414_647_808),
        ("bert-base", 110_106_428),
        ("bert-large", 336_226_108),
        ("modernbert-base", 149_655_232),
        ("t5-base", 247_577_856),
    ],
)
def test_it_has_the_parameters_of_the_published_model(name, parameters):
    config = run_of(MODELS / f"{name}.yaml").model
    assert sum(math.prod(spec.stored_shape) for spec in family(config).specs(config)) == parameters
