"""Runs in which a later stage freezes parameters are the same run in every layout, stopped inside and at the border.

Gradients of one stage that freezes, and their bytes, are held to plain torch and to the plan in `test_frozen` and
tests/engine/plan/test_measured_traffic.py. Here the set of trained parameters changes: stage `first` trains all,
`second` freezes some, `third` trains part of these again, whose moments then begin at zero.
"""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.folder import step_path
from engine.checkpoint.load import open_checkpoint, read_weights
from engine.config.parameter_patterns import matches
from engine.errors import EXIT_DONE
from engine.train.metrics import read_metrics
from tests.distributed.families import family_tree, world_size
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import run_config, stop_after, train_rank

matrix = pytest.mark.matrix
FRONT = ("embed*", "layers.0.*", "layers.1.*")
FREEZES = ((), FRONT, ("embed*",))
STEPS = 2
LAST = STEPS * len(FREEZES)
LAYOUTS = (
    ("gpt2", {"zero_stage": 3, "tensor": 2}),
    ("bert", {"zero_stage": 1, "pipe": 2}),  # stage 0 of the pipeline trains nothing in the second run stage
    pytest.param("t5", {"zero_stage": 3, "pipe": 2, "data": 2}, marks=matrix),
)


def tree_of(corpora: Path, folder: Path, model: str, parallel: dict[str, Any], **changes: Any) -> dict[str, Any]:
    optimizer = {"weight_decay": 0.1}
    tree = family_tree(corpora, folder, model, parallel, steps=STEPS, optimizer=optimizer, **changes)
    [stage] = tree["stages"]
    stage |= {"schedule": {"shape": "constant"}}
    names = ("first", "second", "third")
    stages = [stage | {"name": name, "freeze": [*freeze]} for name, freeze in zip(names, FREEZES, strict=True)]
    return tree | {"stages": stages}


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder) if "loss" in record]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return read_weights(step_path(folder / "checkpoints", step))


@pytest.fixture(scope="module")
def alone(corpora, tmp_path_factory):
    """The run of a model in one process, made once."""
    made: dict[str, Path] = {}

    def run(model: str) -> Path:
        if model not in made:
            made[model] = tmp_path_factory.mktemp(model) / "run"
            run_ranks(1, train_rank, tree_of(corpora, made[model], model, {}))
        return made[model]

    return run


def check_frozen(folder: Path) -> None:
    """Assert what each stage changes, and what its checkpoints hold."""
    for number, freeze in enumerate(FREEZES):
        begin, end = number * STEPS, (number + 1) * STEPS
        manifest = open_checkpoint(step_path(folder / "checkpoints", end))
        assert {n for n, placement in manifest.placements.items() if not placement.moments} == {
            name for name in manifest.placements if matches(name, freeze)
        }
        if number > 0:
            before, after = weights(folder, begin), weights(folder, end)
            same = {name for name in before if torch.equal(before[name], after[name])}
            assert same == {name for name in before if matches(name, freeze)}


def check_memory(trainer: Any) -> None:
    """Assert at each step that one engine is alive, and that it has the moments of the plan and no others."""
    import deepspeed

    from engine.plan.plan import make_plan

    step, groups = trainer._step, trainer.groups
    plans = make_plan(trainer.config, groups.world.size).run_stages

    def checked() -> bool:
        planned = plans[trainer.state.run_stage].stages[groups.coordinates.stage]
        gc.collect()
        engines = [thing for thing in gc.get_objects() if isinstance(thing, deepspeed.DeepSpeedEngine)]
        assert len(engines) == 1, f"{len(engines)} engines in step {trainer.state.step}"
        engine = trainer.pipeline.engine
        held = sum(moment.numel() for shard in engine.parameter_shards() for moment in shard.moments.values())
        # ranks differ by what fills up the flat buffer of a group, or each parameter under ZeRO-3
        padding = len(engine.placements()) * groups.zero.size
        assert abs(held / 2 - planned.updated) <= padding * (groups.zero.size > 1)
        trained = [one for one in engine._engine.module.parameters() if one.requires_grad]
        assert bool(trained) == (planned.updated > 0)
        return bool(step())

    trainer._step = checked


@pytest.mark.parametrize(("model", "parallel"), LAYOUTS)
def test_stages_that_freeze_are_the_run_of_one_process(corpora, alone, tmp_path, model, parallel):
    tree = tree_of(corpora, tmp_path / "run", model, parallel)
    ranks = run_ranks(world_size(parallel), train_rank, tree, check_memory)
    assert {rank["code"] for rank in ranks} == {EXIT_DONE}
    assert losses(tmp_path / "run") == pytest.approx(losses(alone(model)), rel=0, abs=2e-6)
    check_frozen(tmp_path / "run")


def test_one_process_equals_a_loop_of_plain_torch(corpora, alone):
    """Independent of the engine: AdamW of torch over what is trained, with a count of updates of its own for each."""
    folder = alone("gpt2")
    check_frozen(folder)
    config = tree_of(corpora, folder, "gpt2", {})
    found = plain_losses(config)
    assert losses(folder) == pytest.approx(found, rel=0, abs=2e-6)


def plain_losses(tree: dict[str, Any]) -> list[float]:
    """The losses of a run of stages, by a loop of plain torch over the run's own batches."""
    from engine.config.resolve import Layout
    from engine.models.families import family
    from engine.models.initial import initial_value
    from engine.models.materialize import fill
    from engine.optim.groups import weight_decay
    from engine.train.build import stage_spec
    from engine.train.stage_run import RunData, StageRun
    from tests.engine.checkpoint.worlds import fake_groups

    config, groups = run_config(tree), fake_groups(Layout(1, 1, 1, 1), 0)
    kind = family(config.model)
    model, specs = kind.build(config.model), {spec.name: spec for spec in kind.specs(config.model)}
    ties = kind.ties(config.model)
    fill(model, lambda name: initial_value(specs[ties.get(name, name)], config.model, config.seed))
    optimizers: dict[str, torch.optim.AdamW] = {}
    data, found = RunData(config, groups), []
    for number, stage in enumerate(config.stages):
        spec = stage_spec(config, stage, groups)
        run = StageRun(
            number, config, data.take(number, lambda: None), groups, torch.device("cpu"), spec, lambda: False
        )
        trained = {n: p for n, p in model.named_parameters() if not matches(ties.get(n, n), stage.freeze)}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
            if name not in trained:
                optimizers.pop(name, None)
            elif name not in optimizers:  # one for each: moments and counts that begin with it
                decay = weight_decay(name, config.optimizer)
                optimizers[name] = torch.optim.AdamW(
                    [parameter],
                    lr=config.optimizer.learning_rate,
                    betas=(config.optimizer.beta1, config.optimizer.beta2),
                    eps=config.optimizer.epsilon,
                    weight_decay=decay,
                )
        run.feed.start()
        for _ in range(stage.num_steps):
            inputs, counted = run.feed.step()
            total = 0.0
            for given in inputs:
                loss = model(**{k: v for k, v in given.items() if k in spec.inputs})["losses_L"].sum() / counted[0]
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(trained.values(), config.optimizer.clip_norm)
            for name in trained:
                optimizers[name].step()
            model.zero_grad()
            found.append(total)
        run.close()
    return found


CHANGES = (({"zero_stage": 1, "data": 2}, 3), ({"zero_stage": 3, "pipe": 2}, 4), ({"zero_stage": 2, "tensor": 2}, None))
"""Layouts in turn, and the step after which each stops: inside of the second stage, and at its end."""


def test_other_layouts_go_on_inside_a_stage_and_at_its_border(corpora, alone, tmp_path):
    folder = tmp_path / "run"
    for parallel, stop in CHANGES:
        ranks = run_ranks(2, train_rank, tree_of(corpora, folder, "gpt2", parallel), partial(stop_after, step=stop))
        assert {rank["state"].step for rank in ranks} == {stop or LAST}
    assert losses(folder) == pytest.approx(losses(alone("gpt2")), rel=0, abs=2e-6)
    check_frozen(folder)
