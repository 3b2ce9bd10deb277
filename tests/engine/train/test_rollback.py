"""Runs over a fake pipeline whose loss spikes: steps are skipped, then the run goes back and leaves samples out.

The poison belongs to samples, not to steps: wherever one of them is in the batch, the step's gradient is 1e6 times too
large (or not a number). So a run that went back has to equal, bit for bit, one that had those samples left out from the
start of its second third. tests/distributed/test_stability.py shows that all ranks of a layout decide alike.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.folder import step_path
from engine.checkpoint.load import read_state
from engine.errors import EXIT_DONE
from engine.parallel.zero import NotFinite
from engine.train.stability import Unstable
from tests.distributed.poison import LEFT_OUT, NAN, SPIKES, STABILITY, poison
from tests.distributed.runs import run_tree
from tests.engine.train.fake import FakeRun, fake_run, values

LATER = ("step-00000006", "step-00000009")


def tree(corpus: Path, folder: Path, **stability: Any) -> dict[str, Any]:
    return run_tree(corpus, folder, stability=STABILITY | stability)


@pytest.fixture(scope="module")
def poisoned(corpus, tmp_path_factory) -> tuple[Path, FakeRun]:
    """A run that went back past two spikes and skipped a step that was not finite; do not change its folder."""
    folder = tmp_path_factory.mktemp("poisoned") / "run"
    return folder, fake_run(tree(corpus, folder), partial(poison, large=SPIKES, nan=(NAN,)))


def test_after_a_rollback_the_run_is_one_that_never_saw_the_samples(corpus, poisoned, tmp_path):
    folder, run = poisoned
    fake_run(tree(corpus, tmp_path / "clean"))
    shutil.copytree(tmp_path / "clean", tmp_path / "expected", ignore=shutil.ignore_patterns(*LATER))
    never_saw = partial(poison, large=(), nan=(NAN,), left_out=LEFT_OUT)
    expected = fake_run(tree(corpus, tmp_path / "expected"), never_saw)
    assert (run.code, expected.started_at) == (EXIT_DONE, 3)
    assert run.at_end == expected.at_end != run.at_start
    for key in ("loss", "gradient_norm", "learning_rate", "samples", "validation_loss"):
        assert values(folder, key) == values(tmp_path / "expected", key)


def test_what_was_skipped_and_left_out_is_recorded_and_saved(poisoned):
    folder, run = poisoned
    state = run.state
    assert (state.step, state.updates, state.samples, state.rollbacks) == (9, 8, 72, 1)
    # 16 samples left out before it: the sample at 60 is in the step that ends as step 6
    assert values(folder, "skipped") == {6: 1}
    assert 6 not in values(folder, "gradient_norm"), "a norm that is not a number is no number in the metrics"
    assert values(folder, "rollback") == {4: 1}
    assert (values(folder, "left_out_from"), values(folder, "left_out_to")) == ({4: 32}, {4: 48})
    for step in (3, 6, 9):
        sections = read_state(step_path(folder / "checkpoints", step)).sections
        assert sections["loader"]["left_out"] == [[32, 48]]
        assert sections["progress"]["rollbacks"] == 1


def test_a_restart_after_a_rollback_goes_on_as_the_run_did(corpus, poisoned, tmp_path):
    """What the guard remembers is in the checkpoint."""
    folder, run = poisoned
    shutil.copytree(folder, tmp_path / "again", ignore=shutil.ignore_patterns("step-00000009"))
    again = fake_run(tree(corpus, tmp_path / "again"))
    assert (again.started_at, again.at_end, again.state) == (6, run.at_end, run.state)
    assert values(tmp_path / "again", "rollback") == {4: 1}


def test_a_restart_right_after_a_rollback_keeps_its_record(corpus, poisoned, tmp_path):
    shutil.copytree(poisoned[0], tmp_path / "again", ignore=shutil.ignore_patterns(*LATER))
    assert fake_run(tree(corpus, tmp_path / "again")).started_at == 3
    assert (values(tmp_path / "again", "left_out_from"), values(tmp_path / "again", "left_out_to")) == (
        {4: 32},
        {4: 48},
    )


def test_rollbacks_are_bounded(corpus, tmp_path):
    everything = partial(poison, large=tuple(range(24, 200)), nan=())
    with pytest.raises(Unstable, match="step 5: the loss still spikes after 1 rollbacks"):
        fake_run(tree(corpus, tmp_path / "run"), everything)


def test_a_rollback_needs_a_checkpoint(corpus, tmp_path):
    everything = partial(poison, large=tuple(range(24, 200)), nan=())
    with pytest.raises(Unstable, match="step 5: the loss spikes before the first checkpoint"):
        fake_run(tree(corpus, tmp_path / "run") | {"checkpoint": {"every_steps": 8}}, everything)


def test_a_step_that_is_not_finite_ends_the_run_by_default(corpus, tmp_path):
    """The weights are those of the step before it, and its checkpoint is whole."""
    broken = partial(poison, large=(), nan=(NAN,))
    with pytest.raises(NotFinite, match="gradient norm is nan"):
        fake_run(tree(corpus, tmp_path / "run", non_finite="stop"), broken)
    assert max(values(tmp_path / "run", "loss")) == 7


def test_too_many_skips_in_a_row_end_the_run(corpus, tmp_path):
    broken = partial(poison, large=(), nan=tuple(range(24, 200)))
    with pytest.raises(Unstable, match="4 steps in a row were skipped"):
        fake_run(tree(corpus, tmp_path / "run", max_skips=3), broken)
