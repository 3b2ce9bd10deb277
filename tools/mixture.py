"""What a run draws from each of its sources, exactly: the mix that its weights, epochs and limits come to."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from engine.config.load import load_run
from engine.config.schema.stage import RunStage
from engine.data.loader import Loader
from engine.data.stage import open_parts, stage_loader
from engine.data.tokenizer.folder import tokenizer_hash


def show_mixture(run_file: Path, overrides: list[str]) -> None:
    """Prints, for each stage of a run with some keys changed, the samples of each source.

    Reads indices (and offsets where packing needs them), no token. Raises `PalimpsestError` where the file or its data
    cannot be used.
    """
    config = load_run(run_file, overrides)
    for stage in config.stages:
        parts = open_parts(stage, tokenizer_hash(config.tokenizer), config.model.vocab_size)
        Console().print(mixture_table(stage, stage_loader(stage, parts, config.seed)))


def mixture_table(stage: RunStage, loader: Loader) -> Table:
    """Samples of a stage by source: how many, their share, how often that is the whole source, and the asked share."""
    total, weights = stage.batches.samples(stage.num_steps), [part.weight for part in loader.parts]
    table = Table("source", "samples", "share", "weight", "epochs", "tokens of an epoch")
    table.title, table.title_justify = f"stage {stage.name}: {total:,} samples of {stage.sequence_length:,}", "left"
    rows = zip(loader.parts, loader.mix(total), weights, loader.samples_by_source(), strict=True)
    for part, count, weight, epoch in rows:
        table.add_row(
            part.name or part.dataset.location,
            f"{count:,}",
            f"{count / total:.4%}",
            f"{weight / sum(weights):.4%}",
            f"{count / epoch:.3f}",
            f"{part.dataset.index.num_tokens:,}",
        )
    return table
