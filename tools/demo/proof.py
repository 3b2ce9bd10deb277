"""The proof that a resumed run is the same run: the samples that it takes next, and its losses beside the killed run's.

What is expected is worked out twice without the resumed run: from the loader state in the checkpoint, and by counting
from the beginning of the run. Losses differ by rounding alone, because another layout adds in another order.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.demo.commands import DemoFailed

TOLERANCES = {"bf16": 2.0**-6, "fp32": 1e-4}
"""Largest difference of a step's loss. bf16: a logit between 4 and 8 is rounded by up to half of its spacing 2^-5."""
HASHED_SAMPLES = 1024
"""Number of the next samples that a resumed run hashes: that of `train.run_checkpoints`, which imports DeepSpeed."""
_REPORTED = re.compile(r"next samples (\[.*?\]), hash of the next (\d+): ([0-9a-f]+)")


@dataclass(frozen=True)
class Expected:
    """Point at which the newest checkpoint says that the run continues."""

    checkpoint: str
    step: int
    loss: float
    samples: str
    """The first addresses, as the resumed run prints them."""
    hash: str


@dataclass(frozen=True)
class Compared:
    """Losses of one step that both runs did."""

    step: int
    killed: float
    resumed: float

    @property
    def difference(self) -> float:
        return abs(self.resumed - self.killed)


def expect(folder: Path) -> Expected:
    """Return what a run that resumes from the newest checkpoint of a run folder has to report.

    Raises:
        DemoFailed: there is no checkpoint, or its loader state is not where that many steps lead.
    """
    from engine.checkpoint import manifest_json
    from engine.checkpoint.folder import CHECKPOINTS, committed
    from engine.config.load import load_run
    from engine.config.save import FILE
    from engine.data.stage import run_stage_seed, stage_stream
    from engine.train.saved_reservoir import open_stage

    paths = committed(folder / CHECKPOINTS)
    if not paths:
        raise DemoFailed(f"{folder / CHECKPOINTS} holds no checkpoint", "at least one when the run is killed")
    sections = manifest_json.read(paths[0]).state.sections
    config = load_run(folder / FILE)
    progress = sections["progress"]
    run_stage, seed = config.stages[progress["run_stage"]], run_stage_seed(config.seed, progress["run_stage"])
    parts = open_stage(config, progress["run_stage"])
    stream = stage_stream(run_stage, parts, seed)
    # The second way: a stream at the beginning of the run stage, which counts the steps one by one.
    counted = stream.clone()
    stream.restore(sections["loader"])
    for _ in range(progress["stage_step"]):
        counted.skip()
    if counted.state() != stream.state():
        raise DemoFailed(f"{paths[0]}: its loader state is not where {progress['stage_step']} steps lead")
    ids = [tuple(sample) for sample in stream.next_sample_ids(3)]
    return Expected(paths[0].name, progress["step"], progress["loss"], str(ids), stream.sample_hash(HASHED_SAMPLES))


def records(folder: Path) -> list[dict[str, Any]]:
    """Return the records in a run folder's JSON lines; a line that is being written or was cut off is left out."""
    path = folder / "metrics.jsonl"
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def losses(folder: Path) -> dict[int, float]:
    """Return the training loss by step."""
    return {record["step"]: record["loss"] for record in records(folder) if "loss" in record}


def reported(output: str) -> tuple[str, str]:
    """Return the (first sample addresses, hash) that a resumed run has printed.

    Raises:
        DemoFailed: it has printed none.
    """
    found = _REPORTED.search(output)
    if found is None:
        raise DemoFailed("the second launch did not say that it resumes", "`next samples ..., hash of the next ...`")
    return found.group(1), found.group(3)


def compare(killed: dict[int, float], resumed: dict[int, float], after: int) -> list[Compared]:
    """Return the steps after a checkpoint that both runs did, in order."""
    return [Compared(step, killed[step], resumed[step]) for step in sorted(killed) if step > after and step in resumed]


def as_text(expected: Expected, said: tuple[str, str], compared: list[Compared]) -> str:
    """Return what is expected and what was reported, side by side, as lines of text."""
    lines = [
        f"proof: {expected.checkpoint}, loss {expected.loss:.4f}",
        f"next samples (epoch, window, slot)   expected {expected.samples}",
        f"                                     reported {said[0]}",
        f"hash of the samples that come next   expected {expected.hash}",
        f"                                     reported {said[1]}",
        "  step   loss, killed run   loss, resumed run   difference",
    ]
    return "\n".join(
        lines + [f"{at.step:>6}   {at.killed:>16.5f}   {at.resumed:>17.5f}   {at.difference:>10.5f}" for at in compared]
    )


def check(expected: Expected, said: tuple[str, str], compared: list[Compared], tolerance: float) -> None:
    """Raise `DemoFailed` naming what does not agree."""
    if said != (expected.samples, expected.hash):
        raise DemoFailed(
            f"the resumed run takes samples {said[0]} next, hash {said[1]}",
            f"{expected.samples}, hash {expected.hash}, as the checkpoint has it",
        )
    if not compared:
        raise DemoFailed("no step was done by both runs", "some, because the kill came after a checkpoint")
    worst = max(compared, key=lambda step: step.difference)
    # Not `>`, so that NaN fails, too.
    if not worst.difference <= tolerance:
        raise DemoFailed(
            f"at step {worst.step} the killed run had loss {worst.killed:.5f}, the resumed one {worst.resumed:.5f}",
            f"a difference of {tolerance:.0e} at most",
        )
