"""A shard damaged under a run: by default every rank fails; on request all do without it, in any layout alike."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.folder import step_path
from engine.checkpoint.load import read_state
from engine.errors import EXIT_DONE
from engine.train.metrics import read_metrics
from tests.distributed.ranks import RankFailed, run_ranks
from tests.distributed.runs import run_tree, train_rank, write_corpus

SHARD = "shard-000001"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Shards of which one lost its tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    path = folder / "train" / f"{SHARD}.tokens"
    path.write_bytes(bytes(path.stat().st_size))
    return folder


def tree(corpus: Path, folder: Path, on_damage: str, **parallel: int) -> dict[str, Any]:
    found = run_tree(corpus, folder, parallel=parallel)
    found["stages"][0]["data"]["on_damage"] = on_damage
    return found


def loader_states(folder: Path) -> list[Any]:
    return [read_state(step_path(folder / "checkpoints", step)).sections["loader"] for step in (3, 6, 9)]


def test_a_run_does_without_a_damaged_shard_in_every_layout_and_after_a_restart(corpus, tmp_path):
    with pytest.raises(RankFailed, match=f"{SHARD}.tokens is damaged"):
        run_ranks(2, train_rank, tree(corpus, tmp_path / "fail", "fail", data=2))
    two, one = tmp_path / "two", tmp_path / "one"
    ranks = run_ranks(2, train_rank, tree(corpus, two, "quarantine", data=2))
    run_ranks(1, train_rank, tree(corpus, one, "quarantine", data=1))
    assert {rank["code"] for rank in ranks} == {EXIT_DONE}
    assert loader_states(two) == loader_states(one)
    assert loader_states(two)[-1]["lost"] == [[0, 1, 1]]
    records = {folder: {r["step"]: r for r in read_metrics(folder) if "loss" in r} for folder in (two, one)}
    assert records[two][9]["lost_shards"] == 1
    for step, record in records[two].items():  # the same samples; sums of fp32 in another order
        assert record["loss"] == pytest.approx(records[one][step]["loss"], rel=1e-5)

    again = tmp_path / "again"  # what was decided is in the checkpoint, for a world of another size, too
    shutil.copytree(two, again, ignore=shutil.ignore_patterns("step-00000006", "step-00000009"))
    [resumed] = run_ranks(1, train_rank, tree(corpus, again, "quarantine", data=1))
    assert resumed["started_at"] == 3
    assert loader_states(again) == loader_states(two)
