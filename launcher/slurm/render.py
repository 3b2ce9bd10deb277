"""The scripts of a job as text: a pure function of its specification.

The batch script sets up the environment and becomes the conductor; it decides nothing. `rank.sh` is started by srun
once per rank: it names the rank to the launcher's tools, and keeps the rank's exit code for the agent of its node,
because neither srun nor the agent is the rank's parent. No command line is put into a `bash -c '...'`, where quotes of
a user's argument would end.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from launcher.slurm.site import Site
from launcher.slurm.spec import AGENTS_LOG, JobSpec

COMMENT = "palimpsest"
"""First word of the jobs' comments, by which `palimpsest job list` knows them."""
MARK = "PALIMPSEST_MARK"
"""Variable that the ranks of one attempt share: an agent ends them by it."""


def batch_script(spec: JobSpec) -> str:
    """Return the batch script."""
    options = [f"#SBATCH {option}" for option in sbatch_options(spec)]
    become = shlex.join((spec.python, "-m", "launcher.slurm.conductor", str(spec.folder)))
    return _lines(
        "#!/bin/bash",
        f"# {spec.run_folder} on {spec.nodes} nodes of {spec.site_name}, written by `palimpsest launch`",
        *options,
        "",
        "# Until the conductor listens, a signal must not end this shell; it sets handlers of its own.",
        "trap '' USR1 TERM",
        *setup_lines(spec.site),
        *_code_lines(spec),
        f"cd {shlex.quote(str(spec.work_folder))}",
        "# exec: Slurm signals the process of the script, which is the conductor from here on.",
        f"exec {become}",
    )


def sbatch_options(spec: JobSpec) -> list[str]:
    """Return the options of sbatch, in a fixed order."""
    allocation, gpus = spec.site.allocation, spec.site.gpus
    type_ = f"{gpus.type}:" if gpus.type else ""
    request = None
    if spec.gpus_per_node and gpus.request == "gres":
        request = f"--gres=gpu:{type_}{spec.gpus_per_node}"
    elif spec.gpus_per_node and gpus.request == "gpus-per-node":
        request = f"--gpus-per-node={type_}{spec.gpus_per_node}"
    named = {
        "--job-name": spec.name,
        "--comment": shlex.quote(f"{COMMENT} {spec.run_folder}"),
        "--account": allocation.account,
        "--partition": allocation.partition,
        "--qos": allocation.qos,
        "--reservation": allocation.reservation,
        "--constraint": allocation.constraint,
        "--exclude": ",".join(spec.exclude) or None,
        # No --ntasks-per-node beside a range: Slurm would give its minimum. The steps say how many tasks they have.
        "--nodes": spec.nodes,
        "--time": spec.time,
        "--hint": allocation.hint,
        "--mem": allocation.mem,
        "--signal": f"B:USR1@{spec.site.signal_seconds}",
        "--output": shlex.quote(str(spec.output)),
    }
    return [
        *(f"{option}={value}" for option, value in named.items() if value is not None),
        *([request] if request else []),
        *(["--exclusive"] if allocation.exclusive else []),
        "--requeue" if spec.site.requeue else "--no-requeue",
        # The loss of a node ends neither the job nor the other nodes' ranks before the conductor has decided.
        "--no-kill",
        # A requeued job continues its log.
        "--open-mode=append",
        *allocation.extra,
    ]


def setup_lines(site: Site) -> list[str]:
    """Return the lines of a shell that make a site's environment, equal on every node."""
    setup, network = site.setup, site.network
    variables = dict(setup.variables)
    if setup.offline:
        variables = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"} | variables
    if network.interface is not None:
        # Explicit, because a node has several networks and its name may belong to the slow one.
        names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        variables = dict.fromkeys(names, network.interface) | variables
    return [
        *(["module purge"] if setup.purge else []),
        *(f"module use {shlex.quote(folder)}" for folder in setup.use),
        *(f"module load {shlex.quote(module)}" for module in setup.modules),
        *(f"source {shlex.quote(file)}" for file in setup.source),
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
    ]


def _code_lines(spec: JobSpec) -> list[str]:
    """Return the lines that make every process of the job run its snapshot."""
    if spec.code is None:
        return []
    # Safe path: `python -m` would look into the current folder first, which may be the checkout that is edited.
    code = shlex.quote(str(spec.code))
    return [f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1"]


def rank_script(spec: JobSpec) -> str:
    """Return the script that srun starts once per rank, with the rank's command as its arguments."""
    return _lines(
        "#!/bin/bash",
        "# Started by srun, once per rank; the arguments are the command of the rank.",
        "export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID NODE_RANK=$SLURM_NODEID",
        f'export {MARK}="$PALIMPSEST_JOB.$PALIMPSEST_ATTEMPT"',
        # Evaluated here and not in the batch script, because their values differ from node to node.
        *(f"export {name}={value}" for name, value in spec.site.setup.per_node.items()),
        "# Signals are the rank's: this shell outlives it and keeps its exit code.",
        "trap : TERM INT HUP USR1 USR2",
        f'{_container_prefix(spec)}"$@" &',
        "rank=$!",
        "# A signal interrupts `wait`, so it is called until the rank is gone.",
        'while kill -0 "$rank" 2>/dev/null; do wait "$rank"; done',
        'wait "$rank"',
        "code=$?",
        "# An agent that has ended the rank may have cleared the folder.",
        '{ echo "$code" > "$PALIMPSEST_HEARTBEATS/end-$RANK"; } 2>/dev/null',
        'exit "$code"',
    )


def train_command(spec: JobSpec, overrides: Iterable[str]) -> tuple[str, ...]:
    """Return the command of a rank, without the container around it."""
    python = spec.site.container.python if spec.site.container is not None else spec.python
    return (python, "-u", "-m", "engine.cli", "train", str(spec.config), *overrides)


def agents_step(spec: JobSpec, num_nodes: int) -> list[str]:
    """Return the command that starts one agent per node, for as long as the job lasts."""
    return [
        *_step(num_nodes, num_nodes),
        "--gres=none",
        "--cpus-per-task=1",
        f"--output={spec.folder / AGENTS_LOG}",
        "--open-mode=append",
        spec.python,
        "-m",
        "launcher.slurm.agent",
    ]


def rank_step(spec: JobSpec, nodes: list[str], world_size: int, attempt: int, overrides: Iterable[str]) -> list[str]:
    """Return the command that starts the ranks of one attempt on these nodes."""
    tasks, container = spec.site.tasks, spec.site.container
    bound = {
        "--cpus-per-task": tasks.cpus,
        "--cpu-bind": tasks.cpu_bind,
        "--gpu-bind": tasks.gpu_bind,
        "--mem-bind": tasks.mem_bind,
    }
    pyxis = container is not None and container.program == "pyxis"
    return [
        *_step(len(nodes), world_size, spec.site.tasks.mpi),
        f"--ntasks-per-node={world_size // len(nodes)}",
        f"--nodelist={','.join(nodes)}",
        # Ranks of one node in a row: tensor ranks stay on one node.
        "--distribution=block",
        f"--output={spec.logs}/rank-%t.{attempt}.log",
        "--open-mode=append",
        *(f"{option}={value}" for option, value in bound.items() if value is not None),
        *(_pyxis_options(spec) if pyxis else []),
        *tasks.extra,
        "bash",
        str(spec.rank_script),
        *train_command(spec, overrides),
    ]


def _step(num_nodes: int, num_tasks: int, mpi: str = "none") -> list[str]:
    """Return the beginning of an srun that starts beside others, and that the end of one task does not end.

    The conductor decides when the rest of the ranks ends, so that they can still write their last words: an exit code
    85 of the first rank must not kill the others while they save.
    """
    return [
        "srun",
        "--overlap",
        "--no-kill",
        "--kill-on-bad-exit=0",
        "--wait=0",
        f"--nodes={num_nodes}",
        f"--ntasks={num_tasks}",
        "--mem=0",
        f"--mpi={mpi}",
    ]


def _container_prefix(spec: JobSpec) -> str:
    """Return the start of a rank's command line, in the container if there is one; pyxis is an option of srun."""
    container = spec.site.container
    if container is None or container.program == "pyxis":
        return ""
    if container.program in ("apptainer", "singularity"):
        gpus = [f"--{container.gpus}"] if container.gpus else []
        binds = [word for bind in container.binds for word in ("--bind", bind)]
        words = [container.program, "exec", *gpus, *binds, *container.extra, container.image]
    elif container.program == "shifter":
        words = ["shifter", f"--image={container.image}", *(f"--volume={bind}" for bind in container.binds)]
        words += container.extra
    else:
        # The host's processes, memory and network: agents find the ranks by their mark, and read their beats.
        shared = ["--rm", "--env-host", "--network=host", "--ipc=host", "--pid=host"]
        binds = [word for bind in container.binds for word in ("--volume", bind)]
        words = ["podman", "run", *shared, *binds, *container.extra, container.image]
    return shlex.join(words) + " "


def _pyxis_options(spec: JobSpec) -> list[str]:
    container = spec.site.container
    assert container is not None
    # The rank's script is the first thing that runs inside, and beats are files in the node's memory.
    mounts = [*container.binds, f"{spec.run_folder}:{spec.run_folder}", "/dev/shm:/dev/shm"]
    return [f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}", *container.extra]


def _lines(*lines: str) -> str:
    return "\n".join(lines) + "\n"
