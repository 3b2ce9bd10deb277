"""`palimpsest status`: the progress of each run, by its folder alone, while it may go on."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.data.visible import visible
from engine.logs import duration
from engine.redact import redact, redacted

if TYPE_CHECKING:  # pydantic would make --help slow
    from engine.train.run_status import RunStatus

WORDS = {
    "done": "done",
    "appended": "done with its earlier stages; start it again to go on with what was appended",
    "stopped": "saved after a signal; start it again to go on",
    "failed": "failed",
    "ended": "ended without a word (killed, or its node was lost); start it again to go on",
    "new": "not started",
}


def main(
    paths: Annotated[
        list[Path], typer.Argument(metavar="RUN|FOLDER...", help="Run folders, folders of them, or run files.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print a list with everything of each run as JSON.")] = False,
) -> None:
    """Show where runs stand: step, loss, speed, time left, newest checkpoint, who uses the folder, how it ended.

    One run is shown in full; of several each has a line. A folder without a run of its own stands for those up to three
    levels below it.
    """
    from engine.checkpoint.interchange.initial import model_of
    from engine.config.load import load_run
    from engine.train.run_status import read_status, run_folders

    # A run file may have a stage that no start has seen yet; a folder has the configuration of the newest start.
    files = {file.folder: file for file in (load_run(path, None, model_of) for path in paths if path.is_file())}
    folders = dict.fromkeys(folder for path in paths for folder in run_folders(folder_of(path)))
    found = [read_status(folder, files.get(folder)) for folder in folders]
    if as_json:
        print(json.dumps(redacted([_as_json(status) for status in found]), indent=1))
    elif len(found) == 1:
        print(_lines(found[0]))
    else:
        print(_table(found))


def folder_of(path: Path) -> Path:
    """Return `place`, or the run folder that it names if it is a run file."""
    if not path.is_file():
        return path
    from engine.checkpoint.interchange.initial import model_of
    from engine.config.load import load_run

    return load_run(path, None, model_of).folder


def _as_json(status: RunStatus) -> dict[str, object]:
    paths = {"folder": str(status.folder), "checkpoint": status.checkpoint and str(status.checkpoint)}
    return asdict(status) | paths


def _lines(status: RunStatus) -> str:
    """Return the status of one run as lines of text."""
    rows = {
        "state": _state(status),
        "step": _step(status),
        "run stage": f"{status.run_stage_number} of {status.num_run_stages}, {status.run_stage}"
        if status.run_stage
        else "",
        "training loss": _number(status.loss, "{:.4f}"),
        "validation loss": _number(status.validation_loss, "{:.4f}", f" at step {status.validation_step}"),
        "tokens": _number(status.tokens, "{:,}"),
        "speed": _number(status.tokens_per_second, "{:,.0f}", " tokens/s"),
        "time left": _left(status),
        "newest record": _ago(status),
        "checkpoint": str(status.checkpoint or "none"),
        "error": status.outcome.error if status.outcome else "",
        "configuration": status.config_problem or "",
    }
    width = max(map(len, rows)) + 2
    shown = [f"  {name:<{width}}{_clean(text)}" for name, text in rows.items() if text]
    return "\n".join([_clean(f"run {status.name or status.folder.name} in {status.folder}"), *shown])


def _state(status: RunStatus) -> str:
    if (user := status.user) is not None:
        who = f"job {user.job} attempt {user.attempt}, process {user.pid} on {user.host}" if user.job else "just begun"
        return f"running: {who}" + ("" if user.confirmed else " (this file system does not say if it still does)")
    ended = status.outcome
    if ended is None or status.state != "failed":
        return WORDS[status.state]
    rank = "" if ended.rank is None else f", rank {ended.rank} first"
    return f"failed after step {ended.step}{rank} (exit code {ended.code}, job {ended.job} attempt {ended.attempt})"


def _step(status: RunStatus) -> str:
    if not status.num_steps:
        return f"{status.step:,}"
    return f"{status.step:,} of {status.num_steps:,} ({status.step / status.num_steps:.1%})"


def _left(status: RunStatus) -> str:
    if not status.seconds_left:
        return ""
    return duration(status.seconds_left) + ("" if status.user else ", once it runs")


def _ago(status: RunStatus) -> str:
    return "" if status.seconds_since_record is None else f"{duration(status.seconds_since_record)} ago"


def _number(value: float | None, form: str, after: str = "") -> str:
    return "" if value is None else form.format(value) + after


def _table(found: list[RunStatus]) -> str:
    """Return a line of text for each run, in columns."""
    rows = [("run", "state", "step", "loss", "validation", "tokens/s", "left", "record", "checkpoint", "used by")]
    for status in found:
        user = status.user
        # Short forms: ten columns have to fit a terminal.
        rows.append(
            (
                str(status.folder),
                status.state,
                f"{status.step}/{status.num_steps or '?'}",
                _number(status.loss, "{:.4f}"),
                _number(status.validation_loss, "{:.4f}"),
                _number(status.tokens_per_second, "{:,.0f}"),
                duration(status.seconds_left) if status.seconds_left else "",
                _ago(status),
                _number(status.checkpoint_step, "step {}"),
                f"{user.job or 'a new start'} on {user.host}" if user else "",
            )
        )
    shown = [[_clean(cell) or "-" for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in shown)


def _clean(text: str) -> str:
    """Return the text on one line, without control characters and credentials; anybody may have written it."""
    return visible(redact(text)).replace("\n", " ").replace("\t", " ")
