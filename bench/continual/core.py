"""The core experiment: how much forgetting replay removes, and what that costs on the new domain.

For each seed a run learns the old domain. Branches of it then learn the new one for a fixed number of steps, with
different shares of replay, from the whole old data or from a reservoir of 1 % of it. Beside them stand two controls
that begin at initial weights: joint training on both domains, on the tokens that the sequence without replay sees, and
the new domain alone. All stages of a sequence have the schedule that `palimpsest continue` chooses for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.continual.corpora import NEW, OLD
from bench.continual.runs import Planned, Tree, train_all
from engine.config.load import load_run, parse_run
from engine.config.save import FILE
from engine.train import ledger as measures
from engine.train.continuation import choose_schedule
from engine.train.ledger_records import read_ledger

SEEDS = (1, 2)
RATIOS = (0.0, 0.05, 0.10, 0.25)
SMALL_BUFFER, SMALL_RATIO = 0.01, 0.10
"""Share of the old data that the reservoir keeps, and the ratio at which it is compared with the whole data."""
SPAN_TOKENS = 128
BASE, JOINT, SCRATCH, RESERVOIR = "old domain", "joint", "new domain alone", "10 %, reservoir of 1 %"
PEAK_RATE, FINAL_FACTOR = 4e-3, 0.1
GPT: Tree = {"vocab_size": 260, "num_layers": 3, "hidden_size": 128, "num_heads": 4, "max_positions": 128}
"""0.63 million parameters."""
BERT: Tree = GPT | {"family": "bert", "vocab_size": 263, "token_types": 1}
Losses = dict[str, float]
"""Validation loss at a run's end, in nats per token, of each domain."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of an experiment; what is measured by default is described in the guide of the results."""

    model: Tree = field(default_factory=lambda: GPT)
    objective: str = "causal"
    old_steps: int = 400
    new_steps: int = 250
    length: int = 128
    batch: int = 16
    evaluated_samples: int = 256
    """Samples of each validation set at most."""
    seeds: tuple[int, ...] = SEEDS
    ratios: tuple[float, ...] = RATIOS

    def scaled(self, factor: float) -> Sizes:
        """Return the same with fewer steps."""
        steps = {name: max(2, round(getattr(self, name) * factor)) for name in ("old_steps", "new_steps")}
        return replace(self, **steps)


def label(ratio: float) -> str:
    """Return the name of the branch with a replay ratio."""
    return f"{ratio:.0%}".replace("%", " %")


class Experiment:
    """Runs of one experiment, over data that `corpora.write` has written into `folder`."""

    def __init__(self, folder: Path, sizes: Sizes, old_tokens: int) -> None:
        self.folder, self.sizes = folder, sizes
        self.reservoir_rows = max(1, round(SMALL_BUFFER * old_tokens / SPAN_TOKENS))

    def measure(self, processes: int) -> dict[str, Any]:
        """Train all runs, and return the losses and CPU seconds of each by seed and name."""
        seeds = self.sizes.seeds
        first = [planned for seed in seeds for planned in self._from_initial_weights(seed)]
        seconds = train_all(first, processes)
        seconds |= train_all([planned for seed in seeds for planned in self._branches(seed)], processes)
        names = [BASE, *map(label, self.sizes.ratios), RESERVOIR, JOINT, SCRATCH]
        return {
            str(seed): {
                name: {"loss": self._losses(seed, name), "cpu_seconds": round(seconds[self._run(seed, name)], 1)}
                for name in names
            }
            for seed in seeds
        }

    def _from_initial_weights(self, seed: int) -> list[Planned]:
        steps = self.sizes.old_steps, self.sizes.new_steps
        weights = dict(zip((OLD, NEW), steps, strict=True))
        both = [{"name": name, "path": self._data(name), "weight": weight} for name, weight in weights.items()]
        joint = {"sources": both, "validation": {name: self._data(name, "validation") for name in (OLD, NEW)}}
        return [
            self._planned(seed, BASE, [self._old()]),
            self._planned(seed, JOINT, [self._stage("joint", sum(steps), joint)]),
            self._planned(seed, SCRATCH, [self._stage(NEW, steps[1], self._of(NEW))]),
        ]

    def _branches(self, seed: int) -> list[Planned]:
        base = self._tree(seed, BASE, [self._old()])
        checkpoint = Path(base["folder"]) / "checkpoints" / f"step-{self.sizes.old_steps:08d}"
        config = parse_run(base, BASE)
        new_tokens = self.sizes.new_steps * self._step_tokens
        rate = FINAL_FACTOR * PEAK_RATE
        chosen = choose_schedule(config.optimizer, config.stages[-1], rate, new_tokens, self._step_tokens).schedule
        new = self._stage(NEW, self.sizes.new_steps, self._of(NEW)) | {"schedule": chosen}
        replays: dict[str, Tree] = {
            label(ratio): {"ratio": ratio, "source": self._data(OLD)} for ratio in self.sizes.ratios
        }
        replays[RESERVOIR] = {"ratio": SMALL_RATIO}
        return [
            self._planned(seed, name, [self._old(), new | {"replay": replay}], checkpoint)
            for name, replay in replays.items()
        ]

    @property
    def _step_tokens(self) -> int:
        return self.sizes.batch * self.sizes.length

    def _data(self, domain: str, half: str = "train") -> str:
        return str(self.folder / domain / half)

    def _of(self, domain: str) -> Tree:
        return {"train": self._data(domain), "validation": {domain: self._data(domain, "validation")}}

    def _old(self) -> Tree:
        return self._stage(OLD, self.sizes.old_steps, self._of(OLD))

    def _stage(self, name: str, steps: int, data: Tree) -> Tree:
        return {
            "name": name,
            "data": data | {"window_shards": 16},
            "objective": self.sizes.objective,
            "sequence_length": self.sizes.length,
            "global_batch_size": self.sizes.batch,
            "duration": {"steps": steps},
            "schedule": {"shape": "cosine", "warmup": max(1, steps // 20), "final_factor": FINAL_FACTOR},
        }

    def _run(self, seed: int, name: str) -> str:
        return f"seed {seed}, {name}"

    def _folder(self, seed: int, name: str) -> Path:
        return self.folder / "runs" / self._run(seed, name).replace(" ", "-").replace("%", "percent").replace(",", "")

    def _planned(self, seed: int, name: str, stages: list[Tree], begins_at: Path | None = None) -> Planned:
        return Planned(self._run(seed, name), self._tree(seed, name, stages), begins_at)

    def _tree(self, seed: int, name: str, stages: list[Tree]) -> Tree:
        return {
            "name": self._run(seed, name),
            "folder": str(self._folder(seed, name)),
            "seed": seed,
            "tokenizer": str(self.folder / "tokenizer"),
            "model": self.sizes.model,
            "stages": stages,
            "optimizer": {"learning_rate": PEAK_RATE},
            "precision": {"dtype": "fp32"},
            "parallel": {"micro_batch_size": self.sizes.batch},
            "evaluation": {"max_samples": self.sizes.evaluated_samples},
            "checkpoint": {"keep_last": 1},
            "reservoir": {"rows": self.reservoir_rows, "span_tokens": SPAN_TOKENS},
            "logging": {"every_steps": 10, "tensorboard": False, "wandb": "off", "plot": False},
        }

    def _losses(self, seed: int, name: str) -> Losses:
        folder = self._folder(seed, name)
        matrix = read_ledger(folder, load_run(folder / FILE)).matrix
        found = dict(zip(matrix.domains, matrix.losses[matrix.last], strict=True))
        return {domain: loss for domain, loss in found.items() if loss is not None}


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
