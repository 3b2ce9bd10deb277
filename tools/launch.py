"""`palimpsest launch`: starts the ranks of a run on this node, or submits them to Slurm, and watches over them.

The configuration is checked for the world that it will get before anything starts, so a mistake costs no start-up.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from engine import logs
from engine.checkpoint.interchange.initial import model_of
from engine.config.load import load_run
from engine.config.resolve import resolve
from engine.config.schema.run import RunConfig
from engine.errors import EXIT_DONE, ConfigError, EnvironmentProblem
from engine.plan.frozen import check_patterns
from launcher.attempts import Ending, OneNode, run_attempts
from launcher.commands import KINDS, Kind, Node, Wanted, commands
from launcher.devices import names, num_gpus, numbers
from launcher.left_over import left_over
from launcher.ports import free_port
from launcher.processes import of_run
from launcher.rank_readers import refuse_forgotten_srun
from launcher.restarts import Restarts
from launcher.slurm.site import Site
from launcher.slurm.submit import Request, Shape, refuse_second, specify, submit, write
from launcher.slurm.submit import dry_run as show
from launcher.supervise import last_lines
from launcher.variables import OVERRIDES
from tools.slurm_options import (
    SLURM,
    GpusPerNode,
    Nodes,
    RanksPerNode,
    SiteKeys,
    SiteName,
    Time,
    chosen_site,
    refuse_slurm_options,
)


def main(
    config: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run's configuration.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Keys to change.")] = None,
    launcher: Annotated[
        str, typer.Option(help=f"Who starts the ranks: on this node {', '.join(KINDS)}, on a cluster {SLURM}.")
    ] = "local",
    processes: Annotated[
        int | None, typer.Option(min=1, help="Ranks to start (default: one per GPU, else what the layout needs).")
    ] = None,
    restarts: Annotated[
        int | None, typer.Option(min=0, help="Restarts after a failure (default: launch.restarts of the run).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command lines and start nothing.")] = False,
    site: SiteName = None,
    nodes: Nodes = None,
    gpus_per_node: GpusPerNode = None,
    ranks_per_node: RanksPerNode = None,
    time: Time = None,
    requeues: Annotated[
        int | None, typer.Option(min=0, help="slurm: requeues of the job (default: launch.requeues of the run).")
    ] = None,
    chain: Annotated[
        int | None,
        typer.Option(metavar="N", help="slurm: jobs in a row, each of which goes on where the one before has left."),
    ] = None,
    slurm: SiteKeys = None,
) -> None:
    """Start the ranks of a run on this node, show rank 0, and say how the run ended.

    With --launcher slurm the run is submitted as a job instead, which `palimpsest job` follows and cancels.

    A rank that is killed, fails or hangs (it gives no sign of life for longer than launch.*_limit_* of the run) ends
    the others; with --restarts the run goes on from its newest checkpoint on the ranks that remain. SIGTERM, SIGINT
    (Ctrl-C) and SIGUSR1 make the ranks save and stop; once more, five seconds later, ends them at once.

    Exit codes: 0 done, 1 failed, 2 cannot be run as written, 85 saved and wants to be started again.
    """
    logs.configure()
    run = load_run(config, overrides or [], model_of)
    limit = run.launch.restarts if restarts is None else restarts
    if launcher != SLURM:
        given = {"--site": site, "--nodes": nodes, "--gpus-per-node": gpus_per_node, "--ranks-per-node": ranks_per_node}
        given |= {"--time": time, "--requeues": requeues, "--chain": chain, "--slurm": slurm}
        refuse_slurm_options(f"--launcher {launcher}", given)
    elif processes is not None:
        raise ConfigError("--processes beside --launcher slurm", "--ranks-per-node", "say how many ranks a node has")
    else:
        shape = Shape(nodes or "1", gpus_per_node, ranks_per_node, time)
        asked = Request(config, tuple(overrides or []), shape, requeues, limit, chain)
        _submit(run, asked, *chosen_site(site, slurm), dry_run)
        return
    _start_here(run, config, tuple(overrides or []), _kind(launcher), processes, limit, dry_run)


def _start_here(
    run: RunConfig,
    config: Path,
    overrides: tuple[str, ...],
    kind: Kind,
    processes: int | None,
    limit: int,
    dry_run: bool,
) -> None:
    """Start the ranks on this node, with so many restarts at most, or show what would be started."""
    refuse_forgotten_srun(os.environ, "palimpsest launch")
    gpus = num_gpus(os.environ)
    ranks = processes or _default_processes(run, gpus)
    node = _node(kind, ranks, gpus)
    wanted = Wanted(
        config=config,
        overrides=overrides,
        folder=run.folder,
        kind=kind,
        world_size=ranks,
        # A second alone is not unique: two launches may begin in one.
        job=f"{run.name}-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}",
        master_port=free_port(),
    )
    layout = resolve(run, wanted.world_size, check_patterns(run))
    to_start = commands(wanted, node)
    for command in to_start if dry_run else to_start[:1]:
        print(command, flush=True)
    if dry_run:
        return
    logs.logger(__name__).info("%d ranks (%s), run folder %s", wanted.world_size, layout, run.folder)
    # The folder's lock alone is not enough: ranks that a killed launch has left may not hold it.
    _refuse_second_launch(run.folder)
    raise typer.Exit(_tell(run, kind, run_attempts(run, OneNode(run, wanted, node), Restarts(limit), _say)))


def _submit(run: RunConfig, asked: Request, name: str, profile: Site, dry_run: bool) -> None:
    """Submit a run to Slurm, or show what would be submitted."""
    job = specify(run, asked, name, profile, sys.executable)
    if dry_run:
        print(show(run, job))
        return
    refuse_second(job.run_folder)
    job = write(job)
    if job.hides_overrides:
        # The job inherits it: sbatch takes the environment along, and only its owner sees it.
        os.environ[OVERRIDES] = json.dumps(asked.overrides)
    number = submit(job)
    chain = "" if job.chain is None else f"a chain of {job.chain} links, "
    print(f"job {number} ({chain}{job.nodes} nodes of {name}) is submitted; its folder is {job.folder}")
    print(f"  it waits or runs:  palimpsest job status {number}")
    print(f"  its output:        palimpsest job logs {number} --follow")
    print(f"  save and stop it:  palimpsest job cancel {number}")


def _say(words: str) -> None:
    print(f"palimpsest launch: {words}", file=sys.stderr, flush=True)


def _tell(run: RunConfig, kind: Kind, ending: Ending) -> int:
    """Say how the launch ended; return its exit code."""
    verdict = ending.verdict
    # Rank 0's output has been on the terminal all along.
    if verdict.look_at is not None and kind == "local" and verdict.look_at != "rank-0":
        print(last_lines(run.folder, verdict.look_at), file=sys.stderr)
    stream = sys.stdout if verdict.code == EXIT_DONE else sys.stderr
    print(f"palimpsest launch: {verdict.words}", file=stream)
    if ending.refusal:
        print(f"  {ending.refusal}", file=stream)
    if verdict.look_at is not None:
        print(f"  to do: read {run.folder / 'logs' / verdict.look_at}.log", file=stream)
    return verdict.code


def _refuse_second_launch(folder: Path) -> None:
    """Raise `EnvironmentProblem` while processes of another launch, or what a killed one left, use the folder."""
    pids = " ".join(str(process.pid) for process in of_run(folder))
    if pids:
        raise EnvironmentProblem(
            f"run folder {folder} is in use: processes {pids} of an earlier launch are still running",
            "one launch at a time in a run folder",
            f"wait for its end, or let it save and stop: kill {pids} (kill -9 only for what does not react)",
        )


def _node(kind: Kind, num_processes: int, gpus: int) -> Node:
    """Return this node, with all ranks of the run on it.

    Raises:
        EnvironmentProblem: it has GPUs, but fewer than ranks.
    """
    if 0 < gpus < num_processes:
        raise EnvironmentProblem(
            f"--processes = {num_processes}, but this node offers {gpus} GPUs",
            f"1 to {gpus}",
            "start fewer ranks, or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on the CPU",
        )
    devices = names(os.environ, num_processes) if gpus else ()
    # `--include` takes numbers only. Those of UUIDs are nvidia-smi's, which counts along the bus; CUDA's own order is
    # fastest first.
    bus_order = kind == "deepspeed" and not all(name.isdecimal() for name in devices)
    if kind == "deepspeed":
        devices = tuple(map(str, numbers(devices)))
    return Node(
        ranks=range(num_processes),
        num_gpus=gpus,
        devices=devices,
        bus_order=bus_order,
        left_over=left_over(os.environ),
        # Those that the cluster gave to this job, which may be fewer than the node has.
        num_cores=len(os.sched_getaffinity(0)),
        python=sys.executable,
    )


def _kind(name: str) -> Kind:
    for kind in KINDS:
        if kind == name:
            return kind
    raise ConfigError(f"--launcher = {name!r}", ", ".join([*KINDS, SLURM]), "choose one of these")


def _default_processes(run: RunConfig, gpus: int) -> int:
    """Return the number of ranks of the layout where it fixes one, else every GPU, at least one data rank."""
    parallel = run.parallel
    fixed = parallel.pipe * parallel.tensor * parallel.sequence
    return fixed * parallel.data if parallel.data else max(gpus, fixed)
