"""Submission of a job: its specification from command line and site, its folder, and what a dry run shows."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from engine.config.schema.run import RunConfig
from engine.errors import EnvironmentProblem
from engine.plan.shrink import UNKNOWN, world_for
from engine.redact import redact
from launcher import snapshot
from launcher.slurm import client, render, spec
from launcher.slurm.placement import usable_nodes
from launcher.slurm.site import Site
from launcher.slurm.spec import JobSpec

JOBS = "jobs"
"""Folder of a run that holds one folder per job."""


@dataclass(frozen=True)
class Shape:
    """Options of the command line that say what a job on Slurm asks for."""

    nodes: str
    gpus_per_node: int | None
    """None means those of the site's nodes."""
    ranks_per_node: int | None
    """None means one per GPU, or one."""
    time: str | None

    def fields(self, site: Site) -> dict[str, Any]:
        """Return them as fields of a `NodesSpec`, with the site's values where none is given.

        Raises:
            ConfigError: `nodes` is no range.
        """
        min_nodes, max_nodes = spec.parse_nodes(self.nodes)
        gpus = site.gpus.per_node if self.gpus_per_node is None else self.gpus_per_node
        ranks = self.ranks_per_node or gpus or 1
        return {"min_nodes": min_nodes, "max_nodes": max_nodes, "gpus_per_node": gpus, "ranks_per_node": ranks}


@dataclass(frozen=True)
class Request:
    """The command line of a launch on Slurm."""

    config: Path
    overrides: tuple[str, ...]
    shape: Shape
    requeues: int | None
    """None means those of the run's `launch`, for a job that is no chain."""
    restarts: int
    chain: int | None = None


def specify(run: RunConfig, asked: Request, site_name: str, site: Site, python: str) -> JobSpec:
    """Return the specification of a job, checked against the site and for a world that is valid.

    Raises:
        ConfigError: the site would refuse it, or no number of nodes within its range makes a valid world.
    """
    run_folder = run.folder.absolute()
    hides = any(redact(override) != override for override in asked.overrides)
    job = JobSpec(
        name=spec.job_name(run.name),
        config=asked.config.absolute(),
        overrides=() if hides else asked.overrides,
        run_folder=run_folder,
        folder=run_folder / JOBS / stamp(),
        work_folder=Path.cwd(),
        **asked.shape.fields(site),
        time=asked.shape.time,
        requeues=0 if asked.chain is not None else run.launch.requeues if asked.requeues is None else asked.requeues,
        restarts=asked.restarts,
        python=site.python or python,
        site_name=site_name,
        site=site,
        exclude=spec.excluded(site, run_folder),
        chain=asked.chain,
        model=run.model.model_dump(mode="json"),
        hides_overrides=hides,
    )
    spec.check_chain(job, asked.requeues)
    spec.check(job)
    usable_nodes(run, job.min_nodes, job.max_nodes, job.ranks_per_node)
    return job


def stamp() -> str:
    """Return a name for the folder of a job; a second alone is not unique, for two launches may begin in one."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"


def dry_run(run: RunConfig, job: JobSpec) -> str:
    """Return what a launch would submit, and what each rank would run on as many nodes as it may get."""
    valid = usable_nodes(run, job.min_nodes, job.max_nodes, job.ranks_per_node)
    world = world_for(run, valid[-1] * job.ranks_per_node, UNKNOWN, job.ranks_per_node)
    assert world is not None
    names = [f"NODE{number}" for number in range(1, valid[-1] + 1)]
    # With a credential among them no override is shown: the ranks get all by their environment.
    overrides = () if job.hides_overrides else (*job.overrides, *world.overrides(run))
    step = render.rank_step(job, names, world.size, 0, overrides)
    command = shlex.join(render.train_command(job, overrides))
    rows = [
        f"# ranks {first} to {first + job.ranks_per_node - 1} on {name}: {command}"
        for name, first in zip(names, range(0, world.size, job.ranks_per_node), strict=True)
    ]
    return "\n".join(
        [
            f"# {job.script}",
            render.batch_script(job),
            f"# {job.rank_script}",
            render.rank_script(job),
            f"# valid numbers of nodes: {', '.join(map(str, valid))}; the conductor starts on {valid[-1]}:",
            f"# {world.size} ranks ({world.layout})",
            shlex.join(step),
            *rows,
        ]
    )


def write(job: JobSpec) -> JobSpec:
    """Write the folder of a job and the snapshot of the code, and return the job with it.

    Raises:
        EnvironmentProblem: it cannot be written.
    """
    job = replace(job, code=snapshot.take(job.run_folder / JOBS / snapshot.FOLDER))
    try:
        job.logs.mkdir(parents=True)
        job.script.write_text(render.batch_script(job), encoding="utf-8")
        job.rank_script.write_text(render.rank_script(job), encoding="utf-8")
        (job.folder / spec.FILE).write_text(spec.to_json(job), encoding="utf-8")
    except OSError as error:
        raise spec.unwritable(job.folder, error) from error
    return job


def submit(job: JobSpec, ask: client.Run = client.run) -> str:
    """Submit a job whose folder is written, and return its number."""
    number = client.submit(job.site.allocation.submit, job.script, ask=ask)
    with (job.folder / spec.NUMBER_FILE).open("a", encoding="utf-8") as file:
        file.write(f"{number}\n")
    return number


def numbers_of(folder: Path) -> list[str]:
    """Return the numbers under which the job in a folder was submitted, the newest last; none where it never was."""
    try:
        return (folder / spec.NUMBER_FILE).read_text(encoding="utf-8").split()
    except OSError:
        return []


def refuse_second(run_folder: Path, jobs: Callable[[Sequence[str]], list[client.Job]] = client.jobs) -> None:
    """Refuse a submission beside a job of the same run that waits or runs.

    Raises:
        EnvironmentProblem: there is one.
    """
    numbers = [number for folder in job_folders(run_folder) for number in numbers_of(folder)]
    there = [job for job in jobs(numbers) if not job.is_over] if numbers else []
    if there:
        raise EnvironmentProblem(
            f"run folder {run_folder} has a job in the queue already: {there[0].id}, {there[0].state}",
            "one job or chain per run: the second would wait for its nodes and then find the folder in use",
            f"wait for its end, or cancel it: palimpsest job cancel {there[0].number}   (one that goes on after its "
            "time limit: --requeues or --chain)",
        )


def job_folders(run_folder: Path) -> Sequence[Path]:
    """Return the folders of a run's submitted jobs, the newest last."""
    return [folder for folder in sorted((run_folder / JOBS).glob("*")) if numbers_of(folder)]
