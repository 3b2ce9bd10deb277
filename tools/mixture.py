"""Exact number of samples that a run draws from each of its sources, by their weights, epochs and limits."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.checkpoint.interchange.initial import model_of
from engine.config.load import load_run
from engine.config.rules.data import check_mixture
from engine.config.rules.tables import check_replay, check_weights_table
from engine.config.schema.stage import RunStage
from engine.data.stage import run_stage_seed, stage_stream
from engine.data.stream import Stream
from engine.data.tokenizer.folder import tokenizer_hash
from engine.data.visible import visible
from engine.errors import PalimpsestError, report
from engine.redact import redact
from engine.train.saved_reservoir import frozen_generation, open_stage


def show_mixture(run_file: Path, overrides: list[str]) -> None:
    """Print the samples of each source for each run stage of a run, with some keys changed.

    Reads indices (and offsets where packing needs them), no token. Raises `PalimpsestError` where the file or its data
    cannot be used.
    """
    config = load_run(run_file, overrides, model_of)
    problems: list[PalimpsestError] = []
    for index, stage in enumerate(config.stages):
        # Only the rules of data: a mixture can be looked at before model and layout are right.
        check_mixture(f"stages.{index}", stage.data, problems)
        check_weights_table(f"stages.{index}", stage, problems)
    check_replay(config, problems)
    if problems:
        raise report(problems, f"the data of {run_file} cannot be mixed")
    for index, stage in enumerate(config.stages):
        if stage.replays_reservoir and frozen_generation(config, index) is None:
            Console().print(
                Text(visible(f"stage {stage.name}: replays from the run's reservoir, which is known when it begins"))
            )
            continue
        parts = open_stage(config, index, tokenizer_hash(config.tokenizer))
        Console().print(mixture_table(stage, stage_stream(stage, parts, run_stage_seed(config.seed, index))))


def mixture_table(stage: RunStage, stream: Stream) -> Table:
    """Return a table of a run stage by source: samples, their share, the weight asked for, and epochs of the source."""
    total, shares = stage.batches.samples(stage.num_steps), _shares(stream)
    table = Table("source", "samples", "share", "weight", "epochs", "tokens of an epoch")
    table.title = Text(visible(f"stage {stage.name}: {total:,} samples of {stage.sequence_length:,}"))
    table.title_justify = "left"
    rows = zip(stream.parts, stream.mix(total), shares, stream.samples_by_source(), strict=True)
    for part, count, share, epoch in rows:
        table.add_row(
            Text(visible(part.label if len(stream.parts) > 1 else redact(str(part.dataset.location)))),
            f"{count:,}",
            f"{count / total:.4%}",
            share,
            # `epoch` is the samples of one pass over the source.
            f"{count / epoch:.3f}",
            f"{part.dataset.index.num_tokens:,}",
        )
    return table


def _shares(stream: Stream) -> list[str]:
    """Return the share that is asked for of each source: of the new samples, and for replay of all. Those that change
    over the run stage are shown by step."""
    weights, ratios = stream.shares.weights, stream.shares.ratios
    new = [[(step, Fraction(row[k], sum(row))) for step, row in weights] for k in range(len(weights[0][1]))]
    return [_over_steps(rows) for rows in [*new, *([] if ratios is None else [ratios])]]


def _over_steps(rows: Sequence[tuple[int, Fraction]]) -> str:
    if len(rows) == 1:
        return f"{float(rows[0][1]):.4%}"
    return ", ".join(f"{float(share):.2%} from step {step:,}" for step, share in rows)
