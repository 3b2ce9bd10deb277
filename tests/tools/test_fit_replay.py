"""`palimpsest fit-replay` as a user calls it: short runs over a fake pipeline, from the checkpoint of a run."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.cli import main
from engine.config.load import load_run, read_tree
from engine.config.save import save_tree
from tests.distributed.runs import LENGTH, run_tree
from tests.engine.train.fake import fake_run, values

STEP_TOKENS = 8 * LENGTH
BORDER, WHOLE, SHORT = 4, 40, 16


def write_run(corpus: Path, folder: Path, stages: int = 2, **second: Any) -> Path:
    """The file of a run whose first stage is trained, and whose second one replays."""
    tree = run_tree(corpus, folder / "run")
    [stage] = tree["stages"]
    stage["data"]["validation"] = {"old": str(corpus / "validation")}
    data = {"train": str(corpus / "validation"), "validation": {"new": str(corpus / "train")}}
    tree["stages"] = [stage | {"name": "one", "duration": {"steps": BORDER}}]
    fake_run(tree)
    replay = {"ratio": 0.1, "source": str(corpus / "train")}
    schedule = {"shape": "rewarm", "unit": "tokens", "warmup": 4 * STEP_TOKENS}
    new = {"name": "two", "data": data, "duration": {"steps": WHOLE}, "replay": replay, "schedule": schedule}
    tree["stages"].append(stage | new | second)
    tree["stages"] = tree["stages"][:stages]
    save_tree({key: value for key, value in tree.items() if value is not None}, folder / "run.yaml")
    return folder / "run.yaml"


def call(capsys: Any, *arguments: object, code: int = 0) -> str:
    capsys.readouterr()
    assert main(["fit-replay", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def prepare(capsys: Any, run: Path, folder: Path, **options: Any) -> str:
    given = {"ratios": "0,0.05,0.25", "tokens": SHORT * STEP_TOKENS} | options
    code = given.pop("code", 0)
    named = [part for name, value in given.items() for part in (f"--{name}", value)]
    return call(capsys, run, *named, "--prepare", folder, code=code)


def test_short_runs_go_on_from_the_checkpoint_and_are_fitted(corpus, tmp_path, capsys):
    run, short = write_run(corpus, tmp_path), tmp_path / "short"
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    told = prepare(capsys, run, short)
    names = ["ratio-0", "ratio-0.05", "ratio-0.25"]
    assert [line.strip() for line in told.splitlines() if "palimpsest train" in line] == [
        f"palimpsest train {short}/{name}.yaml" for name in names
    ]
    told = call(capsys, short)
    assert told.count("has not come to its end") == 3
    assert "no recommendation" in told
    for name, ratio in zip(names, (0.0, 0.05, 0.25), strict=True):
        config = load_run(short / f"{name}.yaml")
        stage = config.stages[-1]
        assert stage.replay is not None
        assert (stage.num_steps, stage.replay.ratio) == (SHORT, ratio)
        assert stage.schedule.warmup == 2 * STEP_TOKENS, "4 of 40 steps are 2 of 16"
        done = fake_run(read_tree(short / f"{name}.yaml"))
        assert (done.started_at, done.state.step) == (BORDER, BORDER + SHORT)
    assert {path: path.read_bytes() for path in before} == before, "the run itself is not touched"
    told = call(capsys, short)
    found = json.loads((short / "fit.json").read_text())
    assert (found["law"], found["unfinished"]) == ("cpt", [])
    assert ("recommended: replay.ratio" in told) == found["is_carried"] == ("no recommendation" not in told)
    assert f"forecast at step {WHOLE}" in told
    assert (short / "fit.png").stat().st_size > 1000
    # The fit begins at what the run had at the border, which is the same for all ratios.
    assert found["numbers"]["old"]["start"] == pytest.approx(
        values(tmp_path / "run", "validation_loss/old")[BORDER], rel=0.05
    )


def test_bad_calls_have_one_clear_error(corpus, tmp_path, capsys):
    run, short = write_run(corpus, tmp_path), tmp_path / "short"
    for options, part in (
        ({"ratios": "0,0.5"}, "--ratios: 2 different ones"),
        ({"ratios": "0,0.5,1"}, "--ratios: 1 is no ratio"),
        ({"ratios": "0;1"}, "--ratios 0;1"),
        ({"tokens": 5 * STEP_TOKENS}, "are 5 steps"),
        ({"tokens": 50 * STEP_TOKENS}, "are 50 steps"),
    ):
        error = prepare(capsys, run, short, code=2, **options)
        assert part in error
        assert "allowed:" in error
    assert not short.exists(), "nothing is written"
    assert "--prepare DIR beside them" in call(capsys, run, "--tokens", 5, code=2)
    assert "--prepare without" in call(capsys, run, "--prepare", short, code=2)
    assert "holds no runs.json" in call(capsys, tmp_path, code=2)
    (short / "x").mkdir(parents=True)
    assert "exists" in prepare(capsys, run, short, code=2)


def test_a_stage_without_replay_or_a_run_that_is_elsewhere_is_refused(corpus, tmp_path, capsys):
    alone = write_run(corpus, tmp_path / "alone", stages=1)
    assert "palimpsest continue" in prepare(capsys, alone, tmp_path / "short", code=2)
    without = write_run(corpus, tmp_path / "without", replay=None)
    assert "has no stages.1.replay" in prepare(capsys, without, tmp_path / "short", code=2)
    early = write_run(corpus, tmp_path / "early")
    tree = read_tree(early)
    tree["stages"][0]["duration"] = {"steps": BORDER + 2}  # the run is not there yet
    save_tree(tree, early)
    assert "the checkpoint at the end of stage one" in prepare(capsys, early, tmp_path / "short", code=1)
