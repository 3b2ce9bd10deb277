"""A run whose batch grows: the samples of every layout are the same, and a restart inside the ramp changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.train.metrics import read_metrics
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import LENGTH, run_tree, train_rank, write_corpus

SIZES = (4, 4, 8, 8, 8, 12, 12)
"""Samples per step: 8 tokens x 16 are 128; 4 + 4 samples reach them, 4 + 4 + 8 + 8 + 8 samples are 512 tokens."""
RAMP = [{"size": 4, "until_tokens": 8 * LENGTH}, {"size": 8, "until_step": 5}]


def by_step(folder: Path, key: str) -> dict[int, float]:
    return {record["step"]: record[key] for record in read_metrics(folder) if key in record}


def again(whole: Path, folder: Path, tree: dict[str, Any]) -> list[dict[str, Any]]:
    """The run from its checkpoint at step 3, which is inside the ramp."""
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("step-00000006", "step-00000007"))
    return run_ranks(2, train_rank, tree | {"folder": str(folder)})


def test_a_restart_inside_the_ramp_and_another_layout_train_on_the_same_samples(tmp_path):
    write_corpus(tmp_path / "corpus")
    tree = run_tree(tmp_path / "corpus", tmp_path / "whole", parallel={"zero_stage": 2, "data": 2})
    stage = tree["stages"][0] | {"batch_ramp": RAMP, "global_batch_size": 12, "duration": {"steps": 7}}
    tree |= {"stages": [stage | {"schedule": {"unit": "tokens", "warmup": 12 * LENGTH, "shape": "linear"}}]}
    ranks = run_ranks(2, train_rank, tree)
    samples = [sum(SIZES[:steps]) for steps in range(1, 8)]
    assert by_step(tmp_path / "whole", "samples") == dict(zip(range(1, 8), samples, strict=True))
    assert by_step(tmp_path / "whole", "tokens") == {step: n * LENGTH for step, n in enumerate(samples, 1)}
    left = [1 - 0.9 * (n - 12) / (samples[-1] - 12) for n in samples]
    rates = [1e-2 * (n / 12 if n < 12 else factor) for n, factor in zip(samples, left, strict=True)]
    assert list(by_step(tmp_path / "whole", "learning_rate").values()) == pytest.approx(rates)

    same = again(tmp_path / "whole", tmp_path / "same", tree)
    assert same[0]["started_at"] == 3
    assert (same[0]["at_end"], same[0]["state"]) == (ranks[0]["at_end"], ranks[0]["state"])
    assert by_step(tmp_path / "same", "loss") == by_step(tmp_path / "whole", "loss")

    other = again(
        tmp_path / "whole", tmp_path / "other", tree | {"parallel": {"zero_stage": 3, "pipe": 2, "micro_batch_size": 4}}
    )
    assert (other[0]["state"].samples, other[0]["state"].tokens) == (samples[-1], samples[-1] * LENGTH)
    # rounding alone, as in every resume into another layout
    assert by_step(tmp_path / "other", "loss") == pytest.approx(by_step(tmp_path / "whole", "loss"), rel=0, abs=2e-6)
