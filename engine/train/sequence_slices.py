"""What a rank is given of whole rows where ranks share their time: on the sequence axis, and along the tensor axis.

Document numbers stay whole, for attention; of tokens and targets a rank of the sequence axis has its stretch. Of masked
tokens it has those in its stretch, fewer or more of them; pairs, which are read from a row's first token, belong to the
first rank: the others compute them with weight 0, so that all ranks run the same modules.
"""

from __future__ import annotations

import torch

from engine.parallel.boundary import Tensors
from engine.parallel.functions import SequenceSlice
from engine.parallel.groups import Group

SHARED = ("tokens_BT", "token_types_BT", "tokens_BS", "decoder_tokens_BT", "targets_BT", "weights_BT")
"""Keywords with something for each token, of which a rank is given its stretch."""
FILLED = ("decoder_tokens_BT", "decoder_segments_BT", "targets_BT", "weights_BT")
"""Keywords of a decoder's rows, the only ones whose length the ranks need not divide (`engine.config.objectives`)."""


def own_part(inputs: Tensors, row_length: int, sequence_ranks: int, sequence: Group) -> Tensors:
    """The part of one rank of the sequence axis; views where that is possible.

    `row_length` counts the tokens of a row (of the encoder, where there is one), `time_ranks` those who share it.
    """
    given = {
        name: _filled(name, tensor, sequence_ranks) if name in FILLED else tensor for name, tensor in inputs.items()
    }
    if sequence.size == 1:
        return given
    sequence_slice = SequenceSlice(sequence.position, sequence.size)
    given = {name: sequence_slice.own(tensor) if name in SHARED else tensor for name, tensor in given.items()}
    if "masked_BM" in given:
        length = row_length // sequence.size
        given |= _own_masked(
            given["masked_BM"], given["targets_BM"], given["weights_BM"], sequence_slice.first(length), length
        )
    if "pair_weights_B" in given and sequence.position > 0:
        given["pair_weights_B"] = torch.zeros_like(given["pair_weights_B"])
    return given


def _filled(name: str, tensor_BT: torch.Tensor, ranks: int) -> torch.Tensor:
    """Rows as long as `ranks` can share them: with targets that weigh nothing, behind all others.

    They are of the last place's document, whose part of the encoder they see: never nothing at all.
    """
    missing = -tensor_BT.size(1) % ranks
    if missing == 0:
        return tensor_BT
    last_B1 = tensor_BT[:, -1:]
    filling = last_B1 if name == "decoder_segments_BT" else torch.zeros_like(last_B1)
    return torch.cat((tensor_BT, filling.expand(-1, missing)), dim=1)


def _own_masked(
    places_BM: torch.Tensor, targets_BM: torch.Tensor, weights_BM: torch.Tensor, first: int, length: int
) -> Tensors:
    """The masked tokens of a stretch, as many columns as its fullest row has; what is left are places 0 of weight 0."""
    inside_BM = (places_BM >= first) & (places_BM < first + length) & (weights_BM != 0)
    most = max(int(inside_BM.sum(1).max()), 1)
    order_BM = inside_BM.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    outside_BM = ~inside_BM.gather(1, order_BM)
    return {
        "masked_BM": (places_BM.gather(1, order_BM) - first).masked_fill(outside_BM, 0),
        "targets_BM": targets_BM.gather(1, order_BM),
        "weights_BM": weights_BM.gather(1, order_BM).masked_fill(outside_BM, 0.0),
    }
