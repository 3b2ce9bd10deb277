import json
import logging
import math
import os
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

from engine.train import metrics, wandb_files
from engine.train.console import Terminal
from engine.train.metrics import METRICS, JsonLines, Metrics, TensorBoard, read_metrics
from engine.train.plot import PLOT
from tests.distributed.runs import run_config, run_tree
from tests.engine.train.short_runs import run, stage


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


def test_records_that_cannot_be_written_are_dropped_and_said_once(tmp_path, caplog):
    """On a disk that is full for two records, which takes a part of each; the file stays one record a line."""
    logging.getLogger("palimpsest").propagate = True
    sink = Metrics([JsonLines(tmp_path, resumed_at=0)])
    sink.write({"step": 1, "loss": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / METRICS).stat().st_size + 5, hard))
    try:
        sink.write({"step": 2, "loss": 2.0})
        sink.write({"step": 3, "loss": 3.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    sink.write({"step": 4, "loss": 4.0})
    sink.close()
    assert [item["step"] for item in read_metrics(tmp_path)] == [1, 4]
    assert [item.message for item in caplog.records] == [
        "metrics.jsonl cannot be written (File too large): records are dropped until it can"
    ]


def test_a_sink_that_fails_keeps_nothing_from_the_others(tmp_path, caplog, monkeypatch):
    logging.getLogger("palimpsest").propagate = True
    terminal, lines = Terminal(run(stage(2))), JsonLines(tmp_path, resumed_at=0)
    sink = Metrics([terminal, lines])
    full = Path("/dev/full").open("w")  # noqa: SIM115  what it could not write is written once more as it is closed
    monkeypatch.setattr(sys, "stdout", full)
    for step in (1, 2):
        sink.write(record(step))
    monkeypatch.undo()
    with suppress(OSError):
        full.close()
    sink.close()
    assert [item["step"] for item in read_metrics(tmp_path)] == [1, 2]
    assert [item.message for item in caplog.records] == [
        "standard output cannot be written (No space left on device): records are dropped until it can"
    ]


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


def test_wandb_goes_on_with_the_same_run_and_each_step_once(tmp_path, monkeypatch):
    """Killed in step 6 after the checkpoint of step 4, with row 4 not yet on the disk; then rolled back to 2.

    All starts are in one second, where wandb gives their folders further names.
    """
    monkeypatch.setattr("wandb.sdk.wandb_init.time", SimpleNamespace(**vars(time) | {"time": lambda: 1.7e9}))
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
    assert steps_by_start() == [[1], [], [2, 3, 4]]
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
    run_id = (tmp_path / "wandb-id").read_text()
    before, cuts = path.read_bytes(), sorted({499, 400, 3, 2, 1, *range(5, 500, 37)}, reverse=True)
    for block in range(path.stat().st_size // wandb_files.BLOCK_BYTES + 2):
        starts = [(at, step) for at, step in wandb_files.rows(path) if at >= block * wandb_files.BLOCK_BYTES]
        assert list(wandb_files.rows(path, block)) == starts
    for last in cuts:
        assert wandb_files.cut(tmp_path, run_id, last + 1) == last
        assert [step for _, step in wandb_files.rows(path)] == list(range(1, last + 1))
        assert before.startswith(path.read_bytes())
    assert wandb_files.cut(tmp_path, run_id, 9) == 1, "nothing is left to cut"
    assert wandb_files.cut(tmp_path, run_id, 0) == 0


def test_wandb_has_one_row_of_a_step_whose_evaluation_came_after_a_restart(tmp_path):
    """A signal in step 4 puts its evaluation off to the next start."""
    config = run_config(run_tree(tmp_path, tmp_path, logging={"wandb": "offline"}))
    opened = metrics.open_metrics(config, resumed_at=0)
    for step in range(1, 5):
        opened.write(record(step))
    opened.close()
    opened = metrics.open_metrics(config, resumed_at=4)
    opened.write({"step": 4, "validation_loss": 3.0})
    opened.write(record(5))
    opened.close()
    rows = [step for path in tmp_path.glob("wandb/offline-run-*/*.wandb") for _, step in wandb_files.rows(path)]
    assert sorted(rows) == [1, 2, 3, 4, 5]


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


def test_a_loss_that_is_no_number_is_shown_and_left_out_of_the_files(tmp_path, capsys):
    tree = run_tree(tmp_path, tmp_path, logging={"tensorboard": True})
    opened = metrics.open_metrics(run_config(tree), resumed_at=0)
    opened.write(record(4, loss=math.nan))
    opened.write({"step": 4, "validation_loss": math.nan, "validation_seconds": 1.0})
    opened.write({"step": 5, "validation_loss": math.nan})
    opened.close()
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("loss ")[1].split()[0] for line in shown] == ["nan", "nan", "nan"]
    text = (tmp_path / METRICS).read_text()
    assert "NaN" not in text
    assert json.loads(text.splitlines()[1]) == {"step": 4, "validation_seconds": 1.0}
    assert metrics.is_evaluation(json.loads(text.splitlines()[1]))


def test_tensorboard_shows_each_step_once_when_the_clock_goes_back(tmp_path, monkeypatch):
    """The second start is on a node whose clock is an hour behind, the third begins within the second's second."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    now = 1_700_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    for resumed_at, clock in ((0, now), (4, now - 3600), (6, now - 3600), (2, now + 5)):
        now = clock
        sink = TensorBoard(tmp_path, resumed_at)
        for step in range(resumed_at + 1, 9):
            sink.write(record(step, loss=10 * resumed_at + step))
        sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    expected = [(step, float(step)) for step in (1, 2)] + [(step, 20.0 + step) for step in range(3, 9)]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected


def test_tensorboard_files_follow_those_that_torch_wrote(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard.writer import SummaryWriter

    with SummaryWriter(str(tmp_path / "tensorboard")) as earlier:
        for step in (1, 2, 3):
            earlier.add_scalar("loss", step, step)
    sink = TensorBoard(tmp_path, resumed_at=2)
    sink.write(record(3, loss=30))
    sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_rollback_stays_in_the_records_as_long_as_the_state_counts_it(tmp_path):
    """Back from 8 to 4 and killed; gone on from 4, back from 7 to 2; then an older checkpoint that knows of none."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = run_config(run_tree(tmp_path, tmp_path, logging={"tensorboard": True}))

    def start(resumed_at: int, num_rollbacks: int, *written: dict[str, float | int]) -> list[tuple[int, float]]:
        opened = metrics.open_metrics(config, resumed_at, num_rollbacks)
        for one in written:
            opened.write(one)
        opened.close()
        found = [(item["step"], item["rollback"]) for item in read_metrics(tmp_path) if "rollback" in item]
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        shown = events.Scalars("rollback") if "rollback" in events.Tags()["scalars"] else []
        assert [(event.step, event.value) for event in shown] == found
        return found

    def rollback(step: int, number: int) -> dict[str, float | int]:
        return {"step": step, "rollback": number, "left_out_from": 32, "left_out_to": 48}

    start(0, 0, *map(record, range(1, 9)))
    assert start(4, 1, rollback(5, 1)) == [(5, 1)]
    assert start(4, 1, *map(record, range(5, 8))) == [(5, 1)]
    assert start(2, 2, rollback(3, 2)) == [(3, 1), (3, 2)]
    assert start(2, 1, *map(record, range(3, 5))) == [(3, 1)]
    assert start(4, 1) == [(3, 1)]
    assert start(1, 0) == []
    assert [item["step"] for item in read_metrics(tmp_path)] == [1]
