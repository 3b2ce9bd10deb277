"""Runs of two stages over a fake pipeline: they go over, stop, resume and go back at every place as one run would.

Stage `one` has four steps of 8 samples x 16 tokens, stage `two` five of 6 samples x 8 tokens over the same data. That
layouts agree is shown in tests/distributed/test_run_stages.py.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.folder import committed, step_of, step_path
from engine.checkpoint.load import read_state
from engine.data.stage import open_parts, run_stage_seed, stage_stream
from engine.errors import EXIT_DONE, EXIT_REQUEUE, ConfigError, DataError
from tests.distributed.poison import STABILITY
from tests.distributed.runs import LENGTH, Tree, run_config, run_tree
from tests.engine.train.fake import (
    FakeRun,
    StopAfter,
    check_equal,
    fake_run,
    fake_trainer,
    record_samples,
    spike,
    stopped_run,
    values,
)

BORDER, LAST = 4, 9
ONE = {"name": "one", "duration": {"steps": BORDER}}
TWO = {
    "name": "two",
    "sequence_length": LENGTH // 2,
    "global_batch_size": 6,
    "duration": {"steps": LAST - BORDER},
    "schedule": {"shape": "constant", "warmup": 2, "learning_rate": 2e-3},
}


def two_stages(corpus: Path, folder: Path, second: Tree | None = None, **changes: Any) -> Tree:
    """The run; `second` changes its second stage."""
    tree = run_tree(corpus, folder, **changes)
    [stage] = tree["stages"]
    tree["stages"] = [stage | ONE, stage | TWO | (second or {})]
    return tree


def one_stage(corpus: Path, folder: Path) -> Tree:
    tree = two_stages(corpus, folder)
    return tree | {"stages": tree["stages"][:1]}


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> tuple[Path, FakeRun, dict[int, list[Any]]]:
    """A run of both stages that nothing disturbed, and its samples by step; do not change its folder."""
    folder, samples = tmp_path_factory.mktemp("whole") / "run", {}
    return folder, fake_run(two_stages(corpus, folder), record_samples(samples)), samples


def test_a_run_goes_through_its_stages(whole):
    folder, run, _ = whole
    assert (run.code, run.state.step, run.state.run_stage, run.state.stage_step) == (EXIT_DONE, LAST, 1, LAST - BORDER)
    assert [*values(folder, "loss")] == list(range(1, LAST + 1))
    assert [*values(folder, "run_stage").values()] == [0] * BORDER + [1] * (LAST - BORDER)
    samples = [8 * step for step in range(1, BORDER + 1)] + [8 * BORDER + 6 * step for step in range(1, 6)]
    assert [*values(folder, "samples").values()] == samples
    assert run.state.tokens == 8 * BORDER * LENGTH + 6 * (LAST - BORDER) * LENGTH // 2
    assert [*values(folder, "learning_rate").values()][BORDER:] == pytest.approx([1e-3] + [2e-3] * 4)
    assert sorted(step_of(path) for path in committed(folder / "checkpoints")) == [3, BORDER, 6, LAST]
    assert [*values(folder, "validation_loss")] == [3, BORDER, 6, LAST]


def test_the_first_stage_is_the_run_without_a_second_one(whole, corpus, tmp_path):
    folder, _, _ = whole
    fake_run(one_stage(corpus, tmp_path / "run"))
    for key in ("loss", "gradient_norm", "learning_rate", "validation_loss"):
        first = {step: value for step, value in values(folder, key).items() if step <= BORDER}
        assert values(tmp_path / "run", key) == first


def test_each_stage_has_an_order_of_its_own_over_the_same_data(corpus, whole):
    """A pure function of (seed, stage, position)."""
    folder, _, samples = whole
    config, expected = run_config(two_stages(corpus, folder)), []
    for number, stage in enumerate(config.stages):
        stream = stage_stream(stage, open_parts(stage, None, 300), run_stage_seed(config.seed, number))
        for _ in range(stage.num_steps):
            expected.append(stream.next_sample_ids(stream.batch_size))
            stream.skip()
    assert [samples[step] for step in range(LAST)] == expected
    same = two_stages(corpus, folder, {"sequence_length": LENGTH, "global_batch_size": 8})
    hashes = [
        stage_stream(stage, open_parts(stage, None, 300), run_stage_seed(5, number)).sample_hash(64)
        for number, stage in enumerate(run_config(same).stages)
    ]
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize("step", [2, BORDER, BORDER + 1, 7])
def test_a_stop_in_either_stage_or_at_the_border_changes_nothing(whole, corpus, tmp_path, step):
    folder, run, samples = whole
    tree, found = two_stages(corpus, tmp_path / "run"), {}
    signals = StopAfter(step - 1, "forward and backward")

    def prepare(trainer: Any) -> None:
        signals.prepare(trainer)
        record_samples(found)(trainer)

    stopped = fake_run(tree, prepare, signals=signals)
    assert (stopped.code, stopped.state.step) == (EXIT_REQUEUE, step)
    again = fake_run(tree, record_samples(found))
    assert (again.code, again.started_at) == (EXIT_DONE, step)
    assert (again.at_start, again.at_end, again.state) == (stopped.at_end, run.at_end, run.state)
    assert found == samples
    check_equal(tmp_path / "run", folder)


def test_a_stop_before_the_first_step_of_a_stage_resumes_there(whole, corpus, tmp_path):
    folder, run, _ = whole
    tree = two_stages(corpus, tmp_path / "run", {"optimizer_state": "keep"})

    def never(trainer: Any) -> None:
        step = trainer._step

        def stops() -> bool:
            return trainer.state.step == BORDER or step()

        trainer._step = stops

    stopped = fake_run(tree, never)
    assert (stopped.code, stopped.state.step, stopped.state.run_stage) == (EXIT_REQUEUE, BORDER, 1)
    again = fake_run(tree)
    assert (again.started_at, again.at_end) == (BORDER, run.at_end)
    check_equal(tmp_path / "run", folder)


def test_an_evaluation_cut_short_at_the_border_is_made_of_the_stage_that_ended(whole, corpus, tmp_path):
    folder, run, _ = whole
    tree = two_stages(corpus, tmp_path / "run")
    assert stopped_run(tree, BORDER, "evaluation").code == EXIT_REQUEUE
    assert fake_run(tree).at_end == run.at_end
    check_equal(tmp_path / "run", folder)


def test_a_stage_appended_to_a_run_that_is_done_goes_on(whole, corpus, tmp_path):
    """Also where the data of the completed stage is gone."""
    folder, run, _ = whole
    old = tmp_path / "old"
    shutil.copytree(corpus, old)
    first = fake_run(one_stage(old, tmp_path / "run"))
    assert (first.code, first.state.step) == (EXIT_DONE, BORDER)
    tree = two_stages(corpus, tmp_path / "run")
    tree["stages"][0]["data"] = one_stage(old, tmp_path / "run")["stages"][0]["data"]
    shutil.rmtree(old)
    tree["tokenizer"] = str(corpus / "tokenizer")
    appended = fake_run(tree)
    assert (appended.code, appended.started_at, appended.state) == (EXIT_DONE, BORDER, run.state)
    assert appended.at_end == run.at_end
    check_equal(tmp_path / "run", folder)


def test_data_of_a_stage_that_is_to_come_is_checked_before_the_first_step(corpus, tmp_path):
    tree = two_stages(corpus, tmp_path / "run", {"data": {"train": str(tmp_path / "missing")}})
    with pytest.raises(DataError, match="missing"):
        fake_run(tree)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_may_change_depends_on_where_the_run_stands(whole, corpus, tmp_path):
    folder, _, _ = whole
    at_border = tmp_path / "border"
    shutil.copytree(folder, at_border, ignore=shutil.ignore_patterns("step-00000006", "step-00000009"))
    inside = tmp_path / "inside"
    shutil.copytree(folder, inside, ignore=shutil.ignore_patterns("step-00000009"))

    changed = two_stages(corpus, at_border, {"global_batch_size": 4})
    assert fake_run(changed).state.samples == 8 * BORDER + 4 * (LAST - BORDER), "it has not begun"
    with pytest.raises(ConfigError, match=r"stages.1.global_batch_size: 6 -> 4"):
        fake_run(changed | {"folder": str(inside)})
    completed = two_stages(corpus, inside)
    completed["stages"][0]["global_batch_size"] = 4
    with pytest.raises(ConfigError, match="run stage 'one' is completed and cannot change: global_batch_size: 8 -> 4"):
        fake_run(completed)
    assert fake_run(two_stages(corpus, inside)).started_at == 6


def test_checkpoints_carry_the_meaning_up_to_their_stage(whole, corpus):
    from engine.config.resume import meaning_hashes

    folder, _, _ = whole
    hashes = [read_state(step_path(folder / "checkpoints", step)).config_hash for step in (3, BORDER, 6, LAST)]
    first, second = meaning_hashes(run_config(two_stages(corpus, folder)))
    assert hashes == [first, first, second, second]


def test_a_stage_that_resets_the_optimizer_begins_with_moments_of_zero(whole, corpus, tmp_path):
    _, run, _ = whole
    moments: list[float] = []

    def look(trainer: Any) -> None:
        step, engine = trainer._step, trainer.pipeline.engine

        def looking() -> bool:
            moments.append(float(engine.moments["exp_avg"].abs().sum()))
            return step()

        trainer._step = looking

    tree = two_stages(corpus, tmp_path / "run", {"optimizer_state": "reset"})
    reset = fake_run(tree, look)
    assert [step for step, moment in enumerate(moments) if moment == 0] == [0, BORDER]
    assert (reset.state.updates, run.state.updates) == (LAST - BORDER, LAST)
    assert reset.at_end != run.at_end
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000009")
    assert fake_run(tree).at_end == reset.at_end, "a restart inside does not reset them again"


@pytest.mark.parametrize(("save_every", "back_at"), [(100, BORDER), (3, 6)])
def test_a_rollback_out_of_a_stage_leaves_out_its_samples(corpus, tmp_path, save_every, back_at):
    """Spikes in steps 6 and 7, the second and third of stage two: positions 6 to 17 of its stream are left out."""
    saving = {"every_steps": save_every, "keep_last": 9}
    tree = two_stages(corpus, tmp_path / "run", stability=STABILITY | {"window": 2}, checkpoint=saving)
    run = fake_run(tree, partial(spike, at=(5, 6)))
    assert (run.code, run.state.step, run.state.rollbacks) == (EXIT_DONE, LAST, 1)
    assert values(tmp_path / "run", "rollback") == {back_at + 1: 1}
    for step in (back_at, LAST):
        sections = read_state(step_path(tmp_path / "run" / "checkpoints", step)).sections
        assert (sections["loader"]["left_out"], sections["progress"]["left_out_later"]) == ([[6, 18]], [])


def test_a_rollback_past_the_beginning_of_a_stage_keeps_what_that_has_to_leave_out(corpus, tmp_path):
    """The checkpoint at the border is gone, so the run goes back into the first stage."""
    tree = two_stages(corpus, tmp_path / "run", stability=STABILITY | {"window": 2})

    def prepare(trainer: Any) -> None:
        spike(trainer, (4, 5))
        go_back = trainer.go_back

        def without_border(first: int) -> None:
            trainer.checkpoints.settle()
            shutil.rmtree(step_path(tmp_path / "run" / "checkpoints", BORDER))
            go_back(first)

        trainer.go_back = without_border

    run = fake_run(tree, prepare)
    assert (run.code, run.state.step, run.state.rollbacks) == (EXIT_DONE, LAST, 1)
    saved = read_state(step_path(tmp_path / "run" / "checkpoints", 3)).sections
    assert saved["progress"]["left_out_later"] == [[1, 0, 12]]
    last = read_state(step_path(tmp_path / "run" / "checkpoints", LAST)).sections
    assert (last["loader"]["left_out"], last["progress"]["left_out_later"]) == ([[0, 12]], [])


def test_hooks_hear_of_every_stage(corpus, tmp_path):
    from engine.train.hooks import Hook, Hooks
    from engine.train.standard_hooks import standard_hooks

    heard: list[tuple[str, str, int]] = []

    class Listens(Hook):
        def begin_run_stage(self, run: Any) -> None:
            heard.append(("begin", run.run_stage.name, run.state.stage_step))

        def end_run_stage(self, run: Any) -> None:
            heard.append(("end", run.run_stage.name, run.state.stage_step))

    with fake_trainer(two_stages(corpus, tmp_path / "run")) as trainer:
        trainer.hooks = Hooks([*standard_hooks(trainer.config, is_main_rank=True), Listens()])
        assert trainer.fit() == EXIT_DONE
    assert heard == [("begin", "one", 0), ("end", "one", 4), ("begin", "two", 0), ("end", "two", 5)]
