"""A task file made into a run file: the model of its start with a head, encoded examples, lengths in steps.

A task file is a run file with `init_from` and one stage whose `data` names files of examples. What it leaves out has
the values of `DEFAULTS`, those of the BERT paper's fine-tuning (Devlin et al. 2019, appendix A.3) where it says them.
The result is an ordinary run: `train`, `launch` and `plan` take it as it is.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from engine.checkpoint.folder import find
from engine.checkpoint.interchange.huggingface import side_files
from engine.checkpoint.interchange.initial import format_of, model_of
from engine.checkpoint.load import read_state
from engine.checkpoint.storage import location_of
from engine.config.load import Tree, merge, parse_run, parse_section
from engine.config.metrics import MEASURE, VALIDATION_LOSS
from engine.config.objectives import OBJECTIVES
from engine.config.paths import expand_keys
from engine.config.schema.data import AugmentConfig, ColumnsConfig
from engine.config.schema.model import ModelConfig, TaskHead, make_model
from engine.config.schema.objective import ObjectiveConfig, ObjectiveName
from engine.config.schema.run import RunConfig
from engine.corpus.tokenizer_import import import_tokenizer
from engine.corpus.tokenizer_training import Purpose
from engine.data.objectives.sampling import make_sampler
from engine.data.shards.dataset import TokenDataset
from engine.data.tokenizer.files import MODEL_FILE
from engine.errors import ConfigError
from engine.plan.frozen import base_patterns
from engine.serve.source import describe
from engine.tasks.answer_examples import AnswerExamples
from engine.tasks.augment import augmented
from engine.tasks.encode import alone_in, encoded_folder, longest
from engine.tasks.examples import TextExamples
from engine.tasks.framing import Framing
from engine.tasks.kind import Examples, Kind
from engine.tasks.kinds import KINDS
from engine.tasks.kinds.answer import Answer
from engine.tasks.layers import LayerKeys, decayed_rates, unfrozen_stages

EPOCHS = 3.0
BATCH = 32
WARMUP_SHARE = 0.1
ROW_LENGTHS = 8
"""Number of lengths that rows have, at most."""
LENGTH_MULTIPLE = 8
"""Rows are a multiple of this many tokens long, which matrix units of GPUs want."""
DEFAULTS: Tree = {
    "optimizer": {"learning_rate": 5e-5, "beta2": 0.999, "weight_decay": 0.01},
    "parallel": {"micro_batch_size": 8},
    "elastic": {"pad_batch": True},
}
"""Keys of a run that fine-tuning has other values of than pretraining."""
EXAMPLES, TOKENIZER = "examples", "tokenizer"
"""Folders beside the run's checkpoints: encoded examples, and the tokenizer of a Hugging Face folder."""
_PURPOSES: dict[str, Purpose] = {"gpt": "causal", "bert": "masked", "t5": "causal"}
"""Purposes whose special tokens an imported tokenizer is given where it lacks them, by family: T5's task needs no more
than the end of a text."""


def resolve_task(tree: Tree, source: str) -> RunConfig:
    """Return the run of a task file's tree; reads and encodes the examples. `source` names the file in errors.

    Every process of a start may call it at the same time.

    Raises:
        ConfigError, CheckpointError: the file or the start of the run is not what it has to be.
        DataError: the examples are not.
    """
    expand_keys(tree)
    init_from, folder = _start_of(tree, source), Path(str(tree["folder"]))
    stage, name = _stage_of(tree, source)
    start = model_of(init_from)
    if "adapter" in tree and isinstance(tree.setdefault("model", {}), dict):
        tree["model"]["adapter"] = tree.pop("adapter")
    _check_keys(tree, stage, start, source)
    kind = type(make_model(**start))
    model = parse_section(kind, start | _dropout(make_model(**start)) | tree.get("model", {}), ("model",), source)
    if model.family not in OBJECTIVES[name].families:
        raise ConfigError(
            f"objective {name} with the model in {init_from}, of family {model.family}",
            f"a model of family {' or '.join(OBJECTIVES[name].families)}",
            "start from another model",
        )
    if "tokenizer" not in tree:
        tree["tokenizer"] = str(_tokenizer(init_from, folder, model))
    task = _read(stage, name, source, int(tree.get("seed", 0)))
    tokenizer = Path(tree["tokenizer"])
    if isinstance(task.kind, Answer):
        with alone_in(folder / EXAMPLES):
            tokenizer = task.kind.tokenizer(tokenizer, cast(AnswerExamples, task.parts["train"]), folder / TOKENIZER)
    before = None if _section(tree["init_from"]).get("head") == "new" else model.task_head
    model = make_model(**(model.model_dump() | {"task_head": task.kind.head(task.objective.labels)}))
    _require_head(before, model.task_head, init_from)
    if model.adapter is not None:
        stage["freeze"] = [*dict.fromkeys((*base_patterns(model), *stage.get("freeze", ())))]
    # Rows of several lengths are for examples with one label each, of one data set, in steps of one size.
    is_even = not {"replay", "batch_ramp"} & stage.keys() and stage["data"].get("on_damage", "fail") == "fail"
    is_even = is_even and model.task_head is not None and not model.task_head.sees_tokens
    framing = Framing(tokenizer, model)
    task, length = _with_lengths(framing, task, model, stage.get("sequence_length"))
    encoded = {
        part: encoded_folder(task.kind, examples, task.objective, framing, length, folder / EXAMPLES, part)
        for part, examples in task.parts.items()
    }
    stage |= {"name": stage.get("name", name), "sequence_length": length}
    stage["data"] = dict(stage["data"]) | {part: str(location) for part, location in encoded.items()}
    for key in ("columns", "augment"):
        stage["data"].pop(key, None)
    stage["objective"] = task.objective.model_dump(mode="json", exclude_unset=True)
    num_rows = _num_rows(stage, task.objective)
    _lengths(stage, num_rows)
    if is_even:
        stage["data"].setdefault("row_lengths", _row_lengths(encoded["train"], length, tree.get("parallel", {})))
    tree |= {"model": model.model_dump(mode="json"), "tokenizer": str(tokenizer)}
    layers = _layer_keys(stage, source)
    if layers.layer_decay is not None:
        stage["learning_rate_factors"] = decayed_rates(model, layers.layer_decay) | stage.get(
            "learning_rate_factors", {}
        )
    tree["stages"] = [stage]
    defaults = copy.deepcopy(DEFAULTS)
    if model.adapter is not None:
        defaults["optimizer"]["learning_rate"] = model.adapter.learning_rate
    if model.adapter is not None or model.task_head is not None:  # parameters that the start has not
        defaults["init_from"] = {"missing": "initialise"}
    whole = merge(defaults, tree | {"init_from": _section(tree["init_from"])})
    whole.setdefault("evaluation", {}).setdefault("every_steps", _steps(1.0, stage, num_rows))
    if "validation" in encoded:
        _keep_best(whole, name)
    if layers.unfreezing is not None:
        per_epoch, peak = num_rows / stage["global_batch_size"], whole["optimizer"]["learning_rate"]
        whole["stages"] = unfrozen_stages(stage, model, layers.unfreezing, per_epoch, peak)
    return parse_run(whole, source)


def _require_head(before: TaskHead | None, wanted: TaskHead | None, init_from: str) -> None:
    """Raise `ConfigError` where the start has the head of another task, or one of another size."""
    if before is not None and before != wanted:
        new = "the head over the vocabulary" if wanted is None else f"{wanted.task} of {wanted.num_labels} labels"
        raise ConfigError(
            f"{init_from} has a head for {before.task} of {before.num_labels} labels, and the task is {new}",
            "a start with the same head, or a pretrained one without",
            "set init_from.head=new, which begins a head; or name the labels of the start in objective.labels",
        )


def _check_keys(tree: Tree, stage: Tree, start: Tree, source: str) -> None:
    """Raise `ConfigError` where a key of the file has a wrong name or value, before any example is read; keys that are
    found later stand in with values of their own."""
    given = tree.get("model", {})
    found_later = {"sequence_length": LENGTH_MULTIPLE, "global_batch_size": BATCH, "duration": {}}
    draft = {"tokenizer": TOKENIZER} | tree | {"stages": [found_later | stage]}
    draft["model"] = start | given if isinstance(given, dict) else given
    parse_run(merge(copy.deepcopy(DEFAULTS), draft | {"init_from": _section(tree["init_from"])}), source)


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


class _Task(NamedTuple):
    """A kind of task, its objective with the names of all labels, and its examples by their part of `data` (`train`,
    `validation`)."""

    kind: Kind[Any]
    objective: ObjectiveConfig
    parts: dict[str, Examples]


def _read(stage: Tree, name: ObjectiveName, source: str, seed: int) -> _Task:
    data, kind = stage["data"], KINDS[name]
    columns = parse_section(ColumnsConfig, data.get("columns", {}), ("stages", 0, "data", "columns"), source)
    objective = parse_section(ObjectiveConfig, stage["objective"], ("stages", 0, "objective"), source)
    parts = {part: kind.read(str(data[part]), columns) for part in ("train", "validation") if data.get(part)}
    if data.get("augment"):
        config = parse_section(AugmentConfig, data["augment"], ("stages", 0, "data", "augment"), source)
        parts["train"] = _augmented(parts["train"], config, name, seed)
    if labels := kind.labels(parts, objective.labels):
        objective = objective.model_copy(update={"labels": labels})
    return _Task(kind, objective, parts)


def _layer_keys(stage: Tree, source: str) -> LayerKeys:
    """Take the keys of a stage that are made into others out of it."""
    given = {name: stage.pop(name) for name in LayerKeys.model_fields if name in stage}
    return parse_section(LayerKeys, given, ("stages", 0), source)


def _augmented(examples: Examples, config: AugmentConfig, name: ObjectiveName, seed: int) -> Examples:
    if not isinstance(examples, TextExamples):
        raise ConfigError(
            f"stages.0.data.augment with objective {name}, whose labels are of parts of a text",
            "an objective with a label for each text: classification or regression",
            "leave data.augment out, or prepare a larger file of examples",
        )
    if examples.needed is not None:
        raise ConfigError(
            "stages.0.data.augment with data.columns.entities_of_relation, whose marks a variant of a text might lose",
            "texts without marks",
            "leave data.augment out, or prepare a larger file of examples",
        )
    return augmented(examples, config, seed)


def _start_of(tree: Tree, source: str) -> str:
    """Return the path in `init_from`. Raises `ConfigError` where it, or the run folder, is not there."""
    path = _section(tree.get("init_from")).get("path")
    for key, value in (("init_from", path), ("folder", tree.get("folder"))):
        if not isinstance(value, str) or not value:
            raise ConfigError(
                f"{source} has no {key}",
                "a checkpoint or a Hugging Face folder" if key == "init_from" else "the folder of the run",
                f"write {key} in the file or on the command line",
            )
    return str(path)


def _section(given: Any) -> Tree:
    return dict(given) if isinstance(given, dict) else {} if given is None else {"path": given}


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


def _dropout(model: ModelConfig) -> Tree:
    """Return the dropout of fine-tuning: BERT's own, which exports leave to the run; none elsewhere."""
    return {"dropout": 0.1} if model.family == "bert" and model.post_norm else {}


def _tokenizer(init_from: str, folder: Path, model: ModelConfig) -> Path:
    """Return the folder of the start's tokenizer: that of its run, or the imported one of a Hugging Face folder."""
    location = location_of(init_from)
    if format_of(location) == "huggingface":
        taken = folder / TOKENIZER
        with alone_in(folder / EXAMPLES):
            if not (taken / MODEL_FILE).is_file():
                with side_files(location) as local:
                    import_tokenizer(str(local), taken, _PURPOSES[model.family])
        return taken
    checkpoint = find(Path(init_from))[0]
    described = describe(checkpoint, read_state(checkpoint))
    if described.tokenizer is None:
        raise ConfigError(
            f"{init_from} does not say where its tokenizer is",
            "the tokenizer's folder",
            "write `tokenizer` in the file",
        )
    return described.tokenizer


def _with_lengths(framing: Framing, task: _Task, model: ModelConfig, given: int | None) -> tuple[_Task, int]:
    """Return the task with the length of its answers in T5, and the tokens of a row: as many as are given, else as the
    longest example has, rounded up, and as the model has positions."""
    is_known = model.family != "t5" or task.objective.answer_length
    if given is not None and is_known:
        return task, given
    most = given or model.max_positions
    found = [longest(task.kind.encode(one, task.objective, framing, most)) for one in task.parts.values()]
    tokens, decoder = (_filled(max(sizes), model) for sizes in zip(*found, strict=True))
    if not is_known:
        task = task._replace(objective=task.objective.model_copy(update={"answer_length": decoder}))
    return task, given or tokens


def _filled(num_tokens: int, model: ModelConfig) -> int:
    return min(math.ceil(num_tokens / LENGTH_MULTIPLE) * LENGTH_MULTIPLE, model.max_positions)


def _num_rows(stage: Tree, objective: ObjectiveConfig) -> int:
    """Return the rows of an epoch: one for each example, or fewer where examples are packed."""
    dataset = TokenDataset(stage["data"]["train"])
    if stage["data"].get("packing", "concatenate") == "concatenate":
        return dataset.index.num_documents
    shape = (stage["sequence_length"], 0, "document", stage["data"]["packing"], objective)
    return int(make_sampler(dataset, *shape).count(np.arange(dataset.num_shards)).sum())


def _row_lengths(folder: Path, most: int, parallel: Tree) -> list[int]:
    """Return lengths below `most` such that about as many examples of a folder need each of them."""
    dataset = TokenDataset(str(folder))
    found = np.concatenate([np.diff(dataset.offsets(number)[0]) for number in range(dataset.num_shards)])
    ranks = parallel.get("sequence", 1) * (parallel.get("tensor", 1) if parallel.get("sequence_parallel") else 1)
    multiple = math.lcm(LENGTH_MULTIPLE, ranks)
    quantiles = np.quantile(found, np.arange(1, ROW_LENGTHS) / ROW_LENGTHS)
    lengths = {math.ceil(length / multiple) * multiple for length in quantiles.tolist()}
    return sorted(length for length in lengths if length < most)


def _lengths(stage: Tree, num_examples: int) -> None:
    """Set a stage's batch, its length in steps and its schedule, where they are left out."""
    stage.setdefault("global_batch_size", min(BATCH, num_examples))
    duration = dict(stage.get("duration", {}))
    if not {"steps", "tokens"} & duration.keys():
        duration = {"steps": _steps(duration.get("epochs", EPOCHS), stage, num_examples)}
    stage["duration"] = duration
    warmup = math.ceil(WARMUP_SHARE * duration["steps"]) if "steps" in duration else 0
    stage.setdefault("schedule", {"shape": "linear", "warmup": warmup, "final_factor": 0.0})


def _steps(epochs: float, stage: Tree, num_examples: int) -> int:
    return max(1, math.ceil(epochs * num_examples / stage["global_batch_size"]))
