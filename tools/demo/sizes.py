"""Size of the demonstration on this machine: steps from a short timing. Pure.

A slower machine does fewer steps rather than taking longer. The reserve covers what is still to come beside the steps:
three launches, each about as long to start as the timing run was, and the commands about the new data, the ledger,
export and generation.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

GOAL_SECONDS = 420.0
"""Seconds that the demonstration aims to take from its start to its end, without installation."""
FEWEST_STEPS, MOST_STEPS = 40, 400
"""Bounds of the number of steps: enough to see the loss fall and to be killed between two checkpoints; about one pass
over the text."""
NEW_SHARE = 0.25
"""Steps of the second run stage, by those of the first one."""
NUM_CHECKPOINTS = 4
KILLED_AFTER = 2
"""Number of checkpoints that exist when the run is killed."""
STEPS_BEYOND = 5
"""Steps that both runs do, so that their losses can be compared."""
WARM_UP_STEPS = 2
"""The first steps of a timing allocate memory and say nothing."""
STARTS_TO_COME = 6
"""Launches and commands that are still to come, each counted as long as a launch takes to start."""
BESIDE_STEPS = 1.25
"""Factor on the steps' own time that covers evaluation, checkpoints and the slower one of the two layouts."""


@dataclass(frozen=True)
class Sizes:
    """Length of the run in steps."""

    steps: int
    checkpoint_every: int
    kill_at: int
    """The first step at which the run is killed."""

    @property
    def new_steps(self) -> int:
        """Steps of the second run stage."""
        return round(NEW_SHARE * self.steps)


def sizes(step_seconds: list[float], start_seconds: float, elapsed_seconds: float) -> Sizes:
    """Return what fits into the goal, given the times of a few steps, the time to start a run, and the time gone by."""
    left_seconds = GOAL_SECONDS - elapsed_seconds - STARTS_TO_COME * start_seconds
    # The median: on a busy machine single steps take several times as long.
    one = median(step_seconds[WARM_UP_STEPS:] or step_seconds) * BESIDE_STEPS
    fitting = int(max(left_seconds, 0.0) / (one * (1 + NEW_SHARE)))
    steps = min(max(fitting, FEWEST_STEPS), MOST_STEPS)
    checkpoint_every = steps // NUM_CHECKPOINTS
    # A whole number of checkpoint intervals, so that the last step is saved by the schedule as well.
    return Sizes(checkpoint_every * NUM_CHECKPOINTS, checkpoint_every, checkpoint_every * KILLED_AFTER + STEPS_BEYOND)
