"""Site profiles: what a cluster wants of a job, in one YAML file per cluster, `configs/sites/NAME.yaml`.

A profile never enters the hash of a run: the same run continues on another cluster. It holds no credentials; what the
ranks need to log in anywhere comes by the environment of `palimpsest launch`. Values that differ from node to node are
shell expressions (`per_node`), which each node evaluates itself.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from engine.config.load import apply_override, read_tree
from engine.config.schema.section import Section
from engine.errors import ConfigError, PalimpsestError, report

FOLDER = Path(__file__).parents[2] / "configs" / "sites"
"""Profiles that come with Palimpsest."""
NO_SITE = "generic"
"""Profile of a cluster that none describes."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|(API|ACCESS|PRIVATE)_?KEY)(_|$)")


class Allocation(Section):
    """Options of sbatch that say what is allocated, and to whom it is charged."""

    account: str | None = None
    """Project that the job is charged to (`--account`)."""
    partition: str | None = None
    """Partition (`--partition`)."""
    qos: str | None = None
    """Quality of service (`--qos`)."""
    reservation: str | None = None
    """Reservation (`--reservation`)."""
    constraint: str | None = None
    """Features that the nodes must have (`--constraint`)."""
    exclude: tuple[str, ...] = ()
    """Nodes that are not wanted (`--exclude`)."""
    exclude_file: Path | None = None
    """File that names more such nodes, one per line, read at each submission; it need not exist."""
    exclusive: bool = True
    """Whole nodes (`--exclusive`). Ranks are restarted by whole nodes."""
    hint: str | None = None
    """Use of hardware threads (`--hint`), for example nomultithread."""
    mem: str | None = "0"
    """Memory per node (`--mem`); 0 is all of it. None leaves it to the cluster."""
    extra: tuple[str, ...] = ()
    """Further options of sbatch, each as it stands on a line of the script."""
    submit: tuple[str, ...] = ("sbatch",)
    """Command that submits a script."""


class Gpus(Section):
    """GPUs of a node, and the way in which a job asks for them."""

    per_node: NonNegativeInt = 8
    """GPUs of a node; 0 for a cluster without."""
    request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """Option that asks for them; none where the partition alone decides."""
    type: str | None = None
    """Type that the request names, for example a100."""


class Tasks(Section):
    """Ranks of a node: their cores and their binding."""

    cpus: PositiveInt | None = None
    """Cores of each rank (`--cpus-per-task`), which srun does not take over from sbatch since Slurm 22.05."""
    cpu_bind: str | None = None
    """Binding to cores (`--cpu-bind`), also as masks."""
    gpu_bind: str | None = None
    """Binding to GPUs (`--gpu-bind`). Ranks choose their GPU by themselves, so none is right unless a site asks."""
    mem_bind: str | None = None
    """Binding to memory (`--mem-bind`)."""
    mpi: str = "none"
    """Start-up of MPI by srun (`--mpi`), which ranks do not need."""
    extra: tuple[str, ...] = ()
    """Further options of srun."""


class Setup(Section):
    """Environment of the conductor, the agents and the ranks."""

    purge: bool = False
    """Unload all modules first."""
    use: tuple[str, ...] = ()
    """Folders of modules (`module use`)."""
    modules: tuple[str, ...] = ()
    """Modules to load."""
    source: tuple[str, ...] = ()
    """Shell files to source, for example `VENV/bin/activate`."""
    variables: dict[str, str] = Field(default_factory=dict)
    """Variables with a value that is equal on every node, for example NCCL_* and FI_*."""
    per_node: dict[str, str] = Field(default_factory=dict)
    """Variables whose value is a shell expression that each node evaluates, for example "$(hostname -s)"."""
    offline: bool = False
    """Compute nodes reach no network outside: Hugging Face's libraries and wandb do not try."""


class Container(Section):
    """Container in which the ranks run. The conductor and the agents stay outside, where Slurm's commands are."""

    program: Literal["apptainer", "singularity", "pyxis", "shifter", "podman"]
    """Program that starts it."""
    image: str
    """Image: a file, a name, or (pyxis) the path of a `.sqsh`."""
    binds: tuple[str, ...] = ()
    """Folders that are visible inside, as the program writes them (`FROM:TO`)."""
    gpus: Literal["nv", "rocm"] | None = None
    """GPU libraries of the host that apptainer and singularity bring in."""
    python: str = "python"
    """Interpreter inside."""
    extra: tuple[str, ...] = ()
    """Further options of that program."""


class Network(Section):
    """Network on which the ranks meet."""

    interface: str | None = None
    """Interface for gloo and NCCL, and for `address: interface`."""
    address: Literal["host", "interface"] = "host"
    """Address of the first rank: its node's name, or the IP address of `interface` there."""
    suffix: str = ""
    """Text behind a node's name that names its address on the fast network, for example i in Juelich."""


class Limits(Section):
    """Limits that are told before the queue tells them."""

    max_nodes: PositiveInt | None = None
    """Most nodes of a job."""
    max_time: str | None = None
    """Longest time of a job, as in `--time`."""
    max_chain: PositiveInt = 100
    """Most links of a chain, which count as jobs that wait; Slurm itself takes arrays of up to `MaxArraySize`."""


class Site(Section):
    """One cluster."""

    source: str = Field(min_length=1)
    """Public documentation that the values come from, and whether the profile was run there."""
    match: tuple[str, ...] = ()
    """Patterns of the host names of its login nodes, by which it is found."""
    allocation: Allocation = Allocation()
    gpus: Gpus = Gpus()
    tasks: Tasks = Tasks()
    setup: Setup = Setup()
    container: Container | None = None
    network: Network = Network()
    limits: Limits = Limits()
    python: str | None = None
    """Interpreter outside of the container. None means the one that runs `palimpsest launch`."""
    signal_seconds: PositiveInt = 300
    """Seconds before the time limit at which the job is told to save (`--signal=B:USR1@SECONDS`)."""
    requeue: Literal["slurm", "resubmit", "none"] = "slurm"
    """Way in which a job starts again after it has saved: Slurm requeues it; or, where that is disabled, the job
    submits its successor from its first node; or it ends, and is submitted again by hand."""


def choose(
    name: str | None, hosts: Sequence[str], changes: Sequence[str] = (), folder: Path = FOLDER
) -> tuple[str, Site]:
    """Return (name, site): the named profile or file, or else the one that has a pattern for this host.

    `hosts` are this host's names, short and full; `changes` are `section.key=value` of the command line, which win
    over the profile.

    Raises:
        ConfigError: no profile has this name, several match, or the profile is wrong.
    """
    if name is not None:
        path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
        if not path.is_file():
            near = difflib.get_close_matches(name, names(folder), n=1)
            hint = f"did you mean {near[0]}? A file of your own is named by its path" if near else "name a file"
            raise ConfigError(f"--site = {name!r} is no site profile", ", ".join(names(folder)), hint)
        return path.stem, load(path, changes)
    sites = {known: load(folder / f"{known}.yaml") for known in names(folder)}
    matching = [known for known, site in sites.items() if _matches(site, hosts)]
    if len(matching) > 1:
        raise ConfigError(
            f"host {hosts[0]} matches several site profiles", ", ".join(matching), "choose one with --site"
        )
    found = matching[0] if matching else NO_SITE
    return found, load(folder / f"{found}.yaml", changes)


def _matches(site: Site, hosts: Sequence[str]) -> bool:
    return any(fnmatch(host, pattern) for pattern in site.match for host in hosts)


def names(folder: Path = FOLDER) -> list[str]:
    """Return the names of the profiles in a folder, sorted."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load(path: Path, changes: Sequence[str] = ()) -> Site:
    """Return the profile in a file, with the changes of the command line.

    Raises:
        ConfigError: it cannot be read, a key or value is wrong, or it holds a credential.
    """
    tree = read_tree(path)
    for change in changes:
        apply_override(tree, change)
    try:
        site = Site.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        problems: list[PalimpsestError] = [_explain(item) for item in error.errors()]
        raise report(problems, f"site profile {path}") from None
    except TypeError as error:  # dates, and keys that are no text
        raise ConfigError(f"site profile {path}: {error}", "text, numbers and lists", "put text in quotes") from None
    check(site, str(path))
    return site


def check(site: Site, what: str) -> None:
    """Raise `ConfigError` for variables that no shell takes, credentials, and an address without its interface."""
    variables = {**site.setup.variables, **site.setup.per_node}
    wrong = next((name for name in variables if not _VARIABLE.fullmatch(name)), None)
    if wrong is not None:
        raise ConfigError(f"{what}: setup.variables.{wrong}", "letters, digits and _", "rename the variable")
    secret = next((name for name in variables if _SECRET.search(name.upper())), None)
    if secret is not None:
        # Scripts and profiles are read by many people, and Slurm keeps scripts; the environment is the user's alone.
        raise ConfigError(
            f"{what}: {secret} looks like a credential",
            "variables that everybody may read",
            f"export {secret} in the shell from which you launch: the job inherits it",
        )
    if site.network.address == "interface" and site.network.interface is None:
        raise ConfigError(
            f"{what}: network.address = 'interface' without network.interface", "both", "name the interface"
        )


def _explain(item: Any) -> ConfigError:
    """Return pydantic's finding about one key in three parts, the nearest known key with an unknown one."""
    *parents, last = item["loc"]
    path = ".".join(map(str, item["loc"]))
    if item["type"] != "extra_forbidden":
        return ConfigError(f"{path} = {item['input']!r}: {item['msg']}", "see docs/cluster.md", "mend the value")
    section: Any = Site
    for key in parents:
        section = _SECTIONS[str(key)]
    near = difflib.get_close_matches(str(last), section.model_fields, n=1)
    hint = f"did you mean {near[0]}?" if near else "remove it"
    return ConfigError(f"unknown key {path}", ", ".join(section.model_fields), hint)


_SECTIONS: dict[str, type[Section]] = {
    "allocation": Allocation,
    "gpus": Gpus,
    "tasks": Tasks,
    "setup": Setup,
    "container": Container,
    "network": Network,
    "limits": Limits,
}
