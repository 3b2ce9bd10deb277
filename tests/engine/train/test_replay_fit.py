"""The fit of the replay ratio, on losses that the law itself has made, with known numbers and noise."""

from dataclasses import replace

import numpy as np
import pytest

from engine.config.schema.optimizer import OptimizerConfig
from engine.config.schema.stage import RunStage
from engine.train.replay_fit import NEW, OLD, Recommendation, ShortRun, recommend
from engine.train.replay_law import Areas, Law, Points, PowerLaw, areas, fit, fit_power_law

PEAK = 1e-3
SHORT, WHOLE = 120, 600


def stage(steps: int) -> RunStage:
    schedule = {"shape": "rewarm", "warmup": steps // 20, "initial_factor": 0.1}
    return RunStage.model_validate(
        {
            "data": {"train": "x"},
            "sequence_length": 8,
            "global_batch_size": 4,
            "duration": {"steps": steps},
            "schedule": schedule,
        }
    )


def areas_of(steps: int) -> Areas:
    return areas(OptimizerConfig(learning_rate=PEAK), stage(steps), 0.1 * PEAK)


UNIT = float(areas_of(SHORT).forward[-1])
BEFORE = 3 * UNIT
LAWS = {
    OLD: Law(2.0, 0.3, 0.05, 0.8, 20.0, 0.6, 9.0, UNIT, BEFORE),
    NEW: Law(3.0, 0.3, 0.10, -1.0, 40.0, 0.4, 1.2, UNIT, BEFORE),
}
"""Numbers that other runs have shown: half of the forgetting is gone at 8 %, 25 % costs some per cent."""


def best_of(laws: dict[str, Law], upper: float, old_weight: float = 0.5) -> float:
    """Return the best ratio by the laws themselves, on a fine grid of its own."""
    ratio, end = np.linspace(0, upper, 20_001), areas_of(WHOLE)
    full = np.ones_like(ratio)
    old, new = (laws[key].predict(end.forward[-1] * full, end.annealing[-1] * full, ratio) for key in (OLD, NEW))
    return float(ratio[np.argmin(old_weight * old + (1 - old_weight) * new)])


def short_runs(
    ratios: tuple[float, ...], noise: float, laws: dict[str, Law] | None = None, every: int = 6, seed: int = 0
) -> list[ShortRun]:
    random, made = np.random.default_rng(seed), areas_of(SHORT)
    steps = np.arange(0, SHORT + 1, every)

    def curve(law: Law, ratio: float) -> list[tuple[int, float]]:
        exact = law.predict(made.forward[steps], made.annealing[steps], np.full(steps.size, ratio))
        return [
            (int(step), float(loss))
            for step, loss in zip(steps, exact + random.normal(0, noise, steps.size), strict=True)
        ]

    return [ShortRun(ratio, {key: curve(law, ratio) for key, law in (laws or LAWS).items()}) for ratio in ratios]


def recommended(runs: list[ShortRun], old_weight: float = 0.5) -> Recommendation:
    return recommend(runs, areas_of(SHORT), areas_of(WHOLE), BEFORE, old_weight)


def test_areas_are_the_sums_of_the_schedule():
    """A constant rate has no annealing area; a fall by d adds d, and then d times the momentum's powers."""
    constant = RunStage.model_validate(stage(4).model_dump(mode="json") | {"schedule": {"shape": "constant"}})
    flat = areas(OptimizerConfig(learning_rate=PEAK), constant, PEAK)
    assert flat.forward == pytest.approx(PEAK * np.arange(5))
    assert flat.annealing == pytest.approx(np.zeros(5))
    fallen = areas(OptimizerConfig(learning_rate=PEAK), constant, 3 * PEAK)
    assert fallen.annealing == pytest.approx(2 * PEAK * np.array([0, 1, 1.99, 1 + 0.99 + 0.99**2, 3.940399]))


@pytest.mark.parametrize("key", [OLD, NEW])
def test_known_numbers_are_found_without_noise(key):
    made, ratios = areas_of(SHORT), (0.0, 0.05, 0.25)
    steps = np.tile(np.arange(0, SHORT + 1, 6), len(ratios))
    ratio = np.repeat(ratios, steps.size // len(ratios))
    loss = LAWS[key].predict(made.forward[steps], made.annealing[steps], ratio)
    found = fit(Points(made.forward[steps], made.annealing[steps], ratio, loss, BEFORE))
    for name in ("start", "further", "anneal", "shift", "speed", "power", "fading"):
        assert getattr(found, name) == pytest.approx(getattr(LAWS[key], name), rel=1e-4), name


@pytest.mark.parametrize(("seed", "old_weight"), [(0, 0.5), (1, 0.5), (2, 0.3)])
def test_the_best_ratio_of_a_longer_stage_is_found_from_three_noisy_runs(seed, old_weight):
    """Noise of 2 mnat is that of a held-out loss from step to step."""
    found = recommended(short_runs((0.0, 0.05, 0.4), 0.002, seed=seed), old_weight)
    truth = best_of(LAWS, 0.4, old_weight)
    assert 0.08 < truth < 0.3, "not at an end of what is tried"
    assert found.is_carried, found.reasons
    assert found.law == "cpt"
    assert found.interval is not None
    low, high = found.interval
    assert found.ratio == pytest.approx(truth, abs=max(0.02, 3 * (high - low) / 2))
    for key, law in LAWS.items():
        end = areas_of(WHOLE)
        for ratio, loss in found.forecasts[key][::20]:
            exact = law.predict(end.forward[-1:], end.annealing[-1:], np.array([ratio]))[0]
            assert loss == pytest.approx(exact, abs=0.02), "a forecast five times as far as the runs"
        assert found.rms[key] == pytest.approx(0.002, rel=0.4)


def test_noise_that_hides_the_effect_carries_nothing():
    found = recommended(short_runs((0.0, 0.05, 0.25), 0.3))
    assert not found.is_carried


def test_a_best_ratio_beyond_those_that_were_tried_is_said():
    found = recommended(short_runs((0.0, 0.01, 0.03), 0.0005))
    assert any("above 0.03" in reason for reason in found.reasons)
    found = recommended(short_runs((0.3, 0.4, 0.5), 0.0005))
    assert any("below 0.3" in reason for reason in found.reasons)


def test_a_ratio_without_an_effect_carries_nothing():
    flat = replace(LAWS[NEW], fading=0.0)
    laws = {OLD: flat, NEW: flat}
    found = recommended(short_runs((0.0, 0.05, 0.25), 0.002, laws))
    assert any("hardly changes" in reason for reason in found.reasons)


def test_two_ratios_or_few_evaluations_are_too_little():
    for runs in (short_runs((0.0, 0.25), 0.0), short_runs((0.0, 0.05, 0.25), 0.0, every=SHORT), []):
        found = recommended(runs)
        assert not found.is_carried
        assert found.ratio is None
        assert "needs 3 ratios" in found.reasons[0]


@pytest.mark.parametrize("law", [PowerLaw(2.0, 0.7, 0.8), PowerLaw(3.0, 0.02, -0.4)])
def test_a_power_law_is_found_again(law):
    ratios = (0.0, 0.02, 0.05, 0.1, 0.25)
    found = fit_power_law(np.array(ratios), law.predict(np.array(ratios)))
    grid = np.linspace(0, 0.25, 26)
    assert found.predict(grid) == pytest.approx(law.predict(grid), abs=1e-3)


def test_ends_of_runs_alone_take_a_power_law():
    laws = {OLD: PowerLaw(2.0, 0.7, 0.8), NEW: PowerLaw(3.0, 0.02, -0.8)}
    ratios = (0.0, 0.02, 0.05, 0.1, 0.25)
    runs = [
        ShortRun(ratio, {key: [(SHORT, float(law.predict(np.array([ratio]))[0]))] for key, law in laws.items()})
        for ratio in ratios
    ]
    found = recommended(runs)
    grid = np.linspace(0, 0.25, 20_001)
    truth = grid[np.argmin(laws[OLD].predict(grid) + laws[NEW].predict(grid))]
    assert found.law == "power"
    assert found.is_carried, found.reasons
    assert found.ratio == pytest.approx(truth, abs=0.01)
    assert "of their length" in found.notes[0]
