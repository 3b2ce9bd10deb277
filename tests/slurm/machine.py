"""First process of a simulated cluster: its network, munged, slurmctld, and the power switch of each node.

A program of its own, run by the interpreter with `-I -S`. It is process 1 of a namespace that holds the whole cluster,
so all of it ends with this process, and this process ends when its standard input does. Commands come there, one on a
line (`off node2`), and each is answered by a line: `ok`, or the error.

Nothing is named outside of the namespaces, so clusters on one machine do not meet.
"""

import os
import select
import signal
import socket
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
REAP_SECONDS = 0.2


def shell(*command):
    subprocess.run(command, check=True, capture_output=True, text=True)


class Machine:
    """The cluster's processes: daemons of the login host, and one process per node that is switched on."""

    def __init__(self, folder, gpus, shared):
        self.folder, self.gpus, self.shared = folder, gpus, shared
        self.pids = {}
        """Process of each daemon of the login host, and of each node."""

    def boot(self):
        """Bring up the network, munged and slurmctld."""
        socket.sethostname("login")
        shell("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
        for made in ("/run/munge", "/run/netns"):
            os.mkdir(made)
        for own, there in (("hosts", "/etc/hosts"), ("slurm", "/etc/slurm"), ("etc-ssh", "/etc/ssh")):
            if os.path.exists(there):
                shell("mount", "--bind", f"{self.folder}/{own}", there)
        shell("ip", "link", "set", "lo", "up")
        shell("ip", "link", "add", "name", "bridge", "type", "bridge")
        shell("ip", "addr", "add", "10.77.0.1/24", "dev", "bridge")
        shell("ip", "link", "set", "bridge", "up")
        munge = ["--foreground", "--force", f"--key-file={self.folder}/munge.key", "--pid-file=/run/munged.pid"]
        # Files of its own: those in the usual places belong to another user.
        own = ["--seed-file=/run/munged.seed", f"--log-file={self.folder}/logs/munged.log"]
        self.spawn("munged", ["/usr/sbin/munged", *munge, *own, "--socket=/run/munge/munge.socket.2"])
        while not os.path.exists("/run/munge/munge.socket.2"):
            time.sleep(0.02)
            self.check("munged")
        self.start("slurmctld")

    def spawn(self, name, command):
        log = os.open(f"{self.folder}/logs/{name}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.pids[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log).pid
        os.close(log)

    def check(self, name):
        if os.waitpid(self.pids[name], os.WNOHANG) != (0, 0):
            raise RuntimeError(f"{name} has ended: see {self.folder}/logs/{name}.out")

    def start(self, name):
        assert name == "slurmctld"
        self.spawn(name, ["/usr/sbin/slurmctld", "-D"])

    def stop(self, name):
        os.kill(self.pids.pop(name), signal.SIGKILL)

    def on(self, node):
        """Plug a node in and start its first process."""
        number = int(node.removeprefix("node"))
        shell("ip", "netns", "add", node)
        shell("ip", "link", "add", "name", node, "type", "veth", "peer", "name", "eth0", "netns", node)
        shell("ip", "link", "set", node, "master", "bridge", "up")
        inside = ("ip", "-n", node)
        shell(*inside, "addr", "add", f"10.77.0.{10 + number}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            shell(*inside, "link", "set", link, "up")
        command = ["nsenter", f"--net=/run/netns/{node}", "unshare", "--mount", "--uts", "--ipc", "--pid", "--fork"]
        program = [sys.executable, "-I", "-S", f"{HERE}/node.py", self.folder, node, self.gpus, *self.shared]
        self.spawn(node, [*command, "--mount-proc", "--kill-child", *program])

    def off(self, node):
        """Take a node's power: nobody hears from it again, not even that its connections end."""
        shell("ip", "link", "set", node, "down")
        first = self.first_process(node)
        for pid in (self.pids.pop(node), first):
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
        while first is not None and self.is_alive(first):
            time.sleep(0.02)
        shell("ip", "link", "delete", node)
        shell("ip", "netns", "delete", node)

    def cut(self, node):
        shell("ip", "link", "set", node, "down")

    def mend(self, node):
        shell("ip", "link", "set", node, "up")

    def freeze(self, node):
        """Stop every process of a node, those that are being forked meanwhile included."""
        stopped = set()
        while new := self.processes_of(node) - stopped:
            self.send(new, signal.SIGSTOP)
            stopped |= new

    def thaw(self, node):
        self.send(self.processes_of(node), signal.SIGCONT)

    def first(self, node):
        """Answer with the node's first process, in the numbers of this namespace."""
        return str(self.first_process(node))

    def first_process(self, node):
        parent = str(self.pids[node])
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/stat") as file:
                    if file.read().rpartition(")")[2].split()[1] == parent:
                        return int(pid)
            except OSError:
                continue
        return None

    def processes_of(self, node):
        space = os.readlink(f"/proc/{self.first_process(node)}/ns/pid")
        found = set()
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                if os.readlink(f"/proc/{pid}/ns/pid") == space:
                    found.add(int(pid))
            except OSError:
                continue
        return found

    def send(self, pids, number):
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def is_alive(self, pid):
        self.reap()
        return os.path.exists(f"/proc/{pid}")

    def reap(self):
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            pass


def main(folder, gpus, *shared):
    machine = Machine(folder, gpus, shared)
    machine.boot()
    print("ok", flush=True)
    while True:
        if not select.select([sys.stdin], [], [], REAP_SECONDS)[0]:
            machine.reap()
            continue
        words = sys.stdin.readline().split()
        if not words:
            return
        try:
            answer = getattr(machine, words[0])(*words[1:]) or "ok"
        except subprocess.CalledProcessError as error:
            answer = f"error: {' '.join(error.cmd)}: {error.stderr.strip()}"
        except Exception as error:
            answer = f"error: {type(error).__name__}: {error}"
        print(answer.replace("\n", " "), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
