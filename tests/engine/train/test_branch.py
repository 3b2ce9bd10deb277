"""A branch of a run goes on as the run itself does, and neither disturbs the other."""

import shutil
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.train.branch import branch
from engine.train.records import read_metrics
from tests.distributed.runs import Tree, run_tree
from tests.engine.train.fake import fake_run, values

STEPS = 4


def two_stages(corpus: Path, folder: Path, **second: object) -> Tree:
    tree = run_tree(corpus, folder, reservoir={"rows": 40})
    tree["checkpoint"]["every_steps"] = 2
    [stage] = tree["stages"]
    new = {"name": "two", "duration": {"steps": 3}, "replay": {"ratio": 0.25}}
    tree["stages"] = [stage | {"name": "one", "duration": {"steps": STEPS}}, stage | new | second]
    return tree


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_branch_goes_on_as_the_run_would_have(corpus, tmp_path):
    tree = two_stages(corpus, tmp_path / "run")
    whole = fake_run(tree)
    branch(tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}", tmp_path / "branch")
    assert {record["step"] for record in read_metrics(tmp_path / "branch")} == set(range(STEPS + 1))
    before = files(tmp_path / "run")
    found = fake_run(tree | {"folder": str(tmp_path / "branch")})
    assert (found.started_at, found.at_end) == (STEPS, whole.at_end)
    for name in ("loss", "validation_loss", "replay_samples"):  # the reservoir came along
        assert values(tmp_path / "branch", name) == values(tmp_path / "run", name)
    assert files(tmp_path / "run") == before
    shutil.rmtree(tmp_path / "run")
    assert fake_run(tree | {"folder": str(tmp_path / "branch")}).started_at == STEPS + 3, "it stands on its own"


def test_a_branch_may_go_another_way(corpus, tmp_path):
    fake_run(two_stages(corpus, tmp_path / "run"))
    branch(tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}", tmp_path / "branch")
    other = two_stages(corpus, tmp_path / "branch", replay=None, duration={"steps": 2})
    assert fake_run(other).state.step == STEPS + 2


def test_a_folder_that_holds_something_is_no_branch(corpus, tmp_path):
    fake_run(two_stages(corpus, tmp_path / "run"))
    (tmp_path / "branch").mkdir()
    (tmp_path / "branch" / "note").write_text("mine")
    with pytest.raises(ConfigError, match="branch exists"):
        branch(tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}", tmp_path / "branch")
