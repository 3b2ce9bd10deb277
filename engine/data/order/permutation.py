"""A keyed permutation of range(n), computed one index at a time: shuffling that needs no memory and no history.

Invariant: for every key, `Permutation` is a bijection of range(size), and index -> image depends on (size, key)
alone. Hence order survives restarts and any number of ranks. It is a shuffle, not a cipher: do not keep secrets
with it. What is permuted (shards, then slots of a window) is the business of `engine.data.order.sample_order`.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 8
"""Four rounds show a bias over few keys; from six on none is measurable."""

LARGEST_SIZE = 2**62
"""Largest domain: a Feistel network of twice 31 bits."""

_FEW = 8
"""Indices whose images are found sooner one by one in plain integers."""

_MASK = 2**64 - 1
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


class Permutation:
    """A bijection of range(size) chosen by `key`.

    A balanced Feistel network over the smallest even number of bits that holds `size`, with cycle walking for
    the images outside: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", method 3 (generalized
    Feistel) on a square domain with method 2 (cycle walking). The round function is the splitmix64 finaliser
    (Steele, Lea and Flood 2014) of the half plus a round key. The domain is less than four times `size`, so an
    index takes fewer than four walks on average.
    """

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        """Key a bijection of range(size), 1 to `LARGEST_SIZE`, by non-negative integers (seed, purpose, ...)."""
        assert 1 <= size <= LARGEST_SIZE, size
        self.size = size
        # halves of equal width, or a round could not swap them: at most one bit more than `size` needs
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half_mask = (1 << self._half_bits) - 1
        self._round_keys: list[int] = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64).tolist()

    def __call__(self, index: int) -> int:
        """Return the image of one index, in plain integers."""
        assert 0 <= index < self.size, (index, self.size)
        return self._walk(self._encrypt(index))

    def of(self, indices: np.ndarray) -> np.ndarray:
        """Return the images of an array of indices, int64 of its shape; equal to a call for each index."""
        if indices.size <= _FEW:
            return np.array([self(index) for index in indices.ravel().tolist()], np.int64).reshape(indices.shape)
        # uint64 throughout: one int64 in an expression would promote it to float64 and repeat samples beyond 2**53
        values = self._encrypt_array(indices.astype(np.uint64).ravel())
        # at most three quarters are outside at first, and a share of them after each walk: a few walks of the rest
        outside = np.flatnonzero(values >= np.uint64(self.size))
        while outside.size > _FEW:
            values[outside] = self._encrypt_array(values[outside])
            outside = outside[values[outside] >= np.uint64(self.size)]
        for index in outside.tolist():
            values[index] = self._walk(int(values[index]))
        return values.astype(np.int64).reshape(indices.shape)

    def _walk(self, value: int) -> int:
        """Return the first of a value and its successive images that is in the domain (cycle walking)."""
        while value >= self.size:
            value = self._encrypt(value)
        return value

    def _encrypt(self, value: int) -> int:
        # size 10: 4 bits, halves of 2. 9 = 0b10_01: left 2, right 1. A round whose mix of 1 ends in 0b11 makes left 1
        # and right 2 ^ 3 = 1. Both can be computed back from (1, 1) and the key, whatever the mix is: hence a bijection
        # of range(16), and `_walk` one of range(10).
        left, right = value >> self._half_bits, value & self._half_mask
        for key in self._round_keys:
            left, right = right, left ^ (_mix(right + key) & self._half_mask)
        return left << self._half_bits | right

    def _encrypt_array(self, values: np.ndarray) -> np.ndarray:
        half_bits, half_mask = np.uint64(self._half_bits), np.uint64(self._half_mask)
        left, right = values >> half_bits, values & half_mask
        for key in self._round_keys:
            left, right = right, left ^ (mix_array(right + np.uint64(key)) & half_mask)
        return left << half_bits | right


def _mix(word: int) -> int:
    """Apply splitmix64's finaliser to one integer modulo 2**64: every input bit reaches every output bit."""
    word &= _MASK
    word = (word ^ word >> 30) * _MULTIPLIERS[0] & _MASK
    word = (word ^ word >> 27) * _MULTIPLIERS[1] & _MASK
    return word ^ word >> 31


def mix_array(words: np.ndarray) -> np.ndarray:
    """Apply `_mix` to each word of a uint64 array, which wraps around modulo 2**64 by itself."""
    words = (words ^ words >> np.uint64(30)) * np.uint64(_MULTIPLIERS[0])
    words = (words ^ words >> np.uint64(27)) * np.uint64(_MULTIPLIERS[1])
    return words ^ words >> np.uint64(31)
