"""Every method against forgetting beside plain continuation and replay, from one checkpoint of the old domain.

All branches learn the new domain for as many steps, in the order and with the schedule of plain continuation; one has a
constant rate, and WSM merges its checkpoints. Strengths are guesses of a user who has not searched for the best ones,
two per method, so that one sees which way it goes. One seed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.continual.corpora import NEW, OLD
from bench.continual.runs import Planned, Tree, train_all
from bench.continual.setup import BASE, PEAK_RATE, Losses, Setup, Sizes
from engine.checkpoint.folder import CHECKPOINTS
from engine.checkpoint.merge import Sources, merge, wsm_coefficients
from engine.config.schema.regularization import EMA
from engine.data.shards.dataset import TokenDataset
from engine.serve.held_out import held_out_loss
from engine.train import ledger as measures
from engine.train.records import VALIDATION_LOSS, metric_of

PLAIN, REPLAY, CONSTANT = "plain continuation", "replay 10 %", "constant rate"
NUM_SAVED, NUM_MERGED = 10, 5
"""Checkpoints that the branch at a constant rate saves, and how many of them, the last ones, WSM merges."""


@dataclass(frozen=True)
class Method:
    """A branch: keys of its second stage, and of its run."""

    name: str
    stage: Tree
    run: Tree = field(default_factory=dict)
    is_averaged: bool = False
    """True if the losses are those of the moving average of the weights."""


@dataclass(frozen=True)
class Merge:
    """A merge of checkpoints of `base` and of a branch, which costs no training."""

    name: str
    branch: str
    steps: tuple[int, ...]
    """Steps of the merged checkpoints; up to the end of the old domain they are those of `base`."""
    weights: tuple[float, ...]


def methods(setup: Setup) -> list[Method]:
    """Return the branches; plain continuation is the first."""
    layers = [f"layers.{number}.*" for number in range(setup.sizes.model["num_layers"])]
    replay: Tree = {"replay": {"ratio": 0.10, "source": setup.data(OLD)}}
    reptile: Tree = {"reptile": {"every_steps": 10, "step_size": 0.5}}
    batches = {"batches": min(32, setup.sizes.old_steps)}
    every_steps = max(1, setup.sizes.new_steps // NUM_SAVED)
    constant = {"schedule": {"shape": "constant", "learning_rate": PEAK_RATE}}
    saved = {"checkpoint": {"every_steps": every_steps, "keep_last": 2 * NUM_SAVED}}
    return [
        Method(PLAIN, {}),
        Method(REPLAY, replay),
        Method("freeze embeddings and first layer", {"freeze": ["embed_*", *layers[:1]]}),
        Method("freeze all but the last layer", {"freeze": ["embed_*", *layers[:-1]]}),
        *(_penalty("L2-SP", "l2_sp", {}, strength) for strength in (0.003, 0.03)),
        *(_penalty("EWC", "ewc", batches, strength) for strength in (100.0, 1000.0)),
        *(_penalty("distillation", "distillation", {"top_k": 64}, strength) for strength in (0.3, 1.0)),
        *(Method(f"EMA {decay:g}", {"ema": {"decay": decay}}, is_averaged=True) for decay in (0.99, 0.998)),
        Method("Reptile", reptile),
        Method("Reptile and replay 10 %", reptile | replay),
        Method(CONSTANT, constant, saved),
    ]


def _penalty(name: str, key: str, options: Tree, strength: float) -> Method:
    return Method(f"{name} {strength:g}", {"regularization": {key: options | {"strength": strength}}})


def merges(sizes: Sizes) -> list[Merge]:
    """Return the merges: of the old and the new weights, and of checkpoints at a constant rate by WSM."""
    old, end = sizes.old_steps, sizes.old_steps + sizes.new_steps
    saved = [
        step for step in range(old + 1, end + 1) if step % max(1, sizes.new_steps // NUM_SAVED) == 0 or step == end
    ]
    steps = tuple(saved[-NUM_MERGED:])
    return [
        Merge("merge, half old", PLAIN, (old, end), (0.5, 0.5)),
        Merge("merge, a quarter old", PLAIN, (old, end), (0.25, 0.75)),
        Merge("constant rate, WSM", CONSTANT, steps, tuple(wsm_coefficients(steps, "1-sqrt"))),
    ]


class Comparison:
    """Branches of one seed and what is merged from them, over data that `corpora.write` has written into `folder`."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        [self.seed] = sizes.seeds
        self.sizes = sizes
        self.setup = Setup(folder, sizes, reservoir_rows=1)

    def measure(self, processes: int) -> dict[str, dict[str, Any]]:
        """Train all branches, and return the losses and CPU seconds of each and of the merges by name."""
        setup, branches = self.setup, methods(self.setup)
        base = setup.planned(self.seed, BASE, [setup.old_stage()])
        seconds = train_all([base], 1) | train_all([self._planned(method) for method in branches], processes)
        found = {BASE: (setup.losses(self.seed, BASE), seconds[base.name])}
        for method in branches:
            losses = self._averaged(method) if method.is_averaged else setup.losses(self.seed, method.name)
            found[method.name] = losses, seconds[setup.run_name(self.seed, method.name)]
        for one in merges(self.sizes):
            losses, used = self._merged(one)
            found[one.name] = losses, used + found[one.branch][1]
        return {name: {"loss": losses, "cpu_seconds": round(used, 1)} for name, (losses, used) in found.items()}

    def _planned(self, method: Method) -> Planned:
        setup = self.setup
        # Both sets are the stage's own: the average is evaluated on those alone.
        new = setup.new_stage(self.seed, setup.of(OLD, NEW)) | method.stage
        planned = setup.planned(
            self.seed,
            method.name,
            [setup.old_stage(), new],
            setup.checkpoint(self.seed, BASE, self.sizes.old_steps),
        )
        return Planned(planned.name, planned.tree | method.run, planned.begins_at)

    def _averaged(self, method: Method) -> Losses:
        folder = self.setup.run_folder(self.seed, method.name)
        end = self.sizes.old_steps + self.sizes.new_steps
        return {domain: metric_of(folder, [end], f"{EMA}_{VALIDATION_LOSS}/{domain}")[end] for domain in (OLD, NEW)}

    def _merged(self, one: Merge) -> tuple[Losses, float]:
        """Write a merge; return its losses and the CPU seconds that writing it took."""
        begin = time.process_time()
        paths = [
            self.setup.checkpoint(self.seed, BASE if step <= self.sizes.old_steps else one.branch, step)
            for step in one.steps
        ]
        folder = self.setup.run_folder(self.seed, one.name) / CHECKPOINTS
        path = merge(Sources(paths), one.weights, folder)
        used = time.process_time() - begin
        held_out = {domain: TokenDataset(Path(self.setup.data(domain, "validation"))) for domain in (OLD, NEW)}
        return {domain: held_out_loss(path, dataset) for domain, dataset in held_out.items()}, used


def compare(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Return the measures of each branch: losses, forgetting, cost on the new domain, CPU time over plain."""
    before, plain = runs[BASE]["loss"][OLD], runs[PLAIN]
    found: dict[str, dict[str, float | None]] = {BASE: {"old": before}}
    for name, run in runs.items():
        if name == BASE:
            continue
        old, new = run["loss"][OLD], run["loss"][NEW]
        found[name] = {
            "old": old,
            "new": new,
            "forgotten": old - before,
            "forgetting_removed": measures.recovered_share(old - before, plain["loss"][OLD] - before),
            "cost_on_new": measures.cost(new, plain["loss"][NEW]),
            "mean": fmean((old, new)),
            "cpu_seconds": run["cpu_seconds"],
            "cpu_over_plain": run["cpu_seconds"] / plain["cpu_seconds"],
        }
    return found


def verdicts(found: dict[str, dict[str, float | None]]) -> dict[str, str]:
    """Return a judgement of each method beside plain continuation and beside replay, from the losses alone."""
    plain, replay = found[PLAIN], found[REPLAY]
    return {
        name: f"{_beside(row, plain, 'plain continuation')}; {_beside(row, replay, 'replay')}"
        for name, row in found.items()
        if name not in (BASE, PLAIN, REPLAY)
    }


def _beside(row: dict[str, float | None], other: dict[str, float | None], name: str) -> str:
    forgets = "less" if _number(row["old"]) < _number(other["old"]) else "more"
    learns = "more" if _number(row["new"]) < _number(other["new"]) else "less"
    return f"forgets {forgets} and learns {learns} than {name}"


def _number(value: float | None) -> float:
    assert value is not None, "every branch is evaluated on both domains"
    return value
