"""A run whose reservoir is pinned replays the same rows after the source of the stage before has gone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.folder import committed, step_path
from engine.checkpoint.load import read_state
from engine.checkpoint.named_files import FOLDER
from engine.checkpoint.verify import verify
from engine.config.save import save_run
from engine.data.shards.index import read_index
from engine.data.shards.tombstones import Tombstones
from engine.errors import EXIT_DONE, DataError
from engine.train.forgotten import RunOfDocuments
from tests.distributed.runs import Tree, run_config
from tests.engine.train.fake import check_equal, fake_run, stopped_run
from tests.engine.train.reservoirs import BORDER, LAST, replaying_tree


def tree_of(corpus: Path, source: Path, folder: Path, pin: dict[str, Any] | None) -> Tree:
    """The run of test_replay, whose first stage reads `source`."""
    tree = replaying_tree(corpus, folder)
    tree["stages"][0]["data"] = tree["stages"][0]["data"] | {"train": str(source)}
    tree["reservoir"] |= {} if pin is None else {"pin": pin}
    return tree


@pytest.fixture
def source(corpus, tmp_path) -> Path:
    """A copy of the first stage's data, which a test may remove."""
    return Path(shutil.copytree(corpus / "train", tmp_path / "source"))


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> tuple[Path, Any]:
    """The run whose source stays, not pinned."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, fake_run(tree_of(corpus, corpus / "train", folder, None))


PIN = {"max_bytes": 10**9}


def first_stage(tree: Tree) -> Tree:
    """The run before its second stage was appended."""
    return tree | {"stages": tree["stages"][:1]}


def pinned_files(folder: Path, step: int) -> list[str]:
    return read_state(step_path(folder / "checkpoints", step)).sections["reservoir"].get("pinned", [])


def test_a_source_that_is_gone_changes_nothing(corpus, source, whole, tmp_path):
    folder, run = whole
    fake_run(first_stage(tree_of(corpus, source, tmp_path / "run", PIN)))
    files = pinned_files(tmp_path / "run", BORDER)
    assert files
    shutil.rmtree(source)
    # once more, inside of the stage
    stopped_run(tree_of(corpus, source, tmp_path / "run", PIN), 7)
    assert pinned_files(tmp_path / "run", 7 - 1) == files
    again = fake_run(tree_of(corpus, source, tmp_path / "run", PIN))
    assert (again.code, again.at_end) == (EXIT_DONE, run.at_end)
    check_equal(tmp_path / "run", folder)
    # the second stage's end pins its own rows, too, and the first one's from their copies
    assert pinned_files(tmp_path / "run", LAST)
    assert not any(verify(path) for path in committed(tmp_path / "run" / "checkpoints"))


def test_pinning_changes_no_sample(corpus, whole, tmp_path):
    folder, run = whole
    assert fake_run(tree_of(corpus, corpus / "train", tmp_path / "run", PIN)).at_end == run.at_end
    check_equal(tmp_path / "run", folder)


def test_without_pins_the_stage_is_refused(corpus, source, tmp_path):
    fake_run(first_stage(tree_of(corpus, source, tmp_path / "run", None)))
    shutil.rmtree(source)
    with pytest.raises(DataError, match="shards that are missing or have changed"):
        fake_run(tree_of(corpus, source, tmp_path / "run", None))


def test_domains_that_are_not_named_are_not_pinned(corpus, tmp_path):
    pin = PIN | {"domains": ["two"]}
    fake_run(tree_of(corpus, corpus / "train", tmp_path / "run", pin))
    assert not pinned_files(tmp_path / "run", BORDER)
    assert pinned_files(tmp_path / "run", LAST)


def test_a_checkpoint_without_its_copies_is_damaged(corpus, source, tmp_path):
    fake_run(first_stage(tree_of(corpus, source, tmp_path / "run", PIN)))
    names = pinned_files(tmp_path / "run", BORDER)
    for name in names:
        (tmp_path / "run" / "checkpoints" / FOLDER / name).unlink()
    damages = verify(step_path(tmp_path / "run" / "checkpoints", BORDER))
    assert [str(damage) for damage in damages] == [f"{FOLDER}/{name}: is missing" for name in names]


def test_forgetting_names_the_files_that_still_hold_a_document(corpus, source, tmp_path):
    folder = tmp_path / "run"
    fake_run(tree_of(corpus, source, folder, PIN))
    save_run(run_config(tree_of(corpus, source, folder, PIN)), folder)
    shards = read_index(source).shards
    gone = Tombstones({shard.content_hash: range(0, shard.num_documents, 2) for shard in shards})
    shutil.rmtree(source)
    held = dict(RunOfDocuments(folder).pinned(gone))
    assert set(held) == {*pinned_files(folder, BORDER), *pinned_files(folder, LAST)}
    assert all(len(documents) for documents in held.values())
    assert not any(len(documents) for _, documents in RunOfDocuments(folder).pinned(Tombstones({})))
