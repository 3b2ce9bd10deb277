"""Submission of a job: its specification from command line and site, its folder, and what a dry run shows."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

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
NUMBER_FILE = "number"
"""File in the folder of a job that holds its number, once it is submitted."""


@dataclass(frozen=True)
class Request:
    """The command line of a launch on Slurm."""

    config: Path
    overrides: tuple[str, ...]
    nodes: str
    gpus_per_node: int | None
    """None means those of the site's nodes."""
    ranks_per_node: int | None
    """None means one per GPU, or one."""
    time: str | None
    requeues: int
    restarts: int


def specify(run: RunConfig, asked: Request, site_name: str, site: Site, python: str) -> JobSpec:
    """Return the specification of a job, checked against the site and for a world that is valid.

    Raises:
        ConfigError: the site would refuse it, or no number of nodes within its range makes a valid world.
    """
    min_nodes, max_nodes = spec.parse_nodes(asked.nodes)
    gpus = site.gpus.per_node if asked.gpus_per_node is None else asked.gpus_per_node
    run_folder = run.folder.absolute()
    # A second alone is not unique: two launches may begin in one.
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    hides = any(redact(override) != override for override in asked.overrides)
    job = JobSpec(
        name=spec.job_name(run.name),
        config=asked.config.absolute(),
        overrides=() if hides else asked.overrides,
        run_folder=run_folder,
        folder=run_folder / JOBS / name,
        work_folder=Path.cwd(),
        min_nodes=min_nodes,
        max_nodes=max_nodes,
        gpus_per_node=gpus,
        ranks_per_node=asked.ranks_per_node or gpus or 1,
        time=asked.time,
        requeues=asked.requeues,
        restarts=asked.restarts,
        python=site.python or python,
        site_name=site_name,
        site=site,
        exclude=spec.excluded(site, run_folder),
        hides_overrides=hides,
    )
    spec.check(job)
    usable_nodes(run, min_nodes, max_nodes, job.ranks_per_node)
    return job


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
        raise EnvironmentProblem(
            f"the folder of the job, {job.folder}, cannot be written: {error.strerror}",
            "a run folder that can be written here and on every node",
            "change `folder`",
        ) from error
    return job


def submit(job: JobSpec, ask: client.Run = client.run) -> str:
    """Submit a job whose folder is written, and return its number."""
    number = client.submit(job.site.allocation.submit, job.script, ask)
    (job.folder / NUMBER_FILE).write_text(f"{number}\n", encoding="utf-8")
    return number


def number_of(folder: Path) -> str | None:
    """Return the number of the job in a folder; None where it was never submitted."""
    try:
        return (folder / NUMBER_FILE).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def job_folders(run_folder: Path) -> Sequence[Path]:
    """Return the folders of a run's submitted jobs, the newest last."""
    return [folder for folder in sorted((run_folder / JOBS).glob("*")) if number_of(folder) is not None]
