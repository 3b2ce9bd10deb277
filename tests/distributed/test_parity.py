"""Every layout against one plain torch process in fp64: losses, gradient norms and final weights over six steps.

Tolerances in fp32: the sums that a layout reorders have at most 12 x 8 tokens x 64 columns; fp32 rounds each to 6e-8,
which leaves the loss (about 4) within 2e-6 and the norm within 1e-5 of itself. Adam divides by the root of the second
moment, so a relative error of 1e-5 in a gradient moves a weight by at most 1e-5 x learning rate x steps. Where a
gradient is itself rounding (a sum of 96 terms of 1e-3 is off by 6e-10) it moves by 6e-10 / epsilon x learning rate x
steps = 4e-6: 2e-5 covers both. The true gradient of a key bias is zero (softmax does not
see a constant added to all scores), so Adam amplifies pure rounding there: its bound is 2 x learning rate x steps,
and the model's outputs, which do not depend on it, must agree.

They hold for models whose course rounding does not change, and not all are such. An element whose gradient is next to
nothing at its first appearance (an embedding of a token that comes once: -2.3e-6, rounded by 2e-8) moves by gradient /
(|gradient| + epsilon) x learning rate: 1.3e-5 wrong in a row of size 0.02, which an RMS norm magnifies fifty times. A
Llama form of five layers left the bound of the norm that way (1e-4): in one plain process in fp32, tied or not, with
grouped heads or without, on whole batches or single rows; and in fp64 one fp32 rounding of its initial weights moves
its norm by 3e-5, a hundred times as much as that of the models here. So a test holds these to fp64 without any layout,
and a layout that leaves the bounds is wrong.

In bf16, which keeps 8 bits, what a sublayer hands on is rounded about twice, each time by up to 2^-9 of itself: N
sublayers leave the first step's gradient off by about (2 N)^0.5 x 2^-9 of itself. How far that leads a loss depends on
the model: a T5 without a scale on its scores strays ten times as far as a GPT. So one plain process in bf16 says it, by
its largest distance from fp64 over the steps. A layout's is another draw of the same size, times 2^0.5 where tensor
ranks round their parts of a sum, too; the largest of six draws is above thrice that of six others once in 300 times,
hence 4 x. Norms of later steps are taken at weights that have drifted apart, since Adam turns a gradient that is mostly
rounding into a whole step.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import types
from typing import Any

import numpy as np
import pytest
import torch

from engine.config.load import load_run
from engine.models.families import family
from engine.models.materialize import fill
from tests import conftest
from tests.distributed.cases import (
    LEARNING_RATE,
    NUM_STEPS,
    SHIPPED,
    TWINS,
    Case,
    Result,
    config_of,
    global_batch,
    join_results,
    run_rank,
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
from tests.distributed.plain import reference
from tests.distributed.ranks import run_ranks
from tests.distributed.table import Row, markdown, record

HARD = (
    Case("t5", zero_stage=3, pipe=3, data=2, attention="row"),  # the embedding is tied over three stages
    Case("bert", zero_stage=1, pipe=3, data=2, decay=False),  # one layer in each stage
    Case(zero_stage=3, tensor=4, micro_batch_size=8, vocab_multiple=128),  # three ranks hold no real token
)
SELECTION = (*HARD, *first_cases(13, largest_world=4))
"""What `make test` runs."""
LOSS_BOUND, NORM_BOUND, WEIGHT_BOUND = 2e-6, 1e-5, 2e-5
ONE_RANK: dict[str, Any] = {
    field.name: field.default
    for field in dataclasses.fields(Case)
    if field.name not in ("model", "decay", "attention", "optimizer")
}
KEY_BIAS_BOUND = 2 * LEARNING_RATE * NUM_STEPS
REPEATED = (
    Case(zero_stage=0, pipe=2, data=2),
    Case(zero_stage=1, tensor=2, pipe=2),
    Case(zero_stage=2, model="llama", data=2),
    Case(zero_stage=3, pipe=2, data=2, schedule="gpipe"),
)

BF16 = (
    Case(zero_stage=1, tensor=2, dtype="bf16"),
    Case(zero_stage=2, model="llama", data=2, dtype="bf16"),
    Case(zero_stage=3, pipe=2, dtype="bf16"),
    Case(zero_stage=1, pipe=2, dtype="bf16", reduce_dtype="bf16"),
    pytest.param(Case("llama", zero_stage=2, data=2, dtype="bf16", reduce="step"), marks=pytest.mark.matrix),
    pytest.param(Case(zero_stage=3, pipe=2, data=2, dtype="bf16", reduce="step"), marks=pytest.mark.matrix),
)

references: dict[tuple[Any, ...], Result] = {}


def run(case: Case) -> Result:
    return join_results(case, run_ranks(case.world_size, run_rank, case))


def check(case: Case) -> None:
    expected, found = plain(case), run(case)
    record(case, found, expected, furthest_weight(found, expected, case))
    if case.dtype == "bf16":
        check_bf16(found, expected, case)
        return
    check_fp32(found, expected, case)
    for name, values in expected.weights.items():
        keys = key_biases(name, case)
        assert np.abs(found.weights[name] - values)[keys].max(initial=0) <= KEY_BIAS_BOUND, name
    # 2e-5 per weight moves a logit by at most 2e-5 x width x layers x a few; in fact rounding is near 1e-5
    np.testing.assert_allclose(logits(found, case), logits(expected, case), atol=2e-4)


def plain(case: Case, dtype: torch.dtype = torch.float64) -> Result:
    """The run without a layout, taken once for all cases that share it."""
    key = (case.model, case.decay, case.attention, case.optimizer, case.vocab_multiple, dtype)
    if key not in references:
        references[key] = reference(case, dtype)
    return references[key]


def check_fp32(found: Result, expected: Result, case: Case) -> None:
    np.testing.assert_allclose(found.losses, expected.losses, rtol=0, atol=LOSS_BOUND)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=NORM_BOUND)
    assert furthest_weight(found, expected, case) <= WEIGHT_BOUND


def check_bf16(found: Result, expected: Result, case: Case) -> None:
    model = config_of(case).model
    attending_twice = model.num_layers - model.num_encoder_layers if model.family == "t5" else 0
    sublayers = 2 * model.num_layers + attending_twice
    np.testing.assert_allclose(found.norms[0], expected.norms[0], rtol=(2 * sublayers) ** 0.5 * 2.0**-9)
    rounded = np.abs(np.subtract(plain(case, torch.bfloat16).losses, expected.losses)).max()
    np.testing.assert_allclose(found.losses, expected.losses, rtol=0, atol=4 * rounded)
    masters = np.concatenate([values.ravel() for values in found.weights.values()])
    assert masters.dtype == np.float32
    assert (torch.from_numpy(masters).bfloat16().float().numpy() != masters).any(), "all of them are bf16 numbers"


def furthest_weight(found: Result, expected: Result, case: Case) -> float:
    """The largest difference of a final weight that is no key bias."""
    return max(
        float(np.abs(found.weights[name] - values)[~key_biases(name, case)].max(initial=0))
        for name, values in expected.weights.items()
    )


def key_biases(name: str, case: Case) -> np.ndarray:
    """Which elements of a parameter are key biases."""
    model = config_of(case).model
    shape = next(spec.shape for spec in family(model).specs(model) if spec.name == name)
    mask = np.zeros(shape, bool)
    if name.endswith("qkv_proj.bias"):
        first = model.num_heads * model.head_size
        mask[first : first + model.num_kv_heads * model.head_size] = True
    return mask


@torch.no_grad()
def logits(result: Result, case: Case) -> np.ndarray:
    """What the trained model says of one batch."""
    config = config_of(case).model
    model, ties = family(config).build(config), family(config).ties(config)
    fill(model, lambda name: torch.from_numpy(result.weights[ties.get(name, name)]).float())
    batch = global_batch(0, case.attention, case.model)
    seen = {
        name: tensor for name, tensor in batch.items() if not name.startswith(("targets", "weights", "masked", "pair"))
    }
    return model(**seen)["logits_BTV"].numpy()


def test_selection_is_small_and_every_family_meets_what_breaks():
    assert len(SELECTION) <= 16
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


@pytest.mark.matrix
@pytest.mark.parametrize("case", covering(), ids=str)
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


@pytest.mark.parametrize(("part", "expected"), [("1/1", (1, 1)), ("2/4", (2, 4))])
def test_a_part_of_the_matrix(part: str, expected: tuple[int, int], monkeypatch):
    monkeypatch.setenv("PART", part)
    assert conftest.part() == expected


@pytest.mark.parametrize("part", ["0/2", "3/2", "x", "1"])
def test_a_part_that_is_none_is_refused(part: str, monkeypatch):
    monkeypatch.setenv("PART", part)
    with pytest.raises(pytest.UsageError, match="allowed: i/n with 1 <= i <= n"):
        conftest.part()


@dataclasses.dataclass
class Collected:
    """What pytest knows of a test, as far as parts ask."""

    number: int
    is_long: bool
    nodeid: str = "tests/distributed/test_parity.py"

    def get_closest_marker(self, name: str) -> bool | None:
        return (name == "matrix" and self.is_long) or None


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_are_disjoint_complete_and_of_one_size(parts: int, monkeypatch):
    collected = [Collected(number, number % 3 > 0) for number in range(100)]
    kept = []
    for number in range(1, parts + 1):
        monkeypatch.setenv("PART", f"{number}/{parts}")
        items = list(collected)
        config = types.SimpleNamespace(hook=types.SimpleNamespace(pytest_deselected=lambda items: None))
        conftest.pytest_collection_modifyitems(config, items)  # type: ignore[arg-type]
        kept.append([item.number for item in items])
    assert sorted(itertools.chain.from_iterable(kept)) == list(range(100))
    long = [sum(collected[number].is_long for number in one) for one in kept]
    assert max(long) - min(long) <= 1
    assert {number for number in range(100) if not collected[number].is_long} <= set(kept[0])


def test_a_matrix_that_has_outgrown_its_time_is_refused():
    whole: Any = [Collected(number, is_long=True) for number in range(conftest.LARGEST_MATRIX)]
    others: Any = [Collected(0, is_long=True, nodeid=f"{place}x") for place in conftest.ELSEWHERE]
    short: Any = [Collected(0, is_long=False)]
    conftest.check_matrix([*whole, *others, *short])
    with pytest.raises(pytest.UsageError, match="151 cases are marked `matrix`; allowed: 150"):
        conftest.check_matrix([*whole, whole[0]])


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
