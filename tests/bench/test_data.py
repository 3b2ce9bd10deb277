"""The loaders that bench.data compares do the same work: rows of the same tokens, shifted or masked."""

import itertools
import tomllib

import numpy as np
import pytest

from bench.contest import in_turn
from bench.data import OPENINGS, RESUME_STEP, first_batch, masking, opening
from bench.loaders import BATCH_TOKENS, SIDES, Task, documents, ours, write_ours
from tests.readme import REPOSITORY

NUM_TOKENS = 200_000


@pytest.mark.parametrize("name", ["torch memmap", "datasets map", "datasets iterable", "litdata"])
def test_a_peer_yields_rows_of_the_corpus(name, tmp_path):
    side, task = SIDES[name], Task("gpt", 128)
    if not side.is_installed:
        pytest.skip("needs `make bench`")
    side.write(tmp_path, NUM_TOKENS, *((129,) if side.by_width else ()))
    flat = np.concatenate(list(documents(NUM_TOKENS)))
    rows = {flat[start : start + 129].tobytes() for start in range(0, flat.size - 129, 129 if side.by_width else 128)}
    for inputs, targets in itertools.islice(side.read(tmp_path, task, 0), 2):
        assert inputs.shape == targets.shape == (task.rows, 128)
        assert inputs.numel() == BATCH_TOKENS
        both = np.concatenate([inputs.numpy(), targets.numpy()[:, -1:]], axis=1).astype(np.uint16)
        assert {row.tobytes() for row in both} <= rows


def test_what_is_installed_for_benchmarks_brings_no_torchvision():
    """Its usual build beside the CPU build of torch keeps transformers from importing a model."""
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        extra = tomllib.load(file)["project"]["optional-dependencies"]["bench"]
    assert not [line for line in extra if line.startswith(("litdata", "torchvision", "mosaicml", "timm"))]
    assert "--no-deps 'litdata" in (REPOSITORY / "tools" / "environment.sh").read_text(encoding="utf-8")


def test_ours_resumes_where_steps_lead_and_masks(tmp_path):
    write_ours(tmp_path, NUM_TOKENS)
    task = Task("bert", 128)
    stepped = next(itertools.islice(ours(tmp_path, task, 0), RESUME_STEP, None))
    resumed = next(ours(tmp_path, task, RESUME_STEP))
    assert resumed.sources == stepped.sources
    assert resumed.inputs["tokens_BT"].equal(stepped.inputs["tokens_BT"])
    assert resumed.weights["mlm"] > 0.1 * BATCH_TOKENS


def test_one_sample_in_ten_is_replayed(tmp_path):
    write_ours(tmp_path, NUM_TOKENS)
    batches = list(itertools.islice(SIDES["ours with replay"].read(tmp_path, Task("gpt", 128), 0), 5))
    assert abs(sum(int(batch.domains_B.sum()) for batch in batches) - 0.1 * 5 * BATCH_TOKENS / 128) < 1


def test_masking_is_measured():
    assert set(masking(1)) == {"length 128", "length 512"}


def test_sides_take_turns_and_openings_are_compared_within_a_round(tmp_path):
    assert list(in_turn(["a", "b", "c"], 2)) == ["a", "b", "c", "b", "c", "a"]
    theirs, ours = ([{"warm": (9.0, seconds)} for seconds in cpu] for cpu in ((1.0, 4.0, 2.0), (2.0, 2.0, 2.0)))
    found = first_batch(theirs, ours, "warm")
    assert found["cpu_seconds"] == {"median": 2.0, "least": 1.0, "greatest": 4.0}
    assert found["ours_takes"] == {"median": 1.0, "least": 0.5, "greatest": 2.0}


def test_a_resume_skips_steps_and_the_others_none(tmp_path):
    asked = []

    def read(skip):
        asked.append(skip)
        yield None

    (tmp_path / "shard").write_bytes(bytes(10))
    for kind in OPENINGS:
        wall, cpu = opening(read, tmp_path, kind)
        assert wall > 0 <= cpu
    assert asked == [0, 0, RESUME_STEP]
