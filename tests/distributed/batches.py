"""Global batches that catch wrong denominators: rows of very different weight, padding that differs per micro-batch,
documents that end anywhere.

They are drawn by hand, not by the loader: what a layout computes of them does not depend on what they say.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.config.objectives import span_lengths
from engine.data.objectives.draws import dropout_keys
from engine.parallel.boundary import Tensors

GLOBAL_BATCH = 8
LENGTH = 12
VOCAB = 61  # padded to 64: three columns must stay out of the softmax
CORRUPTED = 0.4
"""Rate of span corruption, so that the decoder's rows are not much shorter than the encoder's."""
DECODER_LENGTH = span_lengths(LENGTH, CORRUPTED, mean_span_length=3.0).decoder
MASKED = 4
"""Most masked tokens of a row."""
WEIGHTS = ("weights_BT", "weights_BM", "pair_weights_B")
"""Keywords of targets' weights, in the order of the losses."""


def global_batch(step: int, attention: str, model: str = "gpt2") -> Tensors:
    """The global batch of a step: rows of weight from nearly all targets to nearly none, real weights among them."""
    generator = torch.Generator().manual_seed(1000 + step)
    kind = model.removesuffix("-dropout")
    if "bert" in kind:
        batch = _masked(generator, attention) | (_pairs(generator) if kind.startswith("bert") else {})
    else:
        batch = (_t5 if kind.startswith("t5") else _gpt)(generator, attention)
    if kind != model:
        samples_B3 = np.stack(np.unravel_index(np.arange(GLOBAL_BATCH), (2, 2, 2)), axis=1)
        batch["dropout_keys_B"] = torch.from_numpy(dropout_keys(3, step, samples_B3))
    return batch


def weights(batch: Tensors) -> torch.Tensor:
    """(L,) weight of the targets by loss."""
    return torch.stack([batch[name].sum() for name in WEIGHTS if name in batch])


def _gpt(generator: torch.Generator, attention: str) -> Tensors:
    batch = {"tokens_BT": _tokens(LENGTH, generator)} | _targets(LENGTH, generator)
    if attention == "document":
        batch["segments_BT"] = _documents(LENGTH, generator)
    return batch


def _masked(generator: torch.Generator, attention: str) -> Tensors:
    """Places of masked tokens, rising, then 0 without weight; rows of which hardly anything is masked."""
    places_BM = torch.stack(
        [torch.randperm(LENGTH, generator=generator)[:MASKED].sort().values for _ in range(GLOBAL_BATCH)]
    )
    targets = _targets(MASKED, generator)
    segments_BT = (torch.arange(LENGTH) >= LENGTH - torch.arange(GLOBAL_BATCH).unsqueeze(1) // 2).int()  # padding
    return {
        "tokens_BT": _tokens(LENGTH, generator),
        "segments_BT": _documents(LENGTH, generator) if attention == "document" else segments_BT,
        "masked_BM": places_BM.masked_fill(targets["weights_BT"] == 0, 0),
        "targets_BM": targets["targets_BT"],
        "weights_BM": targets["weights_BT"],
    }


def _pairs(generator: torch.Generator) -> Tensors:
    """Pairs of which some are predicted; ranks have very different numbers of them."""
    return {
        "token_types_BT": (torch.arange(LENGTH) > LENGTH // 2).long().repeat(GLOBAL_BATCH, 1),
        "pair_targets_B": torch.randint(0, 2, (GLOBAL_BATCH,), generator=generator),
        "pair_weights_B": (torch.rand(GLOBAL_BATCH, generator=generator) > 0.6).float() + torch.eye(GLOBAL_BATCH)[0],
    }


def _t5(generator: torch.Generator, attention: str) -> Tensors:
    """The encoder's rows end in padding; every document of the decoder has a part of the encoder's rows."""
    segments_BT = torch.zeros(GLOBAL_BATCH, DECODER_LENGTH, dtype=torch.int32)
    if attention == "document":
        segments_BT = _documents(DECODER_LENGTH, generator)
    parts_B1 = segments_BT[:, -1:] + 2  # padding is the last one
    return {
        "tokens_BS": _tokens(LENGTH, generator),
        "segments_BS": (torch.arange(LENGTH) * parts_B1).div(LENGTH, rounding_mode="floor").int(),
        "decoder_tokens_BT": _tokens(DECODER_LENGTH, generator),
        "decoder_segments_BT": segments_BT,
    } | _targets(DECODER_LENGTH, generator)


def _tokens(length: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, VOCAB, (GLOBAL_BATCH, length), generator=generator)


def _targets(length: int, generator: torch.Generator) -> Tensors:
    weights_BT = torch.rand(GLOBAL_BATCH, length, generator=generator)
    lengths_B = torch.linspace(length, 1, GLOBAL_BATCH).round()
    padding_BT = torch.arange(length) >= lengths_B[torch.randperm(GLOBAL_BATCH, generator=generator)].unsqueeze(1)
    return {"targets_BT": _tokens(length, generator), "weights_BT": weights_BT.masked_fill(padding_BT, 0.0)}


def _documents(length: int, generator: torch.Generator) -> torch.Tensor:
    ends_BT = torch.rand(GLOBAL_BATCH, length, generator=generator) > 0.8
    return (ends_BT.int().cumsum(1, dtype=torch.int32) - ends_BT[:, :1].int()).int()
