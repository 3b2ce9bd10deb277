"""Specifications of jobs for the tests of the renderer; paths are of no machine."""

from pathlib import Path
from typing import Any

from engine.config.load import merge, parse_run
from engine.config.schema.run import RunConfig
from launcher.slurm import site
from launcher.slurm.spec import JobSpec, PreflightSpec

RUN = Path("/path/to/runs/gpt")


def example(site_name: str = "generic", profile: site.Site | None = None, **changes: Any) -> JobSpec:
    """Return the job of `palimpsest launch RUN.yaml --launcher slurm --nodes 2-4 --gpus-per-node 8 --time 24:00:00`."""
    values: dict[str, Any] = {
        "name": "gpt",
        "config": Path("/path/to/RUN.yaml"),
        "overrides": (),
        "run_folder": RUN,
        "folder": RUN / "jobs" / "NAME",
        "work_folder": Path("/path/to/work"),
        "min_nodes": 2,
        "max_nodes": 4,
        "gpus_per_node": 8,
        "ranks_per_node": 8,
        "time": "24:00:00",
        "requeues": 20,
        "restarts": 10,
        "python": "/path/to/venv/bin/python",
        "code": RUN / "jobs" / "code" / "HASH",
        "site_name": site_name,
        "site": profile or site.load(site.FOLDER / f"{site_name}.yaml"),
    }
    return JobSpec(**values | changes)


def preflight(site_name: str = "generic", profile: site.Site | None = None, **changes: Any) -> PreflightSpec:
    """Return the job of `palimpsest preflight RUN.yaml --launcher slurm --nodes 2-4 --gpus-per-node 8`."""
    values: dict[str, Any] = {
        "name": "preflight",
        "folder": RUN / "preflight" / "NAME",
        "work_folder": Path("/path/to/work"),
        "min_nodes": 2,
        "max_nodes": 4,
        "gpus_per_node": 8,
        "ranks_per_node": 8,
        "time": "0:10:00",
        "python": "/path/to/venv/bin/python",
        "site_name": site_name,
        "site": profile or site.load(site.FOLDER / f"{site_name}.yaml"),
        "arguments": ("--gpus", "8", "/path/to/RUN.yaml"),
    }
    return PreflightSpec(**values | changes)


EVERYTHING = site.Site.model_validate(
    {
        "source": "a site that uses every key",
        "allocation": {
            "account": "project",
            "partition": "gpu",
            "qos": "long",
            "reservation": "course",
            "constraint": "a100",
            "hint": "nomultithread",
            "mem": None,
            "exclusive": False,
            "extra": ("--licenses=scratch",),
        },
        "gpus": {"per_node": 8, "request": "gres", "type": "a100"},
        "tasks": {
            "cpus": 7,
            "cpu_bind": "mask_cpu:fe,fe00",
            "gpu_bind": "closest",
            "mem_bind": "local",
            "mpi": "pmix",
            "extra": ("--export=ALL",),
        },
        "setup": {
            "purge": True,
            "use": ("/opt/modules",),
            "modules": ("cuda/12.4", "gcc"),
            "source": ("/path with blank/activate",),
            "variables": {"NCCL_NET": "AWS Libfabric", "NCCL_SOCKET_IFNAME": "hsn0,hsn1"},
            "per_node": {"CACHE": '"/tmp/$USER-$SLURM_NODEID"'},
            "offline": True,
        },
        "container": {
            "program": "apptainer",
            "image": "/images/torch.sif",
            "binds": ("/scratch:/scratch",),
            "gpus": "nv",
            "extra": ("--cleanenv",),
        },
        "network": {"interface": "hsn0", "address": "interface"},
        "signal_seconds": 600,
        "requeue": "none",
    }
)


RESUBMIT = site.Site(source="a site on which Slurm requeues no jobs", requeue="resubmit")

TREE: dict[str, Any] = {
    "folder": "/runs/x",
    "tokenizer": "/tokenizer",
    "model": {"vocab_size": 300, "num_layers": 4, "hidden_size": 16, "num_heads": 4, "max_positions": 16},
    "stages": [
        {
            "data": {"train": "/train", "validation": "/validation"},
            "sequence_length": 16,
            "global_batch_size": 16,
            "duration": {"steps": 9},
        }
    ],
    "precision": {"dtype": "fp32"},
}


def run(**changes: Any) -> RunConfig:
    """Return a run whose batch of 16 fits 1, 2, 4, 8 and 16 data ranks."""
    return parse_run(merge(TREE | {}, changes), "test")
