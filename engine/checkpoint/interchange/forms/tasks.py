"""Forms of fine-tuned models: a form of pretraining whose head over the vocabulary gave way to that of a task.

Theirs are the classes `...ForSequenceClassification`, which classify or, with one label and the problem type
"regression", predict a number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from engine.checkpoint.interchange.config_map import Always, Computed, Field
from engine.checkpoint.interchange.forms.form import Form, Theirs, one
from engine.config.huggingface_forms import Problems
from engine.config.schema.model import ModelConfig, TaskHead
from engine.errors import ConfigError

ENDING = "ForSequenceClassification"
"""Ending of the names of their classes."""
_PROBLEMS = {"classification": "single_label_classification", "regression": "regression"}


@dataclass(frozen=True)
class _Head:
    """Modules and fields of theirs that replace those of the head over the vocabulary."""

    names: dict[str, Theirs]
    fields: tuple[Field, ...] = ()


_HEADS = {
    "bert": _Head({"pooler": one("bert.pooler.dense"), "classifier": one("classifier")}),
    "roberta": _Head({"pooler": one("classifier.dense"), "classifier": one("classifier.out_proj")}),
    "modernbert": _Head({"classifier": one("classifier")}, (Always("classifier_pooling", ("cls",)),)),
    "gpt2": _Head({"classifier": one("score")}),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gpt_neox"), _Head({"classifier": one("score")})),
}
"""Heads by their model type."""
_OF_VOCABULARY = ("lm_head", "pair_head", "pooler")


def _write(model: ModelConfig) -> dict[str, Any]:
    head = model.task_head
    assert head is not None
    labels = {number: f"LABEL_{number}" for number in range(head.num_labels)}
    return {"id2label": labels, "label2id": {name: number for number, name in labels.items()}} | {
        "problem_type": _PROBLEMS[head.task]
    }


def _read(theirs: Any, problems: Problems) -> dict[str, Any]:
    tasks = {problem: task for task, problem in _PROBLEMS.items()}
    # Their classes take one label without a problem type for a regression.
    problem = theirs.problem_type or ("regression" if theirs.num_labels == 1 else _PROBLEMS["classification"])
    task = tasks.get(problem)
    if task is None:
        problems.append(ConfigError(f"problem_type = {theirs.problem_type!r}", " or ".join(tasks)))
        return {}
    return {"task_head": TaskHead.model_validate({"task": task, "num_labels": theirs.num_labels})}


def with_task_head(form: Form) -> Form | None:
    """Return the form of a model that was fine-tuned from one of `form`; None where theirs have no such class."""
    head = _HEADS.get(form.model_type)
    if head is None:
        return None
    kept = {name: theirs for name, theirs in form.names.items() if name.split(".")[0] not in _OF_VOCABULARY}
    # The transformation before BERT's projection goes with it; ModernBERT's stays.
    if form.model_type != "modernbert":
        kept = {name: theirs for name, theirs in kept.items() if not name.startswith("head_")}
    heads = {theirs.modules[0].split(".")[0] + "." for theirs in head.names.values()} - {form.prefix}
    stem = form.architecture.partition("For")[0].partition("LMHead")[0]
    return replace(
        form,
        architecture=stem + ENDING,
        names=kept | head.names,
        fields=(*form.fields, *head.fields, Computed(_write, _read)),
        heads=tuple(sorted(heads | ({"head."} if form.model_type == "modernbert" else set()))),
        copies={},
    )
