"""`palimpsest train`: what every rank runs, under any launcher or alone.

Configuration, place and layout are settled before torch is imported, so that a mistake ends every rank at once
with exit code 2. How a run ended goes to `outcome.json`, because launchers lose exit codes: the trainer writes it,
and where the trainer cannot, the first rank that fails writes it here.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from engine import logs, outcome
from engine.config.load import load_run
from engine.config.place import RankPlace
from engine.config.resolve import Layout, resolve
from engine.config.schema.run import RunConfig
from engine.config.twins import export_warning
from engine.errors import EXIT_FAILURE, EnvironmentProblem, PalimpsestError
from engine.heartbeat import Heartbeat
from engine.outcome import Outcome
from engine.train.signals import StopSignals
from launcher.devices import num_gpus
from launcher.environment import check_meeting_point, export, rank_environment
from launcher.extensions import prepare_extensions

SUPERVISED = "PALIMPSEST_LAUNCHER"
RANK_0_FIRST_SECONDS = 2.0
"""How long the other ranks keep a mistake to themselves."""


def main(
    config: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run's configuration.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Keys to change.")] = None,
) -> None:
    """Train a model; an existing run folder is resumed from its newest verified checkpoint."""
    place: RankPlace | None = None
    try:
        place = rank_environment(os.environ)
        logs.configure(place.global_rank, place.world_size)
        with StopSignals() as signals:  # from here on: a signal during the imports below must not kill this rank
            heart = Heartbeat.of(os.environ, place.global_rank)
            heart.beat(0, "start")
            run = load_run(config, overrides or [])
            code = _train(run, _start(run, place), place, signals, heart)
    except PalimpsestError as error:
        if place is not None and place.global_rank > 0:
            # Rank 0 tells the whole story, and goes first: launchers end the others as soon as one has ended. The
            # others say enough to be found if they fail alone.
            time.sleep(RANK_0_FIRST_SECONDS)
            print(f"palimpsest train [rank {place.global_rank}]: {error.wrong.splitlines()[0]}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from error
        raise
    raise typer.Exit(code)


def _start(run: RunConfig, place: RankPlace) -> Layout:
    """The layout, with the environment made ready for torch."""
    if place.global_rank == 0 and SUPERVISED not in os.environ:
        try:
            outcome.clear(run.folder)  # the supervisor has done it for its ranks
        except OSError as error:
            raise EnvironmentProblem(
                f"run folder {run.folder} cannot be used: {error.strerror}",
                "a folder that can be written",
                "change `folder`",
            ) from error
    try:
        layout = resolve(run, place.world_size)
        check_meeting_point(place, os.environ)
        with logs.phase("preparing DeepSpeed's extensions"):
            prepare_extensions(run.folder, os.environ, first=place.global_rank == 0)
    except PalimpsestError as error:
        note_failure(run.folder, place, error.exit_code, error.wrong)
        raise
    export(place, os.environ)
    if not num_gpus(os.environ):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would guess the same, with a warning per rank
    return layout


def _train(run: RunConfig, layout: Layout, place: RankPlace, signals: StopSignals, heart: Heartbeat) -> int:
    """Hands over to the trainer, the first import of torch; returns the exit code."""
    if place.global_rank == 0 and (warning := export_warning(run)) is not None:
        logs.logger(__name__).warning("%s", warning)
    try:
        with logs.phase("importing torch and DeepSpeed"):
            from engine.train.run import train

        return train(run, layout, place, signals, heart)
    except PalimpsestError as error:
        note_failure(run.folder, place, error.exit_code, str(error))
        raise
    except Exception as error:
        note_failure(run.folder, place, EXIT_FAILURE, f"{type(error).__name__}: {error}")
        raise


def note_failure(folder: Path, place: RankPlace, code: int, error: str) -> None:
    """Notes a failure outside the training loop, at step 0; the loop has noted its own, with its step."""
    outcome.write_failure(folder, Outcome(place.job, place.attempt, code, 0, place.global_rank, error))
