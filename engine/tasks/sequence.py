"""Tasks that were learned one after the other: what each new one has cost those before it, and the language model.

Every run of a task has a head of its own on the same body, which the next run goes on from. A model's measure on an
earlier task is that of its body under that task's head; its loss as a language model is that of its body under the
head over the vocabulary of the first start, or under the one that replayed text was learned with. Nothing is trained
here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.checkpoint.interchange.initial import open_source
from engine.checkpoint.interchange.mapping import unchanged
from engine.checkpoint.interchange.sources import MemorySource, read_parameter
from engine.config.schema.model import BERTConfig, ModelConfig
from engine.config.schema.objective import ObjectiveConfig
from engine.data.shards.dataset import TokenDataset
from engine.data.validation import ValidationSamples
from engine.errors import ConfigError
from engine.models.families import family
from engine.models.materialize import whole_model
from engine.plan.cut import whole_model as whole_chunk
from engine.serve.source import Trained
from engine.tasks.kinds import KINDS
from engine.tasks.learned import open_learned
from engine.tasks.predict import predict
from engine.train.starting_weights import StartingWeights

BODY = ("embed_", "layers.", "final_norm.", "encoder_", "decoder_")
"""Beginnings of the names of the parameters that tasks have in common."""
_ROWS = 8
Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class LearnedTask:
    """A run of a task, and its model."""

    folder: Path
    name: str
    trained: Trained
    measure: str
    """Name of the main measure of its kind."""


def open_tasks(folders: Sequence[Path]) -> list[LearnedTask]:
    """Open the runs of tasks, in the order in which they were trained.

    Raises:
        ConfigError: a folder holds no run of a task, or the bodies of two models differ in shape.
        CheckpointError: a checkpoint is damaged.
    """
    tasks = []
    for folder in folders:
        trained = open_learned(folder)
        if trained.run is None or trained.run.stages[-1].objective.name not in KINDS:
            raise ConfigError(
                f"{folder} is no run of a task", "run folders of `palimpsest finetune`", "name another one"
            )
        kind = KINDS[trained.run.stages[-1].objective.name]
        tasks.append(LearnedTask(folder, trained.run.name, trained, kind.main_measure.name))
    first = _body_shapes(tasks[0].trained)
    for task in tasks[1:]:
        if _body_shapes(task.trained) != first:
            raise ConfigError(
                f"the model of {task.folder} has another body than that of {tasks[0].folder}",
                "models of one start",
                "name runs that were trained one after the other",
            )
    return tasks


def measures(tasks: Sequence[LearnedTask]) -> list[list[float | None]]:
    """Return the main measure of each task (column) after each task was learned (row); None before its own."""
    rows: list[list[float | None]] = []
    for number, body in enumerate(tasks):
        weights = body.trained.weights
        rows.append([_measure(weights, head) if n <= number else None for n, head in enumerate(tasks)])
    return rows


def measures_before(tasks: Sequence[LearnedTask]) -> list[float | None]:
    """Return the main measure of each task before its run: of its start under an untrained head.

    Raises:
        ConfigError, CheckpointError: a start is no longer there.
    """
    found = []
    for task in tasks:
        run = task.trained.run
        assert run is not None
        starting = StartingWeights(run)
        specs = family(run.model).specs(run.model)
        weights = {spec.name: starting.rows(spec, 0, spec.stored_shape[0]) for spec in specs}
        model = replace(task.trained, config=run.model, source=MemorySource(weights, str(task.folder)))
        found.append(_worth(model, task))
    return found


def language_model_losses(tasks: Sequence[LearnedTask], shards: Path, max_samples: int | None) -> list[float]:
    """Return the loss of the first start on a data set, and that of the body after each task under the start's head.

    In nats per predicted token: masked tokens, the next token, or spans, by the family of the model.

    Raises:
        ConfigError: the start cannot be read, or has no head over the vocabulary.
        DataError: the data does not serve it.
    """
    run = tasks[0].trained.run
    assert run is not None
    if run.init_from is None:
        raise ConfigError(f"{tasks[0].folder} has no init_from", "a run of a task that has a start", "name another one")
    opened = open_source(run.init_from.path, run.model.vocab_multiple)
    model = opened.model
    if model.task_head is not None:
        raise ConfigError(
            f"init_from = {run.init_from.path} of {tasks[0].folder} has the head of a task",
            "a start with a head over the vocabulary",
            "name the run that was trained first, too",
        )
    if isinstance(model, BERTConfig) and model.pair_head:
        model = model.model_copy(update={"pair_head": False})
    first = {spec.name: opened.read(spec.name) for spec in family(model).specs(model)}
    found = [_loss(model, first, shards, max_samples)]
    for task in tasks:
        learned = first | _fitting(_learned(task, first), first, task.folder)
        found.append(_loss(model, learned, shards, max_samples))
    return found


def _learned(task: LearnedTask, first: Weights) -> dict[str, torch.Tensor]:
    """Return a task's body, and the head over the vocabulary where replayed text was learned with it."""
    run, trained = task.trained.run, task.trained
    assert run is not None
    if run.stages[-1].replayed_objective is None:
        return {name: value for name, value in trained.weights.items() if name.startswith(BODY)}
    names = {spec.name: spec for spec in family(run.model).specs(run.model) if spec.name in first}
    maps = unchanged(names.values()).parameters
    return {name: read_parameter(trained.source, one) for name, one in maps.items()}


def _measure(body: Weights, head: LearnedTask) -> float | None:
    """Return the main measure of a task's examples, by a body under the task's head."""
    own = head.trained.weights
    weights = own | {name: value for name, value in body.items() if name.startswith(BODY)}
    return _worth(replace(head.trained, source=MemorySource(weights, str(head.folder))), head)


def _worth(model: Trained, task: LearnedTask) -> float | None:
    """Return the main measure of a model on a task's examples."""
    run = task.trained.run
    assert run is not None
    stage = run.stages[-1]
    if not stage.data.validation_locations:
        raise ConfigError(f"{task.folder} has no validation examples", "data.validation", "fine-tune with it")
    return predict(model, stage, TokenDataset(stage.data.validation_locations[0])).measures()[task.measure]


def _body_shapes(trained: Trained) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in trained.source.shapes.items() if name.startswith(BODY)}


def _fitting(body: Weights, first: Weights, folder: Path) -> dict[str, torch.Tensor]:
    wrong = [name for name, value in body.items() if name in first and first[name].shape != value.shape]
    if wrong:
        raise ConfigError(f"{folder} has another {wrong[0]} than its start", "equal shapes", "name runs of one start")
    return {name: value for name, value in body.items() if name in first}


def _loss(model: ModelConfig, weights: Weights, shards: Path, max_samples: int | None) -> float:
    names: dict[str, str] = {"bert": "masked", "gpt": "causal", "t5": "span_corruption"}
    objective = ObjectiveConfig.model_validate(names[model.family])
    samples = ValidationSamples(TokenDataset(shards), model.longest_row, "document", max_samples, objective=objective)
    kind = family(model)
    head, accepted = kind.configured_head(model), kind.inputs(model, whole_chunk(model))
    module, total, weight = whole_model(model, weights).eval(), 0.0, 0.0
    with torch.inference_mode():
        for batch in samples.batches(0, 1, _ROWS):
            inputs = {name: tensor for name, tensor in batch.inputs.items() if name in accepted}
            total += float(module(**inputs)["losses_L"][0])
            weight += batch.weights[head.losses[0]]
    return total / weight if weight else 0.0
