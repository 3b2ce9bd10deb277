"""Keys of rows: -ln(u) / weight with u drawn by a hash of (seed, shard, row), bit for bit equal on every machine.

Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir" (algorithm A-Res, in its exponential form):
the k rows with the smallest keys are a weighted sample without replacement. Keys are pure, so a row that is seen again
has the key that it had, on whatever rank and in whatever order.

The logarithms of C libraries differ in their last bits. This one is a series of additions, multiplications and
divisions of float64, which IEEE 754 rounds alike everywhere, each a call of its own, so that no compiler fuses two.
"""

from __future__ import annotations

import numpy as np

from engine.data.order.permutation import mix_array

PURPOSE_REPLAY = int.from_bytes(b"replay")

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: splitmix64's step between two counters
_LN2 = 0.6931471805599453
_TERMS = 11
"""Terms of the series; the twelfth is below 2**-60 of the first."""
_CHUNK = 1 << 14
"""Rows whose keys are computed together: their temporaries stay in a core's cache."""


def row_keys(seed: int, content_hash: str, inside: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the keys of rows of a shard, (n,) float64, 0 or above; small keys stay.

    `inside` (n,) uint64 are documents and spans (`rows.Rows`), `weights` (n,) within the bounds; None is 1 for all.
    """
    first, second = _shard_words(seed, content_hash)
    keys = np.empty(inside.size, np.float64)
    for start in range(0, inside.size, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        words = mix_array(mix_array(inside[chunk] * _GOLDEN + first) ^ second)
        exponentials = minus_log(uniform(words))
        keys[chunk] = exponentials if weights is None else exponentials / weights[chunk]
    return keys


def uniform(words: np.ndarray) -> np.ndarray:
    """Return words (n,) uint64 as numbers of (0, 1], (n,) float64: multiples of 2**-53."""
    return ((words >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53


def minus_log(u: np.ndarray) -> np.ndarray:
    """Return -ln(u) of u (n,) in (0, 1], (n,) float64, within a few units of the last place."""
    mantissa, exponent = np.frexp(u)
    # mantissa in [0.5, 1) -> [0.71, 1.42), so that u close to 1 is not the difference of two large numbers
    low = mantissa < 0.7071067811865476
    mantissa = np.where(low, mantissa * 2.0, mantissa)
    exponent = (exponent - low).astype(np.float64)
    # ln(m) = 2 (s + s**3 / 3 + s**5 / 5 + ...) with s = (m - 1) / (m + 1), below 0.172
    s = (mantissa - 1.0) / (mantissa + 1.0)
    z = s * s
    series = np.full_like(z, 1.0 / (2 * _TERMS - 1))
    for term in range(_TERMS - 2, -1, -1):
        series = series * z
        series = series + 1.0 / (2 * term + 1)
    log = s * series
    log = log * 2.0
    # 0.0 - x and not -x: u = 1 has key 0 and not -0, which differs in its bytes
    return 0.0 - (exponent * _LN2 + log)


def _shard_words(seed: int, content_hash: str) -> tuple[np.uint64, np.uint64]:
    first, second = np.random.SeedSequence((seed, PURPOSE_REPLAY, int(content_hash, 16))).generate_state(2, np.uint64)
    return first, second
