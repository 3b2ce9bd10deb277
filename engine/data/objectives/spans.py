"""Random spans of noise in rows of tokens, all rows of a micro-batch at once. Pure.

Raffel et al. 2020, "Exploring the Limits of Transfer Learning", reference code (`random_spans_noise_mask`): noise and
what is between it are both cut at random into as many parts, every way to cut equally likely, and the parts take
turns, what is kept first.

B batch (rows), T sequence dimension, W spans of the row that has most.
"""

from __future__ import annotations

import numpy as np

from engine.data.objectives.draws import choose


def noise_mask(keys_BT: np.ndarray, totals_B: np.ndarray, noise_B: np.ndarray, spans_B: np.ndarray) -> np.ndarray:
    """Choose `noise_B` of the first `totals_B` tokens of each row, in `spans_B` spans: (B, T) bool.

    `keys_BT` are uniform uint32. Rows with `totals_B` above 0 have 1 <= spans_B <= noise_B, and at least as many
    tokens outside, or all is noise.
    """
    num_rows, length = keys_BT.shape
    kept_B = totals_B - noise_B
    positions_T = np.arange(length)
    # the first keys cut the noise, those behind them what is kept: no key is used twice
    noise_lengths = _parts(keys_BT, positions_T < noise_B[:, None] - 1, noise_B, spans_B, np.zeros_like(noise_B))
    allowed = (positions_T >= noise_B[:, None]) & (positions_T < totals_B[:, None] - 1)
    kept_lengths = _parts(keys_BT, allowed, kept_B, spans_B, noise_B)
    # (B, W) twice -> (B, 2 W): kept, noise, kept, noise, ...
    turns = np.stack((kept_lengths, noise_lengths), axis=-1).reshape(num_rows, -1)
    edges = np.cumsum(turns, axis=1)
    # the spans' edges flip between kept and noise: lengths 2, 1, 1, 2 have edges 2, 3, 4, 6 and the noise is 2, 4, 5
    edges = np.where(edges < totals_B[:, None], edges, length)  # what lies at or behind the end changes nothing
    flat = (np.arange(num_rows)[:, None] * (length + 1) + edges).ravel()
    flips = np.bincount(flat, minlength=num_rows * (length + 1)).reshape(num_rows, -1)[:, :length]
    return (np.cumsum(flips, axis=1) % 2 == 1) & (positions_T < totals_B[:, None])


def _parts(
    keys_BT: np.ndarray, allowed_BT: np.ndarray, totals_B: np.ndarray, parts_B: np.ndarray, first_B: np.ndarray
) -> np.ndarray:
    """Return the lengths (B, W) of `parts_B` random parts of `totals_B` items, 0 after the last part.

    Position `first_B` + i of the keys stands for a cut behind item i.
    """
    most = int(parts_B.max(initial=1))
    cuts_B = np.clip(parts_B, 1, np.maximum(1, totals_B)) - 1
    chosen_BT = choose(keys_BT, allowed_BT, cuts_B)
    rows, positions = np.nonzero(chosen_BT)
    ends = np.broadcast_to(totals_B[:, None], (len(keys_BT), most)).copy()
    # cuts behind items 1 and 2 (from 0) of 5: ends (2, 3, 5), lengths (2, 1, 2)
    ends[rows, np.arange(rows.size) - np.searchsorted(rows, rows)] = positions - first_B[rows] + 1
    return np.diff(ends, axis=1, prepend=0)
