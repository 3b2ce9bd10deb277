"""The guard against closed forms: which values are spikes, what is counted, when it gives up, when it goes back."""

import json
import statistics

import pytest

from engine.config.schema.optimizer import StabilityConfig
from engine.parallel.zero import NotFinite
from engine.train.stability import Guard, StabilityState, Unstable
from engine.train.state import TrainState

NAN, INFINITE = float("nan"), float("inf")


def guard(**keys) -> Guard:
    return Guard(StabilityConfig(**keys), StabilityState())


def judge(watch: Guard, *values: float, step: int = 0) -> list[str]:
    """Verdicts over steps of that loss and a constant norm; eight samples a step."""
    return [watch.judge(step + n, 8 * (step + n), value, 1.0) for n, value in enumerate(values)]


def test_off_by_default():
    watch = guard()
    assert judge(watch, 1.0, 1.0, 1e9, -1e9, 1e30) == ["accept"] * 5
    assert watch.state == StabilityState(), "and nothing is remembered"


def test_the_boundary_is_mean_plus_sigma_deviations():
    before = [3.0, 5.0, 4.0, 6.0]
    edge = statistics.fmean(before) + 2 * statistics.pstdev(before)
    for value, verdict in ((edge - 1e-9, "accept"), (edge + 1e-9, "spike")):
        watch = guard(spike_sigma=2, window=4)
        assert judge(watch, *before) == ["accept"] * 4
        assert judge(watch, value) == [verdict]


def test_no_spike_before_the_window_is_full_and_only_accepted_steps_enter_it():
    watch = guard(spike_sigma=1, window=3)
    assert judge(watch, 1.0, 900.0, 2.0) == ["accept"] * 3
    assert judge(watch, 1000.0, step=3) == ["spike"]
    assert watch.state.losses == [1.0, 900.0, 2.0]
    assert judge(watch, 1.5, step=4) == ["accept"]
    assert watch.state.losses == [900.0, 2.0, 1.5]


def test_the_norm_is_judged_like_the_loss():
    watch = guard(spike_sigma=3, window=2)
    watch.judge(0, 0, 4.0, 1.0)
    watch.judge(1, 8, 4.1, 1.1)
    assert watch.judge(2, 16, 4.0, 50.0) == "spike"
    assert watch.judge(3, 24, 50.0, 1.0) == "spike"
    assert watch.judge(4, 32, 4.0, 1.0) == "accept"


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (INFINITE, 1.0), (1.0, NAN), (1.0, -INFINITE)])
def test_what_is_not_finite_stops_or_is_skipped(loss, norm):
    with pytest.raises(NotFinite, match=r"the loss is|the gradient norm is"):
        guard().judge(0, 0, loss, norm)
    watch = guard(non_finite="skip", spike_sigma=1, window=2)
    assert watch.judge(0, 0, loss, norm) == "not_finite"
    assert (watch.state.losses, watch.state.spikes, watch.state.skips) == ([], [], 1)


def test_skips_in_a_row_are_bounded():
    watch = guard(non_finite="skip", max_skips=2)
    assert judge(watch, NAN, NAN, 1.0, NAN, NAN) == ["not_finite"] * 2 + ["accept"] + ["not_finite"] * 2
    with pytest.raises(Unstable, match=r"3 steps in a row were skipped; the last had loss nan.*\n.*max_skips = 2"):
        judge(watch, NAN)


def test_spikes_close_together_call_for_a_rollback_from_the_first_of_them():
    watch = guard(spike_sigma=1, window=2, rollback_spikes=2, rollback_steps=3)
    judge(watch, 1.0, 1.1)
    judge(watch, 9.0, 1.0, 1.1, step=2)
    assert judge(watch, 9.0, step=5) == ["spike"]
    assert watch.offending(0) is None, "steps 2 and 5 are further apart than three steps"
    assert judge(watch, 1.0, 9.0, step=6) == ["accept", "spike"]
    assert watch.offending(0) == 8 * 5


def test_rollbacks_are_bounded():
    watch = guard(spike_sigma=1, window=2, rollback_spikes=1, max_rollbacks=2)
    for rollbacks in (0, 1):
        judge(watch, 1.0, 1.1, 9.0)
        assert watch.offending(rollbacks) == 16
        watch.state = StabilityState().after_rollback()
    judge(watch, 1.0, 1.1, 9.0)
    with pytest.raises(Unstable, match=r"step 3: the loss still spikes after 2 rollbacks\n.*max_rollbacks = 2"):
        watch.offending(2)


def test_the_state_comes_back_from_a_checkpoint():
    watch = guard(spike_sigma=1, window=2, non_finite="skip")
    judge(watch, 1 / 3, 0.1, 9.0, NAN)
    assert StabilityState.from_section(json.loads(json.dumps(watch.state.section()))) == watch.state
    assert watch.state.section()["spikes"] == [(2, 16)]
    state = TrainState(step=4, updates=2, rollbacks=1)
    assert TrainState.from_section(json.loads(json.dumps(state.section()))) == state
