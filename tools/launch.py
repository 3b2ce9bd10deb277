"""`palimpsest launch`: starts the ranks of a run on this node and watches over them.

The configuration is checked for the world that it will get before anything starts, so a mistake costs no start-up.
"""

from __future__ import annotations

import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from engine import logs
from engine.config.load import load_run
from engine.config.resolve import resolve
from engine.config.schema.run import RunConfig
from engine.errors import EXIT_DONE, ConfigError, EnvironmentProblem, PalimpsestError
from engine.outcome import Outcome
from engine.run_folder import RunFolder, Start
from launcher.commands import KINDS, Command, Kind, Wanted, commands
from launcher.devices import accelerator, names, num_gpus, numbers
from launcher.extensions import prepare_extensions
from launcher.left_over import left_over
from launcher.ports import free_port
from launcher.processes import of_run
from launcher.restarts import Restarts, next_attempt
from launcher.supervise import last_lines, supervise
from launcher.verdict import Verdict


def main(
    config: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run's configuration.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Keys to change.")] = None,
    launcher: Annotated[str, typer.Option(help=f"Who starts the ranks: {', '.join(KINDS)}.")] = "local",
    processes: Annotated[
        int | None, typer.Option(min=1, help="Ranks to start (default: one per GPU, else what the layout needs).")
    ] = None,
    restarts: Annotated[
        int | None, typer.Option(min=0, help="Restarts after a failure (default: launch.restarts of the run).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command lines and start nothing.")] = False,
) -> None:
    """Start the ranks of a run on this node, show rank 0, and say how the run ended.

    A rank that is killed, fails or hangs (it gives no sign of life for longer than launch.*_limit_* of the run) ends
    the others; with --restarts the run goes on from its newest checkpoint on the ranks that remain. SIGTERM, SIGINT
    (Ctrl-C) and SIGUSR1 make the ranks save and stop; once more, five seconds later, ends them at once.

    Exit codes: 0 done, 1 failed, 2 cannot be run as written, 85 saved and wants to be started again.
    """
    logs.configure()
    run = load_run(config, overrides or [])
    gpus = num_gpus(os.environ)
    wanted = _wanted(run, config, overrides or [], _kind(launcher), processes or _default_processes(run, gpus), gpus)
    layout = resolve(run, wanted.num_processes)
    to_start = commands(wanted)
    for command in to_start if dry_run else to_start[:1]:
        print(command, flush=True)
    if dry_run:
        return
    logs.logger(__name__).info("%d ranks (%s), run folder %s", wanted.num_processes, layout, run.folder)
    limit = run.launch.restarts if restarts is None else restarts
    raise typer.Exit(_start(run, wanted, to_start, Restarts(limit)))


def _start(run: RunConfig, wanted: Wanted, to_start: list[Command], restarts: Restarts) -> int:
    """Take the run folder and start the run; what stops it before any rank is its outcome, too."""
    _refuse_second_launch(run.folder)
    with RunFolder(run.folder, Start(wanted.job, wanted.attempt)) as owned:
        try:
            owned.take(supervisor=True)
            owned.clear()
            return _attempts(run, wanted, to_start, restarts, owned)
        except PalimpsestError as error:
            start = owned.start
            owned.note_failure(Outcome(start.job, start.attempt, error.exit_code, 0, None, str(error)))
            raise


def _attempts(run: RunConfig, wanted: Wanted, to_start: list[Command], restarts: Restarts, owned: RunFolder) -> int:
    """Start attempt after attempt, until one ends well or there is no use in another; returns the exit code."""
    asked = wanted.overrides
    while True:
        prepare_extensions(run.folder, os.environ)
        ranks, attempt = wanted.num_processes, wanted.attempt
        verdict = supervise(to_start, wanted.job, run.folder, ranks, attempt, run.launch, owned)
        refusal = restarts.refusal(verdict)
        if refusal is not None:
            return _tell(run, wanted, verdict, refusal)
        print(f"palimpsest launch: {verdict.words}", file=sys.stderr)
        wanted, world = next_attempt(run, asked, wanted, verdict, free_port(), accelerator())
        where = f"{wanted.num_processes} ranks" if world is None else f"{world.size} ranks ({world.layout})"
        said = f"restart {restarts.used} of {restarts.limit} on {where}"
        print(f"palimpsest launch: {said}", file=sys.stderr, flush=True)
        to_start = commands(wanted)


def _tell(run: RunConfig, wanted: Wanted, verdict: Verdict, refusal: str) -> int:
    """Says how the launch ended; returns its exit code."""
    if verdict.look_at is not None and wanted.kind == "local" and verdict.look_at != "rank-0":
        print(last_lines(run.folder, verdict.look_at), file=sys.stderr)
    stream = sys.stdout if verdict.code == EXIT_DONE else sys.stderr
    print(f"palimpsest launch: {verdict.words}", file=stream)
    if refusal:
        print(f"  {refusal}", file=stream)
    if verdict.look_at is not None:
        print(f"  to do: read {run.folder / 'logs' / verdict.look_at}.log", file=stream)
    return verdict.code


def _refuse_second_launch(folder: Path) -> None:
    """Raises `EnvironmentProblem` while processes of another launch, or what a killed one left, use the folder."""
    pids = " ".join(str(process.pid) for process in of_run(folder))
    if pids:
        raise EnvironmentProblem(
            f"run folder {folder} is in use: processes {pids} of an earlier launch are still running",
            "one launch at a time in a run folder",
            f"wait for its end, or let it save and stop: kill {pids} (kill -9 only for what does not react)",
        )


def _wanted(run: RunConfig, config: Path, overrides: list[str], kind: Kind, num_processes: int, gpus: int) -> Wanted:
    if 0 < gpus < num_processes:
        raise EnvironmentProblem(
            f"--processes = {num_processes}, but this node offers {gpus} GPUs",
            f"1 to {gpus}",
            "start fewer ranks, or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on the CPU",
        )
    devices = names(os.environ, num_processes) if gpus else ()
    bus_order = kind == "deepspeed" and not all(name.isdecimal() for name in devices)
    if kind == "deepspeed":
        devices = tuple(map(str, numbers(devices)))
    return Wanted(
        config=config,
        overrides=tuple(overrides),
        folder=run.folder,
        kind=kind,
        num_processes=num_processes,
        job=f"{run.name}-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}",
        master_port=free_port(),
        num_gpus=gpus,
        devices=devices,
        bus_order=bus_order,
        left_over=left_over(os.environ),
        num_cores=len(os.sched_getaffinity(0)),
        python=sys.executable,
    )


def _kind(name: str) -> Kind:
    for kind in KINDS:
        if kind == name:
            return kind
    raise ConfigError(f"--launcher = {name!r}", ", ".join(KINDS), "choose one of these")


def _default_processes(run: RunConfig, gpus: int) -> int:
    """The layout's own size where it is whole, else every GPU, else one data rank."""
    parallel = run.parallel
    fixed = parallel.pipe * parallel.tensor * parallel.sequence
    return fixed * parallel.data if parallel.data else max(gpus, fixed)
