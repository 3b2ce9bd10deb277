"""Keys: the logarithm against exact arithmetic, equal bytes everywhere, and draws that are uniform."""

import hashlib
import math
from decimal import Decimal, getcontext

import numpy as np

from engine.data.replay.keys import minus_log, row_keys, uniform

HASH = hashlib.sha256(b"a shard").hexdigest()[:32]


def test_the_logarithm_is_within_a_few_units_of_the_last_place():
    getcontext().prec = 40
    generator = np.random.default_rng(0)
    close_to_one = 1 - generator.integers(1, 2**30, 200) * 2.0**-53
    values = np.concatenate([generator.random(200), close_to_one, 2.0 ** -generator.integers(1, 53, 50), [1.0]])
    for value, found in zip(values.tolist(), minus_log(values).tolist(), strict=True):
        exact = -Decimal(value).ln()
        assert abs(Decimal(found) - exact) <= 4 * Decimal(math.ulp(float(exact)))
    assert minus_log(np.array([1.0])).tobytes() == np.zeros(1).tobytes()


def test_words_become_numbers_above_zero_and_up_to_one():
    words = np.array([0, 2**11 - 1, 2**11, 2**64 - 1], np.uint64)
    assert uniform(words).tolist() == [2.0**-53, 2.0**-53, 2.0**-52, 1.0]


def test_keys_are_equal_bit_for_bit_on_every_machine():
    inside, weights = np.arange(100_000, dtype=np.uint64), np.linspace(0.5, 2, 100_000)
    plain, weighted = row_keys(7, HASH, inside), row_keys(7, HASH, inside, weights)
    # a file that another machine wrote depends on these bytes
    assert hashlib.sha256(plain.tobytes() + weighted.tobytes()).hexdigest()[:16] == "51195c09ac0b8aa0"
    assert np.array_equal(weighted, plain / weights)
    # a row's key does not depend on its neighbours
    some = np.array([99_999, 3, 50_000], np.uint64)
    assert row_keys(7, HASH, some).tolist() == plain[some.astype(int)].tolist()


def test_keys_are_exponential_and_differ_by_shard_and_seed():
    inside = np.arange(100_000, dtype=np.uint64)
    other = hashlib.sha256(b"another").hexdigest()[:32]
    drawn = [row_keys(seed, name, inside) for seed, name in ((0, HASH), (1, HASH), (0, other))]
    for keys in drawn:
        counts = np.bincount((np.exp(-keys) * 100).astype(int).clip(0, 99), minlength=100)
        # chi-square of 99 degrees of freedom: above 160 with a probability of 1e-4
        assert ((counts - 1000) ** 2 / 1000).sum() < 160
    for one, two in ((0, 1), (0, 2), (1, 2)):
        # a correlation of independent draws has a standard deviation of 1 / sqrt(100,000)
        assert abs(np.corrcoef(drawn[one], drawn[two])[0, 1]) < 4 / math.sqrt(100_000)
