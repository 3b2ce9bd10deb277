"""Configuration files of the simulated cluster, as text. Pure.

Clocks are short, so that tests need not wait for Slurm to notice a fault: a node is down after `slurmd_timeout`
seconds, and a step that is asked to end is killed after five.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.77.0"
LOGIN = "login"


@dataclass(frozen=True)
class Hardware:
    """Nodes of a cluster and Slurm's clocks."""

    num_nodes: int = 4
    cpus: int = 8
    """Cores that Slurm hands out per node; the machine need not have them."""
    gpus: int = 0
    """GPUs that Slurm hands out per node: device files behind which there is nothing."""
    slurmd_timeout: int = 10
    """Seconds of silence after which the controller takes a node for down; 300 is Slurm's default."""
    cred_expire: int = 5
    """Seconds that a requeued job waits for the credentials of its last start; 120 is Slurm's default."""
    kill_wait: int = 5
    """Seconds between SIGTERM and SIGKILL; 30 is Slurm's default."""

    @property
    def nodes(self) -> list[str]:
        """Host names of the nodes, `node1` and so on."""
        return [f"node{number}" for number in range(1, self.num_nodes + 1)]


def address(host: str) -> str:
    """Return the IP address of a host of the cluster."""
    return f"{NETWORK}.{1 if host == LOGIN else 10 + int(host.removeprefix('node'))}"


def hosts(hardware: Hardware) -> str:
    """Return /etc/hosts of all machines: names without loopback addresses, unlike Debian's default."""
    lines = ["127.0.0.1 localhost", *(f"{address(host)} {host}" for host in [LOGIN, *hardware.nodes])]
    return "\n".join(lines) + "\n"


def slurm_conf(hardware: Hardware, folder: Path) -> str:
    """Return slurm.conf; `folder` takes the controller's state and all logs."""
    names = f"node[1-{hardware.num_nodes}]"
    gres = f" Gres=gpu:{hardware.gpus}" if hardware.gpus else ""
    return f"""\
ClusterName=simulated
SlurmctldHost={LOGIN}({address(LOGIN)})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire={hardware.cred_expire}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout={hardware.slurmd_timeout}
KillWait={hardware.kill_wait}
CompleteWait=0
InactiveLimit=0
MinJobAge=3600
SlurmctldPort=6817
SlurmdPort=6818
StateSaveLocation={folder}/state
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/logs/slurmctld.log
SlurmdLogFile={folder}/logs/slurmd-%h.log
SlurmctldDebug=info
SlurmdDebug=info
{"GresTypes=gpu" if gres else ""}
NodeName={names} CPUs={hardware.cpus} RealMemory=8000{gres} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9
"""


def gres_conf(hardware: Hardware) -> str:
    """Return gres.conf; the device files are made by each node as it starts."""
    return f"Name=gpu File=/run/gpu[0-{hardware.gpus - 1}]\n" if hardware.gpus else ""


def ssh_config(folder: Path) -> str:
    """Return ssh's configuration for all users of the cluster: root's key is everywhere."""
    return f"""\
Host *
    IdentityFile {folder}/ssh/key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""


def sshd_config(folder: Path, path: str) -> str:
    """Return sshd's configuration; `path` is the PATH of commands that ssh runs."""
    return f"""\
HostKey {folder}/ssh/key
AuthorizedKeysFile {folder}/ssh/key.pub
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
SetEnv PATH={path}
"""
