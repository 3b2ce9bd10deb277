"""Samples that spoil the steps that they are in, for tests of the guard and of rollbacks."""

from __future__ import annotations

from typing import Any

SPIKES = (35, 41)
"""Positions of samples; steps hold eight, so these are in the steps from 4 and from 5 on."""
LEFT_OUT = (32, 48)
NAN = 60
STABILITY = {
    "non_finite": "skip",
    "spike_sigma": 1000.0,
    "window": 3,
    "rollback_spikes": 2,
    "rollback_steps": 2,
    "max_rollbacks": 1,
}


def poison(trainer: Any, large: tuple[int, ...], nan: tuple[int, ...], left_out: tuple[int, int] | None = None) -> None:
    """Multiply the gradient of steps that hold the samples `large` by 1e6, of those that hold `nan` by NaN; and leave
    out the positions [first, end) of `left_out`."""
    stream, feed, train = trainer.feed.stream, trainer.feed.step, trainer.pipeline.train
    here = stream.position
    ids = stream.next_sample_ids(200)
    too_large = {ids[position - here] for position in large}
    not_a_number = {ids[position - here] for position in nan}
    factor = 1.0
    if left_out:
        stream.leave_out(*left_out)

    def step():
        nonlocal factor
        samples = set(stream.next_sample_ids(stream.batch_size))
        factor = float("nan") if samples & not_a_number else 1e6 if samples & too_large else 1.0
        return feed()

    trainer.feed.step = step
    trainer.pipeline.train = lambda inputs, scale, *rest: train(inputs, scale * factor, *rest)
