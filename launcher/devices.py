"""How many GPUs this node offers to a run, asked without torch."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping

from engine.plan.hardware import ACCELERATORS, Accelerator

NO_DEVICES = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide every GPU; Slurm writes the last one."""


def num_gpus(environ: Mapping[str, str], list_gpus: Callable[[], str] | None = None) -> int:
    """GPUs that ranks on this node may use: those of CUDA_VISIBLE_DEVICES, else all that nvidia-smi lists."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in NO_DEVICES:
        return 0
    installed = sum(line.startswith("GPU ") for line in (list_gpus or nvidia_smi)().splitlines())
    if visible is None:
        return installed
    return min(len([name for name in visible.split(",") if name.strip()]), installed)


def names(environ: Mapping[str, str], count: int) -> tuple[str, ...]:
    """What to call the first `count` GPUs that ranks may use in CUDA_VISIBLE_DEVICES."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    every = [name.strip() for name in visible.split(",")] if visible else [str(index) for index in range(count)]
    return tuple(every[:count])


def accelerator(list_gpus: Callable[[], str] | None = None) -> Accelerator | None:
    """The kind of this node's first GPU, where the plan knows it."""
    first = (list_gpus or nvidia_smi)().partition("\n")[0].upper()
    for kind in ACCELERATORS.values():
        words = kind.name.upper().removesuffix("GB").split("-")
        if words[0] in first and (words[0] != "A100" or f"{words[1]}GB" in first):
            return kind
    return None


def nvidia_smi() -> str:
    """What `nvidia-smi -L` prints, one line per GPU; nothing where there is no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        return subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
