"""Text of `palimpsest continue`: where the run stands, and what a new stage will do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.config.append_stage import block
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import RunStage
from engine.data.shards.dataset import TokenDataset
from engine.data.source import WeightedDataset
from engine.train.continuation import Standing, course, course_steps, peak_rate

MOST_EPOCHS = 4
"""Passes up to which repeated data is nearly as good as new data (Muennighoff et al. 2023, Scaling Data-Constrained
Language Models)."""
BAR = 40


@dataclass(frozen=True)
class NewStage:
    """A new stage as it will stand in the run file, and what it was made from."""

    config: RunConfig
    """The whole run, with the new stage."""
    tree: dict[str, Any]
    stands: Standing
    why: str
    """Reason for the schedule."""
    parts: list[WeightedDataset]
    """Sources of the new data."""
    held_out: list[str]
    ratio: float
    replayed: TokenDataset | None = None
    """Data that is replayed; None where nothing is, or where the run's reservoir is known later."""

    @property
    def run_stage(self) -> RunStage:
        """The new stage."""
        return self.config.stages[-1]


def plan_text(new: NewStage) -> str:
    """Return everything that a user wants to know before the stage is trained."""
    stage, stands = new.run_stage, new.stands
    rows = {
        "stands": _stands(new),
        "new stage": f"{stage.name}: {stage.num_steps:,} steps of {stage.global_batch_size} x {stage.sequence_length} "
        f"tokens, {stage.batches.samples(stage.num_steps) * stage.sequence_length:,} in all",
        "schedule": f"{stage.schedule.shape}: {new.why}",
        "optimizer": f"its moments are kept (optimizer_state: {stage.optimizer_state}), of {stands.state.updates:,} "
        "updates so far",
        "held out": _held_out(new),
    }
    width = max(map(len, rows)) + 2
    lines = [f"run {new.config.name} in {new.config.folder}"]
    lines += [f"  {name:<{width}}{text}" for name, text in rows.items() if text]
    return "\n".join([*lines, "", *_domains(new), "", *_course(new)])


def stage_text(tree: dict[str, Any]) -> str:
    """Return the stage as YAML, an entry of `stages`."""
    return "\n".join(f"  {line}" for line in block(tree).splitlines())


def _stands(new: NewStage) -> str:
    stands, state = new.stands, new.stands.state
    before = new.config.model_copy(update={"stages": new.config.stages[:-1]})
    stage, last = before.stages[state.run_stage], before.stages[-1]
    text = f"at step {state.step:,}, {state.tokens:,} tokens, in stage {stage.name} ({stands.checkpoint})"
    left = stands.steps_left(before)
    if left > 0:
        text += f"; the {left:,} steps up to the end of stage {last.name} are trained first"
        if last.schedule.shape in ("wsd", "infinite") and state.run_stage == len(before.stages) - 1:
            text += (
                f" (to leave its anneal out, set its duration to {{steps: {state.stage_step}}} and call this again: "
                "the new stage then goes on at the constant rate)"
            )
    return f"{text}; learning rate at its end {stands.rate:.3g} ({stands.phase})"


def _held_out(new: NewStage) -> str:
    if not new.held_out:
        return (
            "none of the new data: what the stage gains there will not be measured (see prepare --validation-fraction)"
        )
    return f"{', '.join(name or new.run_stage.name for name in new.held_out)}; and those of the earlier stages"


def _domains(new: NewStage) -> list[str]:
    """Return the tokens of the stage by domain, and the passes over each."""
    stage = new.run_stage
    total = stage.batches.samples(stage.num_steps) * stage.sequence_length
    weights = sum(part.weight for part in new.parts)
    rows = [("tokens of", "tokens", "share", "passes")]
    for part in new.parts:
        tokens = total * (1 - new.ratio) * part.weight / weights
        passes = tokens / max(1, part.dataset.index.num_tokens)
        warned = f"  more than {MOST_EPOCHS}: repeated data teaches less and less" if passes > MOST_EPOCHS else ""
        rows.append((part.name or stage.name, f"{tokens:,.0f}", f"{tokens / total:.1%}", f"{passes:.2f}{warned}"))
    if new.ratio:
        passes = "known when the stage begins"
        if new.replayed is not None:
            passes = f"{total * new.ratio / max(1, new.replayed.index.num_tokens):.2f}"
        rows.append(("replay", f"{total * new.ratio:,.0f}", f"{new.ratio:.1%}", passes))
    return _aligned(rows)


def _course(new: NewStage) -> list[str]:
    """Return the learning rate over the stage, as points and bars."""
    stage, optimizer = new.run_stage, new.config.optimizer
    points = course(optimizer, stage, course_steps(stage))
    peak = max(new.stands.rate, peak_rate(optimizer, stage))
    rows = [("step", "tokens", "rate", "learning rate")]
    rows.append(("before", "", f"{new.stands.rate:.3g}", _bar(new.stands.rate, peak)))
    rows += [(f"{step:,}", f"{tokens:,}", f"{rate:.3g}", _bar(rate, peak)) for step, tokens, rate in points]
    return _aligned(rows)


def _bar(rate: float, peak: float) -> str:
    return "#" * max(1, round(BAR * rate / peak))


def _aligned(rows: list[tuple[str, str, str, str]]) -> list[str]:
    """Return rows of four columns, the middle two to the right."""
    a, b, c, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [f"  {row[0]:<{a}}  {row[1]:>{b}}  {row[2]:>{c}}  {row[3]}".rstrip() for row in rows]
