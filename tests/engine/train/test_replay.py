"""A run stage replays the run's reservoir: rows of the stages before it, the same after any restart.

Stage `one` has four steps over one data set; stage `two` has five over another one, and replays.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.checkpoint.folder import committed, step_of, step_path
from engine.checkpoint.load import read_state
from engine.config.save import save_run
from engine.data.forgetting import Scan, scan
from engine.data.replay.view import ReplayDataset
from engine.data.shards.index import read_index
from engine.data.shards.tombstones import Tombstones, add_tombstones
from engine.data.stage import run_stage_seed, stage_stream
from engine.errors import EXIT_DONE, DataError
from engine.train.admission import Admission
from engine.train.forgotten import RunOfDocuments
from engine.train.saved_reservoir import frozen_generation, kept_generation, open_stage
from tests.distributed.poison import STABILITY
from tests.distributed.runs import run_config
from tests.engine.train.fake import check_equal, fake_run, fake_trainer, record_samples, spike, stopped_run, values
from tests.engine.train.reservoirs import BORDER, LAST, replaying_tree

REPLAYED = [3, 6, 9, 12, 15]
"""Samples that are replayed after each step of stage two, of six each."""


def view_of(trainer: Any) -> ReplayDataset:
    view = trainer.feed.stream.parts[-1].dataset
    assert isinstance(view, ReplayDataset)
    return view


def reservoir_of(trainer: Any) -> Any:
    return next(hook for hook in trainer.hooks._hooks if isinstance(hook, Admission)).reservoir


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> tuple[Path, Any, dict[int, list[Any]]]:
    folder, samples = tmp_path_factory.mktemp("whole") / "run", {}
    return folder, fake_run(replaying_tree(corpus, folder), record_samples(samples)), samples


def test_a_run_stage_replays_what_the_ones_before_it_were_trained_on(corpus, whole, tmp_path):
    folder, run, _ = whole
    assert run.code == EXIT_DONE
    assert [values(folder, "replay_samples")[step] for step in range(BORDER + 1, LAST + 1)] == REPLAYED
    assert set(values(folder, "loss/replay")) == set(range(BORDER + 1, LAST + 1))
    with fake_trainer(replaying_tree(corpus, tmp_path)) as trainer:
        assert trainer.fit() == EXIT_DONE
        view, reservoir = view_of(trainer), reservoir_of(trainer)
        one = {shard.content_hash for shard in read_index(corpus / "train").shards}
    assert view.domains == ("one",)
    assert set(view.generation.shards) <= one
    # as many rows as documents of stage one are kept: those of stage two are of its new data alone
    assert reservoir.entries["one"].size == view.generation.num_rows > 0
    assert set(reservoir.entries) == {"one", "two"}


@pytest.mark.parametrize("step", [2, BORDER, BORDER + 1, 7])
def test_a_stop_anywhere_changes_no_sample(corpus, whole, tmp_path, step):
    folder, run, samples = whole
    stopped_run(replaying_tree(corpus, tmp_path), step - 1, "forward and backward")
    found: dict[int, list[Any]] = {}
    again = fake_run(replaying_tree(corpus, tmp_path), record_samples(found))
    assert (again.code, again.started_at, again.at_end) == (EXIT_DONE, step, run.at_end)
    assert found == {number: ids for number, ids in samples.items() if number >= step}
    check_equal(tmp_path, folder)


@pytest.mark.parametrize("left", [BORDER, 6])
def test_a_crash_in_the_run_stage_or_at_its_beginning_changes_nothing(corpus, whole, tmp_path, left):
    folder, run, _ = whole
    stopped_run(replaying_tree(corpus, tmp_path), 7)
    for path in committed(tmp_path / "checkpoints"):
        if step_of(path) > left:  # as if it had been killed before those
            shutil.rmtree(path)
    again = fake_run(replaying_tree(corpus, tmp_path))
    assert (again.started_at, again.at_end) == (left, run.at_end)
    check_equal(tmp_path, folder)


@pytest.mark.parametrize("without_border", [False, True])
def test_a_rollback_replays_what_the_run_stage_before_was_trained_on(corpus, tmp_path, without_border):
    """Also where the run goes back into the first stage, which then ends a second time."""
    tree = replaying_tree(corpus, tmp_path) | {"stability": STABILITY | {"window": 2}}
    checkpoints = tmp_path / "checkpoints"

    def prepare(trainer: Any) -> None:
        spike(trainer, (4, 5))
        go_back = trainer.go_back

        def going_back(first: int) -> None:
            trainer.checkpoints.settle()
            for path in committed(checkpoints):
                if step_of(path) >= (BORDER if without_border else BORDER + 1):
                    shutil.rmtree(path)
            go_back(first)

        trainer.go_back = going_back

    run = fake_run(tree, prepare)
    assert (run.code, run.state.step, run.state.rollbacks) == (EXIT_DONE, LAST, 1)
    border, last = (read_state(step_path(checkpoints, step)).sections["reservoir"] for step in (BORDER, LAST))
    assert last["generation"]["file"] == border["chain"][0]
    assert [values(tmp_path, "replay_samples")[step] for step in range(BORDER + 1, LAST + 1)] == REPLAYED


def test_a_reservoir_of_another_size_serves_later_run_stages_alone(corpus, whole, tmp_path):
    """Its keys are of kind schedule, and may change inside of a run stage; the generation stays."""
    folder, run, _ = whole
    stopped_run(replaying_tree(corpus, tmp_path), 7)
    smaller = replaying_tree(corpus, tmp_path) | {"reservoir": {"rows": 3, "span_tokens": 16, "quota": "uniform"}}
    assert fake_run(smaller).at_end == run.at_end
    check_equal(tmp_path, folder)


def test_a_reservoir_of_another_size_before_the_first_step_of_a_run_stage(corpus, whole, tmp_path):
    """The stage has begun: its checkpoint has the place in the generation."""
    folder, run, _ = whole

    def never(trainer: Any) -> None:
        step = trainer._step
        trainer._step = lambda: trainer.state.step == BORDER or step()

    stopped = fake_run(replaying_tree(corpus, tmp_path), never)
    assert (stopped.state.run_stage, stopped.state.stage_step) == (1, 0)
    smaller = replaying_tree(corpus, tmp_path) | {"reservoir": {"rows": 3, "span_tokens": 16, "quota": "uniform"}}
    assert fake_run(smaller).at_end == run.at_end
    check_equal(tmp_path, folder)


def test_a_deleted_document_is_not_read_and_no_sample_moves(corpus, whole, tmp_path):
    _, _, samples = whole
    stopped_run(replaying_tree(corpus, tmp_path), 6)
    shards = read_index(corpus / "train").shards
    gone = Tombstones({shard.content_hash: range(0, shard.num_documents, 2) for shard in shards})
    add_tombstones(tmp_path, gone)
    found: dict[int, list[Any]] = {}
    with fake_trainer(replaying_tree(corpus, tmp_path)) as trainer:
        view, read = view_of(trainer), 0
        for number in range(view.num_shards):
            shard = view.shard(number)
            for document in range(shard.documents.size - 1):
                entry = view.entry(number, document)
                first, end = shard.documents[document : document + 2]
                if np.isin(entry.document, gone.of(entry.content_hash)):
                    assert (shard.tokens[first:end] == view.index.eos_id).all()
                    assert shard.is_forgotten(np.arange(first, end)).all()
                    read += 1
        assert read > 0
        record_samples(found)(trainer)
        assert trainer.fit() == EXIT_DONE
    assert found == {number: ids for number, ids in samples.items() if number >= 6}


def test_data_that_is_streamed_from_a_url_is_replayed_alike(corpus, whole, tmp_path):
    folder, run, samples = whole
    tree, found = replaying_tree(corpus, tmp_path / "run"), {}
    for stage in tree["stages"]:
        cache = {"folder": str(tmp_path / "cache"), "bytes": 10**7}
        stage["data"] = stage["data"] | {"train": f"file://{stage['data']['train']}", "cache": cache}
    assert fake_run(tree, record_samples(found)).at_end == run.at_end
    assert found == samples
    check_equal(tmp_path / "run", folder)
    tree["stages"][1]["data"]["cache"]["bytes"] = 1000
    with pytest.raises(DataError, match=r"data.cache.bytes = 1,000 is less than two windows"):
        fake_run(tree | {"folder": str(tmp_path / "other")})


def test_data_of_the_earlier_run_stage_that_is_gone_is_told(corpus, tmp_path):
    tree = replaying_tree(corpus, tmp_path / "run")
    shutil.copytree(corpus / "train", tmp_path / "old")
    tree["stages"][0]["data"] = tree["stages"][0]["data"] | {"train": str(tmp_path / "old")}
    stopped_run(tree, 6)
    shutil.rmtree(tmp_path / "old")
    with pytest.raises(DataError, match=r"rows to replay are in \d+ shards that are missing"):
        fake_run(tree)
    # found by its content, wherever it lies
    tree["stages"][0]["data"] = tree["stages"][0]["data"] | {"train": str(corpus / "train")}
    assert fake_run(tree).code == EXIT_DONE


def test_an_empty_reservoir_is_refused_where_the_run_stage_begins(corpus, tmp_path):
    """It was switched on after the first run stage."""
    tree = replaying_tree(corpus, tmp_path)
    first = {key: value for key, value in tree.items() if key != "reservoir"} | {"stages": tree["stages"][:1]}
    assert fake_run(first).code == EXIT_DONE
    with pytest.raises(DataError, match="stage two replays from the run's reservoir, which is empty"):
        fake_run(tree)


def test_too_many_epochs_over_the_reservoir_are_refused(corpus, tmp_path):
    tree = replaying_tree(corpus, tmp_path) | {"reservoir": {"rows": 1, "span_tokens": 16}}
    with pytest.raises(DataError, match="stage two replays 15 samples of 1 in replay of generation"):
        fake_run(tree)
    assert read_state(committed(tmp_path / "checkpoints")[0]).sections["progress"]["step"] == BORDER


def test_commands_open_what_a_run_stage_replays(corpus, whole, capsys):
    """As the run itself has opened it, from the checkpoints that name it."""
    folder, _, samples = whole
    config = run_config(replaying_tree(corpus, folder))
    stream = stage_stream(config.stages[1], open_stage(config, 1), run_stage_seed(config.seed, 1))
    for step in range(BORDER, LAST):
        assert stream.next_sample_ids(stream.batch_size) == samples[step]
        stream.skip()
    kept = kept_generation(config)
    assert kept is not None
    assert set(kept[1].domains) == {"one", "two"}
    assert frozen_generation(config, 0) is None
    with pytest.raises(DataError, match="is known once the stage begins"):
        open_stage(run_config(replaying_tree(corpus, folder / "elsewhere")), 1)


def test_a_scan_finds_nothing_of_a_forgotten_document_in_a_saved_buffer(corpus, whole, tmp_path):
    folder = Path(shutil.copytree(whole[0], tmp_path / "run"))
    save_run(run_config(replaying_tree(corpus, folder)), folder)
    run = RunOfDocuments(folder)
    shards = read_index(corpus / "train").shards
    gone = Tombstones({shard.content_hash: range(0, shard.num_documents, 2) for shard in shards})
    scans = dict(run.scan(gone))
    names = ["stage two, replay", f"the reservoir of {committed(folder / 'checkpoints')[0].name}"]
    for name in names:
        found = scans[name]
        assert isinstance(found, Scan), found
        assert found.documents > 0
        assert found.tokens > 0
        assert found.rows > 0
    for held in run.held(gone):
        assert not held.unknown
    # a view that reads them is found out
    config = run_config(replaying_tree(corpus, folder))
    view = open_stage(config, 1, None, gone)[-1].dataset
    assert isinstance(view, ReplayDataset)
    with pytest.raises(DataError, match="its tokens are read"):
        scan(view.with_fill(7), view)
