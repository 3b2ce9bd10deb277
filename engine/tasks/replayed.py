"""Text of pretraining that is replayed beside a task: its objective, the head that predicts it, and where it lies.

Text from the reservoir of the start is copied beside the encoded examples, as much as the run can replay: the run file
that is made here trains where the start is gone, or has been trained further.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from engine.checkpoint.folder import CHECKPOINTS, committed, find
from engine.checkpoint.interchange.initial import format_of
from engine.checkpoint.load import read_state
from engine.checkpoint.storage import location_of
from engine.config.load import Tree, read_tree
from engine.config.objectives import PRETRAINING, span_lengths
from engine.config.save import FILE as RUN_FILE
from engine.config.schema.model import ModelConfig, TaskHead
from engine.config.schema.objective import ObjectiveConfig
from engine.data.replay.generation import Generation
from engine.data.replay.view import ReplayDataset
from engine.data.shards.index import FILE as INDEX
from engine.data.shards.tombstones import read_tombstones
from engine.data.shards.writer import ShardWriter
from engine.data.stage import open_reservoir
from engine.data.tokenizer.folder import tokenizer_hash
from engine.errors import ConfigError
from engine.serve.source import describe
from engine.tasks.encode import written_once
from engine.tasks.read import Task
from engine.train.saved_reservoir import generation_in


def with_replay(stage: Tree, model: ModelConfig, begun: TaskHead | None, init_from: str) -> ModelConfig:
    """Return the model of a task with the head over the vocabulary where its stage replays text, whose objective is
    set as far as it is left out. `begun` is the head of a task that the start has.

    Raises:
        ConfigError: the start has the head of a task alone.
    """
    replay = stage.get("replay")
    if replay is None:
        return model
    replay.setdefault("objective", PRETRAINING[model.family])
    if model.task_head is None:
        return model
    if begun is not None and not begun.keeps_vocabulary:
        raise ConfigError(
            f"stages.0.replay with init_from = {init_from}, which has a head for {begun.task} and none over the "
            "vocabulary",
            "a start that can predict tokens: a pretrained one, or a task that was learned with replay",
            "start from the pretrained model, or leave `replay` out",
        )
    return model.model_copy(update={"task_head": model.task_head.model_copy(update={"keeps_vocabulary": True})})


def with_answer_length(stage: Tree, task: Task, length: int) -> Task:
    """Return the task with the rows of T5's decoder long enough for replayed text, too."""
    given: Any = (stage.get("replay") or {}).get("objective")
    if given is None or not task.objective.answer_length:
        return task
    objective = ObjectiveConfig.model_validate(given)
    if objective.name != "span_corruption":
        return task  # refused by the rules of the run
    decoder = span_lengths(length, objective.rate, objective.mean_span_length).decoder
    longer = max(task.objective.answer_length, decoder)
    return task._replace(objective=task.objective.model_copy(update={"answer_length": longer}))


def set_replayed_source(stage: Tree, init_from: str, folder: Path, seed: int) -> None:
    """Set the folder of the text that a stage replays, where it names none: a copy in `folder` of documents of the
    start's reservoir, drawn at random where it has more than the stage replays.

    Raises:
        ConfigError: the start keeps no reservoir, or an empty one.
        CheckpointError, DataError: the reservoir, or too much of its text, cannot be read.
    """
    replay = stage.get("replay")
    if replay is None or replay.get("source") is not None:
        return
    begun = _copy_in_use(folder)
    if begun is not None:
        replay["source"] = str(begun)
        return
    wanted = _num_tokens(stage)
    # The name needs nothing that is read from the checkpoint, so that the copy is found where that is gone.
    facts = json.dumps([init_from, wanted, seed])
    name = f"replayed-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"

    def write(partial: Path) -> None:
        view = _reservoir_of(init_from)
        index = view.index
        shape = (partial, index.vocab_size, index.eos_id, index.tokenizer_hash)
        with ShardWriter(*shape, vocabulary=index.vocabulary) as writer:
            for tokens in _documents(view, wanted, seed):
                writer.add(tokens)

    replay["source"] = str(written_once(folder, name, write))


def _copy_in_use(folder: Path) -> Path | None:
    """Return the copy in `folder` that the run has saved checkpoints on, if any: its loader refuses other text, while
    the run's length and ratio, which ask for more of it, may change."""
    run = folder.parent
    if not committed(run / CHECKPOINTS) or not (run / RUN_FILE).is_file():
        return None
    for stage in read_tree(run / RUN_FILE).get("stages", []):
        source = Path(str((stage.get("replay") or {}).get("source", "")))
        # by its name in this folder: the run may have been moved
        if source.parent.name == folder.name and (folder / source.name / INDEX).is_file():
            return folder / source.name
    return None


def _num_tokens(stage: Tree) -> int:
    """Return the tokens of all rows that a stage may replay."""
    ratio, length, batch = stage["replay"]["ratio"], stage["sequence_length"], stage["global_batch_size"]
    largest = max((row["ratio"] for row in ratio), default=0) if isinstance(ratio, list) else ratio
    duration = stage["duration"]
    steps = duration["steps"] if "steps" in duration else math.ceil(duration["tokens"] / length / batch)
    # one row more: shares are exact to one row, and the last row of the shards is short
    return (math.ceil(steps * batch * Fraction(str(largest))) + 1) * length


def _reservoir_of(init_from: str) -> ReplayDataset:
    """Return the documents that the start of a run has kept to be replayed."""
    problem = "a Hugging Face folder, which has none"
    if format_of(location_of(init_from)) != "huggingface":
        checkpoint = Path(find(Path(init_from))[0])
        run = describe(checkpoint, read_state(checkpoint)).run
        problem = "a checkpoint without one"
        found: Generation | None = None if run is None else generation_in(checkpoint, run)
        if run is not None and found is not None and found.num_rows:
            given = tokenizer_hash(run.tokenizer), run.model.vocab_size, read_tombstones(run.folder)
            return open_reservoir(run.stages, found, [], *given)
    raise ConfigError(
        f"stages.0.replay.source is missing, and no reservoir is there to replay from: init_from = {init_from} is "
        f"{problem}",
        "a folder of token shards, or a start that has kept a `reservoir: {rows: N}`",
        "set stages.0.replay.source to the text of pretraining, or leave `replay` out",
    )


def _documents(view: ReplayDataset, wanted: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the tokens of documents of at least `wanted` tokens together, or of all; none that was forgotten."""
    bounds = [view.offsets(number)[0] for number in range(view.num_shards)]
    lengths = np.concatenate([np.diff(offsets) for offsets in bounds]).astype(np.int64)
    drawn = np.random.Generator(np.random.Philox(seed)).permutation(lengths.size)
    # the first of a random order that have enough tokens, in the order of the view: [5, 3, 4] of 7 wanted are 5 and 3
    count = int(np.searchsorted(np.cumsum(lengths[drawn]), wanted)) + 1
    chosen = np.zeros(lengths.size, bool)
    chosen[drawn[:count]] = True
    first = 0
    for number, offsets in enumerate(bounds):
        mine = np.flatnonzero(chosen[first : first + offsets.size - 1])
        first += offsets.size - 1
        for document in np.setdiff1d(mine, view.forgotten_documents(number)).tolist():
            yield view.shard(number).tokens[int(offsets[document]) : int(offsets[document + 1])]
        view.release()
