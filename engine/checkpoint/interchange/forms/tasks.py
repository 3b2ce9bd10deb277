"""Forms of fine-tuned models: a form of pretraining whose head over the vocabulary gave way to that of a task.

Theirs are the classes `...ForSequenceClassification`, which classify or, with one label and the problem type
"regression", predict a number; `...ForTokenClassification`; and `...ForQuestionAnswering`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from engine.checkpoint.interchange.config_map import Computed
from engine.checkpoint.interchange.forms.form import Form, Theirs, one
from engine.config.huggingface_forms import Problems
from engine.config.schema.model import ModelConfig, Pooling, TaskHead, TaskName
from engine.errors import ConfigError

SEQUENCES, TOKENS, ANSWERS = "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"
"""Endings of the names of their classes."""
ENDINGS: Mapping[TaskName, str] = {
    "classification": SEQUENCES,
    "regression": SEQUENCES,
    "token_classification": TOKENS,
    "question_answering": ANSWERS,
}
_PROBLEMS = {"classification": "single_label_classification", "regression": "regression"}
_POOLINGS: dict[Pooling, str] = {"token": "cls", "mean": "mean"}
"""Values of ModernBERT's `classifier_pooling`; other classes read one token."""
_SPAN_ENDS = 2
"""Labels of question answering: the first and the last token."""


@dataclass(frozen=True)
class _Head:
    """Modules of theirs that replace those of the head over the vocabulary."""

    names: dict[str, Theirs]
    prefix: str = ""
    """Beginning of the names of all other parameters, where the class has another one than that of pretraining."""


def _classifier(module: str, prefix: str = "") -> _Head:
    return _Head({"classifier": one(module)}, prefix=prefix)


_BERTS = ("bert", "megatron-bert", "roberta")
_LLAMAS = ("llama", "mistral", "qwen2", "qwen3")
_HEADS: Mapping[str, Mapping[str, _Head]] = {
    SEQUENCES: {
        **dict.fromkeys(
            ("bert", "megatron-bert"),
            _Head({"pooler": one("bert.pooler.dense"), "classifier": one("classifier")}),
        ),
        "roberta": _Head({"pooler": one("classifier.dense"), "classifier": one("classifier.out_proj")}),
        "modernbert": _classifier("classifier"),
        **dict.fromkeys(("gpt2", "gpt_neox", *_LLAMAS), _classifier("score")),
    },
    TOKENS: {
        **dict.fromkeys((*_BERTS, "modernbert", "gpt2", "gpt_neox"), _classifier("classifier")),
        **dict.fromkeys(_LLAMAS, _classifier("score")),
    },
    ANSWERS: {
        "modernbert": _classifier("classifier"),
        **dict.fromkeys((*_BERTS, "gpt2", "gpt_neox", "mistral"), _classifier("qa_outputs")),
        **dict.fromkeys(("llama", "qwen2", "qwen3"), _classifier("qa_outputs", prefix="transformer.")),
    },
}
"""Heads by the ending of their class and their model type."""
_OF_VOCABULARY = ("lm_head", "pair_head", "pooler")


def ending_of(classes: Iterable[str]) -> str | None:
    """Return the ending of a task's class among the names of classes; None where all are of pretraining."""
    return next((ending for name in classes for ending in _HEADS if name.endswith(ending)), None)


def _write(model: ModelConfig) -> dict[str, Any]:
    head = model.task_head
    assert head is not None
    labels = {number: f"LABEL_{number}" for number in range(head.num_labels)}
    found: dict[str, Any] = {"id2label": labels, "label2id": {name: number for number, name in labels.items()}}
    if model.transforms_for_tasks and not head.sees_tokens:
        found["classifier_pooling"] = _POOLINGS[head.pooling]
    return found | ({"problem_type": _PROBLEMS[head.task]} if head.task in _PROBLEMS else {})


def _read(ending: str, theirs: Any, problems: Problems) -> dict[str, Any]:
    task: TaskName | None = next(name for name, of_class in ENDINGS.items() if of_class == ending)
    if ending == SEQUENCES:
        task = _sequence_task(theirs, problems)
    if ending == ANSWERS and theirs.num_labels != _SPAN_ENDS:
        problems.append(ConfigError(f"num_labels = {theirs.num_labels}", f"{_SPAN_ENDS} for {ANSWERS}"))
    if task is None:
        return {}
    head = {"task": task, "num_labels": theirs.num_labels}
    if ending == SEQUENCES:
        try:
            head["pooling"] = pooling_of(theirs)
        except ConfigError as error:
            problems.append(error)
            return {}
    return {"task_head": TaskHead.model_validate(head)}


def pooling_of(theirs: Any) -> Pooling:
    """Return the pooling that a configuration of theirs asks for. Raises `ConfigError` for one that is not known."""
    pooling = getattr(theirs, "classifier_pooling", "cls") if theirs.model_type == "modernbert" else "cls"
    if pooling not in _POOLINGS.values():
        raise ConfigError(f"classifier_pooling = {pooling!r}", " or ".join(_POOLINGS.values()))
    return next(ours for ours, named in _POOLINGS.items() if named == pooling)


def _sequence_task(theirs: Any, problems: Problems) -> TaskName | None:
    tasks: dict[str, TaskName] = {
        "single_label_classification": "classification",
        "regression": "regression",
    }
    # Their classes take one label without a problem type for a regression.
    problem = theirs.problem_type or ("regression" if theirs.num_labels == 1 else "single_label_classification")
    if problem not in tasks:
        problems.append(ConfigError(f"problem_type = {theirs.problem_type!r}", " or ".join(tasks)))
    return tasks.get(problem)


def with_task_head(form: Form, ending: str) -> Form | None:
    """Return the form of a model that was fine-tuned from one of `form`; None where theirs have no such class."""
    head = _HEADS[ending].get(form.model_type)
    if head is None:
        return None
    kept = {name: theirs for name, theirs in form.names.items() if name.split(".")[0] not in _OF_VOCABULARY}
    # The transformation before BERT's projection goes with it; ModernBERT's stays.
    if form.model_type != "modernbert":
        kept = {name: theirs for name, theirs in kept.items() if not name.startswith("head_")}
    heads = {theirs.modules[0].split(".")[0] + "." for theirs in head.names.values()} - {form.prefix}
    stem = form.architecture.partition("For")[0].partition("LMHead")[0]
    if head.prefix:
        kept = {name: _moved(theirs, form.prefix, head.prefix) for name, theirs in kept.items()}
    return replace(
        form,
        architecture=stem + ending,
        names=kept | head.names,
        fields=(*form.fields, Computed(_write, partial(_read, ending))),
        prefix=head.prefix or form.prefix,
        heads=tuple(sorted(heads | ({"head."} if form.model_type == "modernbert" else set()))),
        copies={},
    )


def _moved(theirs: Theirs, prefix: str, to: str) -> Theirs:
    return replace(theirs, modules=tuple(to + module.removeprefix(prefix) for module in theirs.modules))
