"""`palimpsest finetune`: train a model of a task on labelled examples, measure it and export it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # pydantic and numpy would make --help slow
    from engine.config.schema.run import RunConfig
    from engine.serve.source import Trained

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
    from tools.train import Command, start

    raise typer.Exit(start(task, overrides or [], Command("finetune", _resolved, writes=True, finish=finish)))


def _resolved(path: Path, overrides: list[str]) -> RunConfig:
    from engine.config.load import read_overridden
    from engine.serve.adapter import require_peft
    from engine.tasks.kinds import KINDS
    from engine.tasks.resolve import resolve_task

    run = resolve_task(read_overridden(path, overrides), str(path))
    KINDS[run.stages[-1].objective.name].require_packages()  # before the run, not at its end
    if (adapter := run.model.adapter) is not None and adapter.is_peft:
        require_peft()
    return run


def _write_run_file(task: Path, overrides: list[str], path: Path) -> None:
    from engine.config.save import save_tree
    from engine.errors import ConfigError

    if path.exists():
        raise ConfigError(f"{path} is there already", "a new file", "name another one, or remove it first")
    run = _resolved(task, overrides)
    save_tree(run.model_dump(mode="json", exclude_none=True), path)
    stage = run.stages[-1]
    print(f"{path}: {run.num_steps} steps of {stage.global_batch_size} examples, {stage.sequence_length} tokens each")
    print(f"next: palimpsest train {path}, or palimpsest launch {path}")


def finish(run: RunConfig) -> None:
    """Predict the validation examples by the best checkpoint, write what was measured, and export the model."""
    from engine.serve.export import export
    from engine.serve.quiet import quiet
    from engine.serve.source import open_trained
    from engine.train.best import chosen_checkpoint

    quiet()
    metric = run.checkpoint.best_metric
    best = chosen_checkpoint(run.folder, run.checkpoint)
    trained = open_trained(best or run.folder)
    measures = _measure(run, trained)
    _draw(run, measures, metric, trained.step if best is not None else None)
    chosen = f", of step {trained.step}, the best by {metric}" if best is not None else ""
    if trained.config.adapter is None:
        _replace(run.folder / EXPORT, lambda new: export(trained, new))
        print(f"model: {run.folder / EXPORT}{chosen}")
    else:
        method = trained.config.adapter.method
        print(f"no Hugging Face folder{chosen}: {_unmerged(run, method)}")
    if run.model.adapter is not None:
        _export_adapter(run, best or run.folder)


def _unmerged(run: RunConfig, method: str) -> str:
    """Return why a run with an adapter has no Hugging Face folder, and what stands in its place."""
    assert run.init_from is not None
    if run.model.adapter is not None and run.model.adapter.is_peft:
        return f"{method} stays beside the model; peft loads {run.folder / ADAPTER} onto {run.init_from.path}"
    return f"their classes have no place for {method} adapters"


def _export_adapter(run: RunConfig, source: Path) -> None:
    """Write the adapter alone; of AdaLoRA say the mean rank, which is higher in a checkpoint before the last choice."""
    from engine.checkpoint.interchange.initial import format_of
    from engine.checkpoint.storage import location_of
    from engine.config.schema.adapter import AdaLoRAConfig
    from engine.serve.adapter import export_adapter, mean_rank
    from engine.serve.source import open_trained

    apart = open_trained(source, merge=False)
    assert run.init_from is not None
    base = run.init_from.path
    is_theirs = format_of(location_of(base)) in ("huggingface", None)  # None: it is gone since
    _replace(run.folder / ADAPTER, lambda new: export_adapter(apart, new, base if is_theirs else None))
    told, rank, adapter = "", mean_rank(apart), run.model.adapter
    if rank is not None and isinstance(adapter, AdaLoRAConfig):
        told = f", mean rank {rank:g}"
        if rank > adapter.rank:
            told += f" and not {adapter.rank}: step {apart.step} lies before the last choice of ranks"
    print(f"adapter: {run.folder / ADAPTER}{told}")


def _replace(output: Path, write: Callable[[Path], Any]) -> None:
    """Write a folder beside its path, and put it in the place of one of before."""
    new = output.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)  # what a killed command left
    write(new)
    shutil.rmtree(output, ignore_errors=True)
    new.rename(output)


def _measure(run: RunConfig, trained: Trained) -> dict[str, Any]:
    """Predict the validation examples and write predictions and measures; return the latter, none without examples."""
    from engine.atomic import write_atomically
    from engine.data.shards.dataset import TokenDataset
    from engine.tasks.predict import MEASURES, predict, write_predictions

    stage = run.stages[-1]
    measures: dict[str, Any] = {}
    for location in stage.data.validation_locations:
        predictions = predict(trained, stage, TokenDataset(location))
        write_predictions(predictions, run.folder)
        measures = predictions.measures()
        text = json.dumps({"step": trained.step, **measures}, indent=1, ensure_ascii=False)
        write_atomically(run.folder / MEASURES, f"{text}\n")
        print(_told(measures))
    return measures


def _draw(run: RunConfig, measures: dict[str, Any], metric: str, best_step: int | None) -> None:
    from engine.logs import logger
    from engine.tasks.pictures import draw_confusion, draw_learning

    try:
        draw_learning(run.folder, run.name, metric, best_step)
        if "confusion" in measures:
            draw_confusion(run.folder, run.name, run.stages[-1].objective.labels, measures["confusion"])
    except Exception as error:  # a picture, whatever its trouble, must not cost the model
        logger(__name__).warning("the pictures cannot be drawn and are left out: %s", error)


def _told(measures: dict[str, Any]) -> str:
    numbers = {name: value for name, value in measures.items() if isinstance(value, float)}
    told = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())
    return f"validation, {measures['examples']:,} examples: {told}"
