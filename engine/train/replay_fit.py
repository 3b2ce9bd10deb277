"""A replay ratio from short runs: what they measured, what the law makes of it, and what that carries.

The recommended ratio has the smallest mean of the old domains' and the new domains' loss at the end of the whole run
stage, as the law forecasts it; a weight says how much the old ones count. Only ratios between those that were tried are
looked at. The error comes from fits to resampled residuals: blocks of neighbouring ones within each run, because
neighbours err together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from engine.train.replay_law import Areas, Law, Points, PowerLaw, fit, fit_power_law

OLD, NEW = "old", "new"
Curve = list[tuple[int, float]]
"""(step of the run stage, loss)."""

FEWEST_RATIOS, FEWEST_POINTS = 3, 8
"""Ratios, and evaluations of each run, that the law needs: it has 7 numbers."""
FEWEST_FOR_POWER_LAW = 4
"""Ratios that a power law needs: it has 3 numbers, and one more tells its error."""
RESAMPLES, BLOCK = 60, 4
LARGEST_ERROR = 0.35
"""Width of the interval of the ratio, by the largest tested ratio, from which on nothing is recommended."""
FAR = 20.0
"""Steps of the whole stage per step of the short runs from which on a forecast is called far."""


@dataclass(frozen=True)
class ShortRun:
    """Measured losses of one short run."""

    ratio: float
    losses: dict[str, Curve]
    """Mean loss of the old domains, and of the new ones, by step of the run stage, from 0."""


@dataclass(frozen=True)
class Recommendation:
    """Outcome of a fit. `ratio` is the best one as far as is known, whether or not the data carries it."""

    law: str
    """`cpt` or `power`."""
    ratio: float | None
    interval: tuple[float, float] | None
    """16 % and 84 % quantile of the ratio over the resampled fits."""
    forecasts: dict[str, list[tuple[float, float]]]
    """(ratio, forecast loss) at the end of the whole stage (`power`: of the short runs), of the old and new domains."""
    rms: dict[str, float]
    """Root mean square of the residuals, by domain, in nats."""
    reasons: list[str]
    """Reasons why the data carries no recommendation; empty where it does."""
    notes: list[str]
    laws: dict[str, Law] | dict[str, PowerLaw]

    @property
    def is_carried(self) -> bool:
        """True where the data carries the recommendation."""
        return not self.reasons


def recommend(
    runs: Sequence[ShortRun], short: Areas, whole: Areas, before: float, old_weight: float = 0.5
) -> Recommendation:
    """Return the ratio that the short runs recommend for the whole stage.

    `short` and `whole` are the areas of a short run and of the whole stage, `before` the forward area of the stages
    before. `old_weight`, from 0 to 1, is the share of the old domains' loss in what is minimized.
    """
    runs = sorted(runs, key=lambda run: run.ratio)
    ratios = [run.ratio for run in runs]
    points = min((len(run.losses[key]) for run in runs for key in (OLD, NEW)), default=0)
    if len(runs) >= FEWEST_RATIOS and points >= FEWEST_POINTS:
        return _by_law(runs, short, whole, before, old_weight)
    if len(runs) >= FEWEST_FOR_POWER_LAW and points:
        return _by_power_law(runs, old_weight)
    reason = (
        f"{len(runs)} finished runs (ratios {', '.join(f'{ratio:g}' for ratio in ratios) or 'none'}) of {points} "
        f"evaluations at least: the law needs {FEWEST_RATIOS} ratios with {FEWEST_POINTS} evaluations each, "
        f"a power law in the ratio {FEWEST_FOR_POWER_LAW} ratios"
    )
    return Recommendation("none", None, None, {}, {}, [reason], [], {})


def _by_law(runs: Sequence[ShortRun], short: Areas, whole: Areas, before: float, old_weight: float) -> Recommendation:
    data = {key: _points(runs, key, short, before) for key in (OLD, NEW)}
    laws = {key: fit(points) for key, points in data.items()}
    residuals = {key: points.loss - _fitted(laws[key], points) for key, points in data.items()}
    candidates, weights = _candidates(runs), {OLD: old_weight, NEW: 1 - old_weight}

    def ends(laws: dict[str, Law]) -> dict[str, np.ndarray]:
        """Return the forecast losses at the end of the whole stage for each candidate."""
        full = np.ones_like(candidates)
        return {
            key: law.predict(whole.forward[-1] * full, whole.annealing[-1] * full, candidates)
            for key, law in laws.items()
        }

    best = [_best(ends(laws), candidates, weights)]
    random = np.random.default_rng(0)
    for _ in range(RESAMPLES):
        again = {}
        for key, points in data.items():
            drawn = _resampled(residuals[key], points.ratio, random)
            again[key] = fit(replace(points, loss=_fitted(laws[key], points) + drawn), near=laws[key])
        best.append(_best(ends(again), candidates, weights))
    forecasts = ends(laws)
    rms = {key: float(np.sqrt(np.mean(found**2))) for key, found in residuals.items()}
    low, high = (float(value) for value in np.quantile(best[1:], (0.16, 0.84)))
    reasons = _doubts(np.array(best[1:]), candidates, _mean(forecasts, weights), rms)
    stretched = (whole.forward.size - 1) / max(1, short.forward.size - 1)
    notes = []
    if stretched > FAR:
        notes.append(f"the stage is {stretched:.0f} times as long as the short runs: the forecast reaches far")
    if laws[OLD].shift <= 0:
        notes.append("the old domains are not forgotten in these runs")
    return Recommendation("cpt", best[0], (low, high), _listed(candidates, forecasts), rms, reasons, notes, laws)


def _points(runs: Sequence[ShortRun], key: str, short: Areas, before: float) -> Points:
    """Return the measured losses of the old or of the new domains, of all runs."""
    rows = [(step, run.ratio, loss) for run in runs for step, loss in run.losses[key]]
    steps, ratio, loss = (np.array(column) for column in zip(*rows, strict=True))
    steps = steps.astype(int)
    return Points(short.forward[steps], short.annealing[steps], ratio, loss, before)


def _fitted(law: Law, points: Points) -> np.ndarray:
    return law.predict(points.forward, points.annealing, points.ratio)


def _candidates(runs: Sequence[ShortRun]) -> np.ndarray:
    """Return the ratios that may be recommended: no further than those that were tried."""
    return np.linspace(runs[0].ratio, runs[-1].ratio, 101)


def _best(forecasts: dict[str, np.ndarray], candidates: np.ndarray, weights: dict[str, float]) -> float:
    return float(candidates[np.argmin(_mean(forecasts, weights))])


def _mean(forecasts: dict[str, np.ndarray], weights: dict[str, float]) -> np.ndarray:
    """Return the weighted mean of the losses for each candidate."""
    return sum(weights[key] * forecasts[key] for key in weights) + np.zeros_like(forecasts[OLD])


def _resampled(residuals: np.ndarray, ratio: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return residuals drawn in blocks of neighbours (with replacement) from the same run, in random sign."""
    drawn = np.empty_like(residuals)
    for one in np.unique(ratio):
        (places,) = np.nonzero(ratio == one)
        own = residuals[places]
        count = -(-own.size // BLOCK)
        starts = random.integers(0, own.size, count)
        # block b: own[starts[b]], own[starts[b] + 1], ... around the end
        blocks = (starts[:, None] + np.arange(BLOCK)) % own.size  # (count, BLOCK)
        signs = random.choice((-1.0, 1.0), (count, 1))
        drawn[places] = (own[blocks] * signs).ravel()[: own.size]
    return drawn


def _doubts(best: np.ndarray, candidates: np.ndarray, means: np.ndarray, rms: dict[str, float]) -> list[str]:
    """Return reasons against a recommendation: `best` are the ratios of the resampled fits, `means` what is minimized,
    for each candidate."""
    reasons, smallest, largest = [], candidates[0], candidates[-1]
    low, high = np.quantile(best, (0.16, 0.84))
    if np.mean(best >= largest) > 0.16:
        reasons.append(f"the best ratio may lie above {largest:g}, the largest that was tried: try a larger one")
    if smallest > 0 and np.mean(best <= smallest) > 0.16:
        reasons.append(f"the best ratio may lie below {smallest:g}, the smallest that was tried: try 0")
    if high - low > LARGEST_ERROR * largest:
        reasons.append(
            f"the ratio is only known to lie between {low:.3f} and {high:.3f}: make the runs longer, or try more ratios"
        )
    span, noise = float(np.ptp(means)), fmean(rms.values())
    if span < 2 * noise:
        reasons.append(
            f"the ratio hardly changes the mean loss ({span:.4f} nats over all that were tried), by the scatter of the "
            f"measurements ({noise:.4f})"
        )
    return reasons


def _by_power_law(runs: Sequence[ShortRun], old_weight: float) -> Recommendation:
    """Return a recommendation from the losses at the ends of the runs alone, for a stage of their length."""
    ratios, candidates, weights = np.array([run.ratio for run in runs]), _candidates(runs), {OLD: old_weight}
    weights[NEW] = 1 - old_weight
    ends = {key: np.array([run.losses[key][-1][1] for run in runs]) for key in (OLD, NEW)}
    laws = {key: fit_power_law(ratios, losses) for key, losses in ends.items()}
    # one run left out at a time: with so few points that tells the error better than their residuals
    best = []
    for left in range(len(runs)):
        kept = np.arange(len(runs)) != left
        without = {key: fit_power_law(ratios[kept], losses[kept]).predict(candidates) for key, losses in ends.items()}
        best.append(_best(without, candidates, weights))
    forecasts = {key: law.predict(candidates) for key, law in laws.items()}
    rms = {key: float(np.sqrt(np.mean((ends[key] - law.predict(ratios)) ** 2))) for key, law in laws.items()}
    reasons = _doubts(np.array(best), candidates, _mean(forecasts, weights), rms)
    note = "from the losses at the ends of the runs alone, so it holds for a stage of their length"
    ratio, interval = _best(forecasts, candidates, weights), (min(best), max(best))
    return Recommendation("power", ratio, interval, _listed(candidates, forecasts), rms, reasons, [note], laws)


def _listed(candidates: np.ndarray, forecasts: dict[str, np.ndarray]) -> dict[str, list[tuple[float, float]]]:
    """Return (ratio, loss) pairs of each domain."""
    return {key: list(zip(candidates.tolist(), losses.tolist(), strict=True)) for key, losses in forecasts.items()}
