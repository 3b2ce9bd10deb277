"""Lengths of a task's rows in tokens, and of its run in steps, as far as the task file leaves them out."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np

from engine.config.load import Tree
from engine.config.schema.model import ModelConfig
from engine.config.schema.objective import ObjectiveConfig
from engine.config.virtual_tokens import num_virtual_tokens
from engine.data.objectives.sampling import make_sampler
from engine.data.shards.dataset import TokenDataset
from engine.errors import ConfigError
from engine.tasks.encode import longest
from engine.tasks.framing import Framing
from engine.tasks.read import Task

EPOCHS = 3.0
BATCH = 32
WARMUP_SHARE = 0.1
ROW_LENGTHS = 8
"""Number of lengths that rows have, at most."""
LENGTH_MULTIPLE = 8
"""Rows are a multiple of this many tokens long, which matrix units of GPUs want."""


def with_lengths(framing: Framing, task: Task, model: ModelConfig, given: int | None) -> tuple[Task, int]:
    """Return the task with the length of T5's answers, and the tokens of a row: `given`, else those of the longest
    example, rounded up to a multiple of `LENGTH_MULTIPLE`, at most the positions of the model.

    Raises:
        ConfigError: the virtual tokens of the model's adapter leave no position to a token.
    """
    _check_room(model)
    is_known = model.family != "t5" or task.objective.answer_length
    if given is not None and is_known:
        return task, given
    most = given or _most(model)
    found = [longest(task.kind.encode(one, task.objective, framing, most)) for one in task.parts.values()]
    tokens, decoder = (_filled(max(sizes), model) for sizes in zip(*found, strict=True))
    if not is_known:
        task = task._replace(objective=task.objective.model_copy(update={"answer_length": decoder}))
    return task, given or tokens


def _filled(num_tokens: int, model: ModelConfig) -> int:
    return min(math.ceil(num_tokens / LENGTH_MULTIPLE) * LENGTH_MULTIPLE, _most(model))


def _most(model: ModelConfig) -> int:
    """Return the tokens that a row may have, beside the virtual tokens of an adapter."""
    return model.max_positions - num_virtual_tokens(model)


def _check_room(model: ModelConfig) -> None:
    """Raise `ConfigError` where virtual tokens take all positions: examples are encoded before the run is checked."""
    if _most(model) < 1:
        raise ConfigError(
            f"model.adapter.virtual_tokens = {num_virtual_tokens(model)} leaves none of the model's "
            f"{model.max_positions} positions to a row's tokens",
            f"1 to {model.max_positions - 1}",
            "take fewer virtual tokens",
        )


def num_rows_of(stage: Tree, objective: ObjectiveConfig) -> int:
    """Return the rows of an epoch: one for each example, or fewer where examples are packed."""
    dataset = TokenDataset(stage["data"]["train"])
    if stage["data"].get("packing", "concatenate") == "concatenate":
        return dataset.index.num_documents
    shape = (stage["sequence_length"], 0, "document", stage["data"]["packing"], objective)
    return int(make_sampler(dataset, *shape).count(np.arange(dataset.num_shards)).sum())


def row_lengths_of(folder: Path, most: int, parallel: Tree) -> list[int]:
    """Return lengths below `most` such that about as many examples of a folder need each of them."""
    dataset = TokenDataset(str(folder))
    found = np.concatenate([np.diff(dataset.offsets(number)[0]) for number in range(dataset.num_shards)])
    ranks = parallel.get("sequence", 1) * (parallel.get("tensor", 1) if parallel.get("sequence_parallel") else 1)
    multiple = math.lcm(LENGTH_MULTIPLE, ranks)
    quantiles = np.quantile(found, np.arange(1, ROW_LENGTHS) / ROW_LENGTHS)
    lengths = {math.ceil(length / multiple) * multiple for length in quantiles.tolist()}
    return sorted(length for length in lengths if length < most)


def set_lengths(stage: Tree, num_examples: int) -> None:
    """Set a stage's batch, its length in steps and its schedule, where they are left out."""
    stage.setdefault("global_batch_size", min(BATCH, num_examples))
    duration = dict(stage.get("duration", {}))
    if not {"steps", "tokens"} & duration.keys():
        if stage.get("replay") and isinstance(stage["replay"]["ratio"], list):
            told = f"has {duration['epochs']} epochs" if "epochs" in duration else "is left out"
            raise ConfigError(
                f"stages.0.replay.ratio is a table, and stages.0.duration {told}",
                "a duration in steps: with a table the examples of a step change",
                "set stages.0.duration.steps",
            )
        duration = {"steps": steps_of(duration.get("epochs", EPOCHS), stage, num_examples)}
    stage["duration"] = duration
    warmup = math.ceil(WARMUP_SHARE * duration["steps"]) if "steps" in duration else 0
    stage.setdefault("schedule", {"shape": "linear", "warmup": warmup, "final_factor": 0.0})


def steps_of(epochs: float, stage: Tree, num_examples: int) -> int:
    """Return the steps of so many passes over the examples, rounded up."""
    return max(1, math.ceil(epochs * num_examples / examples_per_step(stage)))


def examples_per_step(stage: Tree) -> Fraction:
    """Return the examples of a step, beside what is replayed in it: with a table of ratios those at its beginning."""
    ratio = stage["replay"]["ratio"] if stage.get("replay") else 0
    first = Fraction(str(ratio[0]["ratio"] if isinstance(ratio, list) and ratio else ratio or 0))
    # a share of 1 or more is refused by the rules of the run
    return stage["global_batch_size"] * (1 - first if first < 1 else Fraction(1))
