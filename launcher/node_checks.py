"""Judgements over one node, each a pure function of figures: what a run would fail on there, or be slow on, later."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GIB = 2**30
Level = Literal["ok", "warning", "failed"]
LEVELS: tuple[Level, ...] = ("ok", "warning", "failed")
"""From the best to the worst."""
INODES_LEAST = 10_000
SHARED_BYTES_PER_RANK = 64 * 2**20
"""Room in /dev/shm that NCCL and gloo take for one rank, at the most."""
OPEN_FILES_LEAST = 4096
GPU_USED_BYTES = GIB
"""Memory of a GPU in use before the run starts, from which on somebody else is taken to use it."""


@dataclass(frozen=True)
class Finding:
    """Result of one check: how it went, the figures, and the remedy where it did not go well."""

    check: str
    level: Level
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Needs:
    """Demands of a run on one node, in bytes where nothing else is said."""

    folder: Path | None = None
    """Run folder; None checks no disk."""
    disk_bytes: int = 0
    ranks: int = 1
    gpus: int | None = None
    """GPUs that the ranks of a node use; None where any number will do."""
    host_bytes: int = 0
    shared: Path = Path("/dev/shm")
    """Folder of checkpoints in the node's memory."""
    shared_bytes: int = 0
    num_nodes: int = 1
    port: int | None = None
    """Port at which ranks meet on this node; None where they meet on another one."""
    job: str = ""
    """Job whose own processes are no leftovers."""


def disk(free_bytes: int, free_inodes: int | None, needs: Needs) -> Iterator[Finding]:
    """Judge the disk of the run folder; `free_inodes` is None where the file system counts none."""
    text = f"{_gib(free_bytes)} free in {needs.folder}"
    enough = free_bytes >= needs.disk_bytes
    remedy = f"the run's checkpoints take {_gib(needs.disk_bytes)}: make room, or keep fewer (checkpoint.keep_last)"
    yield Finding("disk", "ok" if enough else "failed", text, "" if enough else remedy)
    if free_inodes is not None and free_inodes < INODES_LEAST:
        yield Finding("inodes", "failed", f"{free_inodes:,} free in {needs.folder}", "remove small files there")


def memory(available_bytes: int, needs: Needs) -> Finding:
    """Judge the memory of the node."""
    enough = available_bytes >= needs.host_bytes
    remedy = f"the run's ranks take {_gib(needs.host_bytes)} here: end what else runs on the node"
    return Finding("memory", "ok" if enough else "failed", f"{_gib(available_bytes)} free", "" if enough else remedy)


def shared_memory(free_bytes: int, needs: Needs) -> Finding:
    """Judge the room for shared memory, and for checkpoints in memory beside it."""
    wanted = needs.shared_bytes + needs.ranks * SHARED_BYTES_PER_RANK
    enough = free_bytes >= wanted
    remedy = f"{_gib(wanted)} are needed: give containers more (docker --shm-size), or remove what was left there"
    level: Level = "ok" if enough else "failed" if needs.shared_bytes else "warning"
    return Finding("shared memory", level, f"{_gib(free_bytes)} free in {needs.shared}", "" if enough else remedy)


def gpu_count(found: int, wanted: int | None) -> Finding:
    """Judge the number of GPUs."""
    enough = wanted is None or found >= wanted
    remedy = "" if enough else f"the ranks of a node use {wanted}: look at nvidia-smi and dmesg, or leave the node out"
    return Finding("GPUs", "ok" if enough else "failed", f"{found} found", remedy)


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi lists it."""

    name: str
    driver: str
    used_bytes: int


def gpu_use(gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """Judge the memory that is in use on the GPUs before the run starts."""
    used = [(number, gpu.used_bytes) for number, gpu in enumerate(gpus) if gpu.used_bytes > GPU_USED_BYTES]
    if used:
        text = ", ".join(f"GPU {number}: {_gib(size)}" for number, size in used) + " in use"
        yield Finding("GPU memory", "warning", text, "see whose processes nvidia-smi lists, and end them")


def open_files(limit: int) -> Finding:
    """Judge the hard limit of open files of a process."""
    enough = limit == resource.RLIM_INFINITY or limit >= OPEN_FILES_LEAST
    remedy = "" if enough else f"raise it to {OPEN_FILES_LEAST} or more: ulimit -Hn, or LimitNOFILE of slurmd"
    return Finding("open files", "ok" if enough else "warning", f"limit {limit}", remedy)


def locked_memory(limit: int, infiniband: Path) -> Iterator[Finding]:
    """Judge the limit of locked memory, on nodes with InfiniBand alone."""
    if infiniband.is_dir() and any(infiniband.iterdir()) and limit != resource.RLIM_INFINITY:
        remedy = "InfiniBand registers memory: set memlock to unlimited, also for slurmd (LimitMEMLOCK=infinity)"
        yield Finding("locked memory", "warning", f"limit {limit:,} bytes", remedy)


def host_name(address: str, num_nodes: int, environ: Mapping[str, str]) -> Finding:
    """Judge the address of the node's own name; empty where it has none."""
    named = environ.get("GLOO_SOCKET_IFNAME")
    if address and not address.startswith("127."):
        return Finding("host name", "ok", f"resolves to {address}")
    text = f"resolves to {address}" if address else "does not resolve"
    if num_nodes == 1 or named:
        return Finding("host name", "ok", f"{text}, which does no harm here")
    remedy = "mend /etc/hosts (Debian writes 127.0.1.1), or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
    return Finding("host name", "failed", f"{text}: ranks of several nodes cannot meet", remedy)


def interfaces(environ: Mapping[str, str], net: Path) -> Iterator[Finding]:
    """Judge the interfaces that are named to gloo and NCCL: that each is there, and up."""
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        # NCCL takes a list of prefixes; "=" means the whole name, "^" all but these.
        value = environ.get(variable, "")
        if not value or value.startswith("^"):
            continue
        names = [name.strip() for name in value.removeprefix("=").split(",")]
        there = [path for path in net.iterdir() if any(path.name.startswith(name) for name in names)]
        up = [path.name for path in there if text_of(path / "operstate") != "down"]
        if up:
            yield Finding(variable, "ok", f"{', '.join(sorted(up))}")
        else:
            found = ", ".join(sorted(path.name for path in net.iterdir()))
            text = f"{value}: {'is down' if there else 'no such interface'}"
            yield Finding(variable, "failed", text, f"name one of this node's: {found}")


def port(number: int) -> Iterator[Finding]:
    """Check that the port at which ranks meet is free."""
    with socket.socket() as probe:
        try:
            probe.bind(("", number))
        except OSError as error:
            remedy = "set MASTER_PORT to another one, or end what listens there"
            yield Finding("port", "failed", f"{number}: {error.strerror or error}", remedy)


def trace(user: int, scope: str, has_py_spy: bool) -> Finding:
    """Judge the right to read the stacks of ranks that hang; `scope` is Yama's, empty where the kernel has none."""
    if not has_py_spy:
        return Finding("stacks", "warning", "py-spy is not installed", "install Palimpsest with its dependencies")
    if user == 0 or scope in ("", "0"):
        return Finding("stacks", "ok", "ranks that hang can be looked at")
    remedy = "sysctl kernel.yama.ptrace_scope=0, or the report of a hang names phases and process states alone"
    return Finding("stacks", "warning", f"kernel.yama.ptrace_scope = {scope}", remedy)


def leftovers(others: Mapping[str, Sequence[int]]) -> Finding:
    """Judge processes of other runs of this user, by job."""
    if not others:
        return Finding("other runs", "ok", "none of yours on this node")
    text = "; ".join(f"job {job}: processes {', '.join(map(str, pids))}" for job, pids in sorted(others.items()))
    return Finding("other runs", "warning", text, "end them if they were left over, or share the node knowingly")


def build_locks(stale: Sequence[Path]) -> Finding:
    """Judge locks of builds of DeepSpeed's extensions that were killed."""
    if not stale:
        return Finding("build locks", "ok", "none left over")
    remedy = f"rm -r {' '.join(str(lock.parent) for lock in stale)}"
    return Finding("build locks", "failed", f"{stale[0]}: every rank would wait for it for ever", remedy)


def requeue(slurm_config: str) -> Iterator[Finding]:
    """Judge whether Slurm requeues jobs, from the text of `scontrol show config`."""
    for line in slurm_config.splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "JobRequeue" and value.strip() == "0":
            remedy = "submit with --requeue: after the loss of a node nobody would start the job again"
            yield Finding("JobRequeue", "warning", "0: Slurm does not requeue jobs by itself", remedy)


def slingshot(environ: Mapping[str, str], net: Path) -> Iterator[Finding]:
    """Judge libfabric's cache monitor on HPE Slingshot, whose default can hang under NCCL."""
    if net.is_dir() and any(path.name.startswith("hsn") for path in net.iterdir()):
        value = environ.get("FI_MR_CACHE_MONITOR", "")
        if value not in ("userfaultfd", "kdreg2", "disabled"):
            text = f"{value or 'not set'} on a Slingshot network"
            yield Finding("FI_MR_CACHE_MONITOR", "warning", text, "export FI_MR_CACHE_MONITOR=userfaultfd")


def text_of(path: Path) -> str:
    """Return the text of a small file of the kernel; empty where it cannot be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _gib(count: int) -> str:
    return f"{count / GIB:,.1f} GiB"
