"""Inputs of one rank from whole rows, where ranks share the sequence dimension (sequence and tensor axis).

Document numbers stay whole, for attention; of tokens and targets a rank of the sequence axis has its slice. Of masked
tokens it has those in its slice, fewer or more of them; pairs and labels of rows belong to the first rank: the
others compute them with weight 0, so that all ranks run the same modules.

Legend: B rows, T tokens of a row (S of an encoder's), M masked positions.
"""

from __future__ import annotations

import torch

from engine.config.objectives import REPLAYED
from engine.parallel.boundary import Tensors
from engine.parallel.functions import SequenceSlice
from engine.parallel.groups import Group

SHARED = (
    *("tokens_BT", "token_types_BT", "tokens_BS", "decoder_tokens_BT"),
    *("targets_BT", "weights_BT", "labels_BT", "label_weights_BT"),
    *(f"{REPLAYED}targets_BT", f"{REPLAYED}weights_BT"),
)
"""Keywords with one entry per token, of which a rank is given its slice."""
FILLED = ("decoder_tokens_BT", "decoder_segments_BT", "targets_BT", "weights_BT")
"""Keywords of a decoder's rows, the only ones whose length the ranks need not divide (`engine.config.objectives`)."""


def own_part(inputs: Tensors, row_length: int, sequence_ranks: int, sequence: Group) -> Tensors:
    """Return the inputs of one rank of the sequence axis; views where that is possible.

    `row_length` is the number of tokens of a row (of the encoder, where there is one), `sequence_ranks` the number of
    ranks that share it.
    """
    given = {
        name: _filled(name, tensor, sequence_ranks) if name in FILLED else tensor for name, tensor in inputs.items()
    }
    if sequence.size == 1:
        return given
    sequence_slice = SequenceSlice(sequence.position, sequence.size)
    given = {name: sequence_slice.own(tensor) if name in SHARED else tensor for name, tensor in given.items()}
    length = row_length // sequence.size
    for prefix in ("", REPLAYED):
        names = [f"{prefix}{name}" for name in ("masked_BM", "targets_BM", "weights_BM")]
        if names[0] in given:
            own = _own_masked(*(given[name] for name in names), sequence_slice.first(length), length)
            given |= dict(zip(names, own, strict=True))
    # All ranks run the heads that see rows, and so the collectives inside of them; one of them may count the loss.
    if sequence.position > 0:
        weights = [name for name in ("pair_weights_B", "label_weights_B") if name in given]
        given |= {name: torch.zeros_like(given[name]) for name in weights}
    return given


def _filled(name: str, tensor_BT: torch.Tensor, ranks: int) -> torch.Tensor:
    """Return rows padded to a multiple of `ranks`, with targets of weight 0 behind all others.

    The padding belongs to the document of the last token, whose part of the encoder it sees: a query that saw no key
    at all would have a softmax of NaN.
    """
    # -10 % 4 = 2: a row of 10 tokens becomes one of 12 for 4 ranks
    missing = -tensor_BT.size(1) % ranks
    if missing == 0:
        return tensor_BT
    # (B, T) and (B, missing) -> (B, T + missing)
    last_B1 = tensor_BT[:, -1:]
    filling = last_B1 if name == "decoder_segments_BT" else torch.zeros_like(last_B1)
    return torch.cat((tensor_BT, filling.expand(-1, missing)), dim=1)


def _own_masked(
    positions_BM: torch.Tensor, targets_BM: torch.Tensor, weights_BM: torch.Tensor, first: int, length: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return positions, targets and weights of the masked tokens of a slice, (B, M) with as many columns as its fullest
    row needs.

    Unused entries are position 0 with weight 0.
    """
    # Tokens 4 to 7, positions [[1, 5, 6, 9], [0, 4, 9, 10]]: the first row has two inside and the second one, so
    # most = 2, order = [[1, 2], [1, 0]], and masked_BM = [[1, 2], [0, 0]], of which the last has weight 0.
    inside_BM = (positions_BM >= first) & (positions_BM < first + length) & (weights_BM != 0)
    # at least one column: every rank runs the head, also one whose slice has no masked token
    most = max(int(inside_BM.sum(1).max()), 1)
    # stable: masked tokens keep their order within the row
    order_BM = inside_BM.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    outside_BM = ~inside_BM.gather(1, order_BM)
    return (
        (positions_BM.gather(1, order_BM) - first).masked_fill(outside_BM, 0),
        targets_BM.gather(1, order_BM),
        weights_BM.gather(1, order_BM).masked_fill(outside_BM, 0.0),
    )
