"""`palimpsest finetune`: train a model of a task on labelled examples, measure it and export it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.errors import EXIT_DONE

if TYPE_CHECKING:  # pydantic and numpy would make --help slow
    from engine.config.schema.run import RunConfig

EXPORT, ADAPTER = "huggingface", "adapter"
"""Folders of the exported model in the run folder, and of its adapter alone."""


def main(
    task: Annotated[Path, typer.Argument(metavar="TASK.yaml", help="Run file with init_from and a task's stage.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Keys to change.")] = None,
    prepare: Annotated[
        Path | None, typer.Option(metavar="RUN.yaml", help="Encode the examples, write the run file; train later.")
    ] = None,
) -> None:
    """Fine-tune a model: what each rank runs, or one process alone.

    The run is resumed where it was interrupted. At its end the run folder has the predictions on the validation
    examples, their measures, the model as a Hugging Face folder and, with `adapter`, the adapter alone.
    """
    if prepare is not None:
        _write_run_file(task, overrides or [], prepare)
        return
    from engine.serve.adapter import require_peft
    from engine.tasks.kinds import KINDS
    from launcher.environment import rank_environment
    from tools.train import start

    runs: list[RunConfig] = []

    def load(path: Path, given: list[str]) -> RunConfig:
        runs.append(_resolved(path, given))
        KINDS[runs[-1].stages[0].objective.name].require_packages()  # before the run, not at its end
        if runs[-1].model.adapter is not None:
            require_peft()
        return runs[-1]

    code = start(task, overrides or [], load, "finetune")
    if code == EXIT_DONE and rank_environment(os.environ).global_rank == 0:
        _finish(runs[-1])
    raise typer.Exit(code)


def _resolved(path: Path, overrides: list[str]) -> RunConfig:
    from engine.config.load import read_overridden
    from engine.tasks.resolve import resolve_task

    return resolve_task(read_overridden(path, overrides), str(path))


def _write_run_file(task: Path, overrides: list[str], path: Path) -> None:
    from engine.config.save import save_tree
    from engine.errors import ConfigError

    if path.exists():
        raise ConfigError(f"{path} is there already", "a new file", "name another one, or remove it first")
    run = _resolved(task, overrides)
    save_tree(run.model_dump(mode="json", exclude_none=True), path)
    (stage,) = run.stages
    print(f"{path}: {stage.num_steps} steps of {stage.global_batch_size} examples, {stage.sequence_length} tokens each")
    print(f"next: palimpsest train {path}, or palimpsest launch {path}")


def _finish(run: RunConfig) -> None:
    """Predict the validation examples, write what was measured, and export the model."""
    from engine.atomic import write_atomically
    from engine.data.shards.dataset import TokenDataset
    from engine.serve.export import export
    from engine.serve.quiet import quiet
    from engine.serve.source import open_trained
    from engine.tasks.predict import MEASURES, predict, write_predictions

    quiet()
    (stage,) = run.stages
    trained = open_trained(run.folder)
    for location in stage.data.validation_locations:
        predictions = predict(trained, stage, TokenDataset(location))
        write_predictions(predictions, run.folder)
        measures = predictions.measures()
        write_atomically(run.folder / MEASURES, json.dumps(measures, indent=1, ensure_ascii=False) + "\n")
        print(_told(measures))
    _replace(run.folder / EXPORT, lambda new: export(trained, new))
    print(f"model: {run.folder / EXPORT}")
    if run.model.adapter is not None:
        _export_adapter(run)


def _export_adapter(run: RunConfig) -> None:
    """Write the adapter alone, and say how few parameters it has."""
    from engine.checkpoint.interchange.initial import format_of
    from engine.checkpoint.storage import location_of
    from engine.serve.adapter import export_adapter
    from engine.serve.source import open_trained

    apart = open_trained(run.folder, merge=False)
    assert run.init_from is not None
    base = run.init_from.path
    is_theirs = format_of(location_of(base)) == "huggingface"
    _replace(run.folder / ADAPTER, lambda new: export_adapter(apart, new, base if is_theirs else None))
    print(f"adapter: {run.folder / ADAPTER}")


def _replace(output: Path, write: Callable[[Path], Any]) -> None:
    """Write a folder beside its path, and put it in the place of one of before."""
    new = output.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)  # what a killed command left
    write(new)
    shutil.rmtree(output, ignore_errors=True)
    new.rename(output)


def _told(measures: dict[str, Any]) -> str:
    numbers = {name: value for name, value in measures.items() if isinstance(value, float)}
    told = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())
    return f"validation, {measures['examples']:,} examples: {told}"
