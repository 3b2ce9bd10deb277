"""Merging of checkpoints of one model: the mean, given weights, or the coefficients that stand for a decay.

WSM (Tian et al. 2025, "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging", arXiv 2507.17634): the mean of
checkpoints theta_0 .. theta_k with coefficients c_j (sum 1) is theta_0 plus the updates between them, those of interval
i scaled by w_i = c_i + ... + c_k. So a decay whose factor is w_i in interval i is the merge with c_0 = 1 - w_1,
c_j = w_j - w_(j + 1) and c_k = w_k. Streamed: some elements of a parameter are in memory at a time, summed in fp64 and
written as fp32, whatever the layouts that saved. Weights alone are merged: moments of different steps have no mean
that an optimizer could go on from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from engine.checkpoint.container import Entry, write_stream
from engine.checkpoint.folder import Owner, acquire, partial_path
from engine.checkpoint.load import Files, fill_shard, open_checkpoint
from engine.checkpoint.manifest import WEIGHT, CheckpointState, key_of
from engine.checkpoint.mismatch import FREE_KEYS, check_tensors
from engine.checkpoint.named_files import named_by, share
from engine.checkpoint.storage import Location
from engine.checkpoint.stores import StageTable, Written, build_manifest, commit, prepare
from engine.checkpoint.writers import Writer, stored_numel
from engine.config.resolve import Layout
from engine.errors import CheckpointError, ConfigError
from engine.parallel.sharding import ParameterSpec
from engine.parallel.state import ParameterShard, Placement

Shape = Literal["linear", "1-sqrt", "cosine"]
BLOCK_NUMEL = 1 << 22
"""Elements of a parameter that are merged at a time: 32 MiB in fp64, and 16 MiB of each source."""
SECTION = "merge"
"""Section of the checkpoint that says what it was merged from."""
_TOLERANCE = 1e-6


def wsm_coefficients(steps: Sequence[int], shape: Shape) -> list[float]:
    """Return the coefficient of the checkpoint at each of the rising `steps`; they add up to 1.

    The decay begins at the first checkpoint and would reach 0 one mean interval after the last, so that the last one
    counts: n checkpoints at equal intervals have w_i = f(i / n), and `linear` is their plain mean.

    Raises:
        ConfigError: fewer than two steps, or they do not rise.
    """
    if len(steps) < 2 or any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        raise ConfigError(
            f"--wsm over checkpoints of the steps {', '.join(map(str, steps))}",
            "two or more checkpoints of one run, of different steps",
            "name others, or --last K with the run folder",
        )
    length = (steps[-1] - steps[0]) * len(steps) / (len(steps) - 1)
    factors = [_decay(shape, (step - steps[0]) / length) for step in steps]
    return [now - after for now, after in zip(factors, [*factors[1:], 0.0], strict=True)]


def _decay(shape: Shape, progress: float) -> float:
    """Return the factor of a decay from 1 (progress 0) to 0 (progress 1)."""
    if shape == "linear":
        return 1.0 - progress
    # Haegele et al. 2024, arXiv 2405.18392
    return 1.0 - math.sqrt(progress) if shape == "1-sqrt" else 0.5 * (1.0 + math.cos(math.pi * progress))


def check_weights(weights: Sequence[float], count: int) -> None:
    """Raise `ConfigError` unless there is a finite weight for each of `count` checkpoints, and they add up to 1."""
    total = math.fsum(weights) if all(map(math.isfinite, weights)) else math.nan
    if len(weights) == count and abs(total - 1.0) <= _TOLERANCE:
        return
    wrong = f"{len(weights)} numbers for {count} checkpoints" if len(weights) != count else f"they add up to {total:g}"
    raise ConfigError(
        f"--weights {','.join(f'{weight:g}' for weight in weights)}: {wrong}",
        f"{count} numbers that add up to 1 (a model whose weights are scaled is another one)",
        "divide each by their sum",
    )


@dataclass(frozen=True)
class Member:
    """One of the sources of a merge, of any format."""

    origin: str
    state: CheckpointState
    shapes: Mapping[str, tuple[int, ...]]
    """Stored shape of each parameter, by logical name."""
    fill: Callable[[ParameterSpec, int, torch.Tensor], object]
    """Function that fills a flat fp32 tensor with the elements of a parameter from some flat position on."""
    path: Location | None = None
    """Checkpoint of ours; None for a model of another format."""


def own_member(path: Location) -> Member:
    """Return a checkpoint of ours as a source of a merge. Raises `CheckpointError` where it is damaged."""
    manifest = open_checkpoint(path)
    files = Files(path, manifest)
    shapes = {name: spec.stored_shape for name, spec in manifest.specs.items()}
    fill = lambda spec, start, into: fill_shard(ParameterShard(spec, start, into), files)  # noqa: E731
    return Member(str(path), manifest.state, shapes, fill, path)


class Sources:
    """Checkpoints that are to be merged, checked against the first.

    They may be of different run stages: the mean of the weights before and after new data is a method against
    forgetting (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", arXiv 2109.01903).
    """

    def __init__(self, sources: Sequence[Location | Member]) -> None:
        """Open those that are checkpoints of ours. Raises `CheckpointError` where models or tokenizers differ."""
        self.members: list[Member] = [one if isinstance(one, Member) else own_member(one) for one in sources]
        for one in self.members[1:]:
            self._check(one)

    @property
    def newest_member(self) -> Member:
        """Member of the most steps."""
        return max(self.members, key=lambda one: one.state.step)

    @property
    def newest(self) -> CheckpointState:
        """State of the one of the most steps."""
        return self.newest_member.state

    @property
    def paths(self) -> list[Location]:
        """Those that are checkpoints of ours."""
        return [one.path for one in self.members if one.path is not None]

    def _check(self, one: Member) -> None:
        first, own = self.members[0].state, one.state
        pairs = {
            "model": (_weight_keys(first), _weight_keys(own)),
            "tokenizer": (_section(first, "tokenizer", "hash"), _section(own, "tokenizer", "hash")),
        }
        for what, (before, now) in pairs.items():
            # files of other formats do not say of every tokenizer which one it is
            if before != now and (what == "model" or None not in (before, now)):
                raise CheckpointError(
                    f"{one.origin} is of another {what} than {self.members[0].origin}: {_difference(before, now)}",
                    "checkpoints of one model and tokenizer",
                    "name others; merging across them averages weights that do not belong together",
                )
        # shapes and names, too: a checkpoint that was converted says nothing of its configuration
        check_tensors(dict(one.shapes), dict(self.members[0].shapes), "the checkpoint")


def _weight_keys(state: CheckpointState) -> Any:
    """Return the keys of a model that its weights depend on."""
    model = state.config.get("model")
    return {key: value for key, value in model.items() if key not in FREE_KEYS} if isinstance(model, dict) else model


def _section(state: CheckpointState, name: str, key: str) -> Any:
    section = state.sections.get(name)
    return section.get(key) if isinstance(section, dict) else None


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        return ", ".join(f"{key} = {now.get(key)!r}, not {before.get(key)!r}" for key in keys)
    return f"{now!r}, not {before!r}"


def merge(sources: Sources, weights: Sequence[float], folder: Path) -> Path:
    """Write the weighted mean of checkpoints into a folder `checkpoints/`; return its path.

    Its step, configuration and position are the newest one's, its optimizer begins anew.

    Raises:
        CheckpointError: a weight is not finite, a file is damaged, or the file system refuses or is full.
    """
    specs = [ParameterSpec(name, shape) for name, shape in sorted(sources.members[0].shapes.items())]
    placements = [Placement(spec, (0,), 0, stored_numel(spec)) for spec in specs]
    owner, writer, newest = Owner("merge", 0), Writer(0, 0, 0), sources.newest
    acquire(folder, owner)
    partial = partial_path(folder, newest.step, owner)
    prepare(partial, [4 * sum(map(stored_numel, specs))])
    entries = [Entry(key_of(WEIGHT, spec.name), 0, stored_numel(spec), 0, 1) for spec in specs]
    about = {**writer._asdict(), "step": newest.step}
    contents = (_blocks(sources.members, weights, spec) for spec in specs)
    record = write_stream(partial / writer.file_name, entries, about, contents)
    _share_files(sources, folder)
    state = replace(newest, sections=_sections(sources, weights, newest), hyperparameters={})
    table = StageTable(placements, {})
    return commit(partial, build_manifest(state, Layout(1, 1, 1, 1), [table], [Written(record, ())], owner))


def _share_files(sources: Sources, folder: Path) -> None:
    """Put the files that the newest one's sections name (a reservoir) beside the output. Raises `CheckpointError`."""
    newest = sources.newest_member
    if newest.path is None:
        return
    try:
        share(Path(str(newest.path)), named_by(newest.state.sections), folder)
    except OSError as error:
        raise CheckpointError(
            f"the files that {newest.origin} names cannot be put into {folder}: {error.strerror or error}",
            "a folder that can be written, with room",
            "make room, or choose another one",
        ) from error


def _sections(sources: Sources, weights: Sequence[float], newest: CheckpointState) -> dict[str, Any]:
    """Return the newest one's sections, with no update behind the optimizer's moments, and the sources by step."""
    sections = dict(newest.sections)
    if isinstance(progress := sections.get("progress"), dict):
        sections["progress"] = progress | {
            "updates": 0,
            "updates_before": [0] * len(progress.get("updates_before", ())),
        }
    merged = [[one.state.step, weight] for one, weight in zip(sources.members, weights, strict=True)]
    return sections | {SECTION: merged}


def _blocks(members: list[Member], weights: Sequence[float], spec: ParameterSpec) -> Iterator[np.ndarray]:
    """Yield the weighted mean of a parameter, some elements at a time: flat fp32."""
    numel = stored_numel(spec)
    for start in range(0, numel, BLOCK_NUMEL):
        length = min(BLOCK_NUMEL, numel - start)
        total = torch.zeros(length, dtype=torch.float64)
        part = torch.empty(length)
        for one, weight in zip(members, weights, strict=True):
            one.fill(spec, start, part)
            if not torch.isfinite(part).all():
                raise CheckpointError(
                    f"{spec.name} in {one.origin} holds NaN or infinite weights",
                    "finite weights",
                    "leave that checkpoint out",
                )
            total += part.double() * weight  # two roundings, as anyone would check it: no fused multiply-add
        yield total.float().numpy()
