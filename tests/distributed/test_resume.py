"""A run that was cut in two equals the whole one: bitwise in its own layout, to rounding over six steps in another.

The reference is the uninterrupted run itself. Its checkpoint at step 3 is taken up by fresh processes in a folder of
its own, so the second half starts from what was on the disk and nothing else.
"""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.fingerprint import fingerprint_of_checkpoint
from engine.checkpoint.folder import step_path
from engine.checkpoint.load import open_checkpoint
from engine.config.load import merge, parse_run
from engine.config.rank_environment import RankEnvironment
from engine.data.stage import open_parts, stage_stream
from engine.errors import EXIT_DONE
from engine.logs import ROOT
from engine.train.metrics import read_metrics
from tests.distributed.ranks import RankFailed, run_ranks
from tests.distributed.runs import run_tree, train_rank, write_corpus

LAYOUTS = {
    "zero0": {"zero_stage": 0, "data": 2},
    "zero1": {"zero_stage": 1, "pipe": 2},
    "zero2": {"zero_stage": 2, "data": 2},
    "zero3": {"zero_stage": 3, "pipe": 2, "data": 2},
    "bf16": {"zero_stage": 1, "pipe": 2},
}
PRECISION = {"bf16": {"dtype": "bf16"}}
OTHERS: dict[str, dict[str, int]] = {
    "zero0": {"zero_stage": 3, "tensor": 2},
    "zero1": {"zero_stage": 2, "data": 2, "micro_batch_size": 4},
    "zero2": {"zero_stage": 3, "pipe": 2},
    "zero3": {"zero_stage": 1, "tensor": 2},
}


@dataclass
class Whole:
    """The uninterrupted run in one layout."""

    tree: dict[str, Any]
    ranks: list[dict[str, Any]]

    @property
    def folder(self) -> Path:
        return Path(self.tree["folder"])


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def whole(corpus, tmp_path_factory):
    """The uninterrupted run of a layout, made once."""
    made: dict[str, Whole] = {}

    def run(name: str) -> Whole:
        if name not in made:
            precision = PRECISION.get(name, {})
            tree = run_tree(corpus, tmp_path_factory.mktemp(name), parallel=LAYOUTS[name], precision=precision)
            made[name] = Whole(tree, run_ranks(world_size(LAYOUTS[name]), train_rank, tree))
        return made[name]

    return run


def world_size(parallel: dict[str, int]) -> int:
    return parallel.get("pipe", 1) * parallel.get("tensor", 1) * parallel.get("data", 1)


def second_half(whole: Whole, folder: Path, parallel: dict[str, int]) -> list[dict[str, Any]]:
    """The run from its checkpoint at step 3 on, in `folder`, by fresh processes."""
    shutil.copytree(whole.folder, folder, ignore=shutil.ignore_patterns("step-00000006", "step-00000009"))
    tree = whole.tree | {"folder": str(folder), "parallel": {"micro_batch_size": 2} | parallel}
    return run_ranks(world_size(parallel), train_rank, tree)


def values(folder: Path, key: str) -> dict[int, float]:
    """One metric by step; a step that stands twice is an error."""
    records = [record for record in read_metrics(folder) if key in record]
    steps = [record["step"] for record in records]
    assert len(set(steps)) == len(steps), f"{key} of a step stands twice"
    return {record["step"]: record[key] for record in records}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_layout_goes_on_bitwise(layout, whole, tmp_path):
    run = whole(layout)
    ranks = second_half(run, tmp_path / "again", LAYOUTS[layout])
    assert {rank["code"] for rank in ranks} == {EXIT_DONE}
    assert {rank["started_at"] for rank in ranks} == {3}
    assert ranks[0]["at_end"] == run.ranks[0]["at_end"]
    assert ranks[0]["state"] == run.ranks[0]["state"]
    for key in ("loss", "gradient_norm", "learning_rate", "validation_loss"):
        assert values(tmp_path / "again", key) == values(run.folder, key)


def train_and_tell(environment: RankEnvironment, tree: dict[str, Any]) -> list[str]:
    """What a rank's trainer logs."""
    told: list[str] = []

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    log = logging.getLogger(f"{ROOT}.engine.train.current_run_stage")
    log.addHandler(Told())
    log.setLevel(logging.INFO)
    train_rank(environment, tree)
    return told


def test_a_resume_tells_its_next_samples_and_their_hash(whole, tmp_path):
    """In another world; against a stream that has skipped three steps."""
    run = whole("zero2")
    folder = tmp_path / "again"
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("step-00000006", "step-00000009"))
    tree = run.tree | {"folder": str(folder), "parallel": {"micro_batch_size": 2}}
    (told,) = run_ranks(1, train_and_tell, tree)
    [stage] = parse_run(tree, "test").stages
    stream = stage_stream(stage, open_parts(stage, None, 300), tree["seed"])
    for _ in range(3):
        stream.skip()
    samples = [tuple(sample) for sample in stream.next_sample_ids(3)]
    assert f"next samples {samples}, hash of the next 1024: {stream.sample_hash(1024)}" in told


@pytest.mark.parametrize("layout", OTHERS)
def test_other_layout_goes_on_within_rounding(layout, whole, tmp_path):
    run = whole(layout)
    ranks = second_half(run, tmp_path / "other", OTHERS[layout])
    saved = step_path(run.folder / "checkpoints", 3)
    assert ranks[0]["at_start"] == fingerprint_of_checkpoint(saved, open_checkpoint(saved))
    for key in ("loss", "validation_loss"):
        expected, found = values(run.folder, key), values(tmp_path / "other", key)
        assert found == pytest.approx(expected, rel=0, abs=2e-6)
        assert expected.keys() == found.keys()


def test_state_after_load_is_the_one_saved(whole, tmp_path):
    run = whole("zero3")
    saved = step_path(run.folder / "checkpoints", 9)
    assert fingerprint_of_checkpoint(saved, open_checkpoint(saved)) == run.ranks[0]["at_end"]
    assert run.ranks[0]["at_end"] != run.ranks[0]["at_start"]


def test_held_out_loss_is_equal_in_every_layout(whole):
    """At step 3 the weights differ by rounding alone, so the held-out loss does too: 13 samples do not fill a batch."""
    losses = [values(whole(name).folder, "validation_loss")[3] for name in OTHERS]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=0, abs=2e-6)


def test_a_run_of_another_meaning_is_refused_and_loses_nothing(whole, corpus):
    run = whole("zero0")
    tree = run_tree(corpus, run.folder, parallel=LAYOUTS["zero0"], seed=6)
    before = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    with pytest.raises(RankFailed, match=r"belongs to another run:\n.*seed: 5 -> 6"):
        run_ranks(2, train_rank, tree)
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == before


def test_a_finished_run_started_again_changes_nothing(whole, tmp_path):
    run = whole("zero1")
    folder = tmp_path / "finished"
    shutil.copytree(run.folder, folder)
    before = read_metrics(folder)
    (first, _) = run_ranks(2, train_rank, run.tree | {"folder": str(folder)})
    assert (first["code"], first["started_at"]) == (EXIT_DONE, 9)
    assert read_metrics(folder) == before


def test_another_meaning_is_free_while_nothing_was_trained(corpus, tmp_path):
    """What a first start refused can be mended in the same folder, as its message says."""
    tree = run_tree(corpus, tmp_path / "run", model={"vocab_size": 100})
    with pytest.raises(RankFailed, match=r"have 300 tokens in their vocabulary, model.vocab_size = 100"):
        run_ranks(1, train_rank, tree)
    (rank,) = run_ranks(1, train_rank, run_tree(corpus, tmp_path / "run"))
    assert rank["code"] == EXIT_DONE


def test_damaged_held_out_data_costs_no_training(corpus, tmp_path):
    """Found at the first evaluation, at step 3, when that step is saved already; every rank says the same."""
    held_out = tmp_path / "held-out"
    shutil.copytree(corpus, held_out)
    path = held_out / "validation" / "shard-000000.tokens"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    tree = run_tree(held_out, tmp_path / "run", parallel={"pipe": 2, "data": 2})
    with pytest.raises(RankFailed, match="shard-000000"):
        run_ranks(4, train_rank, tree)
    assert step_path(tmp_path / "run" / "checkpoints", 3).is_dir()


def test_a_run_whose_checkpoints_are_gone_does_not_start_over(corpus, tmp_path):
    """Whatever it saves from now on: `checkpoint.every_steps` may have changed since."""
    tree = run_tree(corpus, tmp_path / "run", parallel={"data": 1})
    run_ranks(1, train_rank, tree)
    before = read_metrics(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    for every_steps in (3, 100, None):
        again = merge(tree, {"checkpoint": {"every_steps": every_steps}})
        with pytest.raises(RankFailed, match=r"has trained 9 steps and saved step 9: its checkpoints are gone"):
            run_ranks(1, train_rank, again)
    assert read_metrics(tmp_path / "run") == before


def die_in_step_6(trainer: Any) -> None:
    step = trainer._step

    def step_or_die() -> bool:
        if trainer.state.step == 5:
            os._exit(1)
        return step()

    trainer._step = step_or_die


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_over(corpus, tmp_path):
    """Also where it is to save much more often than it was: it has never saved, so nothing of it is gone."""
    tree = run_tree(corpus, tmp_path / "run", parallel={"data": 1}, checkpoint={"every_steps": None})
    with pytest.raises(RankFailed, match="died without a word"):
        run_ranks(1, train_rank, tree, die_in_step_6)
    assert [record["step"] for record in read_metrics(tmp_path / "run") if "loss" in record] == [1, 2, 3, 4, 5]
    again = merge(tree, {"checkpoint": {"every_steps": 1}})
    (rank,) = run_ranks(1, train_rank, again)
    assert (rank["code"], rank["started_at"]) == (EXIT_DONE, 0)
