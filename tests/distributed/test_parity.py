"""Every layout against one plain torch process in fp64: losses, gradient norms and final weights over six steps.

The bounds and where they come from are in `parity.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch

from engine.config.load import load_run
from tests.distributed.cases import (
    SHIPPED,
    TWINS,
    Case,
)
from tests.distributed.covering import (
    FACTORS,
    accepted,
    case_of,
    covered,
    covering,
    does_something,
    first_cases,
    possible,
    targets,
    values_of,
)
from tests.distributed.parity import (
    check,
    check_fp32,
    run,
)
from tests.distributed.plain import reference
from tests.distributed.table import Row, markdown

HARD = (
    Case("t5", zero_stage=3, pipe=3, attention="row"),  # the embedding is tied over three stages
    Case("bert", zero_stage=1, pipe=3, decay=False),  # one layer in each stage
    Case(zero_stage=3, tensor=4, micro_batch_size=8, vocab_multiple=128),  # three ranks hold no real token
)
LARGER = [dataclasses.replace(case, data=2) for case in HARD[:2]]
SELECTION = (*HARD, *first_cases(9, largest_world=4))
"""What `make test` runs."""
ONE_RANK: dict[str, Any] = {
    field.name: field.default
    for field in dataclasses.fields(Case)
    if field.name not in ("model", "decay", "attention", "optimizer", "freeze")
}
DECODERS = (
    Case("decoder-options", zero_stage=3, pipe=2, tensor=2),
    *(
        pytest.param(case, marks=pytest.mark.matrix)
        for case in (
            Case("decoder-options", zero_stage=2, tensor=2, data=2, sequence_parallel=True, micro_batch_size=2),
            Case("decoder-options", zero_stage=1, pipe=3, schedule="zb-h1", recompute="selective"),
            Case("decoder-options", zero_stage=3, sequence=2, data=2, attention="row"),
            Case("decoder-options-wide-dropout", zero_stage=1, tensor=2, sequence=2, recompute="full"),
            Case("llama3", zero_stage=2, tensor=2, data=2),
            Case("llama-dynamic", zero_stage=3, sequence=2, tensor=2, sequence_parallel=True),
            Case("mistral", zero_stage=3, pipe=3, chunks_per_stage=1, attention="row"),
            Case("qwen2", zero_stage=1, pipe=2, tensor=2),
            Case("qwen3", zero_stage=0, tensor=2, data=2, sequence_parallel=True),
            Case("qwen3", zero_stage=3, pipe=2, tensor=2, optimizer="muon"),
            Case("pythia", zero_stage=2, pipe=2, tensor=2),
            Case("pythia-dropout", zero_stage=3, sequence=2, data=2),
        )
    ),
)
"""Rotary scaling, partial rotary positions, parallel residuals, norms of heads, biases of projections and windows."""
ENCODERS = (
    Case("bert-pre-norm", zero_stage=3, pipe=2, tensor=2),
    *(
        pytest.param(case, marks=pytest.mark.matrix)
        for case in (
            Case("bert-pre-norm", zero_stage=1, pipe=3, schedule="zb-h1", recompute="selective"),
            Case("bert-pre-norm", zero_stage=3, sequence=2, tensor=2, sequence_parallel=True, attention="row"),
            Case("bert-pre-norm-dropout", zero_stage=0, pipe=3, tensor=2, recompute="full"),
        )
    ),
)
"""Norms before the parts of each layer, and none of the embeddings."""
REPEATED = (
    Case(zero_stage=2, model="llama", data=2),
    Case(zero_stage=3, pipe=2, schedule="gpipe"),
    pytest.param(Case(zero_stage=0, pipe=2, data=2), marks=pytest.mark.matrix),
    pytest.param(Case(zero_stage=1, tensor=2, pipe=2), marks=pytest.mark.matrix),
    pytest.param(Case(zero_stage=3, pipe=2, data=2, schedule="gpipe"), marks=pytest.mark.matrix),
)

BF16 = (
    Case(zero_stage=1, tensor=2, dtype="bf16"),
    Case(zero_stage=2, model="llama", data=2, dtype="bf16"),
    Case(zero_stage=3, pipe=2, dtype="bf16"),
    Case(zero_stage=1, pipe=2, dtype="bf16", reduce_dtype="bf16"),
    pytest.param(Case("llama", zero_stage=2, data=2, dtype="bf16", reduce="step"), marks=pytest.mark.matrix),
    pytest.param(Case(zero_stage=3, pipe=2, data=2, dtype="bf16", reduce="step"), marks=pytest.mark.matrix),
)


def test_selection_is_small_and_every_family_meets_what_breaks():
    assert len(SELECTION) <= 12
    for family_name in ("gpt2", "llama", "bert", "modernbert", "t5"):
        cases = [case for case in SELECTION if case.model.startswith(family_name)]
        assert any(case.world_size > 1 for case in cases), family_name
    assert {case.zero_stage for case in SELECTION} == {0, 1, 2, 3}
    assert any(case.zero_stage == 3 and case.schedule == "gpipe" for case in SELECTION)
    assert any(case.zero_stage == 3 and case.tensor > 1 and case.pipe > 1 for case in SELECTION)
    assert any(case.zero_stage == 2 and case.pipe > 1 for case in SELECTION)


def test_what_can_stand_together_does_so_in_a_case():
    assert len(covering()) <= 100
    found = set().union(*(covered(values_of(case)) for case in covering()))
    apart = {target for target in targets() if target not in found}
    values = {frozenset(target) for target in apart if len(target) == 2}

    def pairs(one: str, other: str) -> set[frozenset[Any]]:
        return {frozenset(((one, a), (other, b))) for a in FACTORS[one] for b in FACTORS[other]}

    # no rule keeps any two of these apart, nor does the number of layers, heads or ranks
    free = ("zero_stage", "decay", "attention", "micro_batch_size", "recompute", "optimizer", "vocab_multiple")
    for one, other in itertools.combinations(("model", *free), 2):
        assert not pairs(one, other) & values
    for name in free:
        assert not pairs("layout", name) & values
    # a few that need others beside them: chunks of one layer, weight gradients put off, whole rows shared
    for target in (
        (("model", "gpt2-deep"), ("schedule", ("1f1b", 3))),
        (("zero_stage", 3), ("gather", "step")),
        (("layout", (4, 1, 2)), ("schedule", ("zb-h1", 1))),
        (("schedule", ("zb-h1", 1)), ("zero_stage", 3), ("gather", "step"), ("reduce", "step")),
        (("schedule", ("gpipe", 1)), ("zero_stage", 3), ("gather", None), ("reduce", None)),
        (("schedule", ("1f1b", 2)), ("recompute", "full"), ("dropout", True)),
        (("zero_stage", 3), ("sequence", 2), ("sequence_parallel", True)),
    ):
        assert target in found, target
    assert all(accepted(case) and case_of(values_of(case)) == case for case in covering())


def test_what_can_be_part_by_part_is_what_can_be_as_a_whole():
    """Choices of which every third or so can be, and the covering's own with one factor changed."""
    rng = random.Random(11)
    drawn = [{name: rng.choice(values[:2]) for name, values in FACTORS.items()} for _ in range(300)]
    for case in covering():
        name = rng.choice(list(FACTORS))
        drawn += [values_of(case) | {name: value} for value in FACTORS[name]]
    found = [possible(choice) for choice in drawn]
    assert found == [does_something(choice) and accepted(case_of(choice)) for choice in drawn]
    assert len(drawn) / 5 < sum(found) < len(drawn) * 4 / 5


ALONE = sorted({dataclasses.replace(case, **ONE_RANK) for case in covering()}, key=str)
"""A case for every reference that the matrix uses."""


@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_rounding_alone_leaves_every_model_within_the_bounds():
    for case in ALONE:
        check_fp32(reference(case, torch.float32), reference(case), case)


@pytest.mark.parametrize("case", SELECTION, ids=str)
def test_layout_equals_plain_torch(case: Case):
    check(case)


@pytest.mark.parametrize("case", DECODERS, ids=str)
def test_options_of_decoders_equal_plain_torch(case: Case):
    check(case)


@pytest.mark.parametrize("case", ENCODERS, ids=str)
def test_options_of_encoders_equal_plain_torch(case: Case):
    check(case)


@pytest.mark.matrix
@pytest.mark.parametrize("case", [*LARGER, *covering()], ids=str)
def test_every_layout_equals_plain_torch(case: Case):
    check(case)


def twin_case(model: str) -> Case:
    """A twin of a shipped model in its layout for 64 GPUs, cut down to four ranks."""
    parallel = load_run(SHIPPED.parent / "parallel" / f"{model}-64.yaml").parallel
    pipe, tensor = min(parallel.pipe, 2), min(parallel.tensor, 2)
    return Case(model, parallel.zero_stage, pipe, tensor, data=2 if pipe * tensor == 1 else 1)


DISTINCT = {str(dataclasses.replace(twin_case(model), model=str(TWINS[model]))): model for model in TWINS}
"""Sizes of one form have one twin where their layouts are alike, too."""


@pytest.mark.matrix
@pytest.mark.parametrize("model", DISTINCT.values())
def test_a_tiny_twin_of_every_shipped_model_trains_as_plain_torch_does(model: str):
    check(twin_case(model))


def test_parts_of_the_covering_start_about_as_many_ranks():
    """Cases of one round of the greedy choice bring as much, and cost as much, as their neighbours."""
    for parts in (2, 4):
        ranks = [sum(case.world_size for case in covering()[first::parts]) for first in range(parts)]
        assert max(ranks) <= 1.25 * min(ranks), ranks


def test_the_parity_table_has_the_largest_of_its_cases():
    case = Case("t5", zero_stage=3, pipe=2, chunks_per_stage=2)
    rows = [Row(case, 1e-6, 2e-7, 3e-5), Row(dataclasses.replace(case, decay=False), 2e-6, 1e-7, 4e-5)]
    line = "| t5 | ZeRO-3, pipe 2 x tensor 1 x data 1 | 1f1b, 2 chunks | 2 | 2.0e-06 | 2.0e-07 | 4.0e-05 |"
    short = "| t5 | 1f1b, 2 chunks | 2 | 2.0e-06 | 2.0e-07 | 4.0e-05 |"
    lines = markdown(rows).splitlines()
    assert (lines[2], lines[-1], len(lines)) == (short, line, 7)


@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_same_seed_and_layout_is_bitwise_equal(case: Case):
    first, second = run(case), run(case)
    assert first.losses == second.losses
    assert first.norms == second.norms
    for name, values in first.weights.items():
        np.testing.assert_array_equal(second.weights[name], values)


@pytest.mark.parametrize("case", BF16, ids=str)
def test_bf16_curve_stays_near_the_exact_one(case: Case):
    check(case)
