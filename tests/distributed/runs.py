"""Whole training runs on ranks of their own, over a small prepared corpus: what restarts are tested with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from engine.config.load import merge, parse_run
from engine.config.rank_environment import RankEnvironment
from engine.config.resolve import resolve
from engine.config.schema.run import RunConfig
from engine.corpus.options import PrepareOptions
from engine.corpus.prepare import prepare
from engine.corpus.tokenizer_training import PURPOSE_TOKENS, Purpose, TokenizerKind, train_tokenizer
from engine.data.shards.writer import ShardWriter
from engine.data.tokenizer.folder import tokenizer_hash
from engine.errors import PalimpsestError
from engine.heartbeat import Heartbeat

Tree = dict[str, Any]
LENGTH = 16


def write_corpus(folder: Path, purpose: Purpose = "causal") -> None:
    """A tokenizer and two folders of token shards, several shards each; what the purpose needs comes on top of 300."""
    texts = [f"document {number} says {'ab' * (number % 7)} and {number * number}." for number in range(200)]
    vocab_size = 300 + len(PURPOSE_TOKENS[purpose])
    tokenizer = train_tokenizer(texts, folder / "tokenizer", "bpe", vocab_size, purpose)
    written_with = tokenizer_hash(folder / "tokenizer")
    for name, chosen in (("train", texts[:180]), ("validation", texts[180:])):
        given = (folder / name, tokenizer.vocab_size, tokenizer.eos_id, written_with)
        special = None if purpose == "causal" else tokenizer.vocabulary
        with ShardWriter(*given, shard_bytes=2000, vocabulary=special) as writer:
            for tokens in tokenizer.encode(chosen):
                writer.add(np.append(tokens, tokenizer.eos_id))


def write_sentences(folder: Path, kind: TokenizerKind, vocab_size: int, purpose: Purpose) -> None:
    """A tokenizer for an objective, and folders `train` and `validation` of shards that know where sentences end."""
    (folder / "text").mkdir(parents=True, exist_ok=True)
    names = ("the ink", "a scraped page", "one thrifty monk", "Heiberg", "this codex", "the prayer book")
    says = ("fades", "was read again", "hides older lines", "bites into parchment", "is a palimpsest")
    texts = []
    for number in range(120):
        sentences = [f"{names[(number * 7 + i) % 6].capitalize()} {says[(number + 3 * i) % 5]}." for i in range(6)]
        texts.append(" ".join(sentences))
        (folder / "text" / f"{number:03}.txt").write_text(texts[-1], encoding="utf-8")
    train_tokenizer(texts, folder / "tokenizer", kind, vocab_size, purpose)
    options = PrepareOptions(
        sources=(str(folder / "text" / "*.txt"),),
        tokenizer=folder / "tokenizer",
        output=folder / "tokens",  # `prepare` keeps out of folders that hold something else
        validation_fraction=0.2,
        sentences="en",
    )
    prepare(options)
    for side in ("train", "validation"):
        (folder / "tokens" / side).rename(folder / side)


def run_tree(corpus: Path, folder: Path, **changes: Any) -> Tree:
    """A tiny GPT-2's run: nine steps, a checkpoint every three, two documents or more per row."""
    tree: Tree = {
        "folder": str(folder),
        "tokenizer": str(corpus / "tokenizer"),
        "seed": 5,
        "model": {"vocab_size": 300, "num_layers": 2, "hidden_size": 16, "num_heads": 4, "max_positions": LENGTH},
        "stages": [
            {
                "data": {
                    "train": str(corpus / "train"),
                    "validation": str(corpus / "validation"),
                    "window_shards": 2,
                },
                "sequence_length": LENGTH,
                "global_batch_size": 8,
                "duration": {"steps": 9},
                "schedule": {"warmup": 2},
            }
        ],
        "optimizer": {"learning_rate": 1e-2, "clip_norm": 0.5},
        "precision": {"dtype": "fp32"},
        "parallel": {"micro_batch_size": 2},
        "evaluation": {"every_steps": 3, "max_samples": 13},
        "checkpoint": {"every_steps": 3, "keep_last": 9},
        "logging": {"tensorboard": False, "wandb": "off", "plot": False},
        "checks": True,
    }
    return merge(tree, changes)


def run_config(tree: Tree) -> RunConfig:
    return parse_run(tree, "test run")


def train_rank(
    environment: RankEnvironment, tree: Tree, prepare: Callable[[Any], None] = lambda trainer: None
) -> dict[str, Any]:
    """One rank of a run: its exit code, the state's fingerprint right after the start and at the end.

    `prepare` is handed the trainer before its first step.
    """
    import torch

    from engine.checkpoint.fingerprint import fingerprint
    from engine.tasks.in_training import measure_of
    from engine.train.build import join_groups
    from engine.train.signals import StopSignals
    from engine.train.trainer import Trainer

    config = run_config(tree)
    groups = join_groups(config, resolve(config, environment.world_size), environment.global_rank)
    measure = measure_of(config) if config.model.task_head is not None else None
    trainer = Trainer(config, groups, environment, torch.device("cpu"), StopSignals(), Heartbeat(None, 0), measure)

    def held() -> str:
        engine = trainer.pipeline.engine  # asked each time: a run stage may have made it again
        return fingerprint(engine.parameter_shards(), engine.placements(), groups)

    started_at, at_start = trainer.state.step, held()
    prepare(trainer)
    try:
        code = trainer.fit()
    except PalimpsestError:
        trainer.checkpoints.settle()  # as `train` does
        raise
    trainer.close()
    return {"code": code, "started_at": started_at, "at_start": at_start, "at_end": held(), "state": trainer.state}


class Stop:
    """Signals of a rank that was asked to stop."""

    stop_requested = True


def stop_after(trainer: Any, step: int | None) -> None:
    """Have the trainer asked to stop in the step before which `step` - 1 are done."""
    beat = trainer.heart.beat

    def watch(number: int, phase: str) -> None:
        beat(number, phase)
        if step is not None and number == step - 1 and phase == "forward and backward":
            trainer.requests.signals = Stop()

    trainer.heart.beat = watch
