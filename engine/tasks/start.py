"""The start of a task: the checkpoint or the Hugging Face folder in `init_from`, its tokenizer and its head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoint.folder import CHECKPOINTS, committed, find
from engine.checkpoint.interchange.forms.tasks import pooling_of
from engine.checkpoint.interchange.huggingface import read_configuration, side_files
from engine.checkpoint.interchange.initial import format_of, model_of
from engine.checkpoint.load import read_state
from engine.checkpoint.storage import location_of
from engine.config.load import Tree, load_run
from engine.config.save import FILE
from engine.config.schema.model import ModelConfig, Pooling, TaskHead
from engine.config.schema.run import RunConfig
from engine.corpus.tokenizer_import import import_tokenizer
from engine.corpus.tokenizer_training import Purpose
from engine.data.tokenizer.files import MODEL_FILE
from engine.errors import CheckpointError, ConfigError
from engine.logs import logger
from engine.redact import redact
from engine.serve.source import describe
from engine.tasks.encode import EXAMPLES, alone_in

TOKENIZER = "tokenizer"
"""Folder in the run folder of the tokenizer of a Hugging Face folder."""
_PURPOSES: dict[str, Purpose] = {"gpt": "causal", "bert": "masked", "t5": "causal"}
"""Purposes whose special tokens an imported tokenizer is given where it lacks them, by family: T5's task needs no more
than the end of a text."""
_log = logger(__name__)


@dataclass(frozen=True)
class Start:
    """The start of a task."""

    path: str
    model: Tree
    """Keys of its model."""
    begun: RunConfig | None = None
    """The run that has begun from it, where the start itself is gone since. `model` is then the run's, without what a
    task file adds: the head of the task and the adapter."""
    pooling: Pooling = "token"
    """State that the class of the start reads labels from, or the run that has begun."""


def open_start(path: str, folder: Path) -> Start:
    """Return the start of the task whose run folder this is.

    Raises:
        ConfigError, CheckpointError: it cannot be read, and the run has no checkpoints of its own, or another start.
    """
    try:
        return Start(path, model_of(path), pooling=_pooling_of(path))
    except (ConfigError, CheckpointError) as error:
        begun = begun_run(folder)
        if begun is None:
            raise
        theirs = None if begun.init_from is None else begun.init_from.path
        if theirs != redact(path):
            raise ConfigError(
                f"{error.wrong}; and the run in {folder}, which has checkpoints, started from {theirs}",
                "the start of the run, which may be gone by now, or one that is there",
                f"set init_from to {theirs} to go on, or begin another run in another `folder`",
            ) from error
        _log.warning("%s: the run goes on from its own checkpoints, with the model in %s", error.wrong, folder / FILE)
        kept = begun.model.model_dump(mode="json") | {"task_head": None, "adapter": None}
        head = begun.model.task_head
        return Start(path, kept, begun, "token" if head is None else head.pooling)


def _pooling_of(path: str) -> Pooling:
    """Return the pooling in the configuration of a Hugging Face folder, also of a pretrained model, whose class for
    texts would be made with it; `token` elsewhere."""
    location = location_of(path)
    return pooling_of(read_configuration(location)) if format_of(location) == "huggingface" else "token"


def begun_run(folder: Path) -> RunConfig | None:
    """Return the configuration of a run that has saved checkpoints; None where there are none."""
    if not committed(folder / CHECKPOINTS) or not (folder / FILE).is_file():
        return None
    return load_run(folder / FILE)


def start_of(tree: Tree, source: str) -> str:
    """Return the path in `init_from`. Raises `ConfigError` where it, or the run folder, is not there."""
    path = section_of(tree.get("init_from")).get("path")
    for key, value in (("init_from", path), ("folder", tree.get("folder"))):
        if not isinstance(value, str) or not value:
            raise ConfigError(
                f"{source} has no {key}",
                "a checkpoint or a Hugging Face folder" if key == "init_from" else "the folder of the run",
                f"write {key} in the file or on the command line",
            )
    return str(path)


def section_of(given: Any) -> Tree:
    return dict(given) if isinstance(given, dict) else {} if given is None else {"path": given}


def dropout_of(model: ModelConfig) -> Tree:
    """Return the dropout of fine-tuning: BERT's own, which exports leave to the run; none elsewhere."""
    return {"dropout": 0.1} if model.family == "bert" and not model.transforms_for_tasks else {}


def tokenizer_of(start: Start, folder: Path, model: ModelConfig) -> Path:
    """Return the folder of the start's tokenizer: that of its run, or the imported one of a Hugging Face folder."""
    init_from, location, taken = start.path, location_of(start.path), folder / TOKENIZER
    if start.begun is not None:
        # by its place in the run folder, which may have been moved
        return taken if (taken / MODEL_FILE).is_file() else start.begun.tokenizer
    if format_of(location) == "huggingface":
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


def require_head(before: TaskHead | None, wanted: TaskHead | None, init_from: str) -> None:
    """Raise `ConfigError` where the start has the head of another task, or one of another size or pooling."""
    if before is not None and (wanted is None or _told(before) != _told(wanted)):
        new = "the head over the vocabulary" if wanted is None else _told(wanted)
        raise ConfigError(
            f"{init_from} has a head for {_told(before)}, and the task is {new}",
            "a start with the same head, or a pretrained one without",
            "set init_from.head=new, which begins a head; or name the labels of the start in objective.labels, and "
            "leave model.task_head out",
        )


def _told(head: TaskHead) -> str:
    pooling = f" with pooling {head.pooling}" if head.pooling != "token" else ""
    return f"{head.task} of {head.num_labels} labels{pooling}"
