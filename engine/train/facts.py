"""Facts that all ranks of a run must have in common; each rank's are compared with rank 0's."""

from __future__ import annotations

import os
from typing import Any

import torch

from engine.checkpoint.manifest import library_versions
from engine.config.rank_environment import RankEnvironment
from engine.config.resume import flatten
from engine.config.schema.run import RunConfig
from engine.data.source import WeightedDataset
from engine.data.validation import ValidationSet
from engine.provenance import code_hash


def facts_of_start(config: RunConfig, environment: RankEnvironment, device: torch.device) -> dict[str, Any]:
    """Return what is known before the ranks meet; every key of the configuration, whatever its kind, is a fact."""
    # `folder` is compared as an absolute path below: ranks may be started in different working directories.
    keys = {key: value for key, (_, value) in flatten(config).items() if key != "folder"}
    versions = {f"version of {name}": number for name, number in library_versions().items()}
    return {
        "job": environment.job,
        "step": environment.step,
        "attempt": environment.attempt,
        "world size": environment.world_size,
        "run folder": str(config.folder.absolute()),
        "device": device.type,
        "hash of Palimpsest's code": code_hash(),
        "version of CUDA": torch.version.cuda,
        **versions,
        **keys,
    }


def facts_of_data(training: list[WeightedDataset], validation: list[ValidationSet] | None) -> dict[str, Any]:
    """Return what is known once the data of a run stage is open."""
    sources = {f"data fingerprint{f' of {part.name}' * bool(part.name)}": part.dataset.fingerprint for part in training}
    return {
        **sources,
        **{f"weight of {part.name or 'the data'}": part.weight for part in training},
        "validation data fingerprints": {name: dataset.fingerprint for name, dataset in validation or []},
        # ranks that read them at different moments would train on different texts
        "tombstones": [part.dataset.tombstones.hash for part in training],
        "validation data tombstones": {name: dataset.tombstones.hash for name, dataset in validation or []},
    }


def gpu_of(device: torch.device) -> str:
    """Return a name that this rank's GPU has on every rank that sees it; empty for the CPU.

    Parts of a GPU (MIG) are told apart by the name under which this rank sees its own.
    """
    if device.type != "cuda":
        return ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    # Parts of one GPU (MIG) report the same UUID: without the name two ranks would seem to share a GPU.
    part = visible if visible.startswith("MIG-") and "," not in visible else ""
    return f"{torch.cuda.get_device_properties(device).uuid}{part and f' {part}'}"
