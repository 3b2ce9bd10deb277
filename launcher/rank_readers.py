"""Rank of this process as its launcher gives it: one reader for the variables of each launcher.

The innermost launcher wins, because torchrun, deepspeed and mpirun all run inside Slurm jobs (`READERS` is in that
order). A missing or contradictory variable is an error, never a guess, since ranks that disagree about the world wait
for each other for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from engine.errors import EnvironmentProblem
from launcher.hosts import expand_counts, expand_hosts
from launcher.variables import LAUNCHER, Environ, first_number, number

JOB_HOSTS = ("SLURM_JOB_NODELIST", "SLURM_NODELIST")
"""Host lists of the job. Not that of the step: mpirun starts the ranks of other nodes through a step of its own, which
leaves out the node that it runs on, rank 0's."""
FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Slurm's numbers from here on are no steps of ranks: the batch script, the shell of `salloc`, ..."""
MPIRUN_NAMES = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID")
"""Variables that the ranks of one mpirun share and two mpiruns do not."""


@dataclass(frozen=True)
class LauncherRank:
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


def find_rank(environ: Environ) -> LauncherRank:
    """Return the rank that the innermost launcher gives this process; alone where there is no launcher.

    Raises:
        EnvironmentProblem: variables are missing, unreadable or contradict each other.
    """
    found = _find(environ)
    _check(found)
    return found


def _find(environ: Environ) -> LauncherRank:
    speaking = [reader for speaks, reader in READERS if speaks(environ)]
    if not speaking:
        refuse_forgotten_srun(environ, "palimpsest train")
        return LauncherRank("alone", 0, 1, 0, 1)
    # Slurm's and mpirun's variables reach the ranks of a torchrun inside of them, never the other way round.
    first = speaking[0](environ)
    if first.launcher == "environment" and not environ.get(LAUNCHER):
        for reader in speaking[1:]:
            if reader is not _read_pmi:  # its variables are often there beside others, and incomplete
                other = reader(environ)
                _check_agreement(first, other)
                first = replace(first, step=other.step)
    return first


def _check_agreement(by_hand: LauncherRank, other: LauncherRank) -> None:
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


def _read_torch(environ: Environ) -> LauncherRank:
    """Read RANK and WORLD_SIZE: torchrun, deepspeed, `palimpsest launch`, or a script of the user's own."""
    # CROSS_SIZE is deepspeed's name for the number of nodes; torchrun's is GROUP_WORLD_SIZE.
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "deepspeed" if "CROSS_SIZE" in environ else ""
    world_size = number(environ, "WORLD_SIZE")
    local_names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    local_world_size = next((number(environ, name) for name in local_names if name in environ), world_size)
    # "none" is torchrun's default where --rdzv-id is not given, equal for all runs.
    run_id = environ.get("TORCHELASTIC_RUN_ID", "none")
    own = {"torchrun": "GROUP", "deepspeed": "CROSS"}.get(launcher)  # the other's are left over from around it
    node_names = (f"{own}_RANK",) if own else ("GROUP_RANK", "CROSS_RANK", "NODE_RANK")
    size_names = (f"{own}_WORLD_SIZE", f"{own}_SIZE") if own else ("GROUP_WORLD_SIZE", "CROSS_SIZE")
    return LauncherRank(
        launcher or "environment",
        global_rank=number(environ, "RANK"),
        world_size=world_size,
        local_rank=number(environ, "LOCAL_RANK") if world_size > 1 or "LOCAL_RANK" in environ else 0,
        local_world_size=local_world_size,
        node_rank=first_number(environ, node_names, 0),
        # Without a variable the nodes are as many as their ranks make, a last one with fewer ranks included.
        num_nodes=first_number(environ, size_names, -(-world_size // max(local_world_size, 1))),
        master_addr=environ.get("MASTER_ADDR", ""),
        job=run_id if run_id != "none" else environ.get("SLURM_JOB_ID", "local"),
    )


def _is_pod(environ: Environ) -> bool:
    """Return True in a container that Kubernetes started for one node of several, where torchrun has started no rank.

    The number of a pod alone (JOB_COMPLETION_INDEX) may as well be that of one independent run of many.
    """
    numbered = "JOB_COMPLETION_INDEX" in environ and "WORLD_SIZE" in environ
    return "LOCAL_RANK" not in environ and ("PET_NNODES" in environ or numbered)


def _read_pod(environ: Environ) -> LauncherRank:
    """Read torchrun's options as variables (PET_*), which operators set in pods; one rank per pod.

    Raises:
        EnvironmentProblem: the pod is to hold several ranks, which torchrun has to start.
    """
    nodes = first_number(environ, ("PET_NNODES", "WORLD_SIZE"), None)
    per_node = environ.get("PET_NPROC_PER_NODE") or "1"
    if per_node != "1":
        raise EnvironmentProblem(
            f"PET_NPROC_PER_NODE = {per_node}, and palimpsest train is one rank",
            "1, or torchrun as the command of the container",
            "torchrun -m engine.cli train RUN.yaml   (it reads the PET_ variables)",
        )
    endpoint, _, endpoint_port = environ.get("PET_RDZV_ENDPOINT", "").partition(":")
    port = environ.get("PET_MASTER_PORT") or endpoint_port
    node_rank = first_number(environ, ("PET_NODE_RANK", "JOB_COMPLETION_INDEX", "RANK"), None)
    return LauncherRank(
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


def _read_openmpi(environ: Environ) -> LauncherRank:
    world_size = number(environ, "OMPI_COMM_WORLD_SIZE")
    job, step = _mpi_job(environ)
    local = first_number(environ, ("OMPI_COMM_WORLD_LOCAL_SIZE",), 1)
    return LauncherRank(
        "openmpi",
        global_rank=number(environ, "OMPI_COMM_WORLD_RANK"),
        world_size=world_size,
        local_rank=number(environ, "OMPI_COMM_WORLD_LOCAL_RANK"),
        local_world_size=local,
        node_rank=first_number(environ, ("OMPI_COMM_WORLD_NODE_RANK_GLOBAL",), 0),
        num_nodes=-(-world_size // max(local, 1)),
        master_addr=_first_host(environ, JOB_HOSTS) if world_size > local else "",
        job=job,
        step=step,
    )


def _read_slurm(environ: Environ) -> LauncherRank:
    """Read one rank per task of an `srun` step."""
    world_size = first_number(environ, ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), None)
    num_nodes = first_number(environ, ("SLURM_STEP_NUM_NODES", "SLURM_NNODES"), 1)
    node_rank = first_number(environ, ("SLURM_NODEID",), 0)
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    # Without Slurm's list every node is taken to hold an even share, rounded up.
    counts = expand_counts(per_node) if per_node else [-(-world_size // max(num_nodes, 1))] * num_nodes
    if node_rank >= len(counts):
        raise EnvironmentProblem(
            f"SLURM_NODEID = {node_rank}, but Slurm lists tasks of {len(counts)} nodes", "", "start the ranks with srun"
        )
    return LauncherRank(
        "slurm",
        global_rank=number(environ, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=number(environ, "SLURM_LOCALID"),
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
    tasks = first_number(environ, ("SLURM_NTASKS", "SLURM_NPROCS"), 1)
    nodes = first_number(environ, ("SLURM_JOB_NUM_NODES", "SLURM_NNODES"), 1)
    if max(tasks, nodes) > 1:
        raise EnvironmentProblem(
            f"srun was forgotten: job {environ['SLURM_JOB_ID']} has {max(tasks, nodes)} tasks on {nodes} nodes, and "
            f"{command} runs once, outside of srun",
            "one rank per task, started by srun",
            f"srun {'palimpsest train' if command.endswith('launch') else command} RUN.yaml   (or, to use one node on "
            f"purpose: srun --nodes=1 --ntasks=1 {command} RUN.yaml)",
        )


def _read_pmi(environ: Environ) -> LauncherRank:
    """Read MPICH, Intel MPI and others that start ranks through PMI (hydra), and bare PMIx."""
    world_size = number(environ, "PMI_SIZE")
    job, step = _mpi_job(environ)
    local = first_number(environ, ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"), world_size)
    return LauncherRank(
        "pmi",
        global_rank=first_number(environ, ("PMI_RANK", "PMIX_RANK"), None),
        world_size=world_size,
        # With several ranks a missing local rank is an error: all of them would take the first GPU.
        local_rank=first_number(environ, ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"), None if world_size > 1 else 0),
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


READERS: list[tuple[Callable[[Environ], bool], Callable[[Environ], LauncherRank]]] = [
    (_is_pod, _read_pod),
    (lambda e: "RANK" in e or ("WORLD_SIZE" in e and "LOCAL_RANK" in e), _read_torch),
    (lambda e: "OMPI_COMM_WORLD_RANK" in e or "OMPI_COMM_WORLD_SIZE" in e, _read_openmpi),
    (lambda e: "MPI_LOCALRANKID" in e, _read_pmi),
    # a batch script and a login shell carry SLURM_PROCID too: a task of a step alone has the step's number
    (lambda e: "SLURM_PROCID" in e and slurm_step(e) != "", _read_slurm),
    (lambda e: "PMI_RANK" in e or ("PMIX_RANK" in e and not _left_by_singleton(e)), _read_pmi),
]
"""(test for a launcher's variables, its reader), innermost launcher first."""


def _check(found: LauncherRank) -> None:
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
