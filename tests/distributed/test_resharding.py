"""Engines that go on in another layout from what a first one saved: the same state, and the same loss over 20 steps.

The whole run is made once in its first layout. Its checkpoint at step 2 is taken up by fresh processes, in the same
layout (losses bitwise equal) and in another one. After the load the hash over all weights and moments is that of the
files; every rank has read the bytes of its own elements and no others, and while it did, tensors took no more memory
than its shard and the largest parameter. Tolerances: sums over other splits of a batch round differently, 1e-7 relative
in fp32 and 4e-3 in bf16, and 20 updates carry that on; 1e-5 and 5e-3 on the loss are what the project promises.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.fingerprint import fingerprint_of_checkpoint
from engine.checkpoint.folder import step_path
from engine.checkpoint.load import open_checkpoint
from engine.config.rank_environment import RankEnvironment
from engine.errors import EXIT_DONE
from engine.train.metrics import read_metrics
from tests.distributed.pairs import (
    FEW_STEPS,
    NUM_PAIRS,
    NUM_STEPS,
    SAVED_AT,
    Pair,
    accepted,
    covering,
    everything,
    name_of,
    possible,
    selection,
    tree_of,
    values_together,
    world_size,
)
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import train_rank

TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}
MATRIX = covering()
SELECTION = selection(3, largest_world=4)
"""What `make test` runs, over fewer steps."""


def test_the_pairs_are_24_and_cover_every_two_values_that_can_be() -> None:
    assert len(MATRIX) == NUM_PAIRS
    assert all(possible(pair) and accepted(pair, "first") and accepted(pair, "second") for pair in MATRIX)
    assert all(pair in MATRIX for pair in SELECTION)
    missing = everything() - set().union(*map(values_together, MATRIX))
    impossible = {
        (("dtype", "bf16"), ("first zero_stage", 0)),
        (("dtype", "bf16"), ("second zero_stage", 0)),
        (("first pipe", 1), ("first chunks_per_stage", 2)),
        (("second pipe", 1), ("second chunks_per_stage", 2)),
        (("first zero_stage", 0), ("first offload", "optimizer")),
        (("second zero_stage", 0), ("second offload", "optimizer")),
        (("optimizer", "muon"), ("first offload", "optimizer")),
        (("optimizer", "muon"), ("second offload", "optimizer")),
    }
    assert missing == impossible


@pytest.fixture(scope="module")
def corpus(corpora: Path) -> Path:
    """A folder per family."""
    return corpora


def watched_rank(environment: RankEnvironment, tree: dict[str, Any]) -> dict[str, Any]:
    """`train_rank`, and what loading took: bytes read, bytes of this rank's own elements, memory."""
    from engine.checkpoint import load as loading
    from engine.train.run_checkpoints import RunCheckpoints
    from tests.engine.checkpoint.memory import Alive

    load_shards, restore = loading.load_shards, RunCheckpoints.restore
    found: dict[str, Any] = {}

    def load_and_count(path: Any, manifest: Any, shards: Any, tensor_rank: int, tensor_size: int, zero: Any) -> int:
        read = load_shards(path, manifest, shards, tensor_rank, tensor_size, zero)
        sizes = [real_length(shard, tensor_rank, tensor_size) * 4 * (1 + len(shard.moments)) for shard in shards]
        found.update(read=read, own=sum(sizes))
        found["shard"] = sum(shard.length * 4 * (1 + len(shard.moments)) for shard in shards)
        found["largest"] = max(math.prod(spec.shape) for spec in manifest.specs.values()) * 4
        return read

    def restore_and_watch(*arguments: Any, **named: Any) -> Any:
        with Alive() as alive:
            restored = restore(*arguments, **named)
        found["peak"] = alive.peak
        return restored

    loading.load_shards = load_and_count  # this process ends with the run
    setattr(RunCheckpoints, "restore", restore_and_watch)  # noqa: B010
    return train_rank(environment, tree) | {"load": found}


def real_length(shard: Any, tensor_rank: int, tensor_size: int) -> int:
    """Elements of a shard that are no padded rows: those have the largest numbers, on the last tensor ranks."""
    rows, real = shard.spec.shape[0], shard.spec.stored_shape[0]
    if rows == real:
        return shard.length
    local, width = rows // tensor_size, math.prod(shard.spec.shape[1:])
    mine = min(max(real - tensor_rank * local, 0), local) * width
    return min(max(mine - shard.start, 0), shard.length)


def run(tree: dict[str, Any], ranks: int) -> list[dict[str, Any]]:
    results = run_ranks(ranks, watched_rank, tree)
    assert {result["code"] for result in results} == {EXIT_DONE}
    return results


def losses(folder: Path, num_steps: int) -> list[float]:
    records = [record for record in read_metrics(folder) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, num_steps + 1))
    return [record["loss"] for record in records]


def check(pair: Pair, corpus: Path, folder: Path, num_steps: int) -> None:
    whole, again, other = folder / "whole", folder / "again", folder / "other"
    # the files at step 2 are all that the second half knows of the first
    run(tree_of(pair, "first", corpus, whole, num_steps), world_size(pair, "first"))
    for copy in (again, other):
        shutil.copytree(whole, copy, ignore=shutil.ignore_patterns("step-*[!2]", "step-*[12]2"))
    saved = step_path(whole / "checkpoints", SAVED_AT)
    held = fingerprint_of_checkpoint(saved, open_checkpoint(saved))
    for side, layout in (("first", again), ("second", other)):
        for result in run(tree_of(pair, side, corpus, layout, num_steps), world_size(pair, side)):
            assert (result["started_at"], result["at_start"]) == (SAVED_AT, held)
            load = result["load"]
            assert load["read"] == load["own"]
            assert load["peak"] <= load["shard"] + load["largest"]
    made = losses(whole, num_steps)
    difference = max(abs(a - b) for a, b in zip(losses(other, num_steps), made, strict=True))
    print(f"largest difference of the loss: {difference:.1e}")
    assert losses(again, num_steps) == made
    assert difference <= TOLERANCE[pair["dtype"]]
    assert len(set(made)) == num_steps
    if num_steps == NUM_STEPS:
        assert sum(made[-5:]) < sum(made[SAVED_AT : SAVED_AT + 5]), "it learns: equal losses say something"


@pytest.mark.parametrize("pair", SELECTION, ids=name_of)
def test_another_layout_goes_on(pair: Pair, corpus: Path, tmp_path: Path) -> None:
    check(pair, corpus, tmp_path, FEW_STEPS)


@pytest.mark.matrix
@pytest.mark.parametrize("pair", MATRIX, ids=name_of)
def test_matrix(pair: Pair, corpus: Path, tmp_path: Path) -> None:
    check(pair, corpus, tmp_path, NUM_STEPS)
