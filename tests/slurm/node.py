"""First process of one node of the simulated cluster: private folders, then slurmd and sshd until it is killed.

A program of its own, run by the interpreter with `-I -S`, since it starts once per node. It runs in new namespaces
(network, mounts, host name, processes, IPC) that `tests.slurm.machine` has made.
"""

import os
import signal
import socket
import subprocess
import sys

PRIVATE = ("/dev/shm", "/run", "/tmp")
"""Folders that are this node's own, in memory, and empty after a power loss."""


def mount(*arguments):
    subprocess.run(["mount", *arguments], check=True)


def make_private(shared):
    """Give the node empty folders in memory, in which only the folders of `shared` are those of the whole cluster."""
    hidden = [path for path in shared if path.startswith(tuple(f"{folder}/" for folder in PRIVATE))]
    mount("-t", "tmpfs", "tmpfs", "/mnt")
    for number, path in enumerate(hidden):
        os.mkdir(f"/mnt/{number}")
        mount("--bind", path, f"/mnt/{number}")
    for folder in PRIVATE:
        mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", folder)
    for number, path in enumerate(hidden):
        os.makedirs(path, exist_ok=True)
        mount("--bind", f"/mnt/{number}", path)
    subprocess.run(["umount", "--recursive", "/mnt"], check=True)


def main(folder, name, gpus, *shared):
    socket.sethostname(name)
    make_private(["/run/munge", *shared])
    for number in range(int(gpus)):
        os.mknod(f"/run/gpu{number}", 0o020666, os.makedev(1, 3))  # /dev/null by another name
    os.makedirs("/run/sshd", exist_ok=True)
    log = os.open(f"{folder}/logs/{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for daemon in (["/usr/sbin/slurmd", "-D"], ["/usr/sbin/sshd", "-D", "-e"]):
        if os.path.exists(daemon[0]):
            subprocess.Popen(daemon, stdin=subprocess.DEVNULL)
    while True:
        try:
            os.wait()  # orphans, too: this is the node's process 1
        except ChildProcessError:
            signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
