"""Samples per step over a run stage, as a pure function of the step: constant, or growing in a ramp.

Steps, samples and tokens are proportional only while the batch keeps its size; every conversion between them is
here. What is counted are samples trained on: samples that a run leaves out (after a rollback) move no boundary.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ramp:
    """Global batch sizes, each from a step on: `first_steps` begins with 0 and never falls.

    Sizes (8, 16, 32) from steps (0, 2, 5) on: 5 steps are 2 x 8 + 3 x 16 = 64 samples, and 65 samples take 6 steps.
    """

    sizes: tuple[int, ...]
    first_steps: tuple[int, ...] = (0,)

    def size(self, step: int) -> int:
        """Return the number of samples of a step (from 0)."""
        # The last size that has begun; of two that begin at one step the later one.
        return self.sizes[bisect_right(self.first_steps, step) - 1]

    def samples(self, steps: int) -> int:
        """Return the number of samples of the first `steps` steps together."""
        ends = (*self.first_steps[1:], steps)
        spans = zip(self.sizes, self.first_steps, ends, strict=True)
        return sum(size * max(min(end, steps) - first, 0) for size, first, end in spans)

    def steps(self, samples: int) -> int:
        """Return the fewest steps that train on `samples` samples or more: the inverse of `samples` at step ends."""
        for size, first, end in zip(self.sizes, self.first_steps, self.first_steps[1:], strict=False):
            if self.samples(end) >= samples:
                # The steps before this size, and as many of this size as the remaining samples take, rounded up.
                return first + -(-max(samples - self.samples(first), 0) // size)
        last = self.first_steps[-1]
        return last + -(-max(samples - self.samples(last), 0) // self.sizes[-1])

    @property
    def largest(self) -> int:
        return max(self.sizes)


def make_ramp(smaller: Iterable[tuple[int, int, int]], final_size: int) -> Ramp:
    """Return the ramp of (size, until step, until sample) entries before `final_size`.

    A size ends with the first step before which that many steps are done and that many samples consumed.
    """
    sizes: tuple[int, ...] = ()
    first_steps: tuple[int, ...] = (0,)
    for size, until_step, until_sample in smaller:
        sizes = (*sizes, size)
        # An entry gives one of both ends and leaves the other 0. An end before its beginning makes a size of no step,
        # which `check_ramp` refuses.
        end = max(until_step, Ramp(sizes, first_steps).steps(until_sample), first_steps[-1])
        first_steps = (*first_steps, end)
    return Ramp((*sizes, final_size), first_steps)
