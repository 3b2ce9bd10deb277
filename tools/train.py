"""`palimpsest train`: the command that every rank runs, under any launcher or alone.

Configuration, rank environment and layout are settled before torch is imported, so that a mistake ends every rank at
once with exit code 2. The run folder is taken before anything is written there. The outcome of a run goes to
`outcome.json`, because launchers lose exit codes: the trainer writes it, and where the trainer cannot, the first rank
that fails writes it here.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from engine import heartbeat, logs
from engine.checkpoint.interchange.initial import model_of
from engine.config.huggingface_forms import export_warning
from engine.config.load import folder_of, load_run
from engine.config.rank_environment import RankEnvironment
from engine.config.resolve import Layout, resolve
from engine.config.schema.run import RunConfig
from engine.errors import EXIT_DONE, EXIT_FAILURE, EXIT_REQUEUE, EnvironmentProblem, PalimpsestError
from engine.heartbeat import Heartbeat
from engine.outcome import Outcome
from engine.plan.frozen import check_patterns
from engine.run_folder import RunFolder
from engine.switch_files import refuse_stopped
from engine.train.signals import StopSignals
from launcher.devices import multiplies_bf16, num_gpus
from launcher.environment import (
    export,
    hidden_overrides,
    is_supervised,
    rank_environment,
    run_folder,
    shares_store_of_agents,
)
from launcher.extensions import prepare_extensions
from launcher.meeting_point import check_meeting_point
from launcher.rank_watcher import heartbeat_folder, start_watcher
from launcher.threads import share_cores

RANK_0_FIRST_SECONDS = 2.0
"""Seconds that the other ranks wait before they report a mistake."""


def main(
    config: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run's configuration.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Keys to change.")] = None,
) -> None:
    """Train a model; an existing run folder is resumed from its newest verified checkpoint."""
    raise typer.Exit(start(config, overrides or []))


@dataclass(frozen=True)
class Command:
    """A command that trains."""

    name: str
    load: Callable[[Path, list[str]], RunConfig]
    """Makes the run of a file and its overrides."""
    writes: bool = False
    """True if `load` writes to the run folder, which is taken before then."""
    finish: Callable[[RunConfig], None] | None = None
    """Called on rank 0 once the run is done, while the folder is still taken. None means that nothing is left to do."""


TRAIN = Command("train", lambda path, given: load_run(path, given, model_of))


def start(config: Path, overrides: list[str], command: Command = TRAIN) -> int:
    """Train the run that a command makes of a file and its overrides; return the exit code. Raises `PalimpsestError` on
    rank 0."""
    environment: RankEnvironment | None = None
    try:
        environment = rank_environment(os.environ)
        logs.configure(environment.global_rank, environment.world_size)
        # Signals first: one during the imports below must not kill this rank.
        with (
            StopSignals() as signals,
            heartbeat_folder(environment, heartbeat.given_folder(os.environ)) as beats,
        ):
            heart = Heartbeat(beats, environment.global_rank)
            # The supervisor sends signals to ranks that have given a sign of life: handlers first, then the beat.
            heart.beat(0, "start")
            given = [*overrides, *hidden_overrides(os.environ)]
            code = _run(command, config, given, environment, signals, heart)
            if code == EXIT_REQUEUE:
                signals.ignore_from_now_on()
            return code
    except PalimpsestError as error:
        # Every rank finds the same mistake; one full report is enough.
        if environment is not None and environment.global_rank > 0:
            first = error.wrong.splitlines()[0]
            print(f"palimpsest {command.name} [rank {environment.global_rank}]: {first}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from error
        raise


def _run(
    command: Command,
    config: Path,
    given: list[str],
    environment: RankEnvironment,
    signals: StopSignals,
    heart: Heartbeat,
) -> int:
    """Take the run folder and train; returns the exit code. What goes wrong outside of training is noted there, too."""
    path = folder_of(config, given)
    try:
        run = None if command.writes and path is not None else command.load(config, given)
    except PalimpsestError as error:
        # A configuration that is refused may still name its folder, where the next reader looks for the outcome.
        if path is not None:
            with run_folder(path, environment, os.environ) as folder:
                with contextlib.suppress(EnvironmentProblem):
                    _enter(folder, environment)
                _note_failure(folder, environment, error)
        raise
    path = run.folder if run is not None else path
    assert path is not None, "a run has a folder, and without one `load` has made the run"
    try:
        environment = _with_unused_attempt(environment, path)
        environment = _with_agreed_attempt(environment)
    except Exception as error:
        # The folder is not entered first: what an earlier start said is known by its number, and what another rank of
        # this one has said, minutes ago, may be the reason why it did not come.
        with run_folder(path, environment, os.environ) as folder:
            _note_failure(folder, environment, error)
        raise
    with run_folder(path, environment, os.environ) as folder:
        try:
            _enter(folder, environment)
            refuse_stopped(path)
            run = run or command.load(config, given)
            if heart.folder is not None and not is_supervised(os.environ):
                start_watcher(environment, run.launch, folder, heart.folder)
            # Taken before `_start` judges the build locks in the folder: of a folder that is ours alone, any is stale.
            code = _train(run, _start(run, environment), environment, signals, heart, folder)
            if code == EXIT_DONE and environment.global_rank == 0 and command.finish is not None:
                command.finish(run)
            return code
        except Exception as error:
            _note_failure(folder, environment, error)
            raise


def _note_failure(folder: RunFolder, environment: RankEnvironment, error: Exception) -> None:
    """Note a failure outside of the training loop, at step 0; the loop has noted its own, with its step."""
    code, words = EXIT_FAILURE, f"{type(error).__name__}: {error}"
    if isinstance(error, PalimpsestError):
        code, words = error.exit_code, str(error)
        if environment.global_rank > 0:
            # Rank 0 tells the whole story, and goes first: launchers end the others as soon as one has ended. The
            # others say enough to be found if they fail alone.
            time.sleep(RANK_0_FIRST_SECONDS)
    folder.note_failure(Outcome(environment.job, environment.attempt, code, 0, environment.global_rank, words))


def _with_unused_attempt(environment: RankEnvironment, path: Path) -> RankEnvironment:
    """Return the environment with an attempt above all of the job that have saved in the run folder `path`.

    That is so for a torchrun alone, whose agents count apart: elsewhere the environment is returned as it is.
    """
    if not shares_store_of_agents(os.environ):
        return environment
    from engine.checkpoint.folder import CHECKPOINTS, owner_of

    before = owner_of(path / CHECKPOINTS)
    if before is None or before.job != environment.job or before.attempt < environment.attempt:
        return environment
    return replace(environment, attempt=before.attempt + 1)


def _with_agreed_attempt(environment: RankEnvironment) -> RankEnvironment:
    """Return the environment with an attempt on which the ranks of a torchrun agree, that of rank 0 or a greater one.
    Collective over the world.

    Under other launchers the ranks are told the same number, and the environment is returned as it is.

    Raises:
        EnvironmentProblem: the ranks did not all arrive.
    """
    if not shares_store_of_agents(os.environ):
        return environment
    with logs.phase("importing torch"):
        from engine.parallel.groups import attempt_under_torchrun
    with logs.phase(f"agreeing with {environment.world_size - 1} other ranks on the attempt"):
        return replace(environment, attempt=attempt_under_torchrun(environment, environment.attempt))


def _enter(folder: RunFolder, environment: RankEnvironment) -> None:
    """Take the run folder on rank 0, without what an earlier start said there; the others leave if it is in use."""
    if environment.global_rank > 0:
        folder.refuse_other()
        return
    folder.take()
    if not is_supervised(os.environ):  # the supervisor has done it for its ranks
        folder.clear()


def _start(run: RunConfig, environment: RankEnvironment) -> Layout:
    """Return the layout, with the environment made ready for torch."""
    layout = resolve(run, environment.world_size, check_patterns(run))
    check_meeting_point(environment, os.environ)
    with logs.phase("preparing DeepSpeed's extensions"):
        prepare_extensions(run.folder, os.environ, first=environment.global_rank == 0)
    export(environment, os.environ)
    gpus = num_gpus(os.environ)
    share_cores(environment, os.environ, on_gpu=gpus > 0)
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would guess the same, with a warning per rank
        if environment.global_rank == 0 and run.precision.dtype == "bf16" and not multiplies_bf16():
            logs.logger(__name__).warning(
                "this processor emulates bf16, many times slower than fp32: set precision.dtype=fp32"
            )
    return layout


def _train(
    run: RunConfig,
    layout: Layout,
    environment: RankEnvironment,
    signals: StopSignals,
    heart: Heartbeat,
    folder: RunFolder,
) -> int:
    """Hand over to the trainer, which imports torch; return the exit code."""
    if environment.global_rank == 0 and (warning := export_warning(run)) is not None:
        logs.logger(__name__).warning("%s", warning)
    with logs.phase("importing torch and DeepSpeed"):
        from engine.train.run import train

    measure = None
    if run.model.task_head is not None:
        from engine.tasks.in_training import measure_of

        measure = measure_of(run)
    return train(run, layout, environment, signals, heart, folder, measure)
