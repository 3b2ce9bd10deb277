"""`palimpsest status` as a user calls it, on folders of runs that go on, ended in every way, or are none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine import outcome
from engine.cli import main
from engine.config import save
from engine.config.load import read_tree
from engine.outcome import Outcome
from engine.run_folder import FILE, RunFolder, Start
from engine.train.records import METRICS
from engine.train.run_status import read_config
from tests.readme import REPOSITORY
from tests.tools.run_folders import make_run

USER = """
import sys
from pathlib import Path
from engine.run_folder import RunFolder, Start
folder = RunFolder(Path(sys.argv[1]), Start("nightly", 3))
folder.take(supervisor=True)
print("taken", flush=True)
sys.stdin.read()
"""


def status(capsys, *arguments: object) -> list[dict]:
    assert main(["status", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def lines(capsys, *arguments: object) -> list[str]:
    assert main(["status", *map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def refused(capsys, *arguments: object) -> str:
    assert main(["status", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_a_run_says_where_it_stands(tmp_path, capsys):
    folder = make_run(tmp_path / "one")
    for step in (3, 5):
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (found,) = status(capsys, folder)
    wanted = {"name": "one", "state": "ended", "step": 6, "num_steps": 10, "loss": 1 / 6, "tokens": 6 * 512}
    wanted |= {"run_stage_number": 1, "num_run_stages": 1, "validation_loss": 0.5, "validation_step": 4}
    wanted |= {"checkpoint_step": 5, "checkpoint": str(folder / "checkpoints" / "step-00000005")}
    wanted |= {"tokens_per_second": 512.0, "user": None, "outcome": None}
    assert {key: found[key] for key in wanted} == wanted
    assert found["seconds_left"] == pytest.approx(4 * 1.0 * (1 + 0.5 / 6)), "4 steps, and their share of evaluations"
    text = "\n".join(lines(capsys, folder))
    for part in ("6 of 10 (60.0%)", "0.1667", "0.5000 at step 4", "512 tokens/s", "4 s, once it runs", "step-00000005"):
        assert part in text


@pytest.mark.parametrize(
    ("code", "state", "words"),
    [
        (0, "done", "done"),
        (85, "stopped", "start it again to go on"),
        (1, "failed", "failed after step 6, rank 3 first (exit code 1, job nightly attempt 0)"),
    ],
)
def test_the_last_attempt_says_how_it_ended(tmp_path, capsys, code, state, words):
    folder = make_run(tmp_path / "one")
    ends = {0: (10, None, ""), 85: (6, None, ""), 1: (6, 3, "no memory")}
    outcome.write(folder, Outcome("nightly", 0, code, *ends[code]))
    assert status(capsys, folder)[0]["state"] == state
    text = "\n".join(lines(capsys, folder))
    assert words in text
    assert ("no memory" in text) == (code == 1)


def test_a_folder_in_use_names_its_user_and_a_killed_one_has_none(tmp_path, capsys):
    folder = make_run(tmp_path / "one")
    command = [sys.executable, "-c", USER, str(folder)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == "taken\n"
        (found,) = status(capsys, folder)
        assert (found["state"], found["user"]["job"], found["user"]["pid"]) == ("running", "nightly", user.pid)
        assert found["user"]["confirmed"]
        assert f"running: job nightly attempt 3, process {user.pid} on " in "\n".join(lines(capsys, folder))
        user.kill()
        user.wait()
    assert (folder / FILE).read_text(encoding="utf-8"), "whoever is killed leaves its name"
    (found,) = status(capsys, folder)
    assert (found["state"], found["user"]) == ("ended", None)


def test_a_start_that_was_killed_before_its_first_step_has_ended(tmp_path, capsys):
    folder = make_run(tmp_path / "one", 0)
    assert status(capsys, folder)[0]["state"] == "new"
    with RunFolder(folder, Start("nightly", 0)) as own:
        own.take()
    assert status(capsys, folder)[0]["state"] == "ended"


def test_a_torn_last_line_is_passed_over(tmp_path, capsys):
    folder = make_run(tmp_path / "one", 5)
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "loss": 0.1')
    (found,) = status(capsys, folder)
    assert (found["step"], found["loss"]) == (5, 1 / 5)


@pytest.mark.parametrize("num_steps", [0, 1])
def test_a_run_that_has_hardly_begun(tmp_path, capsys, num_steps):
    folder = make_run(tmp_path / "one", num_steps)
    (found,) = status(capsys, folder)
    assert (found["step"], found["num_steps"]) == (num_steps, 10)
    assert (found["seconds_left"] is None) == (num_steps == 0)
    assert f"{num_steps} of 10" in "\n".join(lines(capsys, folder))


def test_a_loss_that_was_not_finite_is_unknown(tmp_path, capsys):
    folder = make_run(tmp_path / "one")
    records = (folder / METRICS).read_text(encoding="utf-8")
    (folder / METRICS).write_text(records.replace(f'"loss": {1 / 6}, ', ""), encoding="utf-8")
    assert status(capsys, folder)[0]["loss"] is None


def test_a_configuration_that_cannot_be_read_hides_only_what_follows_from_it(tmp_path, capsys):
    folder = make_run(tmp_path / "one")
    (folder / save.FILE).write_text("old_section: {}\n", encoding="utf-8")
    (found,) = status(capsys, folder)
    assert (found["step"], found["num_steps"], found["seconds_left"]) == (6, None, None)
    assert "old_section" in found["config_problem"]
    assert "configuration" in "\n".join(lines(capsys, folder))


@pytest.mark.parametrize(("num_steps", "number", "name"), [(9, 1, "first"), (10, 2, "second"), (12, 2, "second")])
def test_a_run_of_two_stages_stands_in_the_one_of_its_next_step(tmp_path, capsys, num_steps, number, name):
    folder = make_run(tmp_path / "one", num_steps)
    config = read_config(folder)
    stages = tuple(config.stages[0].model_copy(update={"name": name}) for name in ("first", "second"))
    save.save_run(config.model_copy(update={"stages": stages}), folder)
    (found,) = status(capsys, folder)
    assert (found["run_stage_number"], found["num_run_stages"], found["run_stage"]) == (number, 2, name)
    assert found["num_steps"] == 20
    assert found["seconds_left"] == pytest.approx((20 - num_steps) * (1 + 0.5 / num_steps))


def test_several_runs_have_a_line_each(tmp_path, capsys):
    make_run(tmp_path / "runs" / "b", 3)
    make_run(tmp_path / "runs" / "group" / "a", 10)
    (tmp_path / "runs" / "notes").mkdir()
    shown = lines(capsys, tmp_path / "runs")
    assert [line.split()[:3] for line in shown[1:]] == [
        [str(tmp_path / "runs" / "b"), "ended", "3/10"],
        [str(tmp_path / "runs" / "group" / "a"), "ended", "10/10"],
    ]
    named = lines(capsys, tmp_path / "runs" / "b", tmp_path / "runs" / "group" / "a", tmp_path / "runs")
    assert len(named) == len(shown), "a run that is named twice is shown once"


def test_a_run_file_names_its_folder(tmp_path, capsys):
    folder = make_run(tmp_path / "one")
    file = tmp_path / "run.yaml"
    file.write_text((folder / save.FILE).read_text(encoding="utf-8"), encoding="utf-8")
    assert status(capsys, file)[0]["folder"] == str(folder)


def test_what_holds_no_run_is_refused_in_one_message(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} holds no run" in refused(capsys, tmp_path / "empty")
    assert f"{tmp_path / 'none'} does not exist" in refused(capsys, tmp_path / "none")
    make_run(tmp_path / "one")
    assert f"{tmp_path / 'empty'} holds no run" in refused(capsys, tmp_path / "one", tmp_path / "empty")


def test_control_characters_of_a_run_do_not_reach_the_terminal(tmp_path, capsys):
    folder = make_run(tmp_path / "one")
    outcome.write(folder, Outcome("a\x1b[2J", 0, 1, 6, 0, "line one\nline \x1b]0;two"))
    text = "\n".join(lines(capsys, folder))
    assert "\x1b" not in text
    assert "line one line \\x1b]0;two" in text


def test_neither_command_imports_torch(tmp_path):
    """In a fresh interpreter, with the picture of `compare` left out: importing is what takes the time."""
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    script = (
        "import sys\nfrom engine.cli import main\n"
        f"assert main(['status', {str(first)!r}]) == 0\n"
        "import engine.train.run_comparison as it\nit.draw = lambda *_: None\n"
        f"assert main(['compare', {str(first)!r}, {str(second)!r}]) == 0\n"
        "heavy = ('torch', 'deepspeed', 'transformers', 'datasets', 'pyarrow', 'matplotlib')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert not Path(tmp_path / "compare.png").exists()


def test_a_run_whose_file_has_a_stage_more_is_not_done(tmp_path, capsys):
    folder = make_run(tmp_path / "one", 10)
    outcome.write(folder, Outcome("nightly", 0, 0, 10))
    assert status(capsys, folder)[0]["state"] == "done"
    run = tmp_path / "run.yaml"
    text = (folder / save.FILE).read_text(encoding="utf-8")
    run.write_text(text, encoding="utf-8")
    assert status(capsys, run)[0]["state"] == "done"
    tree = read_tree(run)
    tree["stages"].append(tree["stages"][0] | {"name": "more"})
    run.write_text(json.dumps(tree), encoding="utf-8")
    (found,) = status(capsys, run)
    assert (found["state"], found["step"], found["num_steps"], found["run_stage"]) == ("appended", 10, 20, "more")
    assert "start it again to go on with what was appended" in "\n".join(lines(capsys, run))
    said = outcome.read(folder)
    assert said is not None
    assert [said.ends(steps) for steps in (9, 10, 11)] == [True, True, False]
    assert not Outcome("nightly", 0, 85, 10).ends(10), "saved, and wants to be started again"
