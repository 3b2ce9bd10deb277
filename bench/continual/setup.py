"""Run files that the experiments share: their model, their stages, and the losses at the end of a run.

A run learns the old domain; branches of it then learn the new one, all from the same checkpoint, with the schedule that
`palimpsest continue` chooses for them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.continual.corpora import NEW, OLD
from bench.continual.runs import Planned, Tree
from engine.checkpoint.folder import CHECKPOINTS, step_path
from engine.config.load import load_run, parse_run
from engine.config.save import FILE
from engine.train.continuation import choose_schedule
from engine.train.ledger_records import read_ledger

SPAN_TOKENS = 128
BASE = "old domain"
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
    evaluated_samples: int | None = 256
    """Samples of each validation set at most. None means all."""
    seeds: tuple[int, ...] = (1, 2)
    ratios: tuple[float, ...] = (0.0, 0.05, 0.10, 0.25)

    def scaled(self, factor: float) -> Sizes:
        """Return the same with fewer steps."""
        steps = {name: max(2, round(getattr(self, name) * factor)) for name in ("old_steps", "new_steps")}
        return replace(self, **steps)


def label(ratio: float) -> str:
    """Return the name of the branch with a replay ratio."""
    return f"{ratio:.0%}".replace("%", " %")


class Setup:
    """Run files over data that `corpora.write` has written into `folder`."""

    def __init__(self, folder: Path, sizes: Sizes, reservoir_rows: int) -> None:
        """Keep the sizes. `reservoir_rows` are the rows that the reservoir of each run holds."""
        self.folder, self.sizes, self.reservoir_rows = folder, sizes, reservoir_rows

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.sizes.batch * self.sizes.length

    def data(self, domain: str, half: str = "train") -> str:
        """Return the folder of a domain's training or held-out half."""
        return str(self.folder / domain / half)

    def of(self, *domains: str) -> Tree:
        """Return the data section of a stage that trains on the last domain and is evaluated on all."""
        held_out = {domain: self.data(domain, "validation") for domain in domains}
        return {"train": self.data(domains[-1]), "validation": held_out}

    def old_stage(self) -> Tree:
        """Return the stage that learns the old domain."""
        return self.stage(OLD, self.sizes.old_steps, self.of(OLD))

    def new_stage(self, seed: int, data: Tree) -> Tree:
        """Return the stage that follows on it, with the schedule that `palimpsest continue` chooses."""
        config = parse_run(self.tree(seed, BASE, [self.old_stage()]), BASE)
        rate, tokens = FINAL_FACTOR * PEAK_RATE, self.sizes.new_steps * self.step_tokens
        chosen = choose_schedule(config.optimizer, config.stages[-1], rate, tokens, self.step_tokens).schedule
        return self.stage(NEW, self.sizes.new_steps, data) | {"schedule": chosen}

    def stage(self, name: str, steps: int, data: Tree) -> Tree:
        """Return a stage with a cosine schedule."""
        return {
            "name": name,
            "data": data | {"window_shards": 16},
            "objective": self.sizes.objective,
            "sequence_length": self.sizes.length,
            "global_batch_size": self.sizes.batch,
            "duration": {"steps": steps},
            "schedule": {"shape": "cosine", "warmup": max(1, steps // 20), "final_factor": FINAL_FACTOR},
        }

    def planned(self, seed: int, name: str, stages: list[Tree], begins_at: Path | None = None) -> Planned:
        """Return a run of some stages."""
        return Planned(self.run_name(seed, name), self.tree(seed, name, stages), begins_at)

    def tree(self, seed: int, name: str, stages: list[Tree]) -> Tree:
        """Return the run file of a run."""
        return {
            "name": self.run_name(seed, name),
            "folder": str(self.run_folder(seed, name)),
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

    def run_name(self, seed: int, name: str) -> str:
        """Return the name of a run, different for each seed."""
        return f"seed {seed}, {name}"

    def run_folder(self, seed: int, name: str) -> Path:
        """Return the folder of a run."""
        named = self.run_name(seed, name).replace(" ", "-").replace("%", "percent").replace(",", "")
        return self.folder / "runs" / named

    def checkpoint(self, seed: int, name: str, step: int) -> Path:
        """Return the checkpoint of a run at a step."""
        return step_path(self.run_folder(seed, name) / CHECKPOINTS, step)

    def losses(self, seed: int, name: str) -> Losses:
        """Return the losses of all domains at a run's end."""
        folder = self.run_folder(seed, name)
        matrix = read_ledger(folder, load_run(folder / FILE)).matrix
        found = dict(zip(matrix.domains, matrix.losses[matrix.last], strict=True))
        return {domain: loss for domain, loss in found.items() if loss is not None}
