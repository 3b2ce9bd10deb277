"""What goes wrong for users: one clear message, a non-zero exit of every rank, and no checkpoint lost.

Every case is the real command on two ranks. What each error says in full is tested beside the code that raises it;
here it matters that it reaches the user from inside a world of ranks.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine import outcome
from engine.checkpoint.folder import committed
from engine.checkpoint.verify import verify
from engine.config.save import save_run
from engine.errors import EXIT_FAILURE, EXIT_USAGE
from tests.distributed.ranks import run_commands
from tests.distributed.runs import run_config, run_tree, write_corpus


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    write_corpus(folder)
    return folder


@pytest.fixture
def run_file(corpus, tmp_path) -> Path:
    """A run file; its run folder is `run` beside it."""
    tree = run_tree(corpus, tmp_path / "run", parallel={"pipe": 2, "zero_stage": 3})
    save_run(run_config(tree), tmp_path)
    return tmp_path / "config.yaml"


def refused(run_file: Path, *overrides: str, code: int, world_size: int = 2) -> str:
    """Runs the command; every rank must end with `code`. Returns what rank 0 said."""
    ends = run_commands(world_size, "train", str(run_file), *overrides)
    assert [found for found, _ in ends] == [code] * world_size, ends
    return ends[0][1]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("parallel.tensor=3", "parallel.tensor = 3 does not divide model.num_heads = 4"),
        ("parallel.data=2", "a world of 2 does not fit pipe 2 x tensor 1 x data 2"),
        ("optimizer.learning_rat=1e-3", "did you mean learning_rate?"),
        ("stages.0.global_batch_size=7", "global_batch_size = 7 is no multiple of micro_batch_size 2 x data 1"),
        ("precision.dtype=fp16", "precision.dtype = 'fp16' is not allowed"),
        ("parallel.zero_stage=0 precision.dtype=bf16", "parallel.zero_stage = 0 with precision.dtype = bf16"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(run_file, override, says):
    assert says in refused(run_file, *override.split(), code=EXIT_USAGE)
    assert not (run_file.parent / "run" / "checkpoints").exists()


def truncate(corpus: Path) -> str:
    path = corpus / "train" / "shard-000001.tokens"
    os.truncate(path, path.stat().st_size - 10)
    return "shard-000001"


def flip(corpus: Path) -> str:
    path = corpus / "train" / "shard-000000.tokens"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return "shard-000000"


def lose_shard(corpus: Path) -> str:
    (corpus / "train" / "shard-000000.tokens").unlink()
    return "shard-000000"


def lose_folder(corpus: Path) -> str:
    shutil.rmtree(corpus / "validation")
    return "validation"


def swap_tokenizer(corpus: Path) -> str:
    path = corpus / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][0]["content"] = "<other>"
    path.write_text(json.dumps(content))
    return "tokenizer"


@pytest.mark.parametrize("damage", [truncate, flip, lose_shard, lose_folder, swap_tokenizer])
def test_damaged_data_ends_every_rank_with_a_reason(damage, corpus, run_file):
    named = damage(corpus)
    said = "".join(text for _, text in run_commands(2, "train", str(run_file)))
    end = outcome.read(run_file.parent / "run")
    assert end is not None
    assert end.code == EXIT_FAILURE
    assert end.rank is not None
    assert named in end.error
    assert named in said
    assert "to do:" in end.error


def test_a_stale_build_lock_is_named_at_once(run_file, tmp_path):
    """DeepSpeed would wait for it for ever, without a word."""
    lock = tmp_path / "run" / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    for path in (lock, lock.parent):
        os.utime(path, (0, 0))
    said = refused(run_file, code=EXIT_FAILURE)
    assert f"the build lock {lock} was left by a build that was killed" in said
    assert f"rm -r {lock.parent}" in said


@contextmanager
def small_disk(path: Path, size_bytes: int) -> Iterator[None]:
    """A file system of that size at `path`; skips where it cannot be mounted."""
    path.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs to mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_fails_the_save_and_keeps_the_last_good_checkpoint(run_file):
    folder = run_file.parent / "run"
    with small_disk(folder / "checkpoints", size_bytes=250_000):  # room for one checkpoint of 160 kB, not for two
        ends = run_commands(2, "train", str(run_file))
        assert [code for code, _ in ends] == [EXIT_FAILURE] * 2, ends
        assert "no space left" in ends[0][1]
        (kept,) = committed(folder / "checkpoints")
        assert kept.name == "step-00000003"
        assert verify(kept) == []
        end = outcome.read(folder)
        assert end is not None
        assert (end.code, end.step) == (EXIT_FAILURE, 6)
