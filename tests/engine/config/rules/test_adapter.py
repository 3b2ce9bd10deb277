"""Rules of adapters: each method has its own keys, and virtual tokens have a model, a layout and rows that fit."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config.load import parse_run
from engine.config.resolve import check
from engine.config.schema.run import RunConfig
from engine.errors import ConfigError
from tests.engine.config.run_config import config
from tests.engine.models.tiny import tiny

TASK = {"task": "classification", "num_labels": 2}


def run_of(form: str, adapter: dict[str, Any], parallel: dict[str, Any] | None = None, **stage: Any) -> RunConfig:
    """A classification run whose rows fit, unless `stage` says otherwise."""
    tree = config().model_dump(mode="json", exclude_none=True)
    tree["stages"][0] |= {"objective": {"name": "classification", "labels": ["a", "b"]}, "sequence_length": 16} | stage
    model = tiny(form, **({} if form.startswith("t5") else {"task_head": TASK}))
    tree |= {"model": model.model_dump(mode="json", exclude_none=True) | {"adapter": adapter}}
    tree["parallel"] |= parallel or {}
    return parse_run(tree, "test")


def problems_of(run: RunConfig) -> list[str]:
    return [problem.wrong for problem in check(run) if "adapter" in problem.wrong]


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("form", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("parallel", [{}, {"tensor": 2, "zero_stage": 3}, {"pipe": 2, "zero_stage": 1}])
def test_virtual_tokens_fit_tensor_pipeline_and_zero(method, form, parallel):
    assert problems_of(run_of(form, {"method": method}, parallel)) == []


@pytest.mark.parametrize(
    ("form", "adapter", "parallel", "stage", "wrong"),
    [
        ("t5", {"method": "prompt"}, {}, {}, "model.family = t5"),
        ("t5", {"method": "prefix"}, {}, {}, "model.family = t5"),
        ("modernbert", {"method": "prefix"}, {}, {}, "local attention"),
        ("mistral", {"method": "prefix"}, {}, {}, "local attention"),
        ("bert", {"method": "prompt"}, {"sequence": 2}, {}, "parallel.sequence = 2"),
        ("bert", {"method": "prefix"}, {"sequence": 2}, {}, "parallel.sequence = 2"),
        ("bert", {"method": "prompt"}, {"tensor": 2, "sequence_parallel": True}, {}, "parallel.sequence_parallel"),
        ("bert", {"method": "prompt"}, {}, {"objective": {"name": "masked"}}, "objective = masked"),
        ("gpt2", {"method": "prefix"}, {}, {"objective": {"name": "causal"}}, "objective = causal"),
        ("bert", {"method": "prompt", "virtual_tokens": 120}, {}, {}, "virtual_tokens = 120 is more than the"),
    ],
)
def test_virtual_tokens_that_do_not_fit_are_refused(form, adapter, parallel, stage, wrong):
    found = problems_of(run_of(form, adapter, parallel, **stage))
    assert len(found) == 1, found
    assert wrong in found[0]


def test_a_prefix_may_share_rows_over_tensor_ranks():
    assert problems_of(run_of("bert", {"method": "prefix"}, {"tensor": 2, "sequence_parallel": True})) == []


@pytest.mark.parametrize(
    ("adapter", "stage", "wrong"),
    [
        ({"rank": 12}, {}, "model.adapter.rank = 12 with model.adapter.initial_rank = 12"),
        ({"warmup_share": 0.8}, {}, "leave no steps in which ranks are chosen"),
        ({}, {"regularization": {"mixout": {"share": 0.1}}}, "both change the gradients of a step"),
    ],
)
def test_a_rank_allocation_that_does_not_fit_is_refused(adapter, stage, wrong):
    found = problems_of(run_of("bert", {"method": "adalora"} | adapter, {}, **stage))
    assert len(found) == 1, found
    assert wrong in found[0]


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("lora", "initial_rank", 3),
        ("adalora", "virtual_tokens", 3),
        ("lora", "virtual_tokens", 3),
        ("lora", "size", 3),
        ("ia3", "rank", 3),
        ("bottleneck", "alpha", 2.0),
        ("prompt", "targets", ["query"]),
        ("prompt", "rank", 3),
        ("prefix", "dropout", 0.1),
        ("prefix", "size", 4),
    ],
)
def test_a_key_of_another_method_is_refused_by_name(method, key, value):
    with pytest.raises(ConfigError, match=rf"model.adapter.{key}"):
        run_of("bert", {"method": method, key: value})
