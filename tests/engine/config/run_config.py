"""A small run as `palimpsest train` would parse it, with overrides: what tests of rules and schedules start from."""

from typing import Any

from engine.config.load import apply_override, parse_run
from engine.config.schema.run import RunConfig


def config(*overrides: str) -> RunConfig:
    """Return the run with `key=value` overrides."""
    tree: dict[str, Any] = {
        "folder": "runs/x",
        "tokenizer": "data/tokenizer",
        "model": {"vocab_size": 500, "num_layers": 4, "hidden_size": 64, "num_heads": 4, "max_positions": 128},
        "stages": [
            {
                "data": {"train": "data/train"},
                "sequence_length": 64,
                "global_batch_size": 24,
                "duration": {"steps": 10},
            }
        ],
    }
    for override in overrides:
        apply_override(tree, override)
    return parse_run(tree, "test")
