"""Replayed samples: exact counts over any window of steps, even over ranks and micro-batches."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest

from engine.config.batch_ramp import Ramp
from engine.data.order.mixing import Mixing
from engine.data.order.permutation import mix_array
from engine.data.order.replay_share import MixtureWithReplay, ReplayShare

TABLE = ((0, Fraction(1, 4)), (7, Fraction(0)), (12, Fraction("0.137")), (30, Fraction(9, 10)))


def exact_counts(ratios: tuple[tuple[int, Fraction], ...], batches: Ramp, steps: int) -> list[Fraction]:
    """Exact share up to each step, summed step by step."""
    found = [Fraction(0)]
    for step in range(steps):
        [*_, ratio] = [ratio for first, ratio in ratios if first <= step]
        found.append(found[-1] + ratio * batches.size(step))
    return found


@pytest.mark.parametrize("batches", [Ramp((24,)), Ramp((8, 12, 64), (0, 5, 20)), Ramp((1,)), Ramp((5, 7), (0, 9))])
def test_a_window_of_steps_has_its_share_to_within_one_sample(batches):
    share, steps = ReplayShare(TABLE, batches), 50
    exact = exact_counts(TABLE, batches, steps)
    counts = [share.count(batches.samples(step)) for step in range(steps + 1)]
    for first in range(steps):
        for end in range(first + 1, steps + 1):
            assert abs(counts[end] - counts[first] - (exact[end] - exact[first])) < 1
    replayed = share.of(0, batches.samples(steps))
    for position in range(0, replayed.size, 3):
        assert share.count(position) == replayed[:position].sum()
        assert np.array_equal(share.of(position, 40)[: replayed.size - position], replayed[position:][:40])


@pytest.mark.parametrize("size", [8, 32, 64])
def test_each_rank_and_each_micro_batch_has_its_share_to_within_one_sample(size):
    for ratio in (Fraction(1, 16), Fraction(1, 4), Fraction(3, 10), Fraction(1, 2), Fraction(7, 8)):
        share = ReplayShare(((0, ratio),), Ramp((size,)))
        steps = 2 * size
        replayed = share.of(0, steps * size).reshape(steps, size)
        for micro_batch in (2**n for n in range(size.bit_length() - 1)):
            rows = replayed.reshape(steps, -1, micro_batch).sum(axis=2)
            assert np.ptp(rows, axis=1).max() <= 1, "micro-batches of one step"
            for ranks in (2**n for n in range((size // micro_batch).bit_length())):
                by_rank = rows.reshape(steps, -1, ranks).sum(axis=1)
                assert np.ptp(by_rank, axis=1).max() <= 1, (ratio, micro_batch, ranks)
                # two ranks differ by one row or none in a step, at random: five standard deviations of their sum
                assert np.ptp(by_rank.sum(axis=0)) <= 5 * steps**0.5, (ratio, micro_batch, ranks)


@pytest.mark.parametrize("size", [12, 24, 48, 96])
def test_sizes_that_are_no_powers_of_two_are_shared_out_more_evenly_than_at_random(size):
    generator, steps = np.random.default_rng(0), 200
    share = ReplayShare(((0, Fraction(1, 4)),), Ramp((size,)))
    ours = share.of(0, size * steps).reshape(steps, size)
    random_rows = generator.permuted(np.arange(size) < size // 4 + np.zeros((steps, 1)), axis=1)
    assert set(ours.sum(axis=1)) == {size // 4}

    def spread(replayed: np.ndarray) -> float:
        """Mean difference of the largest and the least count of a rank, over steps and layouts."""
        by_rank = [replayed.reshape(steps, -1, ranks, rows).sum(axis=(1, 3)) for rows, ranks in shapes]
        return float(np.mean([np.ptp(counts, axis=1).mean() for counts in by_rank]))

    shapes = [(rows, ranks) for rows in (1, 2, 4) for ranks in (2, 3, 4, 6, 8) if size % (rows * ranks) == 0]
    assert spread(ours) < 0.85 * spread(random_rows)


def drawn_one_by_one(ratios: tuple[tuple[int, Fraction], ...], batches: Ramp, steps: int):
    """Yield the replayed positions of each step: the first so many of the digital sequence that are in the step."""
    exact = exact_counts(ratios, batches, steps)
    for step in range(steps):
        size, count = batches.size(step), math.floor(exact[step + 1]) - math.floor(exact[step])
        num_digits = (size - 1).bit_length()
        flip = int(mix_array(np.array([step], np.uint64))[0]) % 2**num_digits
        found = []
        for i in range(2**num_digits):
            # digit s is the sum modulo 2 of the digits c of i for which the binomial coefficient (s over c) is odd
            digits = [sum(math.comb(s, c) * (i >> c & 1) for c in range(s + 1)) % 2 for s in range(num_digits)]
            position = sum(digit << s for s, digit in enumerate(digits)) ^ flip
            found += [position] * (position < size)
        yield sorted(found[:count])


@pytest.mark.parametrize("batches", [Ramp((16,)), Ramp((21,)), Ramp((8, 12, 64), (0, 5, 20)), Ramp((1,))])
def test_steps_found_together_are_those_found_one_by_one(batches):
    share = ReplayShare(TABLE, batches)
    for step, expected in enumerate(drawn_one_by_one(TABLE, batches, 45)):
        replayed = share.of(batches.samples(step), batches.size(step))
        assert np.flatnonzero(replayed).tolist() == expected


def test_positions_far_apart_are_found_in_any_order():
    share, fresh = ReplayShare(TABLE, Ramp((24,))), ReplayShare(TABLE, Ramp((24,)))
    whole = fresh.of(0, 50_000)
    for position in np.random.default_rng(2).integers(0, 49_000, 300).tolist():
        assert np.array_equal(share.of(position, 900), whole[position : position + 900])
        assert share.count(position) == np.count_nonzero(whole[:position])


def test_shares_that_go_on_with_another_ratio_owe_what_they_owed():
    generator = random.Random(1)
    for _ in range(60):
        batches = Ramp((generator.randint(1, 40),))
        first, second = (Fraction(generator.randint(0, 99), 100) for _ in range(2))
        border = generator.randint(1, 20)
        before = ReplayShare(((0, first),), batches)
        start = batches.samples(border)
        after = ReplayShare(((0, second),), batches, start, before.owed(start))
        for step in range(border, border + 30):
            end = batches.samples(step)
            exact = first * start + second * (end - start)
            assert abs(before.count(start) + after.count(end) - exact) < 1


def mixture(start: int = 0, counts: tuple[int, ...] = (0, 0, 0)) -> MixtureWithReplay:
    share = ReplayShare(TABLE, Ramp((16,)), start)

    def new(before):
        later = [(before(16 * step), (1, 4)) for step in (10,)]
        return Mixing((3, 1), [None, None], later, before(start), counts[:2])

    return MixtureWithReplay(share, new, start, counts[2])


def test_new_samples_keep_their_own_mixture_beside_replay():
    mixed = mixture()
    sources = mixed.of(0, 16 * 40)
    assert np.array_equal(sources == 2, mixed.share.of(0, 16 * 40))
    new = sources[sources < 2]
    border = int((sources[:160] < 2).sum())
    assert np.array_equal(new, Mixing((3, 1), [None, None], [(border, (1, 4))]).of(0, new.size))
    for position in range(0, sources.size, 13):
        assert mixed.counts(position).tolist() == np.bincount(sources[:position], minlength=3).tolist()
        assert np.array_equal(mixed.of(position, 20)[: sources.size - position], sources[position : position + 20])
    later = mixture(160, tuple(mixed.counts(160).tolist()))
    assert np.array_equal(later.counts(400) - later.counts(160), np.bincount(later.of(160, 240), minlength=3))


def test_the_stream_ends_with_the_last_new_sample():
    share = ReplayShare(((0, Fraction(1, 2)),), Ramp((8,)))
    mixed = MixtureWithReplay(share, lambda _: Mixing((1, 1), [10, 3]), 0, 0)
    end = mixed.num_samples
    assert end is not None
    assert mixed.counts(end)[:2].tolist() == [10, 3]
    assert mixed.of(end - 1, 1)[0] < 2
