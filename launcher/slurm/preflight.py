"""Preflight as a job of its own: the nodes that Slurm gives it are checked, and the network between them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.config.schema.run import RunConfig
from engine.errors import ConfigError
from engine.redact import redact
from launcher.slurm import client, render, spec
from launcher.slurm.placement import usable_nodes
from launcher.slurm.site import Site
from launcher.slurm.spec import PreflightSpec
from launcher.slurm.submit import Shape, stamp

FOLDER = "preflight"
"""Folder of a run, or beside the user where there is none, that holds one folder per preflight."""
TIME = "0:10:00"
"""Time limit where none is given: nodes are checked in seconds, but a slow network takes minutes."""


@dataclass(frozen=True)
class Checks:
    """The command line of a preflight, as each rank of it gets it."""

    config: Path | None
    overrides: tuple[str, ...]
    gpus: int | None
    as_json: bool

    def arguments(self, gpus_per_node: int) -> tuple[str, ...]:
        """Return them as arguments; a node has to have the GPUs that the job asks for, if nothing else is said."""
        gpus = gpus_per_node or None if self.gpus is None else self.gpus
        run = () if self.config is None else (str(self.config.absolute()), *self.overrides)
        return (*(() if gpus is None else ("--gpus", str(gpus))), *(("--json",) if self.as_json else ()), *run)


def specify(
    checks: Checks, run: RunConfig | None, shape: Shape, site_name: str, site: Site, python: str
) -> PreflightSpec:
    """Return the specification of a preflight, checked against the site.

    Raises:
        ConfigError: the site would refuse it, the run does not start on so many nodes, or an override holds a
            credential, which would stand in the script.
    """
    if any(redact(override) != override for override in checks.overrides):
        raise ConfigError(
            "an override of this preflight holds a credential, which everybody could read in its script",
            "overrides without credentials",
            "leave it out: the checks do not need it",
        )
    fields = shape.fields(site)
    folder = (Path.cwd() if run is None else run.folder.absolute()) / FOLDER / stamp()
    job = PreflightSpec(
        name=FOLDER,
        folder=folder,
        work_folder=Path.cwd(),
        **fields,
        time=shape.time or TIME,
        python=site.python or python,
        site_name=site_name,
        site=site,
        exclude=site.allocation.exclude if run is None else spec.excluded(site, run.folder.absolute()),
        arguments=checks.arguments(fields["gpus_per_node"]),
    )
    spec.check(job)
    if run is not None:
        usable_nodes(run, job.min_nodes, job.max_nodes, job.ranks_per_node)
    return job


def show(job: PreflightSpec) -> str:
    """Return the scripts of a preflight, as they would be submitted."""
    scripts = ((job.script, render.preflight_script(job)), (job.rank_script, render.preflight_rank_script(job)))
    return "\n".join(f"# {path}\n{text}" for path, text in scripts)


def submit(job: PreflightSpec, ask: client.Run = client.run) -> str:
    """Write the folder of a preflight, submit it, and return its number.

    Raises:
        EnvironmentProblem: the folder cannot be written, or Slurm refuses the job.
    """
    try:
        job.folder.mkdir(parents=True)
        job.script.write_text(render.preflight_script(job), encoding="utf-8")
        job.rank_script.write_text(render.preflight_rank_script(job), encoding="utf-8")
    except OSError as error:
        raise spec.unwritable(job.folder, error) from error
    return client.submit(job.site.allocation.submit, job.script, ask=ask)
