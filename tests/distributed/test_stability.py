"""Poisoned samples in a run: spikes are skipped, then rolled back past, and what is not finite never gets in.

The poison belongs to samples, not to steps: wherever one of them is in the batch, the step's gradient is 1e6 times too
large (or not a number). So a run that went back and left them out has to equal, bit for bit, one that had them left
out from the start of its second third and never met a spike.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.folder import step_path
from engine.checkpoint.load import read_state
from engine.errors import EXIT_DONE
from engine.train.metrics import read_metrics
from tests.distributed.poison import LEFT_OUT, NAN, SPIKES, STABILITY, poison
from tests.distributed.ranks import RankFailed, run_ranks
from tests.distributed.runs import run_tree, train_rank, write_corpus


def tree(corpus: Path, folder: Path, parallel: dict[str, int], **stability: Any) -> dict[str, Any]:
    return run_tree(corpus, folder, parallel=parallel, stability=STABILITY | stability)


def by_step(folder: Path, key: str) -> dict[int, float]:
    records = [record for record in read_metrics(folder) if key in record]
    assert len({record["step"] for record in records}) == len(records), f"{key} of a step stands twice"
    return {record["step"]: record[key] for record in records}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def check_rollback(corpus: Path, folder: Path, parallel: dict[str, int]) -> None:
    clean, poisoned, expected = folder / "clean", folder / "poisoned", folder / "expected"
    run_ranks(2, train_rank, tree(corpus, clean, parallel))
    ranks = run_ranks(2, train_rank, tree(corpus, poisoned, parallel), partial(poison, large=SPIKES, nan=(NAN,)))
    assert {rank["code"] for rank in ranks} == {EXIT_DONE}

    shutil.copytree(clean, expected, ignore=shutil.ignore_patterns("step-00000006", "step-00000009"))
    never_saw = partial(poison, large=(), nan=(NAN,), left_out=LEFT_OUT)
    reference = run_ranks(2, train_rank, tree(corpus, expected, parallel), never_saw)
    assert [rank["started_at"] for rank in reference] == [3, 3]
    assert [rank["at_end"] for rank in ranks] == [rank["at_end"] for rank in reference]
    for key in ("loss", "gradient_norm", "learning_rate", "samples", "validation_loss"):
        assert by_step(poisoned, key) == by_step(expected, key)
    assert ranks[0]["at_end"] != ranks[0]["at_start"]

    state = ranks[0]["state"]
    assert (state.step, state.updates, state.samples, state.rollbacks) == (9, 8, 72, 1)
    # 16 samples left out before it: the sample at 60 is in the step that ends as step 6
    assert by_step(poisoned, "skipped") == {6: 1}
    assert 6 not in by_step(poisoned, "gradient_norm"), "a norm that is not a number is no number in the metrics"
    assert by_step(poisoned, "rollback") == {4: 1}
    assert (by_step(poisoned, "left_out_from"), by_step(poisoned, "left_out_to")) == ({4: 32}, {4: 48})
    for step in (3, 6, 9):
        sections = read_state(step_path(poisoned / "checkpoints", step)).sections
        assert sections["loader"]["left_out"] == [[32, 48]]
        assert sections["progress"]["rollbacks"] == 1

    # a restart inside goes on the same: what the guard remembers is in the checkpoint
    again = folder / "again"
    shutil.copytree(poisoned, again, ignore=shutil.ignore_patterns("step-00000009"))
    resumed = run_ranks(2, train_rank, tree(corpus, again, parallel))
    assert resumed[0]["started_at"] == 6
    assert (resumed[0]["at_end"], resumed[0]["state"]) == (ranks[0]["at_end"], ranks[0]["state"])
    assert by_step(again, "rollback") == {4: 1}
    # nor does one that was killed right after it lose the record of the rollback
    shutil.rmtree(again / "checkpoints" / "step-00000006")
    shutil.rmtree(again / "checkpoints" / "step-00000009")
    restarted = run_ranks(2, train_rank, tree(corpus, again, parallel))
    assert restarted[0]["started_at"] == 3
    assert (by_step(again, "left_out_from"), by_step(again, "left_out_to")) == ({4: 32}, {4: 48})


def test_after_a_rollback_the_run_is_one_that_never_saw_the_samples(corpus, tmp_path):
    check_rollback(corpus, tmp_path, {"zero_stage": 1, "data": 2})


@pytest.mark.matrix
@pytest.mark.parametrize(
    "parallel", [{"zero_stage": 3, "data": 2}, {"zero_stage": 1, "pipe": 2}, {"zero_stage": 0, "data": 2}], ids=str
)
def test_a_rollback_in_other_layouts(corpus, tmp_path, parallel):
    check_rollback(corpus, tmp_path, parallel)


def test_rollbacks_are_bounded_and_need_a_checkpoint(corpus, tmp_path):
    everything = tuple(range(24, 200))
    config = tree(corpus, tmp_path / "often", {"data": 1})
    with pytest.raises(RankFailed, match="step 5: the loss still spikes after 1 rollbacks"):
        run_ranks(1, train_rank, config, partial(poison, large=everything, nan=()))
    config = tree(corpus, tmp_path / "early", {"data": 1}) | {"checkpoint": {"every_steps": 8}}
    with pytest.raises(RankFailed, match="step 5: the loss spikes before the first checkpoint"):
        run_ranks(1, train_rank, config, partial(poison, large=everything, nan=()))
