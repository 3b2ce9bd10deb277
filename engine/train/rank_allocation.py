"""Hook of AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): the penalty on A and B, and the choice of E's elements.

The arithmetic is that of peft's `RankAllocator`, called after each update with the step's number from 0: an element's
sensitivity |w x gradient| takes the weight after the update and the gradient after clipping, both running means are
moments of the trained weights (`engine.config.kept_moments`), and a choice compares the scores of all matrices. What
was chosen is a section of the checkpoint, so that a run which was stopped goes on exactly. The penalty is added to the
gradient and not to the loss that is recorded.

Legend: R initial rank, I and O features in and out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from engine.config.adapter_targets import MARK
from engine.config.kept_moments import IMPORTANCE, UNCERTAINTY
from engine.config.parameter_patterns import matches
from engine.config.schema.adapter import AdaLoRAConfig
from engine.config.schema.regularization import EMA
from engine.models.families import family
from engine.parallel.boundary import Tensors
from engine.parallel.sharding import ParameterSpec
from engine.parallel.state import ParameterShard
from engine.parallel.whole_values import Values, part_of, whole_values
from engine.train.hooks import Hook, Run, Update
from engine.train.records import Record

_A, _B, _E = "lora_A.weight", "lora_B.weight", "lora_E"


class Schedule(NamedTuple):
    """Steps of a run of `total` steps: none is set to zero up to step `first`, none chosen anew after step `last`."""

    first: int
    last: int
    every: int

    def budget(self, step: int, initial: int, target: int) -> int:
        """Return the number of elements that a choice after this step leaves (Zhang et al. 2023, equation 12)."""
        left = 1 - (step - self.first) / (self.last - self.first)
        return int((initial - target) * left**3 + target)

    def chooses(self, step: int) -> bool:
        """Return True if elements are chosen after this step."""
        return step == self.last or (self.first < step < self.last and step % self.every == 0)


def schedule(config: AdaLoRAConfig, total: int) -> Schedule:
    """Return the schedule of a run of so many steps.

    The last choice comes after the last step at the latest and never after the first, so a run of one step has none.
    """
    last = max(1, min(total - 1, total - int(config.final_share * total)))
    return Schedule(min(int(config.warmup_share * total), last - 1), last, config.every_steps)


class RankAllocation(Hook):
    """Hook that adds the penalty's gradient, keeps the importance of elements, and sets the unimportant to zero."""

    section = "rank_allocation"

    def __init__(self, config: AdaLoRAConfig) -> None:
        self._config = config
        self.kept: dict[str, list[bool]] = {}
        """Which elements of each E the last choice left, by name; empty before the first one."""
        self._specs: list[ParameterSpec] = []
        self._gradients: dict[tuple[str, int], torch.Tensor] = {}
        self._updates = 0
        self._penalty = 0.0

    def begin_run_stage(self, run: Run) -> None:
        specs = family(run.config.model).specs(run.config.model)
        ours = [spec for spec in specs if MARK in spec.name and "lora_" in spec.name]
        # frozen adapters have no moments: they are part of no choice, keep their E, and no penalty moves them
        self._specs = [spec for spec in ours if not matches(spec.name, run.run_stage.freeze)]

    def before_forward(self, run: Run, inputs: list[Tensors], weights_L: torch.Tensor) -> None:
        """Give the engine the penalty's gradient, which it adds to the step's. Collective over the world."""
        specs = [spec for spec in self._specs if not spec.name.endswith(_E)]
        penalty, gradients = orthogonality(self._whole(run, specs, lambda shard: shard.weight), self._config)
        self._penalty, groups = penalty, run.groups

        def add(shard: ParameterShard, gradient: torch.Tensor) -> None:
            if shard.spec.name in gradients:
                gradient.add_(part_of(shard, gradients[shard.spec.name], groups).to(gradient.device, gradient.dtype))

        run.pipeline.engine.gradient_edit = add

    def before_update(self, run: Run, update: Update) -> bool:
        """Keep the gradients of the adapter as the update will see them."""
        clip = run.pipeline.engine.clip_norm
        factor = min(1.0, clip / (update.gradient_norm + 1e-6)) if clip > 0 else 1.0
        names = {spec.name for spec in self._specs}
        self._gradients = {
            (spec.name, start): gradient.float() * factor
            for spec, start, gradient in update.gradients()
            if spec.name in names
        }
        self._updates = run.state.updates
        return True

    @torch.no_grad()
    def after_step(self, run: Run) -> Record:
        """Update the importance of elements, and set elements to zero where that is due. Collective over the world."""
        step, plan = run.state.stage_step - 1, schedule(self._config, run.run_stage.num_steps)
        if step < plan.last and run.state.updates > self._updates:
            self._observe(run)
        self._gradients = {}
        if plan.chooses(step):
            self._choose(run, plan, step)
        if step >= plan.last or plan.chooses(step):
            self._mask(run)
        return {"regularization/orthogonality": self._penalty}

    def _observe(self, run: Run) -> None:
        """Move both running means of each element (Zhang et al. 2023, equations 9 and 10)."""
        for shard in run.pipeline.engine.parameter_shards():
            gradient = self._gradients.get((shard.spec.name, shard.start))
            if gradient is None:
                continue
            sensitivity = (shard.weight * gradient.to(shard.weight.device).view(-1)).abs()
            mean, deviation, stays = shard.moments[IMPORTANCE], shard.moments[UNCERTAINTY], self._config.smoothing
            mean.mul_(stays).add_((1 - stays) * sensitivity)
            deviation.mul_(stays).add_((1 - stays) * (sensitivity - mean).abs())

    def _choose(self, run: Run, plan: Schedule, step: int) -> None:
        """Choose the elements of all matrices that have the highest scores. Collective over the world."""
        scores = self._whole(run, self._specs, lambda shard: shard.moments[IMPORTANCE] * shard.moments[UNCERTAINTY])
        names = [spec.name.removesuffix(_E) for spec in self._specs if spec.name.endswith(_E)]
        initial = len(names) * self._config.initial_rank
        budget = plan.budget(step, initial, len(names) * self._config.rank)
        self.kept = chosen(scores, names, initial - budget)

    def _mask(self, run: Run) -> None:
        """Set the elements that were not chosen to zero, in the average of the weights, too, which is exported at a
        rank that is as low. Collective over the world."""
        for shard in run.pipeline.engine.parameter_shards():
            if (kept := self.kept.get(shard.spec.name)) is not None:
                mask = torch.tensor(kept[shard.start : shard.start + shard.length], device=shard.weight.device)
                for values in (shard.weight, shard.moments.get(EMA)):
                    if values is not None:
                        values.masked_fill_(~mask, 0.0)
        run.pipeline.engine.refresh(frozen=False)

    def _whole(self, run: Run, specs: Sequence[ParameterSpec], value: Any) -> Values:
        engine = run.pipeline.engine
        return whole_values(specs, engine.parameter_shards(), value, run.groups, engine.zero_stage, engine.device)

    def state(self) -> dict[str, Any]:
        return {"kept": self.kept}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.kept = dict(state["kept"])


@torch.no_grad()
def orthogonality(whole: Values, config: AdaLoRAConfig) -> tuple[float, Values]:
    """Return the penalty (Zhang et al. 2023, equation 4, but norms and their mean, as in peft) and its gradients."""
    penalty, gradients = 0.0, {}
    for name, value in whole.items():
        rows_RI = value if name.endswith(_A) else value.T  # of B: (R, O)
        distance_RR = rows_RI @ rows_RI.T - torch.eye(len(rows_RI), device=value.device)
        norm = torch.linalg.matrix_norm(distance_RR)
        penalty += config.orthogonality * norm.item() / len(whole)
        # d |M - I| / d A with M = A A': 2 (M - I) A / |M - I|, since M is symmetric; at the minimum there is no pull
        pull_RI = distance_RR @ rows_RI * (2 * config.orthogonality / len(whole) / norm.clamp(min=1e-30))
        gradients[name] = pull_RI if name.endswith(_A) else pull_RI.T
    return penalty, gradients


def chosen(scores: Values, names: Sequence[str], num_dropped: int) -> dict[str, list[bool]]:
    """Return which elements of each E stay: those with a score above the `num_dropped`-th lowest of all matrices.

    The score of an element is its own, and the means of those of its row of A and of its column of B (Zhang et al.
    2023, equation 11). `names` are those of the adapters, with a dot at the end.
    """
    triplets = {
        f"{name}{_E}": scores[f"{name}{_E}"].view(-1) + scores[f"{name}{_A}"].mean(1) + scores[f"{name}{_B}"].mean(0)
        for name in names
    }
    if num_dropped <= 0:
        return {name: [True] * len(score_R) for name, score_R in triplets.items()}
    threshold = torch.cat(list(triplets.values())).kthvalue(num_dropped).values
    return {name: (score_R > threshold).tolist() for name, score_R in triplets.items()}
