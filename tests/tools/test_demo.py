"""The demonstration's own parts: what text it takes, how it sizes itself, and that its proof can fail."""

import ast
import json
import math
import subprocess
from pathlib import Path

import pytest

from engine.config.load import load_run
from engine.config.resolve import check, resolve
from engine.models.gpt import specs
from engine.train.run_checkpoints import SHOWN_SAMPLES
from tools.demo import __main__ as demo
from tools.demo import proof, text
from tools.demo.__main__ import CONFIG, SECOND_LAYOUT, TIMING
from tools.demo.commands import Commands, DemoFailed
from tools.demo.sizes import (
    FEWEST_STEPS,
    GOAL_SECONDS,
    KILLED_AFTER,
    MOST_STEPS,
    STARTS_TO_COME,
    STEPS_BEYOND,
    sizes,
)

REPOSITORY = Path(__file__).parents[2]
EXPECTED = proof.Expected("step-00000020", 20, 6.5, "[(0, 0, 5)]", "ab12")


# text


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for name in ("one.py", "two.py", "package/three.py", "test/four.py", "site-packages/five.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'"""About {name}."""\n\ndef f():\n    """Does f."""\n' + "x = 1\n" * 50, encoding="utf-8")
    (tmp_path / "broken.py").write_bytes(b"\xff")
    return tmp_path


def test_each_module_gives_source_or_docstrings_and_never_both(library: Path) -> None:
    size = (library / "one.py").stat().st_size
    (_, source), (_, docstrings) = text.modules(library, source_bytes=2 * size + 20)
    names = [name for name, _ in source + docstrings]
    assert sorted(names) == ["one.py", "package/three.py", "two.py"]
    assert len(source) == 2
    ((name, documentation),) = docstrings
    assert documentation == f"About {name}.\n\nf: Does f."


def test_the_choice_is_the_same_each_time_and_not_alphabetical(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"m{number:02}.py").write_text(f"x = {number}\n" * 40, encoding="utf-8")
    first, again = text.modules(tmp_path, 5000), text.modules(tmp_path, 5000)
    assert first == again
    names = [name for name, _ in first[0][1]]
    assert names != sorted(names)


def test_docstrings_of_what_does_not_parse() -> None:
    assert list(text.docstrings_of("def f(:")) == []


def test_collected_text_is_enough_and_not_too_much(tmp_path: Path) -> None:
    counts = text.collect(tmp_path)
    assert 2_000_000 < sum(counts.values()) <= text.TOTAL_BYTES < 10_000_000
    for name, size in counts.items():
        documents = [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
        assert sum(len(document["text"].encode()) for document in documents) == size
        if name == "source.jsonl":
            ast.parse(documents[0]["text"])


# sizes


def test_a_slower_machine_does_less() -> None:
    steps = [sizes([9.0, 9.0, seconds, seconds], 8.0, 60.0).steps for seconds in (0.01, 0.5, 1.0, 2.0, 50.0)]
    assert steps == sorted(steps, reverse=True)
    assert (steps[0], steps[-1]) == (MOST_STEPS, FEWEST_STEPS)
    assert len(set(steps)) == len(steps)


def test_what_fits_stays_within_the_goal() -> None:
    found = sizes([1.0] * 8, start_seconds=8.0, elapsed_seconds=60.0)
    assert 60 + STARTS_TO_COME * 8 + (found.steps + found.new_steps) * 1.0 <= GOAL_SECONDS
    assert 0 < found.new_steps < found.steps


@pytest.mark.parametrize("seconds", [0.01, 0.7, 1.3, 100.0])
def test_the_kill_comes_between_two_checkpoints(seconds: float) -> None:
    found = sizes([seconds] * 4, 5.0, 40.0)
    assert found.steps % found.checkpoint_every == 0
    assert found.checkpoint_every * KILLED_AFTER < found.kill_at < found.checkpoint_every * (KILLED_AFTER + 1)
    assert found.kill_at - found.checkpoint_every * KILLED_AFTER == STEPS_BEYOND


# the run


def test_the_run_is_small_and_fits_both_layouts() -> None:
    choices: tuple[tuple[str, ...], ...] = ((), SECOND_LAYOUT, TIMING)
    for overrides in choices:
        config = load_run(REPOSITORY / CONFIG, [*overrides])
        assert not check(config)
        assert resolve(config, 2).world_size == 2
        assert 1_000_000 < sum(math.prod(spec.shape) for spec in specs(config.model)) <= 4_000_000


def test_the_run_file_has_the_sizes_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "RUN_FILE", str(tmp_path / "run.yaml"))
    monkeypatch.setattr(demo, "CONFIG", str(REPOSITORY / CONFIG))
    found = sizes([1.0] * 8, start_seconds=8.0, elapsed_seconds=60.0)
    demo.write_run_file(found, ("precision.dtype=fp32",))
    config = load_run(tmp_path / "run.yaml")
    [stage] = config.stages
    assert (stage.num_steps, config.precision.dtype) == (found.steps, "fp32")
    assert config.evaluation.every_steps == config.checkpoint.every_steps == found.checkpoint_every
    assert stage.global_batch_size * stage.sequence_length == demo.STEP_TOKENS


# proof


def test_what_the_run_prints_is_what_the_proof_reads() -> None:
    line = "19:00:00 I [rank 0] next samples [(0, 0, 5), (0, 1, 6)], hash of the next 1024: 811224373abc6eae\n"
    assert proof.reported("noise\n" + line) == ("[(0, 0, 5), (0, 1, 6)]", "811224373abc6eae")
    assert proof.HASHED_SAMPLES == SHOWN_SAMPLES


def test_a_run_that_does_not_say_that_it_resumes() -> None:
    with pytest.raises(DemoFailed, match="did not say that it resumes"):
        proof.reported("starting at step 0")


def test_only_steps_beyond_the_checkpoint_that_both_did_are_compared(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 7.0 - step / 10} for step in range(1, 24)] + [{"step": 20, "validation_loss": 5.0}]
    content = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "metrics.jsonl").write_text(content + '\n{"step": 24, "lo', encoding="utf-8")
    killed = proof.losses(tmp_path)
    assert max(killed) == 23
    compared = proof.compare(killed, {21: 4.9, 22: 4.8, 30: 1.0}, after=20)
    assert [at.step for at in compared] == [21, 22]
    assert "4.90000" in proof.as_text(EXPECTED, ("[(0, 0, 5)]", "ab12"), compared)


def test_the_proof_accepts_rounding_and_nothing_else() -> None:
    said = (EXPECTED.samples, EXPECTED.hash)
    proof.check(EXPECTED, said, [proof.Compared(21, 6.5, 6.5001)], tolerance=1e-3)
    with pytest.raises(DemoFailed, match="takes samples"):
        proof.check(EXPECTED, (EXPECTED.samples, "other"), [proof.Compared(21, 6.5, 6.5)], 1e-3)
    with pytest.raises(DemoFailed, match="at step 22 the killed run had loss"):
        proof.check(EXPECTED, said, [proof.Compared(21, 6.5, 6.5), proof.Compared(22, 6.5, 6.6)], 1e-3)
    with pytest.raises(DemoFailed, match="at step 21"):
        proof.check(EXPECTED, said, [proof.Compared(21, 6.5, float("nan"))], 1e-3)
    with pytest.raises(DemoFailed, match="no step was done by both"):
        proof.check(EXPECTED, said, [], 1e-3)


def test_a_run_without_a_checkpoint_has_no_proof(tmp_path: Path) -> None:
    with pytest.raises(DemoFailed, match="holds no checkpoint"):
        proof.expect(tmp_path)


# commands


def test_a_command_is_shown_run_and_logged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = Commands(tmp_path).run("--version")
    assert output.startswith("palimpsest ")
    assert capfd.readouterr().out == "$ palimpsest --version\n" + output
    assert (tmp_path / "01---version.log").read_text(encoding="utf-8") == output


def test_a_command_that_fails_says_which_and_where_its_log_is(tmp_path: Path) -> None:
    with pytest.raises(DemoFailed) as caught:
        Commands(tmp_path).run("plan", "nowhere.yaml")
    assert "`palimpsest plan nowhere.yaml` ended with exit code 2" in caught.value.wrong
    assert str(tmp_path / "01-plan.log") in caught.value.remedy
    assert caught.value.exit_code != 0


def test_a_killed_command_is_no_failure_and_one_that_ends_first_is(tmp_path: Path) -> None:
    def kill(process: subprocess.Popen[bytes]) -> bool:
        process.kill()
        return True

    commands = Commands(tmp_path)
    commands.run("--version", watch=kill)
    with pytest.raises(DemoFailed, match="ended before it could be killed"):
        commands.run("--version", watch=lambda process: False)
