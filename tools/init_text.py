"""The text of a first run file: values that suit model, data and GPUs, each with the reason beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.load import parse_run
from engine.config.schema.model import FamilyName, make_model
from engine.config.schema.parallel import ParallelConfig
from engine.data.shards.index import FILE, read_index
from engine.errors import DataError
from engine.plan.hardware import cluster
from engine.plan.parameters import num_parameters
from engine.plan.ranking import rank

GPU = "h100-80gb"
"""Kind of GPU that the layout is chosen for, as `palimpsest plan` assumes it."""
GPUS_PER_NODE = 8
TOKENS_PER_PARAMETER = 20
"""Tokens per parameter that are near the optimum for their compute (Hoffmann et al. 2022, Chinchilla)."""
MOST_EPOCHS = 4
"""Passes over the data up to which repeated tokens are nearly as good as new ones (Muennighoff et al. 2023)."""
OBJECTIVES: dict[FamilyName, str] = {"gpt": "causal", "bert": "masked", "t5": "span_corruption"}
LENGTHS: dict[FamilyName, int] = {"gpt": 1024, "bert": 512, "t5": 512}


@dataclass(frozen=True)
class Data:
    """A folder that `palimpsest prepare` wrote."""

    train: dict[str, Path]
    """Folders of shards by domain; one without domains has the name ""."""
    validation: Path | None
    tokenizer: Path
    vocab_size: int
    num_tokens: int


def read_data(folder: Path) -> Data:
    """Return what a folder of prepared data holds.

    Raises:
        DataError: it holds no shards of training data, or those of several vocabularies.
    """
    train = folder / "train"
    found = {"": train} if (train / FILE).is_file() else {}
    # Shards lie in train/ itself, or in a folder per domain below it, never in both.
    found |= {path.parent.name: path.parent for path in sorted(train.glob(f"*/{FILE}")) if not found}
    if not found:
        raise DataError(
            f"{folder} has no token shards in train/",
            "the folder that `palimpsest prepare --output` names",
            "prepare text first: palimpsest prepare SOURCE --tokenizer FOLDER --output FOLDER",
        )
    indexes = [read_index(path) for path in found.values()]
    sizes = {index.vocab_size for index in indexes}
    if len(sizes) > 1:
        raise DataError(
            f"the shards in {train} have vocabularies of {' and '.join(map(str, sorted(sizes)))} tokens",
            "one tokenizer for all domains",
            "prepare them together",
        )
    tokens = sum(shard.num_tokens for index in indexes for shard in index.shards)
    validation = folder / "validation"
    return Data(found, validation if validation.is_dir() else None, _tokenizer(folder), sizes.pop(), tokens)


def _tokenizer(folder: Path) -> Path:
    """Return the tokenizer that the data was prepared with, as `prepare.json` names it."""
    try:
        return Path(json.loads((folder / "prepare.json").read_text(encoding="utf-8"))["recipe"]["tokenizer"])
    except (OSError, ValueError, KeyError, TypeError):
        # A guess that the reader of the run file sees and can correct.
        return folder.parent / "tokenizer"


def run_text(family: FamilyName, size: str, sizes: Mapping[str, Any], data: Data, num_gpus: int, name: str) -> str:
    """Return a run file."""
    length = 128 if size == "tiny" else LENGTHS[family]
    keys = {"family": family, "vocab_size": data.vocab_size, **sizes, "max_positions": length}
    parameters = num_parameters(make_model(**keys))
    # A multiple of the GPUs, so that every data axis that `rank` tries divides the batch.
    batch = math.ceil((16 if size == "tiny" else 256) / num_gpus) * num_gpus
    wanted = min(TOKENS_PER_PARAMETER * parameters, MOST_EPOCHS * data.num_tokens)
    # Ten at least, so that a trial on a few documents still has a warm-up, checkpoints and an end.
    steps = max(10, wanted // (batch * length))
    stage: dict[str, Any] = {
        "objective": OBJECTIVES[family],
        "data": _data_keys(data),
        "sequence_length": length,
        "global_batch_size": batch,
        "duration": {"steps": steps},
        "schedule": {"warmup": max(1, steps // 50)},
    }
    tree: dict[str, Any] = {
        "name": name,
        "folder": f"runs/{name}",
        "tokenizer": str(data.tokenizer),
        "model": keys,
        "stages": [stage],
    }
    # Through the same parser as a run file, so that a file that `train` would refuse is never written. The copy is
    # because parsing expands paths in place.
    layout = rank(parse_run(json.loads(json.dumps(tree)), "init"), cluster(GPU, num_gpus, GPUS_PER_NODE))[0].parallel
    return _text(tree, parameters, data, layout, num_gpus)


def _data_keys(data: Data) -> dict[str, Any]:
    if list(data.train) == [""]:
        keys: dict[str, Any] = {"train": str(data.train[""])}
    else:
        keys = {"sources": [{"name": domain, "path": str(path)} for domain, path in data.train.items()]}
    return keys if data.validation is None else {**keys, "validation": str(data.validation)}


def _text(tree: dict[str, Any], parameters: int, data: Data, layout: ParallelConfig, num_gpus: int) -> str:
    stage, every = tree["stages"][0], max(1, tree["stages"][0]["duration"]["steps"] // 10)
    data_lines = "\n".join(f"      {key}: {_value(value)}" for key, value in stage["data"].items())
    model_lines = "\n".join(f"  {key}: {_value(value)}" for key, value in tree["model"].items())
    parallel_lines = "\n".join(f"  {key}: {_value(value)}" for key, value in _changed(layout).items())
    # Falls with the root of the width: 7.2e-4 at 768, near the published 6e-4 of a model that wide (Brown et al. 2020,
    # table 2.1).
    rate = min(1e-3, round(0.02 / math.sqrt(tree["model"]["hidden_size"]), 5))
    return f"""# Written by `palimpsest init`. Each key can be changed here, or on the command line: section.key=value.
# What the run costs and which layouts are fastest: palimpsest plan FILE. All keys: palimpsest schema.
name: {_value(tree["name"])}
folder: {_value(tree["folder"])} # checkpoints, metrics and logs; training again with this folder resumes
tokenizer: {_value(tree["tokenizer"])} # the one that the shards were written with
seed: 0
model: # {parameters:,} parameters
{model_lines}
stages:
  - objective: {stage["objective"]}
    data: # {data.num_tokens:,} tokens
{data_lines}
    sequence_length: {stage["sequence_length"]} # tokens per sample
    global_batch_size: {stage["global_batch_size"]} # samples per step over all GPUs
    # {TOKENS_PER_PARAMETER} tokens per parameter (Hoffmann et al. 2022), at most {MOST_EPOCHS} passes over the data
    duration:
      steps: {stage["duration"]["steps"]}
    schedule: # a cosine after the warm-up, by default
      warmup: {stage["schedule"]["warmup"]} # steps
optimizer:
  learning_rate: {rate} # its peak
parallel: # the fastest layout for {num_gpus} {GPU} that `palimpsest plan` knows; free to change at every start
{parallel_lines}
checkpoint:
  every_steps: {every}
evaluation:
  every_steps: {every}
  max_samples: 4096 # of the validation set
"""


def _changed(layout: ParallelConfig) -> dict[str, Any]:
    """Return the keys of a layout that are not the defaults, and those that a reader looks for in any case."""
    always = {"zero_stage", "micro_batch_size"}
    fields = ParallelConfig.model_fields
    values = layout.model_dump(mode="json")
    return {key: value for key, value in values.items() if key in always or value != fields[key].default}


def _value(value: Any) -> str:
    """Return a value as YAML: JSON is YAML, but plain words need no quotes."""
    if isinstance(value, str) and value.replace("_", "").replace("/", "").replace("-", "").isalpha():
        return value if value not in ("true", "false", "null") else json.dumps(value)
    return json.dumps(value, ensure_ascii=False)
