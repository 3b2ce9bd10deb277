"""Hook of AdaLoRA on one rank: frozen adapters are part of no choice, and the average has the ranks of the weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.config.adapter_targets import MARK
from engine.config.kept_moments import IMPORTANCE, UNCERTAINTY
from engine.config.parameter_patterns import matches
from engine.config.resolve import Layout
from engine.config.schema.regularization import EMA
from engine.models.families import family
from engine.models.initial import initial_value
from engine.parallel.state import ParameterShard
from engine.train.hooks import Update
from engine.train.rank_allocation import RankAllocation
from tests.engine.checkpoint.worlds import fake_groups
from tests.engine.models.tiny import tiny

MODEL = tiny("gpt2", num_layers=2, adapter={"method": "adalora", "rank": 2, "initial_rank": 4, "every_steps": 1})
SPECS = [spec for spec in family(MODEL).specs(MODEL) if MARK in spec.name]
STEPS = 8


class Shards:
    """The adapter's parameters, each whole, and constant gradients of those that are trained."""

    zero_stage, clip_norm, device = 0, 0.0, torch.device("cpu")
    gradient_edit = None

    def __init__(self, freeze: tuple[str, ...], moments: tuple[str, ...]) -> None:
        self.shards, self.gradients = [], {}
        for number, spec in enumerate(SPECS):
            drawn, size = torch.Generator().manual_seed(number), spec.local_numel(1)
            weight = initial_value(spec, MODEL, 0).flatten() + torch.rand(size, generator=drawn)
            held: dict[str, torch.Tensor] = {}
            if not matches(spec.name, freeze):
                held = {name: torch.zeros(size) if name != EMA else weight.clone() for name in moments}
                self.gradients[spec.name] = torch.rand(size, generator=drawn)
            self.shards.append(ParameterShard(spec, 0, weight, held))

    def parameter_shards(self) -> list[ParameterShard]:
        return self.shards

    def refresh(self, frozen: bool = True) -> None:
        assert not frozen, "the weights that the adapter leaves as they are were not written"


def trained(
    freeze: tuple[str, ...] = (), moments: tuple[str, ...] = (IMPORTANCE, UNCERTAINTY)
) -> tuple[Shards, RankAllocation, Any]:
    """Return the shards after the hook's steps of a run, the hook, and the last penalty."""
    engine, hook = Shards(freeze, moments), RankAllocation(MODEL.adapter)  # type: ignore[arg-type]
    run: Any = SimpleNamespace(
        config=SimpleNamespace(model=MODEL),
        run_stage=SimpleNamespace(freeze=freeze, num_steps=STEPS),
        pipeline=SimpleNamespace(engine=engine),
        groups=fake_groups(Layout(1, 1, 1, 1), 0),
    )
    record = {}
    for step in range(STEPS):
        run.state = SimpleNamespace(stage_step=step, updates=step)
        if step == 0:
            hook.begin_run_stage(run)
        hook.before_forward(run, [], torch.ones(1))
        held = [(shard.spec, 0, engine.gradients[shard.spec.name]) for shard in engine.shards if shard.moments]
        hook.before_update(run, Update(step, 0, 1.0, 1.0, 0.1, lambda held=held: iter(held)))
        run.state = SimpleNamespace(stage_step=step + 1, updates=step + 1)
        record = hook.after_step(run)
    return engine, hook, record["regularization/orthogonality"]


@pytest.mark.parametrize("freeze", [("layers.0.*",), ("layers.*.ffn.adapters.*",)])
def test_frozen_adapters_keep_their_elements_and_are_part_of_no_choice(freeze):
    engine, hook, penalty = trained(freeze)
    begun = Shards(freeze, ())
    ranked = [spec.name for spec in SPECS if spec.name.endswith("lora_E") and not matches(spec.name, freeze)]
    assert [*hook.kept] == ranked
    assert sum(map(sum, hook.kept.values())) == 2 * len(ranked)
    for shard, before in zip(engine.shards, begun.shards, strict=True):
        if matches(shard.spec.name, freeze):
            assert torch.equal(shard.weight, before.weight), shard.spec.name
    # the penalty is the mean over the matrices that are trained
    matrices = [shard for shard in begun.shards if "lora_E" not in shard.spec.name]
    norms = [distance(shard) for shard in matrices if not matches(shard.spec.name, freeze)]
    assert penalty == pytest.approx(0.5 * sum(norms) / len(norms), rel=1e-5)


def test_the_average_of_the_weights_has_the_ranks_that_were_chosen():
    engine, hook, _ = trained(moments=(IMPORTANCE, UNCERTAINTY, EMA))
    for shard in engine.shards:
        if (kept := hook.kept.get(shard.spec.name)) is not None:
            assert (shard.moments[EMA] != 0).tolist() == kept
        else:
            assert torch.equal(shard.moments[EMA], shard.weight), shard.spec.name
    assert sum(map(sum, hook.kept.values())) == 2 * len(hook.kept)


def distance(shard: ParameterShard) -> float:
    value = shard.weight.view(shard.spec.shape).double()
    product = value @ value.T if "lora_A" in shard.spec.name else value.T @ value
    return (product - torch.eye(len(product))).norm().item()
