"""Check before ranks meet that the address of rank 0 is one where ranks of other nodes reach it."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

from engine.config.rank_environment import RankEnvironment
from engine.errors import EnvironmentProblem
from launcher.variables import Environ


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
