"""Runs over a fake pipeline that keep values beside their weight: closed forms in fp64, stops, a rollback, a merge.

Layouts, DeepSpeed and the Fisher information are held to plain torch in tests/distributed/test_regularization.py.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.folder import step_path
from engine.checkpoint.load import open_checkpoint, read_weights
from engine.checkpoint.merge import Sources, merge
from engine.config.schema.regularization import EMA, FIRST_WEIGHTS, FISHER, REPTILE
from engine.errors import CheckpointError, DataError
from engine.parallel.sharding import ParameterSpec
from engine.parallel.state import ParameterShard
from engine.parallel.zero.penalties import Penalty, add_penalties
from tests.distributed.poison import STABILITY, poison
from tests.distributed.runs import run_tree
from tests.engine.train.fake import FakeRun, StopAfter, fake_run, stopped_run, values

L2_SP, DECAY, STEP_SIZE = 0.05, 0.75, 0.25
KEPT: dict[str, Any] = {
    "regularization": {"l2_sp": {"strength": L2_SP}},
    "ema": {"decay": DECAY, "every_steps": 2},
    "reptile": {"every_steps": 3, "step_size": STEP_SIZE},
}

SECOND = KEPT | {"ema": {"decay": 0.5}}


def tree(corpus: Path, folder: Path, *stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A run of stages of nine steps, saved every step unless `changes` say otherwise."""
    made = run_tree(corpus, folder, **{"checkpoint": {"every_steps": 1, "keep_last": 99}} | changes)
    [stage] = made["stages"]
    made["stages"] = [stage | {"name": f"stage-{number}"} | more for number, more in enumerate(stages)]
    return made


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> tuple[Path, FakeRun]:
    """A run of two stages; do not change its folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, fake_run(tree(corpus, folder, KEPT, SECOND))


def at(folder: Path, step: int, moment: str | None = None) -> torch.Tensor:
    return read_weights(step_path(folder / "checkpoints", step), moment)["weight"].double()


def test_average_meta_step_and_penalty_are_their_closed_forms(corpus, tmp_path):
    """From the weights of each step's checkpoint; meta-steps are told by the run without them up to the first one."""
    folder = tmp_path / "run"
    fake_run(tree(corpus, folder, KEPT))
    plain = {name: section for name, section in KEPT.items() if name != "reptile"}
    fake_run(tree(corpus, tmp_path / "plain", plain))
    zero = torch.zeros(4, dtype=torch.float64)
    average = zero.clone()
    for step in range(1, 10):
        weight = at(folder, step)
        if step % 2 == 0:
            average = DECAY * average + (1 - DECAY) * weight
        torch.testing.assert_close(at(folder, step, EMA), average, rtol=0, atol=1e-6)
        assert torch.equal(at(folder, step, FIRST_WEIGHTS), zero)
        torch.testing.assert_close(at(folder, step, REPTILE), at(folder, step // 3 * 3) if step >= 3 else zero)
    assert torch.equal(at(folder, 2), at(tmp_path / "plain", 2))
    torch.testing.assert_close(at(folder, 3), STEP_SIZE * at(tmp_path / "plain", 3))
    # of the weights before the step's update
    expected = [0.5 * L2_SP * at(folder, step).square().sum().item() for step in range(1, 9)]
    assert [*values(folder, "regularization/l2_sp").values()] == pytest.approx([0.0, *expected], rel=1e-5)


def test_the_evaluation_of_the_average_leaves_the_run_as_it_is(corpus, tmp_path):
    """Its loss is the one of a run whose weights are the average; every other number is that of a run without it."""
    for name, section in (("with", {"ema": {"decay": DECAY}}), ("without", {})):
        fake_run(tree(corpus, tmp_path / name, section))
    for key in ("loss", "gradient_norm", "validation_loss"):
        assert values(tmp_path / "with", key) == values(tmp_path / "without", key)
    assert torch.equal(at(tmp_path / "with", 9), at(tmp_path / "without", 9))
    found = values(tmp_path / "with", "ema_validation_loss")
    assert [*found] == [3, 6, 9]
    assert not values(tmp_path / "without", "ema_validation_loss")
    average = at(tmp_path / "with", 9, EMA).float()

    def start_there(trainer: Any) -> None:
        beat = trainer.heart.beat

        def watch(step: int, phase: str) -> None:
            beat(step, phase)
            if phase == "evaluation":
                trainer.pipeline.engine.weight_W.copy_(average)

        trainer.heart.beat = watch

    fake_run(tree(corpus, tmp_path / "there", {}), start_there)
    assert values(tmp_path / "there", "validation_loss")[9] == found[9]


@pytest.mark.parametrize("step", [4, 9, 11])
def test_a_run_that_was_stopped_is_the_whole_one_bit_for_bit(corpus, whole, tmp_path, step):
    """In either stage, and between them: the second one begins anew, from its own first weights."""
    folder, run = whole
    stopped_run(tree(corpus, tmp_path / "run", KEPT, SECOND), step)
    again = fake_run(tree(corpus, tmp_path / "run", KEPT, SECOND))
    assert again.at_end == run.at_end
    for key in ("loss", "gradient_norm", "regularization/l2_sp", "ema_validation_loss"):
        assert values(tmp_path / "run", key) == values(folder, key)
    assert torch.equal(at(tmp_path / "run", 18, FIRST_WEIGHTS), at(tmp_path / "run", 9))


def test_a_stage_lets_go_of_what_the_one_before_kept(corpus, tmp_path):
    fake_run(tree(corpus, tmp_path / "run", KEPT, {}))
    held = {step: open_checkpoint(step_path(tmp_path / "run" / "checkpoints", step)).moments for step in (9, 10)}
    assert set(held[9]) - set(held[10]) == {EMA, FIRST_WEIGHTS, REPTILE}
    assert [*values(tmp_path / "run", "regularization/l2_sp")] == list(range(1, 10))
    with pytest.raises(CheckpointError, match="holds no ema of the weights"):
        at(tmp_path / "run", 10, EMA)


def test_an_average_that_is_asked_for_midway_begins_at_the_weights_of_then(corpus, tmp_path):
    folder = tmp_path / "run"
    stopped_run(tree(corpus, folder, {}), 4)
    stopped = at(folder, 5)
    fake_run(tree(corpus, folder, {"ema": {"decay": DECAY}}))
    torch.testing.assert_close(at(folder, 6, EMA), DECAY * stopped + (1 - DECAY) * at(folder, 6), rtol=0, atol=1e-6)


def test_a_rollback_over_the_border_of_stages_begins_the_later_one_again(corpus, tmp_path):
    """The only checkpoint is the one at the first stage's end, so the second one's values are made a second time."""
    saved = {"every_steps": 9, "keep_last": 99}
    base = tree(corpus, tmp_path / "run", {}, KEPT, stability=STABILITY, checkpoint=saved)
    large = (8, 16)  # positions in the second stage's stream: in its second step and its third
    run = fake_run(base, partial(poison_second, large=large))
    assert run.state.rollbacks == 1
    first = at(tmp_path / "run", 18, FIRST_WEIGHTS)
    assert torch.equal(first, at(tmp_path / "run", 9))


def test_the_fisher_information_is_made_once_and_needs_the_data_of_the_stage_before(corpus, tmp_path):
    """It is squares of a batch's mean gradient, times its samples: with one batch, at the second stage's first step."""
    ewc = {"regularization": {"ewc": {"strength": 0.1, "batches": 1}}}
    shutil.copytree(corpus / "train", tmp_path / "first")
    tree_of = partial(tree, corpus, tmp_path / "run")
    first = {"data": tree_of({})["stages"][0]["data"] | {"train": str(tmp_path / "first")}}
    gradients: list[torch.Tensor] = []

    def watch(trainer: Any) -> None:
        train, engine = trainer.pipeline.train, trainer.pipeline.engine

        def watched(*given: Any) -> torch.Tensor:
            found = train(*given)
            if trainer.state.step == 9:
                gradients.append(engine.gradient_W.double())
            return found

        trainer.pipeline.train = watched
        stopped.prepare(trainer)

    stopped = StopAfter(11)
    fake_run(tree_of(first, ewc), watch, signals=stopped)
    assert len(gradients) == 2  # of the estimate and of the step
    torch.testing.assert_close(at(tmp_path / "run", 10, FISHER), 8 * gradients[0].square(), rtol=1e-5, atol=0)
    (tmp_path / "first").rename(tmp_path / "gone")
    fake_run(tree_of(first, ewc))  # it is in the checkpoint
    assert torch.equal(at(tmp_path / "run", 18, FISHER), at(tmp_path / "run", 10, FISHER))
    for step in range(10, 19):
        shutil.rmtree(step_path(tmp_path / "run" / "checkpoints", step))
    with pytest.raises(
        DataError, match=r"stages.1.regularization.ewc needs the training data of run stage stage-0"
    ) as found:
        fake_run(tree_of(first, ewc))
    assert "regularization.l2_sp" in found.value.remedy


def poison_second(trainer: Any, large: tuple[int, ...]) -> None:
    """Poison samples of the second stage alone."""
    begin = trainer.current.begin

    def begun(number: int) -> None:
        begin(number)
        if number == 1:
            poison(trainer, large=large, nan=())
            trainer.current.begin = begin

    trainer.current.begin = begun


def merged(folder: Path, steps: tuple[int, ...]) -> None:
    """Put the mean of some checkpoints in the place of the last of them, and drop later ones."""
    checkpoints = folder / "checkpoints"
    paths = [step_path(checkpoints, step) for step in steps]
    made = merge(Sources(paths), [1 / len(steps)] * len(steps), folder.parent / "merged" / "checkpoints")
    for path in checkpoints.glob("step-*"):
        if path.name >= paths[-1].name:
            shutil.rmtree(path)
    shutil.copytree(made, paths[-1])


def test_merged_weights_go_on_at_the_end_of_a_stage_and_not_within(corpus, whole, tmp_path):
    for name in ("border", "within"):
        shutil.copytree(whole[0], tmp_path / name / "run")
    merged(tmp_path / "border" / "run", (7, 9))
    fake_run(tree(corpus, tmp_path / "border" / "run", KEPT, SECOND))
    assert torch.equal(at(tmp_path / "border" / "run", 18, FIRST_WEIGHTS), at(tmp_path / "border" / "run", 9))
    merged(tmp_path / "within" / "run", (11, 13))
    with pytest.raises(CheckpointError, match="is merged and has no first_weights, reptile"):
        fake_run(tree(corpus, tmp_path / "within" / "run", KEPT, SECOND))


def test_penalties_are_those_of_autograd_in_fp64():
    generator = torch.Generator().manual_seed(0)
    shards, expected = [], torch.zeros(2, dtype=torch.float64)
    for number, size in enumerate((7, 12)):
        weight, center, importance, gradient = (torch.randn(size, generator=generator) for _ in range(4))
        moments = {"c": center, "i": importance.square()}
        exact = weight.double().requires_grad_()
        terms = torch.stack(
            [(0.3 / 2) * (exact - center).square().sum(), (2.0 / 2) * (moments["i"] * (exact - center).square()).sum()]
        )
        terms.sum().backward()
        assert exact.grad is not None
        wanted = gradient.double() + exact.grad
        counted = number == 0
        expected += terms.detach() * counted
        shards.append((ParameterShard(ParameterSpec("p", (size,)), 0, weight, moments), gradient, counted))
        add_penalties([Penalty("a", 0.3, "c"), Penalty("b", 2.0, "c", "i")], shards[-1:], torch.device("cpu"))
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-6)
    found = add_penalties([Penalty("a", 0.3, "c"), Penalty("b", 2.0, "c", "i")], shards, torch.device("cpu"))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_first_weights_in_bf16_would_be_most_of_a_small_distance():
    """Why they are kept in fp32: after steps of 1e-4 of a weight's size, rounding the start to 8 bits moves it further
    than training has, so that the penalty would pull towards the rounded weights."""
    first = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = 1e-3 * first.abs() * torch.randn(100_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    error = {
        dtype: (first.to(dtype).double() - first).norm() / moved.norm() for dtype in (torch.bfloat16, torch.float32)
    }
    assert error[torch.bfloat16] > 1
    assert error[torch.float32] < 1e-4
