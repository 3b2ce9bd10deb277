"""`palimpsest preflight`: checks of the nodes of a job and of the network between them, before a run starts there."""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import time as now
from typing import Annotated

import typer

from engine.config.rank_environment import RankEnvironment
from engine.config.schema.run import RunConfig
from engine.errors import EXIT_FAILURE, ConfigError
from launcher.environment import export, rank_environment
from launcher.meeting_point import check_meeting_point
from launcher.node_checks import LEVELS, Finding, Needs
from launcher.preflight import NodeReport, check_node, compare_nodes
from launcher.slurm.preflight import Checks, show, specify, submit
from launcher.slurm.site import Site
from launcher.slurm.submit import Shape
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

PAIR_BYTES = 32 * 2**20
"""Bytes that two nodes send each other in each direction, and the size of the all-reduce."""
SLOW_FACTOR = 0.5
"""Fraction of the median bandwidth of all pairs of nodes, below which a pair is slow."""
LIMIT_SECONDS = 300.0
"""Time in which all ranks have to arrive, and for each measurement."""


@dataclass(frozen=True)
class Network:
    """Bandwidths between the nodes, in bytes per second."""

    pairs: Mapping[str, float]
    """By pair of hosts, "HOST - HOST", in each direction."""
    all_reduce: float
    """Bus bandwidth of an all-reduce over all ranks."""


def main(
    config: Annotated[
        Path | None, typer.Argument(metavar="[RUN.yaml]", help="A run, whose needs the nodes are judged by.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Keys to change.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs that each node has to have.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    launcher: Annotated[
        str | None, typer.Option(help=f"{SLURM}: submit a job that checks the nodes it gets (default: check here).")
    ] = None,
    site: SiteName = None,
    nodes: Nodes = None,
    gpus_per_node: GpusPerNode = None,
    ranks_per_node: RanksPerNode = None,
    time: Time = None,
    slurm: SiteKeys = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="slurm: print the batch script and submit nothing.")
    ] = False,
) -> None:
    """Check this node, or all nodes of a job if a launcher starts it there (srun palimpsest preflight RUN.yaml).

    Ends with 1 where a check failed. Started on several nodes, one rank of each reports, and all ranks measure the
    network between them. With --launcher slurm a job is submitted that does so.
    """
    if launcher == SLURM:
        checks = Checks(config, tuple(overrides or []), gpus, as_json)
        _submit(checks, Shape(nodes or "1", gpus_per_node, ranks_per_node, time), *chosen_site(site, slurm), dry_run)
        return
    if launcher is not None:
        raise ConfigError(f"--launcher = {launcher!r}", SLURM, "leave it out to check this node")
    given = {"--site": site, "--nodes": nodes, "--gpus-per-node": gpus_per_node, "--ranks-per-node": ranks_per_node}
    refuse_slurm_options(
        "a check of this node", given | {"--time": time, "--slurm": slurm, "--dry-run": dry_run or None}
    )
    environment = rank_environment(os.environ)
    needs = _needs(config, overrides or [], environment, gpus)
    report = check_node(needs, os.environ)
    # Where rank 0 cannot listen, the others would wait in vain: no network is measured.
    if environment.world_size == 1 or (environment.global_rank == 0 and _port_is_taken(report)):
        reports, findings, network = [report], [], None
    else:
        reports, clocks, network = _together(report, environment)
        findings = [*compare_nodes(reports, clocks), *_slow(network)]
    if environment.global_rank > 0:
        return
    if as_json:
        tree = {"nodes": [each.as_json() for each in reports], "together": [asdict(finding) for finding in findings]}
        print(json.dumps(tree | ({} if network is None else {"network": asdict(network)}), indent=1))
    else:
        print(table(reports, findings, network))
    every = [*findings, *(finding for each in reports for finding in each.findings)]
    if any(finding.level == "failed" for finding in every):
        raise typer.Exit(EXIT_FAILURE)


def table(reports: Sequence[NodeReport], findings: Sequence[Finding], network: Network | None) -> str:
    """Return the findings as lines: what went wrong by node with its remedy, then one line for all that is well."""
    lines, names = [], dict.fromkeys(finding.check for report in reports for finding in report.findings)
    for name in names:
        found = [(report.host, one) for report in reports for one in report.findings if one.check == name]
        # Nodes with one and the same finding share a line.
        hosts: dict[tuple[str, str, str], list[str]] = {}
        for host, one in found:
            hosts.setdefault((one.level, one.text if one.level != "ok" else "", one.remedy), []).append(host)
        for (level, text, remedy), held in sorted(hosts.items(), key=lambda item: -LEVELS.index(item[0][0])):  # type: ignore[arg-type]
            where = ", ".join(held)
            shown = text or (found[0][1].text if len(found) == 1 else f"{len(held)} of {len(reports)} nodes")
            lines.append(f"{level:<8} {name:<20} {shown if level == 'ok' else f'{where}: {shown}'}")
            lines += [f"{'':<8} {'':<20} to do: {remedy}"] if remedy else []
    for one in findings:
        lines.append(f"{one.level:<8} {one.check:<20} {one.text}")
        lines += [f"{'':<8} {'':<20} to do: {one.remedy}"] if one.remedy else []
    if network is not None:
        lines.append(f"{'':<8} {'all-reduce':<20} {network.all_reduce / 1e9:.2f} GB/s over all ranks")
        if network.pairs:
            values = sorted(network.pairs.values())
            slowest = min(network.pairs, key=network.pairs.__getitem__)
            text = f"{values[0] / 1e9:.2f} ({slowest}), median {statistics.median(values) / 1e9:.2f} GB/s per direction"
            lines.append(f"{'':<8} {'pairs of nodes':<20} slowest {text}")
    return "\n".join(lines)


def _submit(checks: Checks, shape: Shape, name: str, site: Site, dry_run: bool) -> None:
    """Submit a job that checks its nodes, or show its scripts."""
    run = None if checks.config is None else _load(checks.config, list(checks.overrides))
    job = specify(checks, run, shape, name, site, sys.executable)
    if dry_run:
        print(show(job))
        return
    number = submit(job)
    print(f"job {number} ({job.nodes} nodes of {name}) is submitted; it ends with 1 where a check fails")
    print(f"  it waits or runs:  squeue --jobs={number}")
    print(f"  its table:         cat {str(job.output).replace('%j', number)}")


def _load(config: Path, overrides: list[str]) -> RunConfig:
    from engine.checkpoint.interchange.initial import model_of
    from engine.config.load import load_run

    return load_run(config, overrides, model_of)


def _needs(config: Path | None, overrides: list[str], environment: RankEnvironment, gpus: int | None) -> Needs:
    """Return the demands of a run on each node; without one, those of any run."""
    plain = Needs(
        ranks=environment.local_world_size,
        num_nodes=environment.num_nodes,
        gpus=gpus,
        job=environment.job,
        # One that follows from the job and its step is another one when the run starts.
        port=environment.master_port if environment.global_rank == 0 and os.environ.get("MASTER_PORT") else None,
    )
    if config is None:
        return plain
    from launcher.needs import needs_of

    run = _load(config, overrides)
    parallel, ranks = run.parallel, environment.local_world_size
    world = environment.world_size
    if world == 1:  # not started by a launcher yet: as many ranks as the layout needs at the least, all of them here
        world = ranks = parallel.pipe * parallel.tensor * parallel.sequence * (parallel.data or 1)
    return needs_of(run, world, replace(plain, ranks=ranks))


def _port_is_taken(report: NodeReport) -> bool:
    return any((finding.check, finding.level) == ("port", "failed") for finding in report.findings)


def _together(report: NodeReport, environment: RankEnvironment) -> tuple[list[NodeReport], dict[str, float], Network]:
    """Return every node's report and clock, and the bandwidths. Collective over the world."""
    check_meeting_point(environment, os.environ)
    export(environment, os.environ)
    from engine.parallel.bandwidth import all_reduce_bandwidth, pair_bandwidths
    from engine.parallel.collectives import barrier, gather_objects
    from engine.parallel.groups import Group, connect, disconnect
    from engine.train.run import choose_device

    device = choose_device(environment)
    connect(environment, device, limit_seconds=LIMIT_SECONDS)
    world = Group(tuple(range(environment.world_size)), environment.global_rank)
    told = gather_objects((environment.node_rank, environment.local_rank, report.as_json()), world)
    firsts = [rank for rank, (_, local_rank, _) in enumerate(told) if local_rank == 0]
    reports = [NodeReport.from_json(told[rank][2]) for rank in firsts]
    barrier(world)
    clocks = dict(gather_objects((socket.gethostname(), now()), world))
    pairs = pair_bandwidths(firsts, world, device, PAIR_BYTES)
    hosts = [one.host for one in reports]
    by_host = {" - ".join(hosts[int(number)] for number in pair.split("-")): value for pair, value in pairs.items()}
    network = Network(by_host, all_reduce_bandwidth(world, device, PAIR_BYTES))
    disconnect()
    return reports, clocks, network


def _slow(network: Network) -> list[Finding]:
    """Return the pairs of nodes that are much slower than most."""
    if len(network.pairs) < 3:
        return []
    median = statistics.median(network.pairs.values())
    return [
        Finding("network", "warning", f"{pair}: {value / 1e9:.2f} GB/s, median {median / 1e9:.2f}", "look at its links")
        for pair, value in sorted(network.pairs.items())
        if value < SLOW_FACTOR * median
    ]
