"""A pipeline of one parameter, so that `Trainer` runs whole in this process, in milliseconds and without ranks.

Everything else of a run is the real thing: data, stream, feed, guard, metrics, checkpoints on the disk, restart. What a
model, a layout or DeepSpeed computes is not shown here; tests/distributed does that.

Legend: B batch, T tokens of a row, W elements of the parameter, L losses (one).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.nn import functional as F

from engine.checkpoint.fingerprint import fingerprint
from engine.config.rank_environment import RankEnvironment
from engine.config.resolve import Layout
from engine.errors import PalimpsestError
from engine.heartbeat import Heartbeat
from engine.parallel.boundary import DOMAINS, Tensors
from engine.parallel.groups import Groups
from engine.parallel.pipeline import DomainSums
from engine.parallel.sharding import ParameterSpec
from engine.parallel.state import MOMENTS, ParameterGroup, ParameterShard, Placement
from engine.parallel.zero.penalties import Penalty, add_penalties
from engine.parallel.zero.step import StepResult, accept_finite
from engine.train.metrics import read_metrics
from engine.train.signals import StopSignals
from engine.train.state import TrainState
from engine.train.trainer import Trainer
from tests.distributed.runs import Tree, run_config
from tests.engine.checkpoint.worlds import fake_groups

WIDTH = 4
COMPARED = ("loss", "gradient_norm", "learning_rate", "samples", "tokens", "validation_loss")
"""Metrics that two runs are compared by."""


class FakeEngine:
    """The part of `StageEngine` that a run calls, over one parameter that SGD with momentum updates."""

    zero_stage = 0
    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self) -> None:
        spec = ParameterSpec("weight", (WIDTH,))
        self.parameter_groups = [ParameterGroup((spec,), weight_decay=0.0, replicated=True)]
        self.spec = spec
        self.weight_W = torch.zeros(WIDTH)
        self.moments = {name: torch.zeros(WIDTH) for name in MOMENTS}
        self.gradient_W: torch.Tensor | None = None
        self.added_moments: dict[str, bool] = {}
        self.penalties: tuple[Penalty, ...] = ()
        self.updates = 0
        """Updates that `set_updates` told of, and those since."""

    def step(self, learning_rate: float, accept: Callable[[float], bool] = accept_finite) -> StepResult:
        """Update the weight unless `accept(norm)` is False, and drop the gradient."""
        assert self.gradient_W is not None, "a step follows a backward pass"
        held = [(shard, self.gradient_W, True) for shard in self.parameter_shards()]
        values = add_penalties(self.penalties, held, self.device)
        norm = self.gradient_W.norm().item()
        accepted = accept(norm)
        if accepted:
            momentum_W = self.moments["exp_avg"].mul_(0.5).add_(self.gradient_W)
            self.weight_W.sub_(learning_rate * momentum_W)
            self.updates += 1
        self.gradient_W = None
        names = [penalty.name for penalty in self.penalties]
        return StepResult(accepted, norm, dict(zip(names, values.tolist(), strict=True)))

    def gradient_shards(self) -> Iterator[tuple[ParameterSpec, int, torch.Tensor]]:
        """Yield the parameter, its first element and its gradient, for what `accept` looks at."""
        assert self.gradient_W is not None
        yield self.spec, 0, self.gradient_W

    def add_moment(self, name: str, begins_at_zero: bool) -> None:
        """Keep another value per element, which checkpoints hold."""
        self.moments[name] = torch.zeros(WIDTH)
        self.added_moments[name] = begins_at_zero

    def keep_moments(self, names: Mapping[str, bool]) -> bool:
        """Keep these moments beside the optimizer's and no others; return True if that changed any."""
        changed = names.keys() != self.added_moments.keys()
        for name in self.added_moments.keys() - names.keys():
            del self.moments[name], self.added_moments[name]
        for name in names.keys() - self.added_moments.keys():
            self.add_moment(name, names[name])
        return changed

    @property
    def zero_moments(self) -> frozenset[str]:
        """Added moments that a checkpoint may lack."""
        return frozenset(name for name, begins_at_zero in self.added_moments.items() if begins_at_zero)

    def parameter_shards(self) -> list[ParameterShard]:
        """Return live views of the weight and its moments."""
        return [ParameterShard(self.spec, 0, self.weight_W, self.moments)]

    def placements(self) -> list[Placement]:
        """Return where the parameter lies: whole on the only rank."""
        return [Placement(self.spec, (0,), 0, WIDTH, tuple(self.moments))]

    def working_weights(self) -> Iterator[tuple[ParameterSpec, torch.Tensor]]:
        """Yield the weight, which is its own master."""
        yield self.spec, self.weight_W

    def uncleared_gradients(self) -> list[str]:
        """Return the parameter's name if its gradient outlived a step."""
        return [self.spec.name] if self.gradient_W is not None else []

    def refresh(self, frozen: bool = True) -> None:
        """Do nothing: the working weight is the master weight."""

    def begin_run_stage(self, number: int) -> None:
        """Do nothing: there are no factors of the learning rate."""

    def reset_moments(self) -> None:
        """Set the optimizer's moments to zero."""
        for name in MOMENTS:
            self.moments[name].zero_()
        self.updates = 0

    def set_updates(self, count: int, before: Sequence[int] = ()) -> None:
        """Take over the number of updates, and how many came before each run stage."""
        self.updates = count


class FakePipeline:
    """The part of `Pipeline` that a run calls. A row of weight m costs m * (f @ w - 1)^2, where the features f are the
    shares of its tokens that are 0, 1, 2 and 3 modulo 4: so losses fall, and depend on which samples a step has."""

    def __init__(self) -> None:
        self.engine = FakeEngine()

    def train(
        self, inputs: list[Tensors], loss_scales_L: torch.Tensor, by_domain: DomainSums | None = None
    ) -> torch.Tensor:
        """Forward and backward of one step; return the summed losses (L,)."""
        weight_W = self.engine.weight_W.clone().requires_grad_(True)
        total_L = self._losses(weight_W, inputs, by_domain)
        (total_L * loss_scales_L).sum().backward()
        self.engine.gradient_W = weight_W.grad
        return total_L.detach()

    @torch.no_grad()
    def evaluate(self, inputs: list[Tensors], by_domain: DomainSums | None = None) -> torch.Tensor:
        """Forward only; return the summed losses (L,)."""
        return self._losses(self.engine.weight_W, inputs, by_domain)

    def _losses(self, weight_W: torch.Tensor, inputs: list[Tensors], by_domain: DomainSums | None) -> torch.Tensor:
        total_L = torch.zeros(1)
        for given in inputs:
            features_BW = F.one_hot(given["tokens_BT"].long() % WIDTH, WIDTH).float().mean(dim=1)
            loss_B = given["weights_BT"].float().sum(dim=1) * (features_BW @ weight_W - 1) ** 2
            if by_domain is not None:
                by_domain.add(given[DOMAINS], loss_B.detach()[:, None])
            total_L = total_L + loss_B.sum()
        return total_L


@contextlib.contextmanager
def fake_trainer(tree: Tree, job: str = "job", attempt: int = 0, signals: Any = None) -> Iterator[Trainer]:
    """Yield the trainer of a run of this tree on one rank, over a `FakePipeline`; close it afterwards.

    `signals` stands for `StopSignals` where a test wants a stop.
    """
    config = run_config(tree)
    groups: Groups = fake_groups(Layout(1, 1, 1, 1), 0)
    environment = RankEnvironment(job=job, attempt=attempt)
    with patch("engine.train.current_run_stage.build_pipeline", lambda *_: FakePipeline()):
        trainer = Trainer(config, groups, environment, FakeEngine.device, signals or StopSignals(), Heartbeat(None, 0))
    try:
        yield trainer
    finally:
        trainer.close()


@dataclass(frozen=True)
class FakeRun:
    """How a run over a `FakePipeline` went: exit code, first step, fingerprints of its tensors, last state."""

    code: int
    started_at: int
    at_start: str
    at_end: str
    state: TrainState


def fake_run(tree: Tree, prepare: Callable[[Any], None] = lambda trainer: None, **environment: Any) -> FakeRun:
    """Start a run of this tree and train until it ends, as `tests.distributed.runs.train_rank` does on real ranks.

    `prepare` is handed the trainer before its first step; `environment` as in `fake_trainer`.
    """
    with fake_trainer(tree, **environment) as trainer:
        engine = trainer.pipeline.engine

        def held() -> str:
            return fingerprint(engine.parameter_shards(), engine.placements(), trainer.groups)

        started_at, at_start = trainer.state.step, held()
        prepare(trainer)
        try:
            code = trainer.fit()
        except PalimpsestError:
            trainer.checkpoints.settle()  # as `train` does
            raise
        return FakeRun(code, started_at, at_start, held(), trainer.state)


def values(folder: Path, key: str) -> dict[int, Any]:
    """Return one metric of a run folder by step; a step that stands twice is an error."""
    records = [record for record in read_metrics(folder) if key in record]
    assert len({record["step"] for record in records}) == len(records), f"{key} of a step stands twice"
    return {record["step"]: record[key] for record in records}


class StopAfter:
    """Signals of a rank that is to stop once it has done `step` steps, and has come to `phase` if one is given."""

    def __init__(self, step: int, phase: str | None = None) -> None:
        self.step, self.phase, self.stop_requested = step, phase, False

    def prepare(self, trainer: Any) -> None:
        """Watch the trainer's beats, which say where it is."""
        beat = trainer.heart.beat

        def watch(step: int, phase: str) -> None:
            beat(step, phase)
            self.stop_requested |= step >= self.step and self.phase in (None, phase)

        trainer.heart.beat = watch


def stopped_run(tree: dict[str, Any], step: int, phase: str | None = None) -> FakeRun:
    """Start a run and stop it after so many steps."""
    signals = StopAfter(step, phase)
    return fake_run(tree, signals.prepare, signals=signals)


def record_samples(found: dict[int, list[Any]]) -> Any:
    """Return a `prepare` that notes the samples of each step by its number."""

    def prepare(trainer: Any) -> None:
        step = type(trainer)._step

        def noted() -> bool:
            stream, number = trainer.feed.stream, trainer.state.step
            ids = stream.next_sample_ids(stream.batch_size)
            stop = step(trainer)
            if trainer.state.step > number:
                found[number] = ids
            return stop

        trainer._step = noted

    return prepare


def check_equal(folder: Path, other: Path) -> None:
    """Assert that two runs wrote the same numbers of the same steps."""
    for key in COMPARED:
        assert values(folder, key) == values(other, key)


def spike(trainer: Any, at: tuple[int, ...]) -> None:
    """Multiply the gradient of the first attempt at these steps (from 0) by 1e6."""
    train, left = trainer.pipeline.train, set(at)

    def spiking(inputs: Any, scale: Any, by_domain: Any = None) -> Any:
        factor = 1e6 if trainer.state.step in left else 1.0
        left.discard(trainer.state.step)
        return train(inputs, scale * factor, by_domain)

    trainer.pipeline.train = spiking
