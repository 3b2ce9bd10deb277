"""Rank of this process: the variables of every launcher, read into one `RankEnvironment`.

Each launcher has a reader of its own; the innermost launcher wins, because torchrun, deepspeed and mpirun all run
inside Slurm jobs. Invariant: a rank environment is complete or there is none. A missing or contradictory variable is an
error, never a guess, since ranks that disagree about the world wait for each other for ever. `os.environ` is read by
the caller.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path

from engine import heartbeat
from engine.config.rank_environment import RankEnvironment
from engine.errors import EnvironmentProblem
from engine.run_folder import RunFolder, Start
from launcher.hosts import expand_counts, expand_hosts
from launcher.ports import free_port, job_port

Environ = Mapping[str, str]

JOB, ATTEMPT, LAUNCHER = "PALIMPSEST_JOB", "PALIMPSEST_ATTEMPT", "PALIMPSEST_LAUNCHER"
RUN_FOLDER = "PALIMPSEST_RUN_FOLDER"
"""Variables of `palimpsest launch` alone, beside RANK, WORLD_SIZE and the other usual ones."""
OVERRIDES = "PALIMPSEST_OVERRIDES"
"""Overrides that hold credentials, as a JSON list: all users of a node see command lines, variables only the owner."""
RESTARTS_PER_START = 1000
"""Attempt numbers reserved for each start by Slurm: restarts by torchrun inside of it count on from there."""
LOOPBACK = "127.0.0.1"
JOB_HOSTS = ("SLURM_JOB_NODELIST", "SLURM_NODELIST")
"""Host lists of the job. Not that of the step: mpirun starts the ranks of other nodes through a step of its own, which
leaves out the node that it runs on, rank 0's."""
FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Slurm's numbers from here on are no steps of ranks: the batch script, the shell of `salloc`, ..."""
MPIRUN_NAMES = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID")
"""Variables that the ranks of one mpirun share and two mpiruns do not."""


def rank_environment(environ: Environ) -> RankEnvironment:
    """Return the rank environment of this process, from the variables of its launcher; alone where there are none.

    A process alone is given a free port, so that two runs on one node do not meet.

    Raises:
        EnvironmentProblem: variables are missing, unreadable or contradict each other.
    """
    found = _find(environ)
    _check(found)
    job = environ.get(JOB) or found.job
    several = found.num_nodes > 1
    # The user's own variable wins: only they know which of a node's networks the others reach.
    address = environ.get("MASTER_ADDR") or found.master_addr or ("" if several else LOOPBACK)
    if not address:
        raise EnvironmentProblem(
            f"MASTER_ADDR is not set and the {found.num_nodes} nodes of {found.launcher} do not say who holds rank 0",
            "the host name of rank 0's node",
            "set MASTER_ADDR on every rank, for example mpirun -x MASTER_ADDR=HOST",
        )
    # Ranks cannot agree on a free port before they have met, so theirs follows from the names that they share.
    port = _number(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else found.master_port
    # A supervised job has a name that no other start has, so its ranks need no step to be told apart.
    step = "" if is_supervised(environ) else found.step
    return RankEnvironment(
        global_rank=found.global_rank,
        world_size=found.world_size,
        local_rank=found.local_rank,
        master_addr=address,
        master_port=port or (free_port() if found.world_size == 1 else job_port(job, step)),
        job=job,
        attempt=_attempt(environ),
        local_world_size=found.local_world_size,
        node_rank=found.node_rank,
        num_nodes=found.num_nodes,
        launcher=environ.get(LAUNCHER) or found.launcher,
        step=step,
    )


def hidden_overrides(environ: Environ) -> list[str]:
    """Return the overrides that `palimpsest launch` keeps out of the command line; most often none."""
    return json.loads(environ.get(OVERRIDES) or "[]")


def is_supervised(environ: Environ) -> bool:
    """Return True if `palimpsest launch` watches over this process."""
    return bool(environ.get(LAUNCHER))


def run_folder(path: Path, environment: RankEnvironment, environ: Environ) -> RunFolder:
    """Return the run folder as this rank sees it; not taken yet."""
    meeting = f"{environment.master_addr}:{environment.master_port}"
    mark = "" if is_supervised(environ) else f"step {environment.step or 'none'}, {meeting}"
    # both start the ranks of a node from one process
    one_parent = mark and environment.launcher in ("torchrun", "deepspeed")
    beats = Path(environ.get(heartbeat.VARIABLE) or "/nowhere")
    return RunFolder(
        path,
        Start(environment.job, environment.attempt, mark),
        parent=os.getppid() if one_parent else None,
        aside=beats if is_supervised(environ) and beats.is_dir() else None,
    )


def export(environment: RankEnvironment, environ: MutableMapping[str, str]) -> None:
    """Write the variables that torch and DeepSpeed read, whichever launcher started the ranks."""
    environ.update(
        RANK=str(environment.global_rank),
        WORLD_SIZE=str(environment.world_size),
        LOCAL_RANK=str(environment.local_rank),
        LOCAL_WORLD_SIZE=str(environment.local_world_size),
        MASTER_ADDR=environment.master_addr,
        MASTER_PORT=str(environment.master_port),
    )


def check_meeting_point(
    environment: RankEnvironment, environ: Environ, resolve: Callable[[str], str] = socket.gethostbyname
) -> None:
    """Refuse addresses with which ranks on several nodes would wait for each other in silence.

    Raises:
        EnvironmentProblem: rank 0's host, or this host's own name, resolves to loopback or to nothing.
    """
    if environment.num_nodes == 1:
        return
    if environment.global_rank == 0 and not environ.get("MASTER_ADDR"):
        _refuse_other_host(environment, resolve)
    names = {"MASTER_ADDR": environment.master_addr}
    # Gloo binds to the address of the host's own name unless it is given an interface; Debian gives it 127.0.1.1.
    if not environ.get("GLOO_SOCKET_IFNAME"):
        names["this host's name"] = socket.gethostname()
    for what, name in names.items():
        try:
            address = resolve(name)
        except OSError as error:
            raise EnvironmentProblem(
                f"{what} = {name} does not resolve: {error}", "a name that every node resolves", "use its IP address"
            ) from error
        if address.startswith("127."):
            raise EnvironmentProblem(
                f"{what} = {name} resolves to {address}, where ranks of {environment.num_nodes} nodes cannot meet",
                "an address on the network between the nodes",
                "mend /etc/hosts (Debian writes 127.0.1.1), or set MASTER_ADDR to an IP address and GLOO_SOCKET_IFNAME "
                "and NCCL_SOCKET_IFNAME to the interface",
            )


def _refuse_other_host(environment: RankEnvironment, resolve: Callable[[str], str]) -> None:
    """Refuse on rank 0 an address that was taken from a host list and is another host's: nobody would listen there.

    Raises:
        EnvironmentProblem: this host does not have the address.
    """
    try:
        address = resolve(environment.master_addr)
        with socket.socket() as probe:
            probe.bind((address, 0))
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            return  # a name that does not resolve is refused with the others
        raise EnvironmentProblem(
            f"rank 0 is on {socket.gethostname()}, and the first host of the job is {environment.master_addr}",
            "rank 0 on the first host, or MASTER_ADDR set on every rank",
            f"set MASTER_ADDR={socket.gethostname()} on every rank, for example mpirun -x MASTER_ADDR=HOST",
        ) from error


@dataclass(frozen=True)
class _Found:
    """Rank of this process as one launcher gives it; an empty `master_addr` means that it gives no address."""

    launcher: str
    global_rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int = 0
    num_nodes: int = 1
    master_addr: str = ""
    master_port: int | None = None
    job: str = "local"
    step: str = ""
    """Step of a Slurm job; none under torchrun and deepspeed: their agents may well be several steps of one job."""


def _find(environ: Environ) -> _Found:
    speaking = [reader for speaks, reader in READERS if speaks(environ)]
    if not speaking:
        refuse_forgotten_srun(environ, "palimpsest train")
        return _Found("alone", 0, 1, 0, 1)
    # Slurm's and mpirun's variables reach the ranks of a torchrun inside of them, never the other way round.
    first = speaking[0](environ)
    if first.launcher == "environment" and not environ.get(LAUNCHER):
        for reader in speaking[1:]:
            if reader is not _read_pmi:  # its variables are often there beside others, and incomplete
                other = reader(environ)
                _check_agreement(first, other)
                first = replace(first, step=other.step)
    return first


def _check_agreement(by_hand: _Found, other: _Found) -> None:
    """Refuse RANK and WORLD_SIZE left over in a shell from which another launcher then started the ranks.

    Raises:
        EnvironmentProblem: both launchers are told, and they disagree.
    """
    if (other.global_rank, other.world_size) != (by_hand.global_rank, by_hand.world_size):
        raise EnvironmentProblem(
            f"RANK = {by_hand.global_rank} and WORLD_SIZE = {by_hand.world_size} contradict {other.launcher}, which "
            f"says rank {other.global_rank} of {other.world_size}",
            "one launcher's variables",
            "unset RANK and WORLD_SIZE in the shell that starts the ranks",
        )


def _read_torch(environ: Environ) -> _Found:
    """Read RANK and WORLD_SIZE: torchrun, deepspeed, `palimpsest launch`, or a script of the user's own."""
    # CROSS_SIZE is deepspeed's name for the number of nodes; torchrun's is GROUP_WORLD_SIZE.
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "deepspeed" if "CROSS_SIZE" in environ else ""
    world_size = _number(environ, "WORLD_SIZE")
    local_names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    local_world_size = next((_number(environ, name) for name in local_names if name in environ), world_size)
    # "none" is torchrun's default where --rdzv-id is not given, equal for all runs.
    run_id = environ.get("TORCHELASTIC_RUN_ID", "none")
    own = {"torchrun": "GROUP", "deepspeed": "CROSS"}.get(launcher)  # the other's are left over from around it
    node_names = (f"{own}_RANK",) if own else ("GROUP_RANK", "CROSS_RANK", "NODE_RANK")
    size_names = (f"{own}_WORLD_SIZE", f"{own}_SIZE") if own else ("GROUP_WORLD_SIZE", "CROSS_SIZE")
    return _Found(
        launcher or "environment",
        global_rank=_number(environ, "RANK"),
        world_size=world_size,
        local_rank=_number(environ, "LOCAL_RANK") if world_size > 1 or "LOCAL_RANK" in environ else 0,
        local_world_size=local_world_size,
        node_rank=_first(environ, node_names, 0),
        # Without a variable the nodes are as many as their ranks make, a last one with fewer ranks included.
        num_nodes=_first(environ, size_names, -(-world_size // max(local_world_size, 1))),
        master_addr=environ.get("MASTER_ADDR", ""),
        job=run_id if run_id != "none" else environ.get("SLURM_JOB_ID", "local"),
    )


def _is_pod(environ: Environ) -> bool:
    """Return True in a container that Kubernetes started for one node of several, where torchrun has started no rank.

    The number of a pod alone (JOB_COMPLETION_INDEX) may as well be that of one independent run of many.
    """
    numbered = "JOB_COMPLETION_INDEX" in environ and "WORLD_SIZE" in environ
    return "LOCAL_RANK" not in environ and ("PET_NNODES" in environ or numbered)


def _read_pod(environ: Environ) -> _Found:
    """Read torchrun's options as variables (PET_*), which operators set in pods; one rank per pod.

    Raises:
        EnvironmentProblem: the pod is to hold several ranks, which torchrun has to start.
    """
    nodes = _first(environ, ("PET_NNODES", "WORLD_SIZE"), None)
    per_node = environ.get("PET_NPROC_PER_NODE") or "1"
    if per_node != "1":
        raise EnvironmentProblem(
            f"PET_NPROC_PER_NODE = {per_node}, and palimpsest train is one rank",
            "1, or torchrun as the command of the container",
            "torchrun -m engine.cli train RUN.yaml   (it reads the PET_ variables)",
        )
    endpoint, _, endpoint_port = environ.get("PET_RDZV_ENDPOINT", "").partition(":")
    port = environ.get("PET_MASTER_PORT") or endpoint_port
    node_rank = _first(environ, ("PET_NODE_RANK", "JOB_COMPLETION_INDEX", "RANK"), None)
    return _Found(
        "kubernetes",
        global_rank=node_rank,
        world_size=nodes,
        local_rank=0,
        local_world_size=1,
        node_rank=node_rank,
        num_nodes=nodes,
        master_addr=environ.get("PET_MASTER_ADDR") or endpoint,
        master_port=int(port) if port.isdecimal() else None,
        job=environ.get("PET_RDZV_ID") or "local",
    )


def _read_openmpi(environ: Environ) -> _Found:
    world_size = _number(environ, "OMPI_COMM_WORLD_SIZE")
    job, step = _mpi_job(environ)
    local = _first(environ, ("OMPI_COMM_WORLD_LOCAL_SIZE",), 1)
    return _Found(
        "openmpi",
        global_rank=_number(environ, "OMPI_COMM_WORLD_RANK"),
        world_size=world_size,
        local_rank=_number(environ, "OMPI_COMM_WORLD_LOCAL_RANK"),
        local_world_size=local,
        node_rank=_first(environ, ("OMPI_COMM_WORLD_NODE_RANK_GLOBAL",), 0),
        num_nodes=-(-world_size // max(local, 1)),
        master_addr=_first_host(environ, JOB_HOSTS) if world_size > local else "",
        job=job,
        step=step,
    )


def _read_slurm(environ: Environ) -> _Found:
    """Read one rank per task of an `srun` step."""
    world_size = _first(environ, ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), None)
    num_nodes = _first(environ, ("SLURM_STEP_NUM_NODES", "SLURM_NNODES"), 1)
    node_rank = _first(environ, ("SLURM_NODEID",), 0)
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    # Without Slurm's list every node is taken to hold an even share, rounded up.
    counts = expand_counts(per_node) if per_node else [-(-world_size // max(num_nodes, 1))] * num_nodes
    if node_rank >= len(counts):
        raise EnvironmentProblem(
            f"SLURM_NODEID = {node_rank}, but Slurm lists tasks of {len(counts)} nodes", "", "start the ranks with srun"
        )
    return _Found(
        "slurm",
        global_rank=_number(environ, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_world_size=counts[node_rank],
        node_rank=node_rank,
        num_nodes=num_nodes,
        master_addr=_first_host(environ, ("SLURM_STEP_NODELIST", *JOB_HOSTS)) if num_nodes > 1 else "",
        job=environ.get("SLURM_JOB_ID", "local"),
        step=slurm_step(environ),
    )


def slurm_step(environ: Environ) -> str:
    """Return the number of the `srun` step that this process is a task of; empty in a batch script and outside."""
    step = environ.get("SLURM_STEP_ID") or environ.get("SLURM_STEPID") or ""
    return "" if step.isdecimal() and int(step) >= FIRST_SPECIAL_STEP else step


def refuse_forgotten_srun(environ: Environ, command: str) -> None:
    """Refuse to run a command once in a Slurm job for several tasks or nodes, outside of `srun`.

    Raises:
        EnvironmentProblem: the process is in a batch script, or the shell of `salloc`, of such a job.
    """
    if not environ.get("SLURM_JOB_ID") or slurm_step(environ):
        return
    tasks = _first(environ, ("SLURM_NTASKS", "SLURM_NPROCS"), 1)
    nodes = _first(environ, ("SLURM_JOB_NUM_NODES", "SLURM_NNODES"), 1)
    if max(tasks, nodes) > 1:
        raise EnvironmentProblem(
            f"srun was forgotten: job {environ['SLURM_JOB_ID']} has {max(tasks, nodes)} tasks on {nodes} nodes, and "
            f"{command} runs once, outside of srun",
            "one rank per task, started by srun",
            f"srun {'palimpsest train' if command.endswith('launch') else command} RUN.yaml   (or, to use one node on "
            f"purpose: srun --nodes=1 --ntasks=1 {command} RUN.yaml)",
        )


def _read_pmi(environ: Environ) -> _Found:
    """Read MPICH, Intel MPI and others that start ranks through PMI (hydra), and bare PMIx."""
    world_size = _number(environ, "PMI_SIZE")
    job, step = _mpi_job(environ)
    local = _first(environ, ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"), world_size)
    return _Found(
        "pmi",
        global_rank=_first(environ, ("PMI_RANK", "PMIX_RANK"), None),
        world_size=world_size,
        # With several ranks a missing local rank is an error: all of them would take the first GPU.
        local_rank=_first(environ, ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"), None if world_size > 1 else 0),
        local_world_size=local,
        num_nodes=-(-world_size // max(local, 1)),
        master_addr=_first_host(environ, JOB_HOSTS) if world_size > local else "",
        job=job,
        step=step,
    )


def _left_by_singleton(environ: Environ) -> bool:
    """True in a child of a process that called MPI_Init without mpirun: Open MPI gives itself a rank of a world of one
    and leaves it in the environment."""
    return environ.get("OMPI_MCA_ess") == "singleton"


READERS: list[tuple[Callable[[Environ], bool], Callable[[Environ], _Found]]] = [
    (_is_pod, _read_pod),
    (lambda e: "RANK" in e or ("WORLD_SIZE" in e and "LOCAL_RANK" in e), _read_torch),
    (lambda e: "OMPI_COMM_WORLD_RANK" in e or "OMPI_COMM_WORLD_SIZE" in e, _read_openmpi),
    (lambda e: "MPI_LOCALRANKID" in e, _read_pmi),
    # a batch script and a login shell carry SLURM_PROCID too: a task of a step alone has the step's number
    (lambda e: "SLURM_PROCID" in e and slurm_step(e) != "", _read_slurm),
    (lambda e: "PMI_RANK" in e or ("PMIX_RANK" in e and not _left_by_singleton(e)), _read_pmi),
]
"""(test for a launcher's variables, its reader), innermost launcher first."""


def _check(found: _Found) -> None:
    """Refuse numbers that no world has. Raises `EnvironmentProblem`."""
    pairs = [
        ("rank", found.global_rank, found.world_size, "world size"),
        ("local rank", found.local_rank, found.local_world_size, "ranks on this node"),
        ("node rank", found.node_rank, found.num_nodes, "number of nodes"),
        ("ranks on this node", found.local_world_size - 1, found.world_size, "world size"),
    ]
    for what, value, limit, of in pairs:
        if not 0 <= value < limit:
            shown = value + 1 if what == "ranks on this node" else value
            raise EnvironmentProblem(
                f"{found.launcher} says {what} = {shown}, but {of} = {limit}",
                f"{what} below {of}" if shown == value else f"{what} at most {of}",
                "unset variables left over from another launcher, and start the ranks again",
            )


def _number(environ: Environ, name: str) -> int:
    text = environ.get(name)
    if text is None or not text.strip():
        raise EnvironmentProblem(
            f"{name} is not set, but other variables say that a launcher started this rank",
            "all of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or none of them",
            f"set {name}, or start the ranks with palimpsest launch, torchrun, deepspeed, srun or mpirun",
        )
    try:
        return int(text)
    except ValueError:
        raise EnvironmentProblem(f"{name} = {text!r} is no number", "a whole number", f"set {name} anew") from None


def _first(environ: Environ, names: tuple[str, ...], default: int | None) -> int:
    """Return the first of several variables that is set; without a default the first one is required."""
    for name in names:
        if environ.get(name):
            return _number(environ, name)
    return _number(environ, names[0]) if default is None else default


def _attempt(environ: Environ) -> int:
    if environ.get(ATTEMPT):
        return _number(environ, ATTEMPT)
    restarts = _first(environ, ("SLURM_RESTART_COUNT",), 0)
    # A number that only grows, so that no earlier attempt can commit over this one: restart 2 of start 1 is 1002.
    return restarts * RESTARTS_PER_START + _first(environ, ("TORCHELASTIC_RESTART_COUNT",), 0)


def _first_host(environ: Environ, lists: tuple[str, ...]) -> str:
    hosts = next((environ[name] for name in lists if environ.get(name)), "")
    return expand_hosts(hosts)[0] if hosts else ""


def _mpi_job(environ: Environ) -> tuple[str, str]:
    """Return (job, step) of an mpirun: the cluster's job and the mpirun's own name, or that name alone.

    Slurm's step says nothing here: mpirun starts ranks on its own node without one, and others through one.
    """
    own = next((environ[name] for name in MPIRUN_NAMES if environ.get(name)), "")
    job = next((environ[name] for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID") if environ.get(name)), "")
    return (job, own) if job else (own or "local", "")
