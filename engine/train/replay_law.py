"""Law of the validation loss of a domain over a run stage with replay, fitted to short runs of one checkpoint.

The law is that of Wang et al. 2025 (Learning Dynamics in Continual Pre-Training for Large Language Models, ICML, arXiv
2505.07796), written relative to the checkpoint at which the run stage begins:

    L(t, r) = L(0) + A ((1 + S1(t) / S0)^-1/2 - 1) - C S2(t) + B exp(-k r) (1 - (1 + E S1(t))^-b)

with S1 the forward area (sum of the learning rates of the stage so far), S0 that of the stages before, S2 the
annealing area (their falls, fading with momentum), and r the replay ratio. The A term is what any further training
improves, the C term what a falling learning rate improves, the B term the shift of the distribution: a rise for the old
domain, a fall for the new one. Departures: the exponent of the A term is fixed, since short runs cannot tell it from
the shift; and the ratio enters as a factor exp(-k r) of the shift alone, with a k for each domain.

L is linear in L(0), A, C and B, so least squares over these is solved exactly for each (E, b, k), which are searched
on a grid and refined by Gauss-Newton steps (variable projection: Golub and Pereyra 1973). A and C are not negative.

Legend: N points, P columns of the linear part.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from engine.config.schema.optimizer import OptimizerConfig
from engine.config.schema.stage import RunStage
from engine.optim.schedules import learning_rate

MOMENTUM = 0.99
"""Factor by which a fall of the learning rate fades from step to step in the annealing area."""
EXPONENT = 0.5
_SPEEDS = np.geomspace(0.3, 3000.0, 9)
"""Values of E on the grid, per forward area of the longest run."""
_POWERS = np.geomspace(0.05, 3.0, 6)
_FADINGS = (-4.0, -2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Values of k on the grid."""
_REFINEMENTS = 12


@dataclass(frozen=True)
class Areas:
    """Forward and annealing area of a run stage after each step, (steps + 1,), from 0."""

    forward: np.ndarray
    annealing: np.ndarray


def areas(optimizer: OptimizerConfig, run_stage: RunStage, rate_before: float) -> Areas:
    """Return the areas of a run stage whose predecessor ended with the learning rate `rate_before`."""
    rates = np.array([learning_rate(optimizer, run_stage, step) for step in range(run_stage.num_steps)])
    falls = -np.diff(rates, prepend=rate_before)
    fading, annealing = 0.0, [0.0]
    for fall in falls:
        fading = MOMENTUM * fading + fall
        annealing.append(annealing[-1] + fading)
    return Areas(np.concatenate([[0.0], np.cumsum(rates)]), np.array(annealing))


@dataclass(frozen=True)
class Points:
    """Measured losses of one domain, each (N,), and the forward area of the stages before."""

    forward: np.ndarray
    annealing: np.ndarray
    ratio: np.ndarray
    loss: np.ndarray
    before: float

    @property
    def scale(self) -> float:
        """Largest forward area, the unit of E."""
        return float(self.forward.max())


@dataclass(frozen=True)
class Law:
    """The law with the numbers of one domain, in nats per token."""

    start: float
    further: float
    """A."""
    anneal: float
    """C, per forward area of the longest run."""
    shift: float
    """B."""
    speed: float
    """E, per forward area of the longest run."""
    power: float
    """b."""
    fading: float
    """k."""
    scale: float
    before: float

    def predict(self, forward: np.ndarray, annealing: np.ndarray, ratio: np.ndarray) -> np.ndarray:
        """Return the loss at points of a run stage, (N,)."""
        terms_NP = _terms(forward, annealing, ratio, self.scale, self.before, (self.speed, self.power, self.fading))
        return terms_NP @ np.array([self.start, self.further, self.anneal, self.shift])


def fit(points: Points, near: Law | None = None) -> Law:
    """Return the law that fits the points best, by least squares; with `near`, looked for around that one alone."""
    if near is not None:
        best = (near.speed, near.power, near.fading)
    else:
        grid = itertools.product(_SPEEDS, _POWERS, _FADINGS)
        best = min(grid, key=lambda shape: float(np.sum(_solve(points, shape)[1] ** 2)))
    shape = _refine(points, best)
    start, further, anneal, shift = _solve(points, shape)[0].tolist()
    return Law(start, further, anneal, shift, *shape, points.scale, points.before)


def _terms(
    forward: np.ndarray,
    annealing: np.ndarray,
    ratio: np.ndarray,
    scale: float,
    before: float,
    shape: tuple[float, float, float],
) -> np.ndarray:
    """Return what L(0), A, C and B are multiplied by, (N, P)."""
    speed, power, fading = shape
    # Without training before there is no curve to go on along: the term is left to the shift.
    further = (1 + forward / before) ** -EXPONENT - 1 if before > 0 else np.zeros_like(forward)
    shift = np.exp(-fading * ratio) * -np.expm1(-power * np.log1p(speed * forward / scale))
    return np.stack([np.ones_like(forward), further, -annealing / scale, shift], axis=1)


def _solve(points: Points, shape: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the best (P,) numbers of the linear part, A and C not negative, and the residuals (N,)."""
    terms_NP = _terms(points.forward, points.annealing, points.ratio, points.scale, points.before, shape)
    found = None
    # Two numbers have a bound. Where the free optimum breaks one, the best lies on a bound: all four cases are tried.
    for kept in ([0, 1, 2, 3], [0, 1, 3], [0, 2, 3], [0, 3]):
        numbers = np.zeros(4)
        numbers[kept] = np.linalg.lstsq(terms_NP[:, kept], points.loss, rcond=1e-10)[0]
        if numbers[1] < 0 or numbers[2] < 0:
            continue
        residuals = points.loss - terms_NP @ numbers
        if found is None or residuals @ residuals < found[1] @ found[1]:
            found = numbers, residuals
        if len(kept) == 4:
            break  # no bound is touched
    assert found is not None, "the last case has no bound"
    return found


def _refine(points: Points, shape: tuple[float, float, float]) -> tuple[float, float, float]:
    """Return (E, b, k) after damped Gauss-Newton steps on the residuals of the linear solution."""
    # E and b are positive: their logarithms are free
    x = np.array([np.log(shape[0]), np.log(shape[1]), shape[2]])
    low = np.array([np.log(_SPEEDS[0] / 10), np.log(_POWERS[0] / 5), -20.0])
    high = np.array([np.log(_SPEEDS[-1] * 10), np.log(_POWERS[-1] * 5), 200.0])

    def residuals(x: np.ndarray) -> np.ndarray:
        return _solve(points, (float(np.exp(x[0])), float(np.exp(x[1])), float(x[2])))[1]

    damping, now = 1e-3, residuals(x)
    for _ in range(_REFINEMENTS):
        steps = np.array([1e-4, 1e-4, 1e-4 * max(1.0, abs(x[2]))])
        jacobian = np.stack([(residuals(x + step) - now) / step.sum() for step in np.diag(steps)], axis=1)  # (N, 3)
        normal, gradient = jacobian.T @ jacobian, jacobian.T @ now
        while damping < 1e6:
            damped = normal + damping * np.diag(np.diag(normal) + 1e-12)
            trial = np.clip(x - np.linalg.solve(damped, gradient), low, high)
            after = residuals(trial)
            if after @ after < now @ now:
                x, now, damping = trial, after, damping / 10
                break
            damping *= 10
        else:
            break
    return float(np.exp(x[0])), float(np.exp(x[1])), float(x[2])


@dataclass(frozen=True)
class PowerLaw:
    """Loss at the end of runs of one length as a power law in the ratio: c + a (1 + r / `UNIT`)^-g, the form of the
    D-CPT law (Que et al. 2024, arXiv 2406.01375) in the ratio alone."""

    constant: float
    factor: float
    exponent: float

    UNIT = 0.01

    def predict(self, ratio: np.ndarray) -> np.ndarray:
        """Return the loss for each ratio."""
        return self.constant + self.factor * (1 + ratio / self.UNIT) ** -self.exponent


def fit_power_law(ratio: np.ndarray, loss: np.ndarray) -> PowerLaw:
    """Return the power law that fits the losses at the ends of runs best; three numbers are fitted."""
    found = None
    for exponent in (*np.linspace(-1.0, -0.05, 20), *np.linspace(0.05, 3.0, 60)):
        terms = np.stack([np.ones_like(ratio), (1 + ratio / PowerLaw.UNIT) ** -exponent], axis=1)
        numbers = np.linalg.lstsq(terms, loss, rcond=None)[0]
        error = float(np.sum((loss - terms @ numbers) ** 2))
        if found is None or error < found[0]:
            found = error, PowerLaw(float(numbers[0]), float(numbers[1]), float(exponent))
    assert found is not None
    return found[1]
