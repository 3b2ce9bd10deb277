"""A real Slurm cluster on this machine: a login host with slurmctld, and nodes that are sets of namespaces.

    with Cluster(folder, Hardware(num_nodes=4)) as cluster:
        cluster.run("srun", "--nodes=2", "hostname")
        job = cluster.sbatch("srun hostname", "--nodes=2")
        cluster.power_off("node2")

`folder` is the disk that all nodes share; the repository and the interpreter are the same everywhere, and /tmp,
/dev/shm and /run are each node's own. It needs root, and the Debian packages of `PROGRAMS`; `missing` says what is not
there. All processes end with the cluster, however this process ends.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from tests.slurm import files
from tests.slurm.files import LOGIN, Hardware

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "srun": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
    "unshare": "util-linux",
}
"""Program -> Debian package."""
PATH = ":".join([str(Path(sys.executable).parent), "/usr/sbin", "/usr/bin", "/sbin", "/bin"])
FOREIGN = ("SLURM", "SBATCH", "SRUN", "PALIMPSEST_", "OMPI_", "PMI", "PRTE", "TORCHELASTIC", "PET_", "PYTEST_")
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
"""Variables of this process that commands on the cluster do not see, beside those that begin as `FOREIGN` does."""
UP_SECONDS = 120.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL")
"""States in which a job stays."""


@cache
def missing() -> str:
    """Return the reason why there can be no cluster here; empty where there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "the simulated cluster needs root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    packages = {package for program, package in PROGRAMS.items() if shutil.which(program, path=path) is None}
    if packages:
        return f"the simulated cluster needs: apt-get install {' '.join(sorted(packages))}"
    tried = ["unshare", *NAMESPACES, "ip", "link", "add", "name", "b", "type", "bridge"]
    done = subprocess.run(tried, capture_output=True, text=True, check=False)
    return f"the simulated cluster needs namespaces: {done.stderr.strip()}" if done.returncode else ""


NAMESPACES = ("--pid", "--fork", "--kill-child", "--mount-proc", "--mount", "--net", "--uts", "--ipc")


def lacking(*programs: str) -> str:
    """Return the reason why a test that needs further programs cannot run; empty where it can."""
    absent = [name for name in programs if shutil.which(name, path=PATH) is None]
    return missing() or (f"there is no {', '.join(absent)}" if absent else "")


class ClusterError(Exception):
    """The cluster did not do what it was told."""


class Cluster:
    """A running cluster while entered. Commands run on the login host unless `on` names a node."""

    def __init__(self, folder: Path, hardware: Hardware | None = None) -> None:
        self.folder, self.hardware = folder, hardware or Hardware()
        self.nodes = self.hardware.nodes
        self._own = folder / "cluster"
        """Files of the cluster itself; tests use the rest of the folder."""
        self._outer: subprocess.Popen[str] | None = None
        self._first = 0

    def __enter__(self) -> Cluster:
        self._write_files()
        shared = sorted({str(path) for path in (self.folder, ROOT, Path(sys.prefix), Path(sys.base_prefix))})
        program = [sys.executable, "-I", "-S", str(ROOT / "tests/slurm/machine.py")]
        self._outer = subprocess.Popen(
            ["unshare", *NAMESPACES, *program, str(self._own), str(self.hardware.gpus), *shared],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self._own / "logs/machine.err").open("w"),
            env=self._environment(),
            text=True,
        )
        try:
            self._answer("boot")
            self._first = _child_of(self._outer.pid)
            for node in self.nodes:
                self._tell("on", node)
            self.wait_nodes("idle")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._outer is not None:
            # `--kill-child`: the first process dies with it, and every other with that one.
            self._outer.kill()
            self._outer.wait()
            for pipe in (self._outer.stdin, self._outer.stdout):
                if pipe is not None:
                    pipe.close()
            _wait(lambda: not Path(f"/proc/{self._first}").exists(), 30, "the cluster does not end")

    # ---- commands

    def command(self, *argv: str | Path, on: str = LOGIN, cwd: Path | None = None) -> list[str]:
        """Return a command line of this machine that runs `argv` on a host of the cluster."""
        assert self._first
        enter = ["nsenter", "--target", str(self._first), "--all", "--"]
        if on != LOGIN:
            enter += ["nsenter", "--target", self._tell("first", on), "--all", "--"]
        return [*enter, "env", "-C", str(cwd or self.folder), *map(str, argv)]

    def run(
        self,
        *argv: str | Path,
        on: str = LOGIN,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        check: bool = True,
        timeout: float = 240,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command and return its output.

        Raises:
            ClusterError: its exit code is not 0, and `check` is set.
        """
        line = self.command(*argv, on=on, cwd=cwd)
        done = subprocess.run(
            line, capture_output=True, text=True, timeout=timeout, env=self._environment(env), stdin=subprocess.DEVNULL
        )
        if check and done.returncode:
            raise ClusterError(f"{' '.join(map(str, argv))}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def start(
        self, *argv: str | Path, on: str = LOGIN, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command and return its process; a signal to it does not reach the command (`kill` on the host)."""
        return subprocess.Popen(
            self.command(*argv, on=on, cwd=cwd),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self._environment(env),
        )

    def sbatch(self, script: str, *options: str, env: Mapping[str, str] | None = None) -> int:
        """Submit a batch script (`#!/bin/bash` is added) and return the job's number; see `output`."""
        path = self.folder / f"script-{time.monotonic_ns()}.sh"
        path.write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
        where = f"--output={self.folder}/job-%j.out"
        return int(self.run("sbatch", "--parsable", where, *options, path, env=env).stdout)

    def output(self, job: int) -> str:
        """Return what the batch script of a job has written so far."""
        path = self.folder / f"job-{job}.out"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    # ---- state

    def job(self, job: int) -> dict[str, str]:
        """Return what Slurm says of a job: `JobState`, `ExitCode`, `NodeList`, `Restarts`, ..."""
        text = self.run("scontrol", "--oneliner", "show", "job", str(job)).stdout
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait_job(self, job: int, *states: str, timeout: float = 240) -> str:
        """Wait until a job is in one of these states (default: one in which it stays), and return that one.

        Raises:
            ClusterError: it is not after `timeout` seconds.
        """
        wanted = states or ENDED

        def state() -> str:
            found = self.job(job)["JobState"]
            return found if found in wanted else ""

        words = f"job {job} is not {' or '.join(wanted)}"
        return _wait(state, timeout, words, lambda: f"{self.job(job)}\n{self.output(job)}")

    def wait_for(self, until: Callable[[], T], words: str, timeout: float = 240) -> T:
        """Wait until something is true, and return it. Raises `ClusterError` with `words`."""
        return _wait(until, timeout, words, self._logs)

    def node_states(self) -> dict[str, str]:
        """Return the state of each node as `sinfo` names it: idle, mixed, allocated, down, drained.

        "down*": the node does not answer. Empty while the controller does not."""
        asked = ("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T")
        lines = self.run(*asked, check=False).stdout.splitlines()
        return {line.partition(" ")[0]: line.partition(" ")[2] for line in lines}

    def wait_nodes(self, state: str, *nodes: str, timeout: float = UP_SECONDS) -> None:
        """Wait until nodes (default: all) are in a state. Raises `ClusterError`."""

        def reached() -> bool:
            found = self.node_states()
            return all(found.get(node) == state for node in nodes or self.nodes)

        _wait(reached, timeout, f"nodes are not {state}", self._logs)

    # ---- faults

    def power_off(self, node: str) -> None:
        """Take a node's power: its processes, /tmp and /dev/shm are gone, and nobody is told."""
        self._tell("off", node)

    def power_on(self, node: str) -> None:
        """Start a node that was switched off."""
        self._tell("on", node)

    def cut(self, node: str) -> None:
        """Pull a node's cable; its processes go on."""
        self._tell("cut", node)

    def mend(self, node: str) -> None:
        """Plug the cable in again."""
        self._tell("mend", node)

    def freeze(self, node: str) -> None:
        """Stop all processes of a node."""
        self._tell("freeze", node)

    def thaw(self, node: str) -> None:
        """Let them go on."""
        self._tell("thaw", node)

    def stop_controller(self) -> None:
        """Kill slurmctld; jobs go on."""
        self._tell("stop", "slurmctld")

    def start_controller(self) -> None:
        """Start it again, with the state that it left."""
        self._tell("start", "slurmctld")

    # ---- inside

    def _write_files(self) -> None:
        own = self._own
        for name in ("logs", "state", "slurm", "ssh", "etc-ssh"):
            (own / name).mkdir(parents=True, exist_ok=True)
        (own / "hosts").write_text(files.hosts(self.hardware))
        (own / "slurm/slurm.conf").write_text(files.slurm_conf(self.hardware, own))
        (own / "slurm/gres.conf").write_text(files.gres_conf(self.hardware))
        (own / "etc-ssh/ssh_config").write_text(files.ssh_config(own))
        (own / "etc-ssh/sshd_config").write_text(files.sshd_config(own, PATH))
        key = own / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        if shutil.which("ssh-keygen"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", own / "ssh/key"], check=True)

    def _environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN) and name not in RANKS}
        return own | {"PATH": PATH, "PYTHONPATH": str(ROOT)} | dict(more or {})

    def _tell(self, *words: str) -> str:
        """Give an order to the first process of the cluster and return the answer. Raises `ClusterError`."""
        assert self._outer is not None
        assert self._outer.stdin is not None
        self._outer.stdin.write(" ".join(words) + "\n")
        self._outer.stdin.flush()
        return self._answer(" ".join(words))

    def _answer(self, order: str) -> str:
        assert self._outer is not None
        assert self._outer.stdout is not None
        if not select.select([self._outer.stdout], [], [], UP_SECONDS)[0]:
            raise ClusterError(f"{order}: no answer\n{self._logs()}")
        answer = self._outer.stdout.readline().strip()
        if not answer or answer.startswith("error"):
            raise ClusterError(f"{order}: {answer}\n{self._logs()}")
        return answer

    def _logs(self) -> str:
        """Return the end of each daemon's log, for the message of a test that fails."""
        found = []
        for path in sorted((self._own / "logs").iterdir()):
            lines = path.read_text(errors="replace").splitlines()[-8:]
            found.append("\n".join([f"== {path.name}", *lines]))
        return "\n".join(found)


class MakeCluster(Protocol):
    """Start a cluster of so many nodes; `clocks` are the other fields of `Hardware`."""

    def __call__(self, num_nodes: int = 4, **clocks: Any) -> Cluster: ...


def _child_of(parent: int) -> int:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "stat").read_text().rpartition(")")[2].split()[1] == str(parent):
                    return int(entry.name)
            except OSError:
                continue
    raise ClusterError("the cluster's first process has ended")


def _wait(until: Callable[[], T], timeout: float, words: str, more: Callable[[], str] = str) -> T:
    """Ask until the answer is true, and return it. Raises `ClusterError` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (answer := until()):
        if time.monotonic() > deadline:
            raise ClusterError(f"{words} after {timeout:.0f} s\n{more()}")
        time.sleep(0.1)
    return answer
