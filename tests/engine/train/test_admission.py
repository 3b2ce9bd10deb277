"""The run's reservoir: what was trained on is in it, at any checkpoint, after any restart."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.checkpoint.folder import committed, step_of
from engine.checkpoint.verify import verify
from engine.data.mixed_order import Cursor
from engine.data.order.sample_order import START
from engine.data.replay import files
from engine.data.replay.rows import documents_of
from engine.data.replay.view import ReplayDataset
from engine.data.shards.tombstones import Tombstones, add_tombstones
from engine.data.trained_rows import trained_rows
from engine.errors import EXIT_DONE, CheckpointError
from tests.engine.train.fake import fake_run, fake_trainer, stopped_run
from tests.engine.train.reservoirs import BORDER, LAST, admitting_tree, bytes_of, hook_of, sections


def test_a_checkpoint_names_what_was_admitted_and_a_run_stages_end_compacts_it(corpus, tmp_path):
    assert fake_run(admitting_tree(corpus, tmp_path)).code == EXIT_DONE
    found = sections(tmp_path)
    assert {step: len(state["chain"]) for step, state in found.items()} == {2: 1, 4: 1, 6: 2, 8: 3, 9: 1}
    assert [found[step]["generation"] for step in (2, 4)] == [None, None]
    assert {found[step]["generation"]["file"] for step in (6, 8, 9)} == set(found[4]["chain"])
    assert not any(verify(path) for path in committed(tmp_path / "checkpoints"))


def test_the_reservoir_has_the_rows_of_all_samples_up_to_its_checkpoint(corpus, tmp_path):
    rows: set[tuple[str, int]] = set()

    def prepare(trainer: Any) -> None:
        begin = trainer.current.begin

        def noted(number: int) -> None:
            note(trainer)
            begin(number)

        trainer.current.begin = noted

    def note(trainer: Any) -> None:
        stream = trainer.feed.stream
        start = Cursor(0, (START,) * len(stream.parts))
        for found in trained_rows(stream, start, stream.position, 16):
            name = stream.parts[found.source].dataset.index.shards[found.shard].content_hash
            rows.update((name, inside) for inside in found.rows.inside.tolist())

    with fake_trainer(admitting_tree(corpus, tmp_path)) as trainer:
        prepare(trainer)
        assert trainer.fit() == EXIT_DONE
        note(trainer)
        reservoir = hook_of(trainer).reservoir
    kept = {
        (reservoir.shards[row_id >> 44], row_id % 2**44)
        for entries in reservoir.entries.values()
        for row_id in entries.row_ids.tolist()
    }
    assert kept == rows
    assert set(reservoir.entries) == {"one", "two"}


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 7])
def test_a_run_that_was_stopped_ends_with_the_same_bytes(corpus, tmp_path, stop):
    fake_run(admitting_tree(corpus, tmp_path / "whole"))
    stopped_run(admitting_tree(corpus, tmp_path / "parts"), stop)
    assert fake_run(admitting_tree(corpus, tmp_path / "parts")).code == EXIT_DONE
    assert bytes_of(tmp_path / "parts", LAST) == bytes_of(tmp_path / "whole", LAST)


class FullDisk:
    """A file system that refuses the reservoir's files while a trainer stands at some steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
        self.steps, self.at, self.refused = steps, -1, []
        real = files.replacing

        def replacing(path: Path) -> Any:
            if self.at in self.steps:
                self.refused.append(self.at)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(path)

        monkeypatch.setattr(files, "replacing", replacing)

    def prepare(self, trainer: Any) -> None:
        save = trainer.checkpoints.save

        def watched(state: Any, *arguments: Any) -> None:
            self.at = state.step
            save(state, *arguments)
            self.at = -1

        trainer.checkpoints.save = watched


@pytest.mark.parametrize("full", [{2}, {6}, {6, 8}, {BORDER}])
@pytest.mark.parametrize("replays", [False, True])
def test_a_full_disk_fails_the_checkpoint_and_not_the_run(corpus, tmp_path, monkeypatch, full, replays):
    """A later checkpoint has what was missing; at a run stage's end, the generation that the next one replays, too."""
    trees = [admitting_tree(corpus, tmp_path / name) for name in ("whole", "full")]
    for tree in trees:
        tree["stages"][1] |= {"replay": {"ratio": 0.5}} if replays else {}
        tree["checkpoint"] |= {"on_failure": "continue"}
    whole = fake_run(trees[0])
    disk = FullDisk(monkeypatch, full)
    run = fake_run(trees[1], disk.prepare)
    assert (run.code, run.at_end, set(disk.refused)) == (EXIT_DONE, whole.at_end, full)
    assert {step_of(path) for path in committed(tmp_path / "full" / "checkpoints")} == {2, 4, 6, 8, 9} - full
    assert bytes_of(tmp_path / "full", LAST) == bytes_of(tmp_path / "whole", LAST)
    generations = [sections(tmp_path / name)[LAST]["generation"] for name in ("whole", "full")]
    assert generations[0] == generations[1] or not replays


def test_a_full_disk_stops_a_run_that_asks_for_it(corpus, tmp_path, monkeypatch):
    disk = FullDisk(monkeypatch, {6})
    with pytest.raises(CheckpointError, match="No space left"):
        fake_run(admitting_tree(corpus, tmp_path), disk.prepare)
    disk.steps = set()
    assert fake_run(admitting_tree(corpus, tmp_path)).started_at == BORDER


def test_documents_that_are_replayed_from_a_folder_are_not_admitted_again(corpus, tmp_path):
    """The folder holds documents that the first stage has not trained on."""
    tree = admitting_tree(corpus, tmp_path)
    tree["stages"][1]["replay"] = {"ratio": 0.5, "source": str(corpus / "validation")}
    with fake_trainer(tree) as trainer:
        assert trainer.fit() == EXIT_DONE
        replayed = trainer.feed.stream.parts[-1].dataset.index.shards
        reservoir = hook_of(trainer).reservoir
        assert trainer.feed.stream.trained()["replay"] > 0
    assert set(reservoir.entries) == {"one", "two"}
    assert not set(reservoir.shards) & {shard.content_hash for shard in replayed}


def test_rows_that_are_trained_on_again_after_a_crash_change_nothing(corpus, tmp_path):
    fake_run(admitting_tree(corpus, tmp_path / "whole"))
    stopped_run(admitting_tree(corpus, tmp_path / "parts"), 7)
    for path in committed(tmp_path / "parts" / "checkpoints"):
        if step_of(path) > 6:  # as if it had been killed before those
            shutil.rmtree(path)
    assert fake_run(admitting_tree(corpus, tmp_path / "parts")).started_at == 6
    assert bytes_of(tmp_path / "parts", LAST) == bytes_of(tmp_path / "whole", LAST)


def test_the_generation_is_what_was_admitted_before_the_run_stage(corpus, tmp_path):
    stopped_run(admitting_tree(corpus, tmp_path), 6)
    with fake_trainer(admitting_tree(corpus, tmp_path)) as trainer:
        hook = hook_of(trainer)
        generation = hook.generation(trainer)
        assert generation is not None
        assert {name for name, domain in generation.domains.items() if domain.size} == {"one"}
        view = ReplayDataset(generation, [part.dataset for part in trainer.feed.stream.parts])
        assert view.index.num_documents == generation.num_rows > 0


def test_a_deleted_document_does_not_come_back_from_a_checkpoint(corpus, tmp_path):
    """The frozen generation keeps its place, so that no other row moves; tests/engine/train/test_replay.py shows what
    is read there."""
    stopped_run(admitting_tree(corpus, tmp_path), 6)
    with fake_trainer(admitting_tree(corpus, tmp_path)) as trainer:
        before = hook_of(trainer).reservoir
    gone = Tombstones({name: range(0, 40, 2) for name in before.shards})
    add_tombstones(tmp_path, gone)
    with fake_trainer(admitting_tree(corpus, tmp_path)) as trainer:
        assert trainer.state.step == 6
        after = hook_of(trainer).reservoir
    row_ids = [entries.row_ids for entries in after.entries.values()]
    assert sum(found.size for found in row_ids)
    assert not any(np.isin(documents_of(found), range(0, 40, 2)).any() for found in row_ids)
