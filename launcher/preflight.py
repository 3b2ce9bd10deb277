"""Checks of a node before a run starts there, and the comparison of nodes that must be alike.

Without torch, so that an answer comes within a second or two. `check_node` reads this node and judges it by `Needs`
(`launcher.node_checks`); `compare_nodes` looks at the reports of all nodes.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.provenance import installed_versions
from launcher import node_checks as checks
from launcher.commands import program
from launcher.extensions import STALE_SECONDS, VARIABLE, locks
from launcher.node_checks import LEVELS, Finding, Gpu, Level, Needs, text_of
from launcher.processes import by_job

CLOCK_SKEW_SECONDS = 5.0
"""Difference of two nodes' clocks from which on times in logs and outcomes mislead."""
VERSIONS = ("torch", "deepspeed", "transformers", "numpy")
PROC, NET = Path("/proc"), Path("/sys/class/net")


@dataclass(frozen=True)
class NodeReport:
    """Findings of one node, and the facts in which all nodes must be alike."""

    host: str
    findings: tuple[Finding, ...]
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def level(self) -> Level:
        """Level of the worst finding."""
        return LEVELS[max((LEVELS.index(finding.level) for finding in self.findings), default=0)]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> NodeReport:
        findings = tuple(Finding(**finding) for finding in tree["findings"])
        return cls(tree["host"], findings, tree["facts"])


def check_node(needs: Needs, environ: Mapping[str, str] = os.environ) -> NodeReport:
    """Check this node; takes a second or two."""
    gpus = _gpus()
    findings = [
        *(_disk(needs) if needs.folder is not None else ()),
        checks.memory(_available_bytes(), needs),
        checks.shared_memory(shutil.disk_usage(needs.shared).free, needs),
        checks.gpu_count(len(gpus), needs.gpus),
        *checks.gpu_use(gpus),
        checks.open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        *checks.locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[1], Path("/sys/class/infiniband")),
        checks.host_name(_address(socket.gethostname()), needs.num_nodes, environ),
        *checks.interfaces(environ, NET),
        *(checks.port(needs.port) if needs.port is not None else ()),
        checks.trace(os.geteuid(), text_of(PROC / "sys/kernel/yama/ptrace_scope"), _has_py_spy()),
        checks.leftovers({job: pids for job, pids in by_job().items() if job != needs.job}),
        checks.build_locks(_stale_locks(environ)),
        *checks.requeue(_slurm_config() if environ.get("SLURM_JOB_ID") else ""),
        *checks.slingshot(environ, NET),
    ]
    installed = installed_versions()
    facts = {"Python": sys.version.split()[0], **{name: installed.get(name, "absent") for name in VERSIONS}}
    facts |= {"GPUs": ", ".join(sorted({gpu.name for gpu in gpus})) or "none", "number of GPUs": str(len(gpus))}
    facts |= {"driver": ", ".join(sorted({gpu.driver for gpu in gpus}))} if gpus else {}
    return NodeReport(socket.gethostname(), tuple(findings), facts)


def compare_nodes(reports: Sequence[NodeReport], clocks: Mapping[str, float]) -> list[Finding]:
    """Return what differs between nodes that must be alike.

    `clocks` are the nodes' clocks at about one moment, in seconds since 1970.
    """
    findings = []
    for name in sorted({name for report in reports for name in report.facts}):
        hosts: dict[str, list[str]] = {}
        for report in reports:
            hosts.setdefault(report.facts.get(name, "absent"), []).append(report.host)
        if len(hosts) > 1:
            text = "; ".join(f"{value} on {', '.join(held)}" for value, held in sorted(hosts.items()))
            findings.append(Finding(name, "failed", text, "use one environment, and nodes of one kind"))
    first, last = min(clocks, key=clocks.__getitem__), max(clocks, key=clocks.__getitem__)
    skew = clocks[last] - clocks[first]
    if skew > CLOCK_SKEW_SECONDS:
        text = f"{last} is {skew:.0f} s ahead of {first}"
        findings.append(Finding("clocks", "warning", text, "start time synchronisation (chrony or ntpd) on both"))
    return findings


def _disk(needs: Needs) -> Iterator[Finding]:
    """Check that files can be written in the run folder, and its disk; the folder itself need not exist yet."""
    assert needs.folder is not None
    there = next(path for path in (needs.folder.absolute(), *needs.folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
        found = os.statvfs(there)
    except OSError as error:
        text = f"{there}: {error.strerror or error}"
        yield Finding("disk", "failed", text, "choose a folder in which this node can write")
        return
    yield from checks.disk(found.f_bavail * found.f_frsize, found.f_favail if found.f_files else None, needs)


def _available_bytes() -> int:
    lines = (line.split() for line in text_of(PROC / "meminfo").splitlines())
    return next((1024 * int(words[1]) for words in lines if words and words[0] == "MemAvailable:"), 0)


def _gpus() -> list[Gpu]:
    """Return the GPUs of the node; none where there is no driver."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.used", "--format=csv,noheader,nounits"]
    rows = [line.split(", ") for line in _output(query).splitlines()]
    # memory.used is in MiB, or [N/A] where the GPU shares the host's memory
    return [Gpu(row[0], row[1], int(row[2]) * 2**20 if row[2].isdigit() else 0) for row in rows if len(row) == 3]


def _address(name: str) -> str:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return ""


def _has_py_spy() -> bool:
    return shutil.which(program("py-spy", sys.executable)) is not None


def _stale_locks(environ: Mapping[str, str]) -> list[Path]:
    folder = environ.get(VARIABLE)
    now = time.time()
    return [lock for lock in locks(Path(folder)) if now - lock.stat().st_mtime > STALE_SECONDS] if folder else []


def _slurm_config() -> str:
    return _output(["scontrol", "show", "config"])


def _output(command: list[str]) -> str:
    """Return what a program prints; empty where it is not there, fails, or takes more than 20 s."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
