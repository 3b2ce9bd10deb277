"""Configurations of short runs, for what the terminal and the metrics say of them."""

from typing import Any

from engine.config.load import parse_run
from engine.config.schema.run import RunConfig


def stage(steps: int, **changes: Any) -> dict[str, Any]:
    """Return the tree of a run stage of so many steps."""
    sizes = {"sequence_length": 8, "global_batch_size": 4} | changes
    return {"data": {"train": "data"}, "duration": {"steps": steps}, **sizes}


def run(*stages: dict[str, Any], every_steps: int = 1) -> RunConfig:
    """Return a run of up to three stages, called a, b and c."""
    tree = {
        "folder": "run",
        "tokenizer": "tokenizer",
        "model": {"vocab_size": 64, "num_layers": 1, "hidden_size": 8, "num_heads": 1, "max_positions": 64},
        "stages": [{"name": name} | each for name, each in zip("abc", stages, strict=False)],
        "logging": {"every_steps": every_steps},
    }
    return parse_run(tree, "test")
