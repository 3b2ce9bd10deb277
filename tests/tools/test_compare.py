"""`palimpsest compare` as a user calls it."""

import json

import pytest
from PIL import Image

from engine.cli import main
from engine.config import save
from engine.train.records import METRICS
from tests.tools.run_folders import make_run


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def compare(capsys, *arguments: object) -> dict:
    assert main(["compare", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, code: int, *arguments: object) -> str:
    assert main(["compare", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("allowed: ") == 1
    return captured.err


def test_metrics_stand_side_by_side_and_are_drawn(tmp_path, capsys):
    make_run(tmp_path / "a", 6, losses={3: 0.01})
    make_run(tmp_path / "b", 8, "optimizer.learning_rate=0.5")
    tree = compare(capsys, "a", "b")
    first, other = tree["runs"]
    assert (first["step"], other["step"], first["tokens"], other["tokens"]) == (6, 8, 3072, 4096)
    assert first["final_training_loss"] == {"step": 6, "loss": 1 / 6}
    assert first["best_training_loss"] == {"step": 3, "loss": 0.01}
    assert other["best_validation_loss"] == {"step": 4, "loss": 0.5}
    assert (first["tokens_per_second"], first["seconds_in_steps"]) == (512.0, 6.0)
    (beside,) = tree["compared_with_first"]
    assert [change["key"] for change in beside["changes"]] == ["optimizer.learning_rate"]
    with Image.open("compare.png") as image:
        assert image.size == (960, 540)
    assert main(["compare", "a", "b", "--output", "b.png"]) == 0
    text = capsys.readouterr().out
    for part in (
        "0.0100 (step 3)",
        "0.1250 (step 8)",
        "512",
        "optimizer.learning_rate: ",
        "b.png",
        "part at step 3: loss",
    ):
        assert part in text


def test_runs_part_exactly_before_they_part_beyond_a_tolerance(tmp_path, capsys):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", losses={2: 0.5 * (1 + 1e-6), 5: 0.2 * 1.01})
    make_run(tmp_path / "same")
    near, same = compare(capsys, "a", "b", "same")["compared_with_first"]
    assert near["parted"] == {"step": 2, "metric": "loss", "first": 0.5, "other": 0.5 * (1 + 1e-6)}
    assert near["parted_beyond"]["step"] == 5
    assert (same["parted"], same["parted_beyond"], same["common_steps"]) == (None, None, 6)
    (wide,) = compare(capsys, "a", "b", "--tolerance", "0.02")["compared_with_first"]
    assert (wide["parted"]["step"], wide["parted_beyond"]) == (2, None)


def test_times_and_evaluations_at_other_steps_part_no_runs(tmp_path, capsys):
    make_run(tmp_path / "a")
    other = make_run(tmp_path / "b") / METRICS
    text = other.read_text(encoding="utf-8").replace('"step_seconds": 1.0', '"step_seconds": 2.0')
    text = "".join(line for line in text.splitlines(keepends=True) if "validation" not in line)
    other.write_text(text, encoding="utf-8")
    assert compare(capsys, "a", "b")["compared_with_first"][0]["parted"] is None


def test_a_loss_that_was_finite_in_one_of_both_parts_them(tmp_path, capsys):
    make_run(tmp_path / "a")
    other = make_run(tmp_path / "b") / METRICS
    other.write_text(other.read_text(encoding="utf-8").replace(f'"loss": {1 / 3}, ', ""), encoding="utf-8")
    (found,) = compare(capsys, "a", "b")["compared_with_first"]
    assert found["parted"] == found["parted_beyond"] == {"step": 3, "metric": "loss", "first": 1 / 3, "other": None}


def test_a_run_that_goes_on_is_compared_as_far_as_it_is(tmp_path, capsys):
    make_run(tmp_path / "a", 9)
    with (make_run(tmp_path / "b", 5) / METRICS).open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "loss": 0.1')
    (found,) = compare(capsys, "a", "b")["compared_with_first"]
    assert (found["common_steps"], found["parted"]) == (5, None)


def test_runs_without_a_common_step_say_so(tmp_path, capsys):
    make_run(tmp_path / "a", 3)
    other = make_run(tmp_path / "b", 9) / METRICS
    other.write_text("".join(other.read_text(encoding="utf-8").splitlines(keepends=True)[4:]), encoding="utf-8")
    assert main(["compare", "a", "b"]) == 0
    assert "no step in common" in capsys.readouterr().out


@pytest.mark.parametrize(("num_steps", "words"), [(0, "no step"), (1, "one step")])
def test_a_run_without_a_curve_is_refused(tmp_path, capsys, num_steps, words):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", num_steps)
    assert f"b has records of {words} in {METRICS}" in refused(capsys, 1, "a", "b")


def test_what_is_no_run_is_refused(tmp_path, capsys):
    make_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    assert "empty is no run folder" in refused(capsys, 2, "a", "empty")
    assert "none does not exist" in refused(capsys, 2, "a", "none")
    assert "only a to compare" in refused(capsys, 2, "a", "a")
    assert "--output b.jpg" in refused(capsys, 2, "a", "empty", "--output", "b.jpg")


def test_another_model_is_refused_unless_it_is_asked_for(tmp_path, capsys):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", 6, "model.num_layers=1")
    assert "another model than a: model.num_layers: 4 -> 1" in refused(capsys, 2, "a", "b")
    (found,) = compare(capsys, "a", "b", "--other-models")["compared_with_first"]
    assert [change["key"] for change in found["changes"]] == ["model.num_layers"]


def test_a_configuration_that_cannot_be_read_hides_only_its_changes(tmp_path, capsys):
    make_run(tmp_path / "a")
    (make_run(tmp_path / "b") / save.FILE).write_text("old_section: {}\n", encoding="utf-8")
    (found,) = compare(capsys, "a", "b")["compared_with_first"]
    assert (found["changes"], found["common_steps"]) == (None, 6)


@pytest.mark.filterwarnings("error")
def test_names_in_any_script_are_drawn(tmp_path, capsys):
    for name in ("_hidden", "日本語 $x", "русский"):
        make_run(tmp_path / name)
    compare(capsys, "_hidden", "日本語 $x", "русский")


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path, capsys):
    make_run(tmp_path / "one" / "run")
    make_run(tmp_path / "two" / "run")
    assert main(["compare", "one/run", "two/run"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["one/run", "two/run"]
