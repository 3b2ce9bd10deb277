"""Ranks of one world that were started differently: all of them end, with the same words, before anything is built."""

from __future__ import annotations

from typing import Any

from engine import outcome
from engine.config.rank_environment import RankEnvironment
from engine.config.save import save_run
from engine.errors import EXIT_USAGE
from engine.parallel.meeting import Disagreement
from tests.distributed.ranks import run_different, run_ranks
from tests.distributed.runs import run_config, run_tree, train_rank, write_corpus


def test_another_learning_rate_ends_both_ranks(tmp_path):
    write_corpus(tmp_path / "corpus")
    save_run(run_config(run_tree(tmp_path / "corpus", tmp_path / "run")), tmp_path)
    command = ["train", str(tmp_path / "config.yaml")]
    ends = run_different([command, [*command, "optimizer.learning_rate=0.02"]])
    assert [code for code, _ in ends] == [EXIT_USAGE] * 2, ends
    says = "optimizer.learning_rate: 0.01 on rank 0, 0.02 on rank 1"
    assert says in ends[0][1]
    said = outcome.read(tmp_path / "run")
    assert said is not None
    assert (said.code, said.step) == (EXIT_USAGE, 0)
    assert says in said.error
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["outcome.json", "running.json"]


def trained(environment: RankEnvironment, trees: list[dict[str, Any]]) -> str:
    try:
        train_rank(environment, trees[environment.global_rank])
    except Disagreement as error:
        return str(error)
    return "trained"


def test_other_data_under_the_same_name_ends_both_ranks(tmp_path):
    """As on a disk that is not shared: rank 1 finds other documents where rank 0 finds its own."""
    write_corpus(tmp_path / "corpus", "causal")
    write_corpus(tmp_path / "other", "masked")
    trees = [run_tree(tmp_path / name, tmp_path / "run", model={"vocab_size": 320}) for name in ("corpus", "other")]
    first, second = run_ranks(2, trained, trees)
    assert first == second
    assert "data fingerprint: " in first
    assert "tokenizer: " in first
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
