"""Penalties, distillation, averaged weights and meta-steps: every layout against a loop of plain torch, resumed.

One run has them all: `first` trains plainly, `second` is pulled to its first weights by L2-SP, EWC and distillation,
takes meta-steps of Reptile, keeps an average of its weights, and freezes a layer. The reference is a loop of torch's
AdamW over the batches of the run, whose loss has the penalties as ordinary terms. Tolerances of losses and weights are
those of `parity`; a penalty is a sum of squares of distances, each off by at most 2e-5 of about 1e-2.
"""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from engine.checkpoint.folder import step_path
from engine.checkpoint.load import open_checkpoint, read_weights
from engine.config.parameter_patterns import matches
from engine.config.schema.regularization import EMA, FIRST_WEIGHTS, FISHER, REPTILE
from engine.errors import EXIT_DONE
from engine.parallel.functions import Functions
from engine.train.metrics import read_metrics
from tests.distributed.families import family_tree, world_size
from tests.distributed.parity import LOSS_BOUND, WEIGHT_BOUND
from tests.distributed.ranks import RankFailed, run_ranks
from tests.distributed.runs import run_config, train_rank

matrix = pytest.mark.matrix
BORDER, LAST = 3, 7
L2_SP, EWC, DECAY, STEP_SIZE, BATCHES = 0.5, 20.0, 0.6, 0.5, 2
DISTILLATION, TOP_K = 2.0, 7
FREEZE = ("layers.1.*",)
SECOND: dict[str, Any] = {
    "name": "second",
    "freeze": [*FREEZE],
    "regularization": {
        "l2_sp": {"strength": L2_SP},
        "ewc": {"strength": EWC, "batches": BATCHES},
        "distillation": {"strength": DISTILLATION, "top_k": TOP_K},
    },
    "ema": {"decay": DECAY},
    "reptile": {"every_steps": 2, "step_size": STEP_SIZE},
    "duration": {"steps": LAST - BORDER},
}
LAYOUTS = (
    ("gpt2", {"zero_stage": 3, "tensor": 2}),
    ("bert", {"zero_stage": 1, "pipe": 2}),
    pytest.param("gpt2", {"zero_stage": 2, "pipe": 2, "data": 2}, marks=matrix),
    pytest.param("gpt2", {"zero_stage": 0, "tensor": 2, "sequence_parallel": True}, marks=matrix),
    pytest.param("t5", {"zero_stage": 3, "pipe": 2, "data": 2}, marks=matrix),
    pytest.param("gpt2", {"zero_stage": 3, "data": 2, "offload": "optimizer"}, marks=matrix),
    pytest.param("gpt2", {"zero_stage": 1, "sequence": 2}, marks=matrix),
)
WORLDS = ({"zero_stage": 1, "data": 2}, {"zero_stage": 3, "pipe": 2}, {"zero_stage": 2, "tensor": 2})
"""Layouts in turn, between them a kill: in step 4, the second of the second stage, and in step 6."""
KILLS = (4, 6)


def tree_of(corpora: Path, folder: Path, model: str, parallel: dict[str, Any]) -> dict[str, Any]:
    tree = family_tree(
        corpora,
        folder,
        model,
        parallel,
        steps=BORDER,
        optimizer={"weight_decay": 0.1},
        checkpoint={"every_steps": 1, "asynchronous": False},
    )
    [stage] = tree["stages"]
    stage |= {"schedule": {"shape": "constant"}}
    return tree | {"stages": [stage | {"name": "first"}, stage | SECOND]}


def values(folder: Path, key: str) -> dict[int, float]:
    return {record["step"]: record[key] for record in read_metrics(folder) if key in record}


@pytest.fixture(scope="module")
def plain(corpora, tmp_path_factory):
    """The reference of a model, made once."""
    made: dict[str, Plain] = {}

    def run(model: str) -> Plain:
        if model not in made:
            made[model] = Plain(tree_of(corpora, tmp_path_factory.mktemp(model) / "run", model, {}))
        return made[model]

    return run


class Plain:
    """The run by a loop of plain torch: its losses, penalties and averaged weights."""

    def __init__(self, tree: dict[str, Any]) -> None:
        from engine.config.resolve import Layout
        from engine.models.families import family
        from engine.models.initial import initial_value
        from engine.models.materialize import fill
        from engine.train.stage_run import RunData
        from tests.engine.checkpoint.worlds import fake_groups

        self.config, self.groups = run_config(tree), fake_groups(Layout(1, 1, 1, 1), 0)
        kind = family(self.config.model)
        self.model = self.build()
        self.teacher: torch.nn.Module | None = None
        self.said = self.weights = torch.empty(0)
        specs = {spec.name: spec for spec in kind.specs(self.config.model)}
        self.ties = kind.ties(self.config.model)
        fill(
            self.model,
            lambda name: initial_value(specs[self.ties.get(name, name)], self.config.model, self.config.seed),
        )
        self.data = RunData(self.config, self.groups)
        self.optimizers: dict[str, torch.optim.AdamW] = {}
        self.losses: list[float] = []
        self.penalties: dict[str, list[float]] = {"l2_sp": [], "ewc": [], "distillation": []}
        self.average: dict[str, torch.Tensor] = {}
        self.run_stage(0)
        self.run_stage(1)

    def build(self) -> torch.nn.Module:
        from engine.models.families import family

        functions = Functions(linear_cross_entropy=self.cross_entropy)
        return family(self.config.model).build(self.config.model, functions=functions)

    def run_stage(self, number: int) -> None:
        stage = self.config.stages[number]
        trained = {n: p for n, p in self.model.named_parameters() if not matches(self.ties.get(n, n), stage.freeze)}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)
        fisher = self.fisher(trained) if number else {}
        first = {name: p.detach().clone() for name, p in trained.items()}
        anchor = {name: p.clone() for name, p in first.items()}
        if number:
            self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
            self.teacher = self.build()
            self.teacher.load_state_dict(self.model.state_dict())
        batches = self.batches(number)
        for step in range(1, stage.num_steps + 1):
            batch = next(batches)
            loss = self.loss(batch)
            self.losses.append(loss.item())
            if number:
                distilled = DISTILLATION * self.divergence(batch)
                self.penalties["distillation"].append(distilled.item())
                squares = {name: (p - first[name]) ** 2 for name, p in trained.items()}
                l2_sp = L2_SP / 2 * torch.stack([each.sum() for each in squares.values()]).sum()
                ewc = EWC / 2 * torch.stack([(fisher[name] * each).sum() for name, each in squares.items()]).sum()
                self.penalties["l2_sp"].append(l2_sp.item())
                self.penalties["ewc"].append(ewc.item())
                loss = loss + l2_sp + ewc + distilled
            loss.backward()
            self.update(trained)
            if number == 0:
                continue
            with torch.no_grad():
                for name, parameter in trained.items():
                    if step % 2 == 0:
                        parameter.copy_(anchor[name] + STEP_SIZE * (parameter - anchor[name]))
                        anchor[name] = parameter.clone()
                    self.average[name] = DECAY * self.average[name] + (1 - DECAY) * parameter

    def fisher(self, trained: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
        found = {name: torch.zeros_like(p) for name, p in trained.items()}
        batches = self.batches(0)
        for _ in range(BATCHES):
            self.loss(next(batches)).backward()
            for name, parameter in trained.items():
                assert parameter.grad is not None
                found[name] += self.config.stages[0].global_batch_size * parameter.grad**2 / BATCHES
            self.model.zero_grad()
        return found

    def batches(self, number: int):
        from engine.train.build import stage_spec
        from engine.train.stage_run import StageRun

        spec = stage_spec(self.config, self.config.stages[number], self.groups)
        data = self.data.take(number, lambda: None)
        run = StageRun(number, self.config, data, self.groups, torch.device("cpu"), spec, lambda: False)
        run.feed.start()
        try:
            while True:
                inputs, counted = run.feed.step()
                yield [{k: v for k, v in given.items() if k in spec.inputs} for given in inputs], torch.tensor(counted)
        finally:
            run.close()

    def loss(self, batch: Any) -> torch.Tensor:
        inputs, counted_L = batch
        parts = [self.model(**given)["losses_L"] / counted_L.to(torch.float32) for given in inputs]
        return torch.stack(parts).sum()

    def divergence(self, batch: Any) -> torch.Tensor:
        """The mean divergence of whole logits from the likeliest of the first weights, whose sum is made 1."""
        assert self.teacher is not None
        inputs, counted_L = batch
        total = torch.zeros(())
        for given in inputs:
            with torch.no_grad():
                self.teacher(**given)
                best_NK, tokens_NK = self.said.topk(TOP_K, dim=-1)
            self.model(**given)
            logs_NV = self.said.log_softmax(-1)
            each_N = F.kl_div(logs_NV.gather(1, tokens_NK), best_NK.softmax(-1), reduction="none").sum(-1)
            total = total + (each_N * self.weights).sum() / counted_L[0]
        return total

    def cross_entropy(
        self, hidden: Any, weight: Any, bias: Any, targets: Any, weights: Any, vocab_size: int
    ) -> torch.Tensor:
        """Of whole logits, which are kept as `said`."""
        self.said = F.linear(hidden.flatten(0, -2), weight, bias)[:, :vocab_size]
        self.weights = weights.flatten()
        return (F.cross_entropy(self.said, targets.flatten(), reduction="none") * self.weights).sum()

    def update(self, trained: dict[str, torch.nn.Parameter]) -> None:
        from engine.optim.groups import weight_decay

        chosen = self.config.optimizer
        torch.nn.utils.clip_grad_norm_(trained.values(), chosen.clip_norm)
        for name, parameter in trained.items():
            if name not in self.optimizers:
                self.optimizers[name] = torch.optim.AdamW(
                    [parameter],
                    lr=chosen.learning_rate,
                    betas=(chosen.beta1, chosen.beta2),
                    eps=chosen.epsilon,
                    weight_decay=weight_decay(name, chosen),
                )
            self.optimizers[name].step()
        self.model.zero_grad()


def check(folder: Path, expected: Plain) -> None:
    """Assert that a run is the one of plain torch, and what its checkpoints hold."""
    losses = values(folder, "loss")
    assert [*losses] == list(range(1, LAST + 1))
    assert [*losses.values()] == pytest.approx(expected.losses, rel=0, abs=LOSS_BOUND)
    for name, found in expected.penalties.items():
        seen = values(folder, f"regularization/{name}")
        assert [*seen] == list(range(BORDER + 1, LAST + 1))
        assert [*seen.values()] == pytest.approx(found, rel=5e-3, abs=1e-9), name
        assert max(found) > 1e-4, "too small to show in a loss"
    path = step_path(folder / "checkpoints", LAST)
    manifest = open_checkpoint(path)
    assert {FIRST_WEIGHTS, FISHER, EMA, REPTILE} <= {*manifest.moments}
    averaged, trained = read_weights(path, EMA), read_weights(path)
    assert any(not torch.equal(averaged[name], trained[name]) for name in trained)
    for name, average in expected.average.items():
        if name not in expected.ties:
            real = average[: averaged[name].size(0)]
            assert (averaged[name] - real).abs().max() <= bound(name), name
    [ema_loss] = values(folder, "ema_validation_loss").values()
    assert ema_loss == pytest.approx(held_out(expected, expected.average), rel=0, abs=LOSS_BOUND)


def bound(name: str) -> float:
    """Adam magnifies the rounding of key biases, whose true gradient is zero (`parity`)."""
    return 2 * 2e-3 * LAST if name.endswith("qkv_proj.bias") else WEIGHT_BOUND


@torch.no_grad()
def held_out(expected: Plain, weights: dict[str, torch.Tensor]) -> float:
    """The mean loss of these weights over the held-out samples that the run evaluates."""
    from engine.data.shards.tombstones import read_tombstones
    from engine.data.stage import open_validation
    from engine.data.stage_validation import samples_of
    from engine.data.tokenizer.folder import tokenizer_hash

    config = expected.config
    stage = config.stages[1]
    checked = (tokenizer_hash(config.tokenizer), config.model.vocab_size, read_tombstones(config.folder))
    opened = open_validation(stage, *checked)
    assert opened is not None
    samples = samples_of(stage, opened, config.evaluation.max_samples)
    expected.model.load_state_dict(weights, strict=False)
    losses, counted = 0.0, {}
    total_L = None
    for batch in samples.batches(0, 1, 2):
        made = expected.model(**batch.inputs)["losses_L"].double()
        total_L = made if total_L is None else total_L + made
        for name, weight in batch.weights.items():
            counted[name] = counted.get(name, 0.0) + weight
    assert total_L is not None
    for loss, weight in zip(total_L.tolist(), counted.values(), strict=True):
        losses += loss / weight
    return losses


@pytest.mark.parametrize(("model", "parallel"), LAYOUTS)
def test_a_layout_is_the_loop_of_plain_torch(corpora, plain, tmp_path, model, parallel):
    tree = tree_of(corpora, tmp_path / "run", model, parallel)
    ranks = run_ranks(world_size(parallel), train_rank, tree, check_memory)
    assert {rank["code"] for rank in ranks} == {EXIT_DONE}
    check(tmp_path / "run", plain(model))


def check_memory(trainer: Any) -> None:
    """Assert at each step that a rank holds the moments of the plan, the added ones among them."""
    from engine.plan.plan import make_plan

    step, groups = trainer._step, trainer.groups
    plans = make_plan(trainer.config, groups.world.size).run_stages

    def checked() -> bool:
        planned = plans[trainer.state.run_stage].stages[groups.coordinates.stage]
        engine = trainer.pipeline.engine
        held = sum(moment.numel() for shard in engine.parameter_shards() for moment in shard.moments.values())
        kinds = 2 + planned.added_moments
        assert (
            planned.added_moments == len(engine.added_moments) == 4 * trainer.state.run_stage
        )  # first weights, Fisher, average, Reptile
        # ranks differ by what fills up the flat buffer of a group, or each parameter under ZeRO-3
        padding = len(engine.placements()) * groups.zero.size
        assert abs(held / kinds - planned.updated) <= padding * (groups.zero.size > 1)
        return bool(step())

    trainer._step = checked


def kill(trainer: Any, step: int | None) -> None:
    """Kill the last rank in step `step`, which no checkpoint holds then."""
    run, groups = trainer._step, trainer.groups

    def killed() -> bool:
        if trainer.state.step == step and groups.global_rank == groups.world.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return bool(run())

    trainer._step = killed


def test_kills_and_other_layouts_change_nothing(corpora, plain, tmp_path):
    folder = tmp_path / "run"
    for parallel, step in zip(WORLDS, (*KILLS, None), strict=True):
        tree = tree_of(corpora, folder, "gpt2", parallel)
        if step is None:
            run_ranks(2, train_rank, tree)
        else:
            with pytest.raises(RankFailed):
                run_ranks(2, train_rank, tree, partial(kill, step=step))
    check(folder, plain("gpt2"))


@matrix
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_in_bf16_the_evaluation_of_the_average_leaves_the_run_as_it_is(corpora, tmp_path, zero_stage):
    """Bit for bit: the working weights are cast anew from masters that came back."""
    for name in ("with", "without"):
        tree = tree_of(corpora, tmp_path / name, "gpt2", {"zero_stage": zero_stage})
        tree["stages"] = [stage | {"ema": None, "regularization": {}, "reptile": None} for stage in tree["stages"]]
        tree["stages"][1]["ema"] = SECOND["ema"] if name == "with" else None
        tree |= {"precision": {"dtype": "bf16"}, "evaluation": {"every_steps": 1}}
        run_ranks(1, train_rank, tree)
    for key in ("loss", "gradient_norm", "validation_loss"):
        assert values(tmp_path / "with", key) == values(tmp_path / "without", key), key
    assert [*values(tmp_path / "with", "ema_validation_loss")] == list(range(BORDER + 1, LAST + 1))
