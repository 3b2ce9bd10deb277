"""The scripts of a job as text: a pure function of its specification.

The batch script sets up the environment and becomes the conductor; it decides nothing. `rank.sh` is started by srun
once per rank: it names the rank to the launcher's tools, and keeps the rank's exit code for the agent of its node,
because neither srun nor the agent is the rank's parent. No command line is put into a `bash -c '...'`, where quotes of
a user's argument would end.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from launcher.slurm.site import Container, Site
from launcher.slurm.spec import AGENTS_LOG, JobSpec, NodesSpec, PreflightSpec

COMMENT = "palimpsest"
"""First word of the jobs' comments, by which `palimpsest job list` knows them."""
PREFLIGHT_COMMENT = "palimpsest-preflight"
MARK = "PALIMPSEST_MARK"
"""Variable that the ranks of one attempt share: an agent ends them by it."""


def batch_script(spec: JobSpec) -> str:
    """Return the batch script."""
    become = shlex.join((spec.python, "-m", "launcher.slurm.conductor", str(spec.folder)))
    if spec.chain is None and spec.site.requeue == "resubmit":
        become += ' "$@"'  # of a successor: the number of the first job, and how many starts there were
    chain = "" if spec.chain is None else f" in {spec.chain} links, one after another,"
    return _lines(
        "#!/bin/bash",
        f"# {spec.run_folder}{chain} on {spec.nodes} nodes of {spec.site_name}, written by `palimpsest launch`",
        *_sbatch_lines(sbatch_options(spec)),
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
    """Return the options of sbatch for a run, in a fixed order."""
    alone = spec.chain is None
    return [
        *_allocation_options(spec, f"{COMMENT} {spec.run_folder}", spec.output),
        # B: to the batch script alone, which is the conductor; it tells the ranks.
        f"--signal=B:USR1@{spec.site.signal_seconds}",
        # %1: one link at a time. Links are not requeued: Slurm would start the next one while the other waits.
        *([] if alone else [f"--array=1-{spec.chain}%1"]),
        "--requeue" if alone and spec.site.requeue == "slurm" else "--no-requeue",
        # The loss of a node ends neither the job nor the other nodes' ranks before the conductor has decided.
        "--no-kill",
        # A requeued job continues its log.
        "--open-mode=append",
        *spec.site.allocation.extra,
    ]


def _sbatch_lines(options: Iterable[str]) -> list[str]:
    return [f"#SBATCH {option}" for option in options]


def _allocation_options(spec: NodesSpec, comment: str, output: Path) -> list[str]:
    """Return the options that say what is allocated, for whom, and where the output goes."""
    allocation, gpus = spec.site.allocation, spec.site.gpus
    type_ = f"{gpus.type}:" if gpus.type else ""
    request = None
    if spec.gpus_per_node and gpus.request == "gres":
        request = f"--gres=gpu:{type_}{spec.gpus_per_node}"
    elif spec.gpus_per_node and gpus.request == "gpus-per-node":
        request = f"--gpus-per-node={type_}{spec.gpus_per_node}"
    named = {
        "--job-name": spec.name,
        "--comment": shlex.quote(comment),
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
        "--output": shlex.quote(str(output)),
    }
    return [
        *(f"{option}={value}" for option, value in named.items() if value is not None),
        *([request] if request else []),
        *(["--exclusive"] if allocation.exclusive else []),
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
        *_per_node_lines(spec),
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
    return (*_cli(spec), "train", str(spec.config), *overrides)


def preflight_script(spec: PreflightSpec) -> str:
    """Return the batch script that checks the nodes it gets, and the network between them."""
    tasks = f'"$((SLURM_JOB_NUM_NODES * {spec.ranks_per_node}))"'
    options = [
        *("--mem=0", f"--mpi={spec.site.tasks.mpi}", f"--ntasks-per-node={spec.ranks_per_node}"),
        *_rank_options(spec, spec.folder),
        *("bash", str(spec.rank_script), *_cli(spec), "preflight", *spec.arguments),
    ]
    return _lines(
        "#!/bin/bash",
        f"# Preflight of {spec.nodes} nodes of {spec.site_name}, written by `palimpsest preflight`",
        *_sbatch_lines(
            [
                *_allocation_options(spec, f"{PREFLIGHT_COMMENT} {spec.folder}", spec.output),
                "--no-requeue",
                *spec.site.allocation.extra,
            ]
        ),
        "",
        *setup_lines(spec.site),
        *_meeting_lines(spec.site),
        f"cd {shlex.quote(str(spec.work_folder))}",
        "# The number of nodes is known here and not before, where a range was asked for.",
        f'exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks={tasks} {shlex.join(options)}',
    )


def preflight_rank_script(spec: PreflightSpec) -> str:
    """Return the script that srun starts once per rank of a preflight, with its command as arguments."""
    return _lines(
        "#!/bin/bash",
        "# Started by srun, once per rank; the arguments are the command of the rank.",
        *_per_node_lines(spec),
        f'exec {_container_prefix(spec)}"$@"',
    )


def _meeting_lines(site: Site) -> list[str]:
    """Return the lines of a batch script that name the address of the first node, where its name is not the one."""
    network = site.network
    if network.address == "interface":
        shown = f"ip -4 -o addr show dev {shlex.quote(network.interface or '')}"
        return [f"export MASTER_ADDR=$({shown} | awk '{{ split($4, address, \"/\"); print address[1] }}')"]
    if network.suffix:
        return [f'export MASTER_ADDR="$SLURMD_NODENAME"{shlex.quote(network.suffix)}']
    return []


def _cli(spec: NodesSpec) -> tuple[str, ...]:
    """Return the start of a command of ours on a rank: in a container with the interpreter inside."""
    python = spec.site.container.python if spec.site.container is not None else spec.python
    return (python, "-u", "-m", "engine.cli")


def agents_step(spec: JobSpec, num_nodes: int) -> list[str]:
    """Return the command that starts one agent per node, for as long as the job lasts."""
    return [
        *_step(num_nodes, num_nodes),
        # With the job's GPUs, which --overlap shares: agents count them. Without (--gres=none) they would see none
        # where Slurm hides devices, and Slurm refuses it beside the SLURM_GPUS_PER_NODE of the job.
        "--cpus-per-task=1",
        f"--output={spec.folder / AGENTS_LOG}",
        "--open-mode=append",
        spec.python,
        "-m",
        "launcher.slurm.agent",
    ]


def rank_step(spec: JobSpec, nodes: list[str], world_size: int, attempt: int, overrides: Iterable[str]) -> list[str]:
    """Return the command that starts the ranks of one attempt on these nodes."""
    return [
        *_step(len(nodes), world_size, spec.site.tasks.mpi),
        f"--ntasks-per-node={world_size // len(nodes)}",
        f"--nodelist={','.join(nodes)}",
        f"--output={spec.logs}/rank-%t.{attempt}.log",
        "--open-mode=append",
        *_rank_options(spec, spec.run_folder),
        "bash",
        str(spec.rank_script),
        *train_command(spec, overrides),
    ]


def _rank_options(spec: NodesSpec, visible: Path) -> list[str]:
    """Return the options of srun that order and bind ranks; their container sees the folder `visible`."""
    tasks, container = spec.site.tasks, spec.site.container
    bound = {
        "--cpus-per-task": tasks.cpus,
        "--cpu-bind": tasks.cpu_bind,
        "--gpu-bind": tasks.gpu_bind,
        "--mem-bind": tasks.mem_bind,
    }
    return [
        # Ranks of one node in a row: tensor ranks stay on one node.
        "--distribution=block",
        *(f"{option}={value}" for option, value in bound.items() if value is not None),
        *(_pyxis_options(container, visible) if container is not None and container.program == "pyxis" else []),
        *tasks.extra,
    ]


def _per_node_lines(spec: NodesSpec) -> list[str]:
    """Return the lines for values that each node evaluates itself, because they differ from node to node."""
    return [f"export {name}={value}" for name, value in spec.site.setup.per_node.items()]


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


def _container_prefix(spec: NodesSpec) -> str:
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


def _pyxis_options(container: Container, visible: Path) -> list[str]:
    # The rank's script is the first thing that runs inside, and beats are files in the node's memory.
    mounts = [*container.binds, f"{visible}:{visible}", "/dev/shm:/dev/shm"]
    return [f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}", *container.extra]


def _lines(*lines: str) -> str:
    return "\n".join(lines) + "\n"
