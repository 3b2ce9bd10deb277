"""Specification of a job: the command line and the site profile joined, as the batch script and the conductor need it.

A specification is written to the job's folder, `RUN_FOLDER/jobs/NAME/job.json`, and read by the conductor on the batch
host. It holds no credentials, and nothing of it enters the hash of the run.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, EnvironmentProblem
from launcher.slurm.site import Site

FILE = "job.json"
NUMBER_FILE = "number"
"""File in the folder of a job that holds the numbers under which it was submitted, the newest last."""
LOGS = "logs"
AGENTS_LOG = "agents.log"
ATTEMPTS_FILE = "attempts.jsonl"
"""File in the folder of a job with one line per attempt: its nodes, its world, its end."""
SLOW_NODES = "slow-nodes.txt"
"""File in the run folder that names nodes which ranks have found to be slow (`engine.train.node_speed`)."""
_NODES = re.compile(r"(\d+)(?:-(\d+))?")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")
_JOB_NAME = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, kw_only=True)
class NodesSpec:
    """Nodes that a batch script asks for, and what it starts on each of them."""

    name: str
    """Name of the job in the queue."""
    folder: Path
    """Folder of the job: its scripts, its specification, and what it writes."""
    work_folder: Path
    """Folder in which the command was called, which relative paths of the run refer to."""
    min_nodes: int
    max_nodes: int
    gpus_per_node: int
    ranks_per_node: int
    time: str | None
    python: str
    """Interpreter of the conductor, the agents and, outside of a container, the ranks."""
    site_name: str
    site: Site
    exclude: tuple[str, ...] = ()
    """Nodes that are not wanted."""

    @property
    def nodes(self) -> str:
        """The range as sbatch takes it."""
        few, many = self.min_nodes, self.max_nodes
        return str(few) if few == many else f"{few}-{many}"

    @property
    def rank_script(self) -> Path:
        """The script that srun starts once per rank."""
        return self.folder / "rank.sh"


@dataclass(frozen=True, kw_only=True)
class PreflightSpec(NodesSpec):
    """A job that checks nodes and the network between them, and starts no run."""

    arguments: tuple[str, ...]
    """Arguments of `palimpsest preflight` on each rank."""

    @property
    def script(self) -> Path:
        """The batch script."""
        return self.folder / "preflight.sbatch"

    @property
    def output(self) -> Path:
        """File that takes the table; `%j` is the job's number."""
        return self.folder / "preflight-%j.log"


@dataclass(frozen=True, kw_only=True)
class JobSpec(NodesSpec):
    """One job as it is submitted; the same for all its starts."""

    config: Path
    overrides: tuple[str, ...]
    """The user's overrides; empty where `hides_overrides`."""
    run_folder: Path
    requeues: int
    """Most times that the job is requeued, or submits its successor. 0 in a chain."""
    restarts: int
    """Most restarts of the ranks within one start of the job."""
    chain: int | None = None
    """Number of links of a chain: jobs of one array, one after another, each of which continues the run where the one
    before has left it. None means a job that stands alone."""
    model: dict[str, Any] | None = None
    """Keys of the run's model, for a conductor whose run file leaves them to the source of `init_from`."""
    code: Path | None = None
    """Snapshot of the code that the job runs, whatever is edited while it waits. None means the installed one."""
    hides_overrides: bool = False
    """An override holds a credential: all of them come by the environment, because their order matters."""

    @property
    def script(self) -> Path:
        """The batch script."""
        return self.folder / ("train.sbatch" if self.chain is None else "chain.sbatch")

    @property
    def logs(self) -> Path:
        """Folder of the ranks' logs: of this job alone, for attempts of the next one are numbered from 0 again."""
        return self.folder / LOGS

    @property
    def output(self) -> Path:
        """File that takes the output of the batch script, which is the conductor's; `%j` is the job's number, `%A` that
        of an array and `%a` the link."""
        return self.folder / ("conductor-%j.log" if self.chain is None else "conductor-%A_%a.log")


def parse_nodes(text: str) -> tuple[int, int]:
    """Return (fewest, most) nodes of `4` or `2-4`.

    Raises:
        ConfigError: it is no such range.
    """
    match = _NODES.fullmatch(text)
    few, many = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= few <= many:
        raise ConfigError(f"--nodes = {text!r}", "a number of nodes, or a range such as 2-4", "for example --nodes 4")
    return few, many


def seconds_of(time: str) -> int:
    """Return the seconds of a time as Slurm writes it: minutes, M:SS, H:MM:SS, D-H, D-H:MM, D-H:MM:SS.

    Raises:
        ConfigError: it is no such time.
    """
    match = _TIME.fullmatch(time)
    if match is None:
        raise ConfigError(f"time {time!r}", "minutes, H:MM:SS or D-H:MM:SS", "for example --time 24:00:00")
    numbers = [int(number) for number in match["clock"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    # A number alone is minutes, two are minutes and seconds.
    hours, minutes, seconds = (0, numbers[0], 0) if len(numbers) == 1 else [0, *numbers][-3:]
    return (hours * 60 + minutes) * 60 + seconds


def check_chain(spec: JobSpec, requeues: int | None) -> None:
    """Raise `ConfigError` for a chain that could not go from link to link; `requeues` are those of the command line."""
    if spec.chain is None:
        return
    most = spec.site.limits.max_chain
    if not 1 <= spec.chain <= most:
        raise ConfigError(
            f"--chain = {spec.chain}", f"1 to {most} links (limits.max_chain of site {spec.site_name})", "choose one"
        )
    if requeues:
        raise ConfigError(
            f"--requeues = {requeues} beside --chain = {spec.chain}",
            "one of both: where a job alone is requeued, the next link of a chain goes on",
            "leave out --requeues, and give --chain as many links as the run may need starts",
        )
    if spec.time is None:
        raise ConfigError(
            f"--chain = {spec.chain} without --time",
            "the time limit of each link, at which the next one goes on",
            "for example --time 24:00:00",
        )


def check(spec: NodesSpec) -> None:
    """Raise `ConfigError` for a job that the site is known to refuse."""
    limits, site = spec.site.limits, spec.site_name
    if limits.max_nodes is not None and spec.max_nodes > limits.max_nodes:
        raise ConfigError(
            f"--nodes = {spec.nodes}, but site {site} takes {limits.max_nodes} nodes at most",
            f"1 to {limits.max_nodes}",
            "ask for fewer, or raise limits.max_nodes in the site profile",
        )
    if spec.time is not None:
        seconds = seconds_of(spec.time)
        if limits.max_time is not None and seconds > seconds_of(limits.max_time):
            raise ConfigError(
                f"--time = {spec.time}, but site {site} takes {limits.max_time} at most",
                f"up to {limits.max_time}",
                "ask for less: the job goes on after its time limit (--requeues, or --chain)",
            )
        if isinstance(spec, JobSpec) and seconds <= spec.site.signal_seconds:
            raise ConfigError(
                f"--time = {spec.time} is not longer than the {spec.site.signal_seconds} s before its end at which "
                "the job is told to save",
                "a longer time",
                "ask for more time, or lower signal_seconds in the site profile",
            )
    if 0 < spec.site.gpus.per_node < spec.gpus_per_node:
        raise ConfigError(
            f"--gpus-per-node = {spec.gpus_per_node}, but nodes of site {site} have {spec.site.gpus.per_node}",
            f"0 to {spec.site.gpus.per_node}",
            "ask for fewer, or choose another site",
        )
    if 0 < spec.gpus_per_node < spec.ranks_per_node:
        raise ConfigError(
            f"--ranks-per-node = {spec.ranks_per_node}, but each node has {spec.gpus_per_node} GPUs of the job",
            f"1 to {spec.gpus_per_node}",
            "start fewer ranks, or --gpus-per-node 0 to run on the CPU",
        )


def job_name(run_name: str) -> str:
    """Return a name for the queue, in letters that no shell and no log file's name minds."""
    return _JOB_NAME.sub("-", run_name).strip("-.") or "run"


def excluded(site: Site, run_folder: Path) -> tuple[str, ...]:
    """Return the nodes that are not wanted: those of a site profile and its file, and those found slow by the run.

    A `#` begins a comment in these files; neither need exist.
    """
    found = list(site.allocation.exclude)
    for file in (site.allocation.exclude_file, run_folder / SLOW_NODES):
        if file is not None and file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines()
            found += [name for line in lines if (name := line.partition("#")[0].strip())]
    return tuple(dict.fromkeys(found))


def unwritable(folder: Path, error: OSError) -> EnvironmentProblem:
    """Return the error for a job's folder that cannot be written."""
    return EnvironmentProblem(
        f"the folder of the job, {folder}, cannot be written: {error.strerror}",
        "a run folder that can be written here and on every node",
        "change `folder`",
    )


def to_json(spec: JobSpec) -> str:
    """Return the specification as text for `job.json`."""
    tree = asdict(spec) | {"site": spec.site.model_dump(mode="json")}
    return json.dumps({key: str(value) if isinstance(value, Path) else value for key, value in tree.items()}, indent=1)


def read(folder: Path) -> JobSpec:
    """Return the specification in a job's folder.

    Raises:
        EnvironmentProblem: there is none, or it was written by another version.
    """
    try:
        tree: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
        paths: dict[str, Path | None] = {
            key: Path(tree[key]) for key in ("config", "run_folder", "folder", "work_folder")
        }
        paths["code"] = Path(tree["code"]) if tree["code"] else None
        lists = {key: tuple(tree[key]) for key in ("overrides", "exclude")}
        site = Site.model_validate_json(json.dumps(tree["site"]))
        return JobSpec(**{**tree, **paths, **lists, "site": site})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EnvironmentProblem(
            f"{folder / FILE} cannot be read: {error}",
            "the folder of a job that palimpsest launch has submitted",
            "submit the job again",
        ) from error
