"""GPUs that this node offers to a run, and its processors' support of bf16; found without torch."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from engine.errors import EnvironmentProblem
from engine.plan.hardware import ACCELERATORS, Accelerator

NO_DEVICES = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide every GPU; Slurm writes the last one."""

NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "bf16", "sve_bf16"}
"""Flags of processors (x86 and Arm) that multiply bf16 themselves."""


def multiplies_bf16(cpuinfo: str | None = None) -> bool:
    """Return True if the processor that `cpuinfo` describes (None: this node's) multiplies bf16 in hardware.

    Others emulate it, many times slower than fp32.
    """
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        except OSError:
            return False
    lines = (line for line in cpuinfo.splitlines() if line.startswith(("flags", "Features")))
    return any(NATIVE_BF16.intersection(line.split()) for line in lines)


def num_gpus(environ: Mapping[str, str], list_gpus: Callable[[], str] | None = None) -> int:
    """Number of GPUs that ranks on this node may use: those of CUDA_VISIBLE_DEVICES, else all that nvidia-smi lists."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in NO_DEVICES:
        return 0
    installed = sum(line.startswith("GPU ") for line in (list_gpus or nvidia_smi)().splitlines())
    if visible is None:
        return installed
    # The variable may name more than there are, where it was written for another node.
    return min(len([name for name in visible.split(",") if name.strip()]), installed)


def names(environ: Mapping[str, str], count: int) -> tuple[str, ...]:
    """Return the names of the first `count` GPUs that ranks may use in CUDA_VISIBLE_DEVICES."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    every = [name.strip() for name in visible.split(",")] if visible else [str(index) for index in range(count)]
    return tuple(every[:count])


def numbers(names: tuple[str, ...], list_gpus: Callable[[], str] | None = None) -> tuple[int, ...]:
    """Return the numbers that nvidia-smi gives to GPUs that are named as in CUDA_VISIBLE_DEVICES, sorted.

    Raises:
        EnvironmentProblem: one is no whole GPU of this node.
    """
    listed = [line for line in (list_gpus or nvidia_smi)().splitlines() if line.startswith("GPU ")]
    found = []
    for name in names:
        # A line is "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-5ee6...)"; CUDA takes any prefix of a UUID that is unique.
        by_name = [number for number, line in enumerate(listed) if name.startswith("GPU-") and f"(UUID: {name}" in line]
        if not name.isdecimal() and len(by_name) != 1:
            raise EnvironmentProblem(
                f"CUDA_VISIBLE_DEVICES names {name}, which deepspeed cannot be told",
                "numbers or UUIDs of whole GPUs of this node",
                "use --launcher local or torchrun, or name GPUs by number",
            )
        found.append(int(name) if name.isdecimal() else by_name[0])
    return tuple(sorted(found))


def accelerator(list_gpus: Callable[[], str] | None = None) -> Accelerator | None:
    """Return the kind of this node's first GPU; None where the plan does not know it."""
    first = (list_gpus or nvidia_smi)().partition("\n")[0].upper()
    for kind in ACCELERATORS.values():
        # "h100-80gb" is ("H100", "80"). A100 is sold with 40 and with 80 GB, which its name in the list tells apart.
        words = kind.name.upper().removesuffix("GB").split("-")
        if words[0] in first and (words[0] != "A100" or f"{words[1]}GB" in first):
            return kind
    return None


def nvidia_smi() -> str:
    """Return the output of `nvidia-smi -L`, one line per GPU; nothing where there is no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        return subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
