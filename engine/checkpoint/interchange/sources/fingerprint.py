"""A short hash of a model's weights in a source, equal wherever the source lies and however it is cut into files."""

from __future__ import annotations

import hashlib
import json

import torch

from engine.checkpoint.interchange.mapping import ModelMap
from engine.checkpoint.interchange.sources.source import Source

SAMPLED_ROWS = 4
"""Rows of each parameter that enter the fingerprint: evenly spread, with the first and the last."""


def fingerprint_of(source: Source, model_map: ModelMap) -> str:
    """Return 32 hex digits for names, shapes and some rows of every parameter of ours, as fp32.

    Equal for a folder of theirs and for the checkpoint that it was converted to. It is a sample: two models that differ
    in other rows alone are not told apart, which no training leaves.
    """
    digest = hashlib.sha256()
    for name, one in sorted(model_map.parameters.items()):
        digest.update(json.dumps([name, list(one.shape)]).encode())
        last = one.shape[0] - 1
        for row in sorted({last * number // (SAMPLED_ROWS - 1) for number in range(SAMPLED_ROWS)}):
            values = one.ours(source.read, row, row + 1).float().contiguous()
            digest.update(values.view(torch.int32).numpy().astype("<i4", copy=False).tobytes())
    return digest.hexdigest()[:32]
