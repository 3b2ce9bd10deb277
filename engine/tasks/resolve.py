"""A task file made into a run file: the model of its start with a head, encoded examples, lengths in steps.

A task file is a run file with `init_from` and one stage whose `data` names files of examples. What it leaves out has
the values of `DEFAULTS`, those of the BERT paper's fine-tuning (Devlin et al. 2019, appendix A.3) where it says them.
The result is an ordinary run: `train`, `launch` and `plan` take it as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from engine.config.load import Tree, merge, parse_run, parse_section
from engine.config.metrics import MEASURE, VALIDATION_LOSS
from engine.config.objectives import OBJECTIVES
from engine.config.paths import expand_keys
from engine.config.schema.model import ModelConfig, TaskHead, make_model
from engine.config.schema.objective import ObjectiveName
from engine.config.schema.run import RunConfig
from engine.errors import ConfigError
from engine.plan.frozen import base_patterns
from engine.tasks.answer_examples import AnswerExamples
from engine.tasks.distilled import check_labels, set_head
from engine.tasks.encode import EXAMPLES, alone_in, encoded_folder
from engine.tasks.framing import Framing
from engine.tasks.kinds.answer import Answer
from engine.tasks.layers import LayerKeys, decayed_rates, unfrozen_stages
from engine.tasks.lengths import (
    BATCH,
    LENGTH_MULTIPLE,
    examples_per_step,
    num_rows_of,
    row_lengths_of,
    set_lengths,
    steps_of,
    with_lengths,
)
from engine.tasks.read import Task, read_task
from engine.tasks.replayed import set_replayed_source, with_answer_length, with_replay
from engine.tasks.start import (
    TOKENIZER,
    Start,
    begun_run,
    dropout_of,
    open_start,
    require_head,
    section_of,
    start_of,
    tokenizer_of,
)

DEFAULTS: Tree = {
    "optimizer": {"learning_rate": 5e-5, "beta2": 0.999, "weight_decay": 0.01},
    "parallel": {"micro_batch_size": 8},
    "elastic": {"pad_batch": True},
}
"""Keys of a run that fine-tuning has other values of than pretraining."""
_POOLED: tuple[ObjectiveName, ...] = ("classification", "regression")
"""Objectives whose head reads one state of a row."""


def resolve_task(tree: Tree, source: str) -> RunConfig:
    """Return the run of a task file's tree; reads and encodes the examples. `source` names the file in errors.

    Every process of a start may call it at the same time.

    Raises:
        ConfigError, CheckpointError: the file or the start of the run is not what it has to be.
        DataError: the examples are not.
    """
    expand_keys(tree)
    init_from, folder = start_of(tree, source), Path(str(tree["folder"]))
    start = open_start(init_from, folder)
    stage, name = _stage_of(tree, source)
    model, head = _model(tree, stage, name, start, source)
    begun = model.task_head
    before = None if section_of(tree["init_from"]).get("head") == "new" else begun
    set_head(tree, stage, name, before, start)
    if "tokenizer" not in tree:
        tree["tokenizer"] = str(tokenizer_of(start, folder, model))
    task = read_task(stage, name, source, int(tree.get("seed", 0)))
    tree["tokenizer"] = str(_with_dialogues(Path(tree["tokenizer"]), task, folder))
    model = make_model(**(model.model_dump() | {"task_head": _head(task, before, start, head)}))
    require_head(before, model.task_head, init_from)
    if before is not None:
        check_labels(stage, task.objective.labels, init_from)
    model = with_replay(stage, model, begun, init_from)
    tree["model"] = model.model_dump(mode="json")
    framing = Framing(Path(tree["tokenizer"]), model)
    task, length = with_lengths(framing, task, model, stage.get("sequence_length"))
    task = with_answer_length(stage, task, length)
    encoded = {
        part: encoded_folder(task.kind, examples, task.objective, framing, length, folder / EXAMPLES, part)
        for part, examples in task.parts.items()
    }
    layers = _layer_keys(stage, source)
    num_rows = _fill_stage(stage, task, model, encoded, length)
    if model.task_head is not None:
        _set_row_lengths(stage, encoded["train"], tree.get("parallel", {}), start.begun or begun_run(folder))
    set_replayed_source(stage, init_from, folder / EXAMPLES, int(tree.get("seed", 0)))
    if layers.layer_decay is not None:
        given = stage.get("learning_rate_factors", {})
        stage["learning_rate_factors"] = decayed_rates(model, layers.layer_decay) | given
    whole = merge(_defaults(model), tree | {"stages": [stage], "init_from": section_of(tree["init_from"])})
    whole.setdefault("evaluation", {}).setdefault("every_steps", steps_of(1.0, stage, num_rows))
    if "validation" in encoded:
        _keep_best(whole, name)
    if layers.unfreezing is not None:
        per_epoch, peak = float(num_rows / examples_per_step(stage)), whole["optimizer"]["learning_rate"]
        whole["stages"] = unfrozen_stages(stage, model, layers.unfreezing, per_epoch, peak)
    return parse_run(whole, source)


def _model(tree: Tree, stage: Tree, name: ObjectiveName, start: Start, source: str) -> tuple[ModelConfig, Tree]:
    """Return the model of the start with the keys of the file, and what the file says of the head. Checks the names and
    values of all keys."""
    if "adapter" in tree and isinstance(tree.setdefault("model", {}), dict):
        tree["model"]["adapter"] = tree.pop("adapter")
    given = tree.get("model")
    if isinstance(given, dict) and isinstance(head := given.get("task_head"), dict):
        _check_head_keys(head, name, source)
    _check_keys(tree, stage, name, start.model, source)
    head = tree.get("model", {}).pop("task_head", None) or {}
    started = make_model(**start.model)
    model = parse_section(type(started), start.model | dropout_of(started) | tree.get("model", {}), ("model",), source)
    if model.family not in OBJECTIVES[name].families:
        raise ConfigError(
            f"objective {name} with the model in {start.path}, of family {model.family}",
            f"a model of family {' or '.join(OBJECTIVES[name].families)}",
            "start from another model",
        )
    adapter = model.adapter
    if name == "answer" and adapter is not None and not adapter.generates:
        raise ConfigError(
            f"objective answer with adapter.method = {adapter.method}: at the end answers are generated by Hugging "
            "Face's class or by peft's, which cannot do it with such an adapter",
            "adapter.method lora, adalora, ia3 or prompt",
            "use one of these",
        )
    return model, head


def _head(task: Task, before: TaskHead | None, start: Start, given: Tree) -> Tree | None:
    """Return `model.task_head`: the head of the task, with the pooling of the file, else of the start."""
    head = task.kind.head(task.objective.labels)
    if head is None or task.kind.name not in _POOLED:
        return head
    return head | {"pooling": start.pooling if before is None else before.pooling} | given


def _check_head_keys(given: Tree, name: ObjectiveName, source: str) -> None:
    """Raise `ConfigError` where a file says more of the head than its pooling: the rest is the objective's."""
    is_pooled = name in _POOLED
    wrong = [f"model.task_head.{key}" for key in given if key != "pooling" or not is_pooled]
    if wrong:
        raise ConfigError(
            f"{source}: {', '.join(wrong)} with objective {name}",
            "model.task_head.pooling" if is_pooled else "no model.task_head",
            "leave it out: the objective says what the head is",
        )


def _with_dialogues(tokenizer: Path, task: Task, folder: Path) -> Path:
    """Return the folder of a tokenizer that has a chat template where the task's examples are dialogues."""
    if not isinstance(task.kind, Answer):
        return tokenizer
    with alone_in(folder / EXAMPLES):
        return task.kind.tokenizer(tokenizer, cast(AnswerExamples, task.parts["train"]), folder / TOKENIZER)


def _fill_stage(stage: Tree, task: Task, model: ModelConfig, encoded: Mapping[str, Path], length: int) -> int:
    """Set what encoding has found, and what the stage leaves out; return the rows of an epoch."""
    if model.adapter is not None:
        stage["freeze"] = [*dict.fromkeys((*base_patterns(model), *stage.get("freeze", ())))]
    stage |= {"name": stage.get("name", task.kind.name), "sequence_length": length}
    read = {key: value for key, value in stage["data"].items() if key not in ("columns", "augment")}
    stage["data"] = read | {part: str(location) for part, location in encoded.items()}
    stage["objective"] = task.objective.model_dump(mode="json", exclude_unset=True)
    num_rows = num_rows_of(stage, task.objective)
    set_lengths(stage, num_rows)
    return num_rows


def _set_row_lengths(stage: Tree, train: Path, parallel: Tree, begun: RunConfig | None) -> None:
    """Set the lengths that rows may have where they are left out, for examples of one data set in steps of one size. A
    run that has begun keeps its own: on other ranks that share a row others would be found."""
    data, length = stage["data"], stage["sequence_length"]
    if {"replay", "batch_ramp"} & stage.keys() or data.get("on_damage", "fail") != "fail" or "row_lengths" in data:
        return
    if begun is None:
        data["row_lengths"] = row_lengths_of(train, length, parallel)
    else:  # where rows are shorter now, it is another run, and refused as that
        data["row_lengths"] = [one for one in begun.stages[0].data.row_lengths if one < length]


def _defaults(model: ModelConfig) -> Tree:
    """Return the values of keys that the file leaves out."""
    defaults = copy.deepcopy(DEFAULTS)
    if model.adapter is not None:
        defaults["optimizer"]["learning_rate"] = model.adapter.learning_rate
    if model.adapter is not None or model.task_head is not None:  # parameters that the start has not
        defaults["init_from"] = {"missing": "initialise"}
    return defaults


def _check_keys(tree: Tree, stage: Tree, name: ObjectiveName, start: Tree, source: str) -> None:
    """Raise `ConfigError` where a key of the file has a wrong name or value, before any example is read; keys that are
    found later stand in with values of their own."""
    given = tree.get("model", {})
    found_later = {"sequence_length": LENGTH_MULTIPLE, "global_batch_size": BATCH, "duration": {}}
    draft = {"tokenizer": TOKENIZER} | tree | {"stages": [found_later | stage]}
    draft["model"] = start | given if isinstance(given, dict) else given
    if isinstance(given, dict) and isinstance(head := given.get("task_head"), dict):
        draft["model"]["task_head"] = {"task": name, "num_labels": 2} | head
    parse_run(merge(copy.deepcopy(DEFAULTS), draft | {"init_from": section_of(tree["init_from"])}), source)


def _keep_best(tree: Tree, name: ObjectiveName) -> None:
    """Set what saves and keeps the best checkpoint, as far as it is left out: one at each evaluation."""
    evaluated, checkpoint = tree["evaluation"]["every_steps"], tree.setdefault("checkpoint", {})
    saved = checkpoint.setdefault("every_steps", evaluated)
    has_both = isinstance(saved, int) and isinstance(evaluated, int) and saved > 0 and evaluated > 0
    if has_both and saved % evaluated == 0:
        checkpoint.setdefault("keep_best", 1)
        checkpoint.setdefault("keep_last", 1)
    is_measured = "max_samples" not in tree["evaluation"] and tree["model"]["task_head"] is not None
    measures = OBJECTIVES[name].measures if is_measured else ()
    checkpoint.setdefault("best_metric", f"{MEASURE}{measures[0]}" if measures else VALIDATION_LOSS)


def _layer_keys(stage: Tree, source: str) -> LayerKeys:
    """Take the keys of a stage that are made into others out of it."""
    given = {name: stage.pop(name) for name in LayerKeys.model_fields if name in stage}
    return parse_section(LayerKeys, given, ("stages", 0), source)


def _stage_of(tree: Tree, source: str) -> tuple[Tree, ObjectiveName]:
    """Return the one stage of a task file, and the name of its objective."""
    stages = tree.get("stages")
    given = stages if isinstance(stages, list) else []
    if len(given) != 1 or not all(isinstance(each, dict) for each in given):
        raise ConfigError(
            f"{source}: stages is {stages!r:.60}", "a list of one stage", "see configs/tasks/classification.yaml"
        )
    stage: Tree = dict(*given)
    objective = stage.get("objective")
    name = objective.get("name") if isinstance(objective, dict) else objective
    tasks = [one for one, entry in OBJECTIVES.items() if entry.is_task]
    if name not in tasks:
        raise ConfigError(f"{source}: stages.0.objective is {objective!r:.60}", " or ".join(tasks), "name a task")
    data = stage.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("train"), str):
        raise ConfigError(f"{source}: stages.0.data.train names no file", "a file of examples", "write data.train")
    if not isinstance(data.get("validation", ""), str):
        raise ConfigError(
            f"{source}: stages.0.data.validation is {data['validation']!r:.60}", "one file of examples, or none",
            "name one file",
        )  # fmt: skip
    return stage, cast(ObjectiveName, name)
