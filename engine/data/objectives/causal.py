"""Causal targets: each token predicts its successor. A pure function of the row.

B batch (rows), T time (sequence length).
"""

from __future__ import annotations

import numpy as np

from engine.data.objectives.packing import Row


def causal(rows: list[Row], targets_BT: np.ndarray, weights_BT: np.ndarray, inside_documents: bool) -> None:
    """Fills in the rows' targets (int64) and weights (float32): 1 where a token has a successor.

    With `inside_documents` a successor in another document (what follows an end of text) is none. Padding keeps
    weight 0.
    """
    for b, row in enumerate(rows):
        assert row.successors is not None
        targets_BT[b, : row.tokens.size] = row.successors
        weights_BT[b, : row.tokens.size] = 1.0
        if inside_documents:
            weights_BT[b, row.ends] = 0.0
