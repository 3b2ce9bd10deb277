"""Names and shapes of tensors that are not those of a model, reported in one error."""

from __future__ import annotations

from collections.abc import Mapping

from engine.errors import CheckpointError
from engine.parallel.sharding import Shape

SHOWN = 20
"""Largest number of tensors that an error names."""
FREE_KEYS = frozenset({"vocab_multiple", "dropout", "attention_dropout", "init_std"})
"""Keys of a model that its trained weights do not depend on."""


def check_tensors(found: Mapping[str, Shape], wanted: Mapping[str, Shape], source: str) -> None:
    """Check that tensors are the parameters of a model: all of them and no others, in their stored shapes.

    `source` says in words where `found` is from, such as "the checkpoint".

    Raises:
        CheckpointError: naming each tensor that is missing, unknown or of another shape.
    """
    problems = [f"{name}: not in {source}" for name in wanted.keys() - found.keys()]
    problems += [f"{name}: not in the model" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name}: {tuple(found[name])} in {source}, {tuple(wanted[name])} in the model"
        for name in wanted.keys() & found.keys()
        if tuple(wanted[name]) != tuple(found[name])
    ]
    if problems:
        lines = [f"the tensors in {source} are those of another model:", *sorted(problems)[:SHOWN]]
        lines += [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise CheckpointError(
            "\n  ".join(lines),
            "the model's parameters by their logical names, in their shapes without padded rows",
            "use the configuration of the model that was trained",
        )
