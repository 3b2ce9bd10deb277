"""Run stages that freeze parameters, over a fake pipeline: where the engine is made again, and what it is told.

What an engine does with frozen parameters is shown on real ranks: tests/distributed/test_frozen.py and test_freeze.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from engine.checkpoint.folder import step_path
from engine.errors import EXIT_DONE
from tests.distributed.poison import STABILITY
from tests.distributed.runs import Tree, run_tree
from tests.engine.train.fake import FakeEngine, FakeRun, StopAfter, fake_run, spike, values

FREEZES = ((), ("layers.0.*",), ("layers.0.*",), ())
BORDERS = (2, 4, 6)
LAST = 8


def four_stages(corpus: Path, folder: Path, freezes=FREEZES, **changes: Any) -> Tree:
    tree = run_tree(corpus, folder, **changes)
    stage = tree["stages"][0] | {"duration": {"steps": 2}}
    tree["stages"] = [stage | {"name": f"n{n}", "freeze": list(freeze)} for n, freeze in enumerate(freezes)]
    tree["checkpoint"] |= {"every_steps": 1}
    return tree


class Made:
    """Engines that were made in the place of others: (step, frozen parameters)."""

    def __init__(self, tree: Tree, prepare: Any = lambda trainer: None, **environment: Any) -> None:
        self.engines: list[tuple[int, bool]] = []
        self.counts: list[tuple[int, list[int]]] = []
        self.trainer: Any = None
        set_updates = FakeEngine.set_updates

        def rebuild(pipeline: Any, config: Any, spec: Any) -> None:
            self.engines.append((self.trainer.state.step if self.trainer else 0, bool(spec.frozen)))
            pipeline.spec = spec

        def told(engine: Any, count: int, before: Any = ()) -> None:
            self.counts.append((count, list(before)))
            set_updates(engine, count, before)

        def watched(trainer: Any) -> None:
            self.trainer = trainer
            prepare(trainer)

        with patch("engine.train.current_run_stage.rebuild", rebuild), patch.object(FakeEngine, "set_updates", told):
            self.run: FakeRun = fake_run(tree, watched, **environment)


def test_an_engine_is_made_again_only_where_other_parameters_are_trained(corpus, tmp_path):
    made = Made(four_stages(corpus, tmp_path / "run"))
    assert made.run.code == EXIT_DONE
    assert made.engines == [(2, True), (6, False)]
    assert made.run.state.updates_before == [0, 2, 4, 6]
    assert made.counts == [(0, [0]), (2, [0, 2]), (4, [0, 2, 4]), (6, [0, 2, 4, 6])]


def test_without_frozen_parameters_none_is_made_again(corpus, tmp_path):
    made = Made(four_stages(corpus, tmp_path / "run", ((), ())))
    assert made.engines == []


def test_a_reset_begins_the_count_of_all_anew(corpus, tmp_path):
    tree = four_stages(corpus, tmp_path / "run")
    tree["stages"][2]["optimizer_state"] = "reset"
    made = Made(tree)
    assert made.counts == [(0, [0]), (2, [0, 2]), (0, [0, 0, 0]), (2, [0, 0, 0, 2])]


@pytest.mark.parametrize("step", [BORDERS[0], 5, BORDERS[2]])
def test_a_resume_inside_and_at_a_border_has_the_engine_of_its_stage(corpus, tmp_path, step):
    """At a border it is loaded into the engine of the stage that ended, and then carried over."""
    tree = four_stages(corpus, tmp_path / "run")
    signals = StopAfter(step - 1, "forward and backward")
    first = Made(tree, signals.prepare, signals=signals)
    again = Made(tree)
    assert (again.run.code, again.run.started_at) == (EXIT_DONE, step)
    assert again.run.state.updates_before == [0, 2, 4, 6]
    assert [frozen for _, frozen in first.engines + again.engines] == [True, False]
    whole = Made(four_stages(corpus, tmp_path / "whole"))
    assert values(tmp_path / "run", "loss") == values(tmp_path / "whole", "loss")
    assert again.run.at_end == whole.run.at_end


def test_a_rollback_over_a_border_goes_back_to_the_engine_of_the_stage_before(corpus, tmp_path):
    tree = four_stages(corpus, tmp_path / "run", ((), ("layers.0.*",)), stability=STABILITY | {"window": 2})
    tree["stages"] = [stage | {"duration": {"steps": 4}} for stage in tree["stages"]]
    tree["checkpoint"] |= {"every_steps": 3}

    def prepare(trainer: Any) -> None:
        spike(trainer, (4, 5))
        go_back = trainer.go_back

        def without_border(first: int) -> None:
            trainer.checkpoints.settle()
            shutil.rmtree(step_path(tmp_path / "run" / "checkpoints", 4))
            go_back(first)

        trainer.go_back = without_border

    made = Made(tree, prepare)
    assert (made.run.code, made.run.state.step, made.run.state.rollbacks) == (EXIT_DONE, LAST, 1)
    assert [frozen for _, frozen in made.engines] == [True, False, True]
    assert made.run.state.updates_before == [0, 4]
