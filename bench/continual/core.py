"""The core experiment: how much forgetting replay removes, and what that costs on the new domain.

For each seed a run learns the old domain. Branches of it then learn the new one for a fixed number of steps, with
different shares of replay, from the whole old data or from a reservoir of 1 % of it. Beside them stand two controls
that begin at initial weights: joint training on both domains, on the tokens that the sequence without replay sees, and
the new domain alone. All stages of a sequence have the schedule that `palimpsest continue` chooses for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.continual.corpora import NEW, OLD
from bench.continual.runs import Planned, Tree, train_all
from bench.continual.setup import BASE, SPAN_TOKENS, Setup, Sizes, label
from engine.train import ledger as measures

SMALL_BUFFER, SMALL_RATIO = 0.01, 0.10
"""Share of the old data that the reservoir keeps, and the ratio at which it is compared with the whole data."""
JOINT, SCRATCH, RESERVOIR = "joint", "new domain alone", "10 %, reservoir of 1 %"


class Experiment:
    """Runs of one experiment, over data that `corpora.write` has written into `folder`."""

    def __init__(self, folder: Path, sizes: Sizes, old_tokens: int) -> None:
        self.sizes = sizes
        self.setup = Setup(folder, sizes, max(1, round(SMALL_BUFFER * old_tokens / SPAN_TOKENS)))

    def measure(self, processes: int) -> dict[str, Any]:
        """Train all runs, and return the losses and CPU seconds of each by seed and name."""
        seeds, setup = self.sizes.seeds, self.setup
        first = [planned for seed in seeds for planned in self._from_initial_weights(seed)]
        seconds = train_all(first, processes)
        seconds |= train_all([planned for seed in seeds for planned in self._branches(seed)], processes)
        names = [BASE, *map(label, self.sizes.ratios), RESERVOIR, JOINT, SCRATCH]
        return {
            str(seed): {
                name: {
                    "loss": setup.losses(seed, name),
                    "cpu_seconds": round(seconds[setup.run_name(seed, name)], 1),
                }
                for name in names
            }
            for seed in seeds
        }

    def _from_initial_weights(self, seed: int) -> list[Planned]:
        setup, steps = self.setup, (self.sizes.old_steps, self.sizes.new_steps)
        weights = dict(zip((OLD, NEW), steps, strict=True))
        both = [{"name": name, "path": setup.data(name), "weight": weight} for name, weight in weights.items()]
        joint = {"sources": both, "validation": {name: setup.data(name, "validation") for name in (OLD, NEW)}}
        return [
            setup.planned(seed, BASE, [setup.old_stage()]),
            setup.planned(seed, JOINT, [setup.stage("joint", sum(steps), joint)]),
            setup.planned(seed, SCRATCH, [setup.stage(NEW, steps[1], setup.of(NEW))]),
        ]

    def _branches(self, seed: int) -> list[Planned]:
        setup = self.setup
        new = setup.new_stage(seed, setup.of(NEW))
        replays: dict[str, Tree] = {
            label(ratio): {"ratio": ratio, "source": setup.data(OLD)} for ratio in self.sizes.ratios
        }
        replays[RESERVOIR] = {"ratio": SMALL_RATIO}
        begins_at = setup.checkpoint(seed, BASE, self.sizes.old_steps)
        return [
            setup.planned(seed, name, [setup.old_stage(), new | {"replay": replay}], begins_at)
            for name, replay in replays.items()
        ]


def summarize(seeds: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return, for each branch and control, the means over the seeds of its losses and of what they say."""
    rows = [_of_seed(runs) for runs in seeds.values()]
    return {name: {key: measures.mean(row[name][key] for row in rows) for key in rows[0][name]} for name in rows[0]}


def _of_seed(runs: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return the measures of each run of one seed."""
    before = runs[BASE]["loss"][OLD]
    without, joint = runs[label(0.0)]["loss"], runs[JOINT]["loss"]
    found: dict[str, dict[str, float | None]] = {}
    for name, run in runs.items():
        old, new = run["loss"].get(OLD), run["loss"].get(NEW)
        is_branch = name not in (BASE, JOINT, SCRATCH)
        found[name] = {
            "old": old,
            "new": new,
            "forgotten": old - before if is_branch else None,
            "forgetting_removed": measures.recovered_share(old - before, without[OLD] - before) if is_branch else None,
            "cost_on_new": measures.cost(new, without[NEW]),
            "mean_over_joint": None
            if old is None or new is None
            else measures.cost(fmean((old, new)), fmean((joint[OLD], joint[NEW]))),
        }
    return found


@dataclass(frozen=True)
class Bar:
    """One bar of the experiment: what is measured, the number, its limit, and True if it is met."""

    text: str
    value: float | None
    limit: float
    at_least: bool

    @property
    def is_met(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"bar": self.text, "value": self.value, "limit": self.limit, "is_met": self.is_met}


def bars(found: dict[str, dict[str, float | None]]) -> list[Bar]:
    """Return the bars that the experiment is held to on English prose."""
    limits: Sequence[tuple[float, float, float]] = ((0.05, 0.35, 0.01), (0.10, 0.55, 0.02), (0.25, 0.75, 0.04))
    result = []
    for ratio, removed, cost in limits:
        row = found[label(ratio)]
        result.append(Bar(f"replay of {label(ratio)} removes", row["forgetting_removed"], removed, True))
        result.append(Bar(f"replay of {label(ratio)} costs on the new domain", row["cost_on_new"], cost, False))
    result.append(Bar("mean loss at 25 % above joint training", found[label(0.25)]["mean_over_joint"], 0.08, False))
    small, whole = found[RESERVOIR]["forgetting_removed"], found[label(SMALL_RATIO)]["forgetting_removed"]
    share = None if small is None or not whole else small / whole
    result.append(Bar("reservoir of 1 % keeps of the effect at 10 %", share, 0.8, True))
    return result
