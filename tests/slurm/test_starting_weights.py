"""Runs whose file has no `model`: it is that of the source of `init_from`, which the torch-free conductor cannot open.

A node is lost in each, so that the conductor plans a second world; ranks open the source by themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.interchange.initial import model_of
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import train_rank, write_corpus
from tests.engine.models.tiny import random_weights, tiny, twin
from tests.slurm.cluster import Cluster, MakeCluster
from tests.slurm.launches import Launch, launch, losses, tree

MODEL = tiny("llama", vocab_size=300, num_layers=2)


def lose_a_node(cluster: Cluster, source: Path, **options: Any) -> Launch:
    """Launch a run from a source, have it lose its second node, and return it when it is done."""
    job = launch(cluster, "1-2", "--restarts", "1", model_of=source, **options)
    job.wait_for_hold()
    job.cluster.power_off("node2")
    job.wait(lambda: len(job.attempts()) > 1, "no second attempt")
    job.go()
    ended = job.outcome_of(1)
    assert (ended.code, ended.step) == (0, 9)
    assert [attempt["nodes"] for attempt in job.attempts()] == [["node1", "node2"], ["node1"]]
    return job


def write_theirs(folder: Path) -> Path:
    """Write a folder of Hugging Face with random weights."""
    twin(MODEL, random_weights(MODEL, seed=2)).save_pretrained(folder)
    return folder


@pytest.mark.matrix
def test_worlds_are_planned_for_the_model_of_the_source(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2)
    job = lose_a_node(cluster, write_theirs(cluster.folder / "theirs"), stand_ins=True)
    assert "restart 1 of 1 on 1 ranks (pipe 1 x data 1 x sequence 1 x tensor 1) on node1" in job.said()
    # Commands that take the run's file, on the login host, find the job by it.
    assert job.number in job.palimpsest("job", "status", str(cluster.folder / "RUN.yaml"))


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["huggingface", "run"])
def test_ranks_start_from_the_source_and_go_on_without_a_node(kind: str, make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2)
    corpus, source, whole = (cluster.folder / name for name in ("corpus", "source", "whole"))
    write_corpus(corpus)
    if kind == "huggingface":
        write_theirs(source)
    else:
        [stage] = tree(corpus, source)["stages"]
        run_ranks(1, train_rank, tree(corpus, source, stages=[stage | {"duration": {"steps": 3}}]))
    run_ranks(2, train_rank, tree(corpus, whole, init_from=str(source)) | {"model": model_of(str(source))})
    job = lose_a_node(cluster, source)
    assert losses(job.run) == pytest.approx(losses(whole), rel=0, abs=1e-5)
