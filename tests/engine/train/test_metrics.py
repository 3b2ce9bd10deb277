import json
import logging
import os
from pathlib import Path

from engine.train import metrics, wandb_files
from engine.train.metrics import METRICS, JsonLines, Metrics, TensorBoard, read_metrics
from engine.train.plot import PLOT
from tests.distributed.runs import run_config, run_tree


def record(step: int, loss: float = 1.0) -> dict[str, float | int]:
    return {
        "step": step,
        "loss": loss,
        "gradient_norm": 0.5,
        "learning_rate": 1e-3,
        "tokens_per_second": 10.0,
        "step_seconds": 2.0,
    }


def test_steps_beyond_the_resumed_one_are_cut_and_written_anew(tmp_path):
    first = JsonLines(tmp_path, resumed_at=0)
    for step in (1, 2, 3, 4):
        first.write(record(step, loss=step))
    first.close()
    second = JsonLines(tmp_path, resumed_at=2)
    second.write(record(3, loss=30))
    second.close()
    assert [(item["step"], item["loss"]) for item in read_metrics(tmp_path)] == [(1, 1), (2, 2), (3, 30)]


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    (tmp_path / METRICS).write_text(json.dumps(record(1)) + '\n{"step": 2, "lo')
    assert [item["step"] for item in read_metrics(tmp_path)] == [1]
    JsonLines(tmp_path, resumed_at=5).close()
    assert (tmp_path / METRICS).read_text() == json.dumps(record(1)) + "\n"


def test_numbers_that_are_none_are_left_out(tmp_path):
    lines = JsonLines(tmp_path, resumed_at=0)
    Metrics([lines]).write({"step": 1, "loss": float("nan"), "gradient_norm": float("inf"), "skipped": 1})
    lines.close()
    assert (tmp_path / METRICS).read_text() == '{"step": 1, "skipped": 1}\n'


def test_tensorboard_shows_each_step_once_after_a_restart(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoard(tmp_path, resumed_at=0)
    for step in (1, 2, 3):
        first.write(record(step, loss=step))
    first.close()
    second = TensorBoard(tmp_path, resumed_at=1)
    second.write(record(2, loss=20))
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]


def test_tensorboard_loses_nothing_with_a_killed_process(tmp_path):
    """The first writer is never closed, as by SIGKILL; what it was given is there, and what lies beyond is hidden."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed = TensorBoard(tmp_path, resumed_at=0)
    for step in range(1, 8):
        killed.write(record(step, loss=step))
    second = TensorBoard(tmp_path, resumed_at=5)
    for step in (6, 7, 8):
        second.write(record(step, loss=10 * step))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.0), (6, 60.0), (7, 70.0), (8, 80.0)
    ]  # fmt: skip


def test_wandb_goes_on_with_the_same_run_and_each_step_once(tmp_path):
    """Killed in step 6 after the checkpoint of step 4, with row 4 not yet on the disk; then rolled back to 2."""
    config = run_config(run_tree(tmp_path, tmp_path, logging={"wandb": "offline"}))

    def trained(resumed_at: int, steps: range) -> None:
        lines, sink = JsonLines(tmp_path, resumed_at), metrics.Wandb(config, resumed_at)
        for step in steps:
            lines.write(record(step))
            sink.write(record(step))
        sink.close()
        lines.close()

    def files() -> list[Path]:
        return sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))

    def steps_by_start() -> list[list[int]]:
        return [
            [step for _, step in wandb_files.rows(path)]
            for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
        ]

    trained(0, range(1, 7))
    (first,) = files()
    assert steps_by_start() == [[1, 2, 3, 4, 5, 6]]
    row_4 = next(at for at, step in wandb_files.rows(first) if step == 4)
    os.truncate(first, row_4 + 20)
    assert steps_by_start() == [[1, 2, 3]], "a row that was cut off in the middle is none"
    trained(4, range(5, 8))
    assert steps_by_start() == [[1, 2, 3], [4, 5, 6, 7]]
    trained(2, range(3, 5))
    assert steps_by_start() == [[1, 2], [], [3, 4]]
    assert {path.stem for path in tmp_path.glob("wandb/offline-run-*/*.wandb")} == {
        f"run-{(tmp_path / 'wandb-id').read_text()}"
    }


def test_wandb_rows_in_later_blocks_of_the_log_are_found(tmp_path):
    """Several blocks' worth of rows: some record is split between two."""
    sink = metrics.Wandb(run_config(run_tree(tmp_path, tmp_path, logging={"wandb": "offline"})), 0)
    for step in range(1, 501):
        sink.write(record(step))
    sink.close()
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert path.stat().st_size > 3 * wandb_files.BLOCK_BYTES
    assert [step for _, step in wandb_files.rows(path)] == list(range(1, 501))
    assert wandb_files.cut(tmp_path, (tmp_path / "wandb-id").read_text(), 400) == set(range(1, 401))
    assert [step for _, step in wandb_files.rows(path)] == list(range(1, 401))


def test_a_tracker_that_cannot_start_does_not_cost_the_run(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError("no such tracker")

    monkeypatch.setattr(metrics, "TensorBoard", fail)
    logging.getLogger("palimpsest").propagate = True
    tree = run_tree(tmp_path, tmp_path, logging={"tensorboard": True})
    opened = metrics.open_metrics(run_config(tree), resumed_at=0)
    opened.write(record(1))
    opened.close()
    assert "TensorBoard cannot start and is left out: no such tracker" in caplog.text
    assert [item["step"] for item in read_metrics(tmp_path)] == [1]


def test_the_plot_is_drawn_from_what_was_written(tmp_path):
    opened = metrics.open_metrics(run_config(run_tree(tmp_path, tmp_path, logging={"plot": True})), resumed_at=0)
    for step in range(1, 9):
        opened.write(record(step, loss=9 - step))
    opened.write({"step": 8, "validation_loss": 2.0})
    opened.close()
    assert (tmp_path / PLOT).read_bytes().startswith(b"\x89PNG")


def test_ranks_that_do_not_speak_write_nothing(tmp_path):
    Metrics([]).write(record(1))
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_fails_in_the_middle_does_not_cost_the_run(caplog):
    class Failing:
        def write(self, record):
            raise OSError("disk quota")

        def close(self):
            raise AssertionError("was left out")

    logging.getLogger("palimpsest").propagate = True
    tracker = metrics.Tracker("wandb", Failing)
    tracker.write(record(1))
    tracker.write(record(2))
    tracker.close()
    assert caplog.text.count("wandb cannot take a record and is left out: disk quota") == 1


def test_a_line_without_a_step_ends_the_records(tmp_path):
    (tmp_path / METRICS).write_text(json.dumps(record(1)) + "\n{}\n" + json.dumps(record(2)) + "\n")
    assert [item["step"] for item in read_metrics(tmp_path)] == [1]
