"""The manifest as values: content of a checkpoint, its files, and the state of the run when it was written.

Its size does not grow with the number of ranks, but for one short line per file: where each shard lies follows
from a `Placement` per parameter. Reading and writing it as JSON is `engine.checkpoint.manifest_json`.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from engine.checkpoint.container import FileRecord
from engine.checkpoint.mismatch import check_tensors
from engine.checkpoint.writers import Writer, stored_range, writers_of
from engine.config.resolve import Layout
from engine.parallel.sharding import ParameterSpec
from engine.parallel.state import Placement

WEIGHT = "model"
"""State name of the fp32 master weights; a moment's is `optim.<moment>`."""
LIBRARIES = ("palimpsest", "torch", "deepspeed", "numpy", "safetensors", "xxhash")


def moment_state(moment: str) -> str:
    """Return the state name of a moment: an optimizer's, or one that was added to the engine."""
    return f"optim.{moment}"


def key_of(state: str, parameter: str) -> str:
    """Name of a tensor in a file, for example `optim.exp_avg.final_norm.weight`."""
    return f"{state}.{parameter}"


def library_versions() -> dict[str, str]:
    """Return versions of Python and of the libraries that shape a checkpoint; those not installed are left out."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
            continue
    return versions


@dataclass(frozen=True)
class CheckpointState:
    """The half of a run's state that is not tensors; all of it JSON (keys are text, no NaN).

    `sections` are equal on every rank (rank 0's are written); `hyperparameters` are those of this rank's
    parameters by name, joined over the pipeline stages when saved.
    """

    step: int
    """Optimizer steps taken."""
    tokens: int
    """Tokens consumed."""
    zero_stage: int
    """ZeRO stage under which it was saved; for information, loading does not depend on it."""
    config_hash: str
    """Hash of the configuration's keys of kind meaning."""
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved configuration."""
    sections: dict[str, Any] = field(default_factory=dict)
    """State of the run's other parts by name; see `engine.checkpoint.sections`."""
    hyperparameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Optimizer settings by parameter name."""
    versions: dict[str, str] = field(default_factory=library_versions)


@dataclass(frozen=True)
class Manifest:
    """Everything about one checkpoint but its elements."""

    state: CheckpointState
    layout: Layout
    """Layout of the run that saved."""
    placements: dict[str, Placement]
    """Placement of each parameter of the whole model over the ranks that saved, by logical name."""
    moments: tuple[str, ...]
    """All moments stored beside the weights, in order; each parameter has those of its placement. Empty for weights
    alone."""
    files: dict[str, FileRecord]
    """Files by name; only ranks that stored something have one."""
    job: str
    attempt: int

    def states_of(self, name: str) -> tuple[str, ...]:
        """Return names of a parameter's states, weights first, in the order in which files hold them."""
        own = self.placements[name].moments
        return (WEIGHT, *(moment_state(moment) for moment in self.moments if moment in own))

    @property
    def data_size(self) -> int:
        """Number of ranks that ZeRO sharded over."""
        # Ranks of the sequence axis hold the same weights as well, so ZeRO shards over both axes.
        return self.layout.data * self.layout.sequence

    @property
    def specs(self) -> dict[str, ParameterSpec]:
        return {name: placement.spec for name, placement in self.placements.items()}

    @property
    def num_bytes(self) -> int:
        return sum(record.num_bytes for record in self.files.values())

    def expected(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Return the ranges (start, length) that each file must hold, by file name and parameter name."""
        files: dict[str, dict[str, tuple[int, int]]] = {}
        for name, placement in self.placements.items():
            for writer in writers_of(placement, self.data_size, self.layout.tensor):
                files.setdefault(writer.file_name, {})[name] = self.range_of(name, writer)
        return files

    def range_of(self, name: str, writer: Writer) -> tuple[int, int]:
        """Return (start, length) that a writer stores of a parameter."""
        return stored_range(self.placements[name], writer, self.layout.tensor)


def match(manifest: Manifest, specs: Iterable[ParameterSpec]) -> None:
    """Check that a checkpoint holds exactly the parameters of a whole model, in these stored shapes.

    Raises:
        CheckpointError: naming each parameter that is missing, unknown or of another shape.
    """
    held = {name: spec.stored_shape for name, spec in manifest.specs.items()}
    check_tensors(held, {spec.name: spec.stored_shape for spec in specs}, "the checkpoint")


def join_placements(by_stage: list[list[Placement]]) -> dict[str, Placement]:
    """Return one placement per parameter from those of every pipeline stage; a tied one as its first stage has it."""
    joined: dict[str, Placement] = {}
    for stage, placements in enumerate(by_stage):
        for placement in placements:
            name = placement.spec.name
            assert stage in placement.stages, f"{name}: stage {stage} is not among {placement.stages}"
            assert name not in joined or joined[name].spec == placement.spec, f"{name}: the stages disagree"
            # the stage that stores it (`writers.stored_range`)
            if stage == placement.stages[0]:
                joined[name] = placement
    return joined
