"""Runs of a model of any family, four layers deep, over the corpora of the fixture `corpora`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tests.distributed.cases import MODELS
from tests.distributed.pairs import OBJECTIVES, VOCAB
from tests.distributed.runs import LENGTH, Tree, run_tree


def family_tree(
    corpora: Path,
    folder: Path,
    model: str,
    parallel: Tree,
    *,
    steps: int,
    optimizer: Tree | None = None,
    **changes: Any,
) -> Tree:
    """A run of `steps` steps without evaluations that saves each of them; `changes` are those of `run_tree`."""
    shape = MODELS[model] | {"max_positions": LENGTH, "num_layers": 4}
    family = family_of(model)
    tree = run_tree(
        corpora / family,
        folder,
        model=shape | {"vocab_size": VOCAB[family]},
        parallel=parallel,
        optimizer={"learning_rate": 2e-3, "epsilon": 1e-5} | (optimizer or {}),
        **{"evaluation": {"every_steps": None}, "checkpoint": {"every_steps": 1}} | changes,
    )
    [stage] = tree["stages"]
    stage |= {"objective": OBJECTIVES[family], "duration": {"steps": steps}}
    return tree


def family_of(model: str) -> str:
    """The family of a model of `MODELS`, by whose name its corpus is called."""
    return MODELS[model].get("family", "gpt")


def world_size(parallel: Tree) -> int:
    """The ranks of a layout of these sizes."""
    return math.prod(parallel.get(axis, 1) for axis in ("pipe", "tensor", "sequence", "data"))
