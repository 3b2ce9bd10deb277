"""Parameters that a run stage freezes, and how far back gradients flow; problems with patterns of names.

A frozen parameter has its weight alone. Layers in front of which nothing is trained, and that train nothing themselves,
keep no activations; nothing is sent back to a chunk that has only such layers.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Sequence
from functools import lru_cache

from engine.config.adapter_targets import MARK
from engine.config.objectives import RowLengths, row_lengths
from engine.config.parameter_patterns import matches
from engine.config.schema.adapter import AdaLoRAConfig, BottleneckConfig
from engine.config.schema.model import ModelConfig
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import RunStage
from engine.errors import ConfigError, PalimpsestError
from engine.plan.cut import ModelChunk, layers_of, whole_model
from engine.plan.families import figures
from engine.plan.operations import training_operations
from engine.plan.parameters import model_entries
from engine.plan.parts import Entries

NOTHING = Entries(())
_LAYER = re.compile(r"^layers\.\d+\.")
_PRETRAINED = ("embed_", "layers.", "final_norm.", "encoder_", "decoder_", "lm_head.")
"""Beginnings of the names of a model's parameters but for the head of a task."""
REMEDY = "correct the pattern: `layers.0.*` means the first layer"


@lru_cache(maxsize=1024)
def frozen_entries(model: ModelConfig, chunks: tuple[ModelChunk, ...], patterns: tuple[str, ...]) -> Entries:
    """Return the frozen parameters among those of a pipeline stage with these chunks, one entry for each."""
    if not patterns:
        return NOTHING
    # layer by layer, not by kind: a pattern may name some of several equal layers
    held = (entry for c in chunks for entry in figures(model).entries(model, c.layers, c.first, c.last))
    return Entries(tuple({entry.name: entry for entry in held if matches(entry.name, patterns)}.values()))


@lru_cache(maxsize=1024)
def first_trained_layer(model: ModelConfig, patterns: tuple[str, ...]) -> int:
    """Return the global number of the first layer through which gradients flow.

    It is the number of layers where the head alone is trained.
    """
    if not patterns:
        return 0
    for layer in range(model.num_layers):
        # with what stands in front of the layer: embeddings, and T5's relative positions
        held = figures(model).entries(model, range(layer, layer + 1), is_first=layer == 0, is_last=False)
        if not all(matches(entry.name, patterns) for entry in held):
            return layer
    return model.num_layers


@lru_cache(maxsize=1024)
def front_entries(model: ModelConfig, chunks: tuple[ModelChunk, ...], patterns: tuple[str, ...]) -> Entries:
    """Return the parameters of a pipeline stage through whose modules no gradients flow, for every use of each."""
    first = first_trained_layer(model, patterns)
    if first == 0:
        return NOTHING
    held = []
    for c in chunks:
        if c.layers.start < first:
            layers = range(c.layers.start, min(c.layers.stop, first))
            held += figures(model).entries(model, layers, c.first, is_last=False)
    return Entries(tuple(held))


@lru_cache(maxsize=64)
def base_patterns(model: ModelConfig) -> tuple[str, ...]:
    """Return patterns of the parameters that an adapter leaves as they are, and of no others.

    Those are all but the adapter's and, in a model with the head of a task, that head's.
    """
    modules = (entry.name.rpartition(".")[0] for entry in model_entries(model) if is_base(model, entry.name))
    return tuple(dict.fromkeys(f"{_LAYER.sub('layers.*.', module)}.*" for module in modules))


def is_base(model: ModelConfig, name: str) -> bool:
    """Return True if a parameter belongs to what a model was pretrained as, and not to its adapter or task's head."""
    if MARK in name:
        return False
    if isinstance(model.adapter, BottleneckConfig) and name.startswith("layers.") and "_norm." in name:
        return False
    if model.task_head is None or name.startswith(_PRETRAINED):
        return True
    # the transformation before the head over the vocabulary, unless the task's head has it, too
    return model.has_vocabulary_head and not model.transforms_for_tasks and name.startswith("head_")


@lru_cache(maxsize=64)
def num_trained(model: ModelConfig, patterns: tuple[str, ...]) -> int:
    """Return the number of the real parameters of a whole model that a run stage trains."""
    entries = {entry.name: entry for entry in model_entries(model)}.values()
    return sum(entry.numel - entry.padding for entry in entries if not matches(entry.name, patterns))


def spared_operations(
    model: ModelConfig, chunks: Sequence[ModelChunk], lengths: RowLengths, patterns: tuple[str, ...]
) -> int:
    """Return the operations per row that a backward pass does not compute: gradients of the frozen matrices of layers,
    and all of the layers in front of the first that is trained.

    T5's decoder is counted as if it saw as many tokens as its encoder.
    """
    if not patterns:
        return 0
    first, spared = first_trained_layer(model, patterns), 0
    for layer in layers_of(chunks):
        if layer < first:
            spared += 2 * figures(model).layer_operations(model, layer, lengths)
            continue
        held = figures(model).layer_entries(model, layer)
        frozen = (entry for entry in held if entry.multiplies and matches(entry.name, patterns))
        spared += 2 * lengths.tokens * sum(entry.numel for entry in frozen)
    return spared


def useful_operations(model: ModelConfig, run_stage: RunStage) -> int:
    """Return the operations of forward and backward per row, as utilisation counts them: `training_operations` without
    gradients that nobody wants."""
    lengths = row_lengths(run_stage)
    spared = spared_operations(model, (whole_model(model),), lengths, run_stage.freeze)
    return training_operations(model, lengths) - spared


def receives_gradients(model: ModelConfig, layer: int, patterns: tuple[str, ...]) -> bool:
    """Return True if a parameter in front of a layer is trained, so that its input has a gradient."""
    return first_trained_layer(model, patterns) < layer


def layers_kept(model: ModelConfig, chunks: Sequence[ModelChunk], patterns: tuple[str, ...]) -> Sequence[int]:
    """Return the layers of a pipeline stage that keep activations for a backward pass."""
    layers, first = layers_of(chunks), first_trained_layer(model, patterns)
    return layers if first == 0 else tuple(layer for layer in layers if layer >= first)


def check_patterns(config: RunConfig) -> list[PalimpsestError]:
    """Return a problem for each pattern that matches no parameter, and for each run stage that trains none."""
    names = [entry.name for entry in model_entries(config.model)]
    problems: list[PalimpsestError] = []
    for number, run_stage in enumerate(config.stages):
        by_key = {"learning_rate_factors": tuple(run_stage.learning_rate_factors), "freeze": run_stage.freeze}
        problems += [
            ConfigError(
                f"stages.{number}.{key}: the pattern {pattern!r} matches no parameter",
                f"patterns of parameters' names, such as {names[0]}, {names[-1]}",
                REMEDY,
            )
            for key, patterns in by_key.items()
            for pattern in patterns
            if not fnmatch.filter(names, pattern)
        ]
        trained = [name for name in names if not matches(name, run_stage.freeze)]
        if config.model.adapter is not None and any(is_base(config.model, name) for name in trained):
            problems.append(
                ConfigError(
                    f"stages.{number}.freeze = {list(run_stage.freeze)} with model.adapter: weights of the model that "
                    f"is adapted would be trained, {next(n for n in trained if is_base(config.model, n))} for one",
                    f"freeze: {json.dumps(base_patterns(config.model))}",
                    "paste it, or let `palimpsest finetune` set it",
                )
            )
        if isinstance(config.model.adapter, AdaLoRAConfig):
            problems += _problems_of_rank_allocation(names, run_stage, f"stages.{number}")
        if run_stage.regularization.adversarial is not None:
            problems += _problems_of_adversarial(config.model, run_stage, f"stages.{number}")
        if not trained:
            problems.append(
                ConfigError(
                    f"stages.{number}.freeze = {list(run_stage.freeze)}: every parameter is frozen",
                    "patterns that leave a parameter to train",
                    "remove a pattern; to evaluate only, use `palimpsest evaluate`",
                )
            )
    return problems


def _problems_of_rank_allocation(names: Sequence[str], run_stage: RunStage, key: str) -> list[PalimpsestError]:
    """Return a problem where AdaLoRA trains only some of a matrix's A, B and E, which are scored together, or none."""
    frozen = dict[str, list[bool]]()
    for name in names:
        adapter, mark, _ = name.partition(".lora_")
        if mark:
            frozen.setdefault(adapter, []).append(matches(name, run_stage.freeze))
    parted = [adapter for adapter, each in frozen.items() if any(each) and not all(each)]
    told = f"{key}.freeze = {list(run_stage.freeze)} with model.adapter.method = adalora"
    if parted:
        return [
            ConfigError(
                f"{told}: {parted[0]} would train only some of its A, B and E, whose importance is one score",
                f"patterns that match all three or none, such as {json.dumps(f'{parted[0]}.*')}",
                f"correct the pattern in {key}.freeze",
            )
        ]
    if frozen and all(all(each) for each in frozen.values()):
        return [
            ConfigError(
                f"{told}: every adapter is frozen, and no ranks are left to choose",
                "patterns that leave the adapter of a matrix to train",
                f"remove a pattern of {key}.freeze, or leave `adapter` out to train the task's head alone",
            )
        ]
    return []


def _problems_of_adversarial(model: ModelConfig, run_stage: RunStage, key: str) -> list[PalimpsestError]:
    """Return what keeps the gradient of the loss from the embeddings."""
    if model.family == "t5":
        return [
            ConfigError(
                f"{key}.regularization.adversarial with model.family = t5",
                "a model of family bert or gpt",
                "remove it: a T5 embeds two texts, and the paper moves one",
            )
        ]
    first = first_trained_layer(model, run_stage.freeze)
    if first == 0:
        return []
    return [
        ConfigError(
            f"{key}.regularization.adversarial with {key}.freeze = {list(run_stage.freeze)}: nothing in front of layer "
            f"{first} is trained, so no gradient reaches the embeddings",
            "a run stage that trains something of the first layer or of the embeddings",
            f"remove {key}.regularization.adversarial, or train layer 0",
        )
    ]
