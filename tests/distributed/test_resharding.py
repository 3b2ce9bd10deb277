"""Engines that go on in another layout from what a first one saved: the same state, and the same loss over 20 steps.

The whole run is made once in its first layout. Its checkpoint at step 2 is taken up by fresh processes, in the same
layout (losses bitwise equal) and in another one. After the load the hash over all weights and moments is that of the
files. Tolerances: sums over other splits of a batch round differently, 1e-7 relative in fp32 and 4e-3 in bf16, and
20 updates carry that on; 1e-5 and 5e-3 on the loss are what the project promises.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from engine.checkpoint.fingerprint import fingerprint_of_checkpoint
from engine.checkpoint.folder import step_path
from engine.checkpoint.load import open_checkpoint
from engine.errors import EXIT_DONE
from engine.train.metrics import read_metrics
from tests.distributed.cases import MODELS
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import run_tree, train_rank, write_corpus

SAVED_AT, NUM_STEPS = 2, 22
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}
LAYOUTS: dict[str, dict[str, Any]] = {
    "data 2": {"data": 2},
    "tensor 2": {"tensor": 2},
    "pipe 2 in chunks": {"pipe": 2, "virtual_stages": 2},
    "pipe 2, tensor 2, data 2": {"pipe": 2, "tensor": 2, "data": 2},
}
OFFLOADED: dict[str, dict[str, Any]] = {
    f"{name}, offload": layout | {"offload": "optimizer"} for name, layout in LAYOUTS.items()
}
"""The same with the optimizer's state in host memory."""


class Pair(NamedTuple):
    """A first layout that saves and a second one that goes on."""

    model: str
    dtype: str
    first: str
    first_zero: int
    second: str
    second_zero: int

    def __str__(self) -> str:
        return ", ".join(map(str, self))


PAIRS = [
    Pair("gpt2", "fp32", "data 2", 3, "pipe 2 in chunks", 1),
    Pair("llama", "fp32", "pipe 2 in chunks", 0, "tensor 2", 3),
    Pair("gpt2", "bf16", "tensor 2", 2, "data 2, offload", 3),
    Pair("llama", "bf16", "pipe 2 in chunks, offload", 1, "data 2", 2),
]


def possible() -> list[Pair]:
    """Every pair of layouts, ZeRO stages, precision and model that there is."""
    zero = range(4)
    every = map(Pair._make, itertools.product(("gpt2", "llama"), ("fp32", "bf16"), LAYOUTS, zero, LAYOUTS, zero))
    return [pair for pair in every if pair.dtype == "fp32" or (pair.first_zero and pair.second_zero)]


def values_together(pair: Pair) -> set[Any]:
    """Every two values of a pair, with the fields that they are of."""
    return set(itertools.combinations(enumerate(pair), 2))


def covering(pairs: list[Pair], count: int) -> list[Pair]:
    """`count` pairs, chosen greedily, in which any two values occur together that do so at all."""
    missing, chosen = set().union(*map(values_together, pairs)), []
    while missing or len(chosen) < count:
        best = max(pairs, key=lambda pair: (len(values_together(pair) & missing), pair not in chosen))
        chosen.append(best)
        missing -= values_together(best)
    return chosen


MATRIX = covering(possible(), 24)


def test_the_matrix_covers_every_two_values() -> None:
    assert len(MATRIX) == 24
    together: Iterable[set[Any]] = map(values_together, possible())
    assert set().union(*map(values_together, MATRIX)) == set().union(*together)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def tree(corpus: Path, folder: Path, pair: Pair, layout: str, zero_stage: int) -> dict[str, Any]:
    base = run_tree(corpus, folder)
    shape = {name: value for name, value in MODELS[pair.model].items() if name not in ("num_layers", "max_positions")}
    return run_tree(
        corpus,
        folder,
        model=shape | {"num_layers": 4},
        stages=[base["stages"][0] | {"duration": {"steps": NUM_STEPS}}],
        optimizer={"learning_rate": 2e-3},
        precision={"dtype": pair.dtype},
        parallel=(LAYOUTS | OFFLOADED)[layout] | {"zero_stage": zero_stage},
        evaluation={"every_steps": None},
        checkpoint={"every_steps": SAVED_AT, "keep_last": 1, "keep_every": None},
        checks=False,
    )


def run(tree: dict[str, Any]) -> dict[str, Any]:
    parallel = tree["parallel"]
    world_size = parallel.get("pipe", 1) * parallel.get("tensor", 1) * parallel.get("data", 1)
    ranks = run_ranks(world_size, train_rank, tree)
    assert {rank["code"] for rank in ranks} == {EXIT_DONE}
    return ranks[0]


def losses(folder: Path) -> list[float]:
    records = [record for record in read_metrics(folder) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, NUM_STEPS + 1))
    return [record["loss"] for record in records]


def check(pair: Pair, corpus: Path, folder: Path) -> None:
    whole, again, other = folder / "whole", folder / "again", folder / "other"
    first = tree(corpus, whole, pair, pair.first, pair.first_zero)
    # two steps, then the rest: the files at step 2 are all that the second half knows of the first
    run(first | {"checkpoint": {"every_steps": SAVED_AT, "keep_last": NUM_STEPS}})
    for copy in (again, other):
        shutil.copytree(whole, copy, ignore=shutil.ignore_patterns("step-*[!2]", "step-*[12]2"))
    saved = step_path(whole / "checkpoints", SAVED_AT)
    held = fingerprint_of_checkpoint(saved, open_checkpoint(saved))
    same = run(first | {"folder": str(again)})
    assert (same["started_at"], same["at_start"]) == (SAVED_AT, held)
    assert losses(again) == losses(whole)
    moved = run(tree(corpus, other, pair, pair.second, pair.second_zero))
    assert (moved["started_at"], moved["at_start"]) == (SAVED_AT, held)
    assert losses(other) == pytest.approx(losses(whole), rel=0, abs=TOLERANCE[pair.dtype])
    assert losses(whole)[-1] < losses(whole)[SAVED_AT], "it learns: equal losses say something"


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_another_layout_goes_on(pair: Pair, corpus: Path, tmp_path: Path) -> None:
    check(pair, corpus, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("pair", MATRIX, ids=str)
def test_matrix(pair: Pair, corpus: Path, tmp_path: Path) -> None:
    check(pair, corpus, tmp_path)
