"""Every model in `configs/models` is valid and has the size that it says."""

from __future__ import annotations

import math

import pytest

from engine.config.load import parse_run, read_tree
from engine.config.resolve import check
from engine.models.gpt import specs
from tests.engine.models.tiny import MODELS

RUN = {
    "folder": "run",
    "tokenizer": "tokenizer",
    "stages": [
        {"data": {"train": "t"}, "sequence_length": 128, "global_batch_size": 2, "duration": {"steps": 1}},
    ],
}


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.yaml")), ids=lambda path: path.stem)
def test_it_can_be_a_runs_model(path):
    config = parse_run({**RUN, **read_tree(path)}, path.name)
    assert check(config) == []


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
    ],
)
def test_it_has_the_parameters_of_the_published_model(name, parameters):
    config = parse_run({**RUN, **read_tree(MODELS / f"{name}.yaml")}, name).model
    assert sum(math.prod(spec.stored_shape) for spec in specs(config)) == parameters
