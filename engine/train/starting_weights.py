"""Weights that a run starts from (`init_from`): rows of its parameters out of another model's files.

The model of the run has to be that of the source: keys that differ are refused by name, but for those that no weight
depends on. With `missing: initialise` heads and vocabulary rows that the source lacks are those of the run's seed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import torch

from engine.checkpoint.interchange.convert import blocks
from engine.checkpoint.interchange.initial import open_source
from engine.checkpoint.interchange.mapping import ModelMap, ParameterMap
from engine.checkpoint.interchange.source_model import SourceModel
from engine.checkpoint.interchange.sources.fingerprint import fingerprint_of
from engine.checkpoint.mismatch import FREE_KEYS
from engine.config.adapter_targets import MARK
from engine.config.load import load_run
from engine.config.save import FILE
from engine.config.schema.model import ModelConfig, without_vocabulary
from engine.config.schema.rotary import DynamicScaling
from engine.config.schema.run import InitFrom, RunConfig
from engine.errors import ConfigError, PalimpsestError
from engine.models.families import family
from engine.models.kept_head import HeadWithVocabulary
from engine.parallel.functions import PLAIN
from engine.parallel.sharding import ParameterSpec
from engine.parallel.zero.held_state import RowValues
from engine.train.build import InitialRows


class StartingWeights:
    """The source that a run's `init_from` names, opened and compared with the run's model."""

    def __init__(self, config: RunConfig) -> None:
        """Open the source; reads configuration and headers.

        Raises:
            ConfigError, CheckpointError: it cannot be read, is of another model, or lacks what `missing` does not
                allow.
        """
        given = config.init_from
        assert given is not None
        self._opened = opened = _opened(config, given)
        _check_agrees(config.model, opened, given)
        _check_adapter(config.model, opened, given)
        _check_task_head(config.model, opened, given)
        _check_distilled(config, opened)
        _check_vocabulary_head(config.model, opened, given)
        opened.check()
        self._initial = InitialRows(config.model, config.seed)
        self._takes_mean = given.new_rows == "mean"
        self._means: dict[str, torch.Tensor] = {}

    @property
    def bytes_read(self) -> int:
        """Bytes that were read of the source."""
        return self._opened.bytes_read

    def rows(self, spec: ParameterSpec, first: int, end: int) -> torch.Tensor:
        """Return rows [first, end) of a parameter of the run, fp32; padding rows are 0.

        Raises:
            ConfigError: a value is not finite.
        """
        one = self._opened.map.parameters.get(spec.name)
        if one is None:
            return self._initial(spec, first, end)
        stored = min(end, one.shape[0])
        if stored == end:
            return self._opened.read(spec.name, first, end)
        rest = self._new_rows(spec, one, max(first, stored), end)
        return torch.cat((self._opened.read(spec.name, first, stored), rest)) if first < stored else rest

    def _new_rows(self, spec: ParameterSpec, one: ParameterMap, first: int, end: int) -> torch.Tensor:
        """Return rows [first, end) of a table of the vocabulary, behind those of the source; padding rows are 0."""
        if not self._takes_mean:
            return self._initial(spec, first, end)
        if spec.name not in self._means:
            self._means[spec.name] = self._mean(one)
        rows = torch.zeros((end - first, *one.shape[1:]))
        rows[: max(0, spec.stored_shape[0] - first)] = self._means[spec.name]
        return rows

    def _mean(self, one: ParameterMap) -> torch.Tensor:
        """Return the mean of all rows of the source's parameter, summed in fp64. Reads the whole table in blocks."""
        total = torch.zeros(one.shape[1:], dtype=torch.float64)
        for block in blocks(one, lambda first, end: self._opened.read(one.name, first, end)):
            total += block.sum(0, dtype=torch.float64)
        return (total / one.shape[0]).float()

    @property
    def updates(self) -> int:
        """Updates that the source's moments have seen."""
        return self._opened.step or 0

    def moment_rows(self, moment: str) -> RowValues:
        """Return the function that gives rows of a moment of each parameter, as `rows` does of the weights.

        Raises:
            ConfigError: the source holds no such moment of a parameter; raised when its rows are asked for.
        """

        def rows(spec: ParameterSpec, first: int, end: int) -> torch.Tensor:
            one = self._opened.map.parameters.get(spec.name)
            if one is None or moment not in self._opened.moments_of(spec.name):
                raise ConfigError(
                    f"init_from.moments = true, and {self._opened.source.origin} holds no {moment} of {spec.name}",
                    "a source with the moments that the run's optimizer keeps of every parameter that it trains",
                    "leave init_from.moments out: the optimizer begins anew",
                )
            stored = min(end, one.shape[0])
            found = self._opened.read(spec.name, min(first, stored), stored, moment)
            # padding rows of the vocabulary
            return torch.cat((found, found.new_zeros((end - max(first, stored), *found.shape[1:]))))

        return rows


def with_fingerprint(config: RunConfig) -> RunConfig:
    """Return the configuration with the fingerprint of the weights that the run starts from.

    A run that has begun may go on where its source is gone: then the noted one stands.

    Raises:
        ConfigError: the source is of other weights than the configuration says.
        PalimpsestError: it cannot be read, and the run has not begun.
    """
    given = config.init_from
    assert given is not None
    try:
        opened = _opened(config, given)
        found = fingerprint_of(opened.source, opened.map)
    except PalimpsestError:
        noted = _noted(config)
        if noted is None:
            raise
        found = noted
    if given.fingerprint not in (None, found):
        raise ConfigError(
            f"init_from.fingerprint = {given.fingerprint}, and the weights in {given.path} have {found}",
            "the weights that the fingerprint is of",
            "name the right source, or leave the fingerprint out in a new run",
        )
    return config.model_copy(update={"init_from": given.model_copy(update={"fingerprint": found})})


def _noted(config: RunConfig) -> str | None:
    """Return the fingerprint that the run folder's configuration has."""
    path = config.folder / FILE
    before = load_run(path).init_from if path.is_file() else None
    return None if before is None else before.fingerprint


def _opened(config: RunConfig, given: InitFrom) -> SourceModel:
    """Return the source, which is of the run's model where its files do not say of which it is."""
    opened = open_source(given.path, config.model.vocab_multiple, config.model)
    if given.head == "new" and opened.model.task_head is not None:
        opened = _without_task_head(opened)
    return _without_absent_heads(opened, given)


def _without_task_head(opened: SourceModel) -> SourceModel:
    """Return a source whose head of a task is left out, as if it had none."""
    with torch.device("meta"):
        head = family(opened.model).configured_head(opened.model)
        modules = {*head.modules(PLAIN)}
        if isinstance(head, HeadWithVocabulary):  # whose own modules stay
            modules -= head.vocabulary.modules(PLAIN).keys()
    heads = {name for name in opened.map.parameters if name.partition(".")[0] in modules}
    unused = tuple(re.escape(tensor) for name in heads for tensor in opened.map.parameters[name].tensors)
    kept = {name: one for name, one in opened.map.parameters.items() if name not in heads}
    return replace(
        opened,
        model=opened.model.model_copy(update={"task_head": None}),
        map=ModelMap(kept, opened.map.copies),
        unused=(*opened.unused, *unused),
    )


def _without_absent_heads(opened: SourceModel, given: InitFrom) -> SourceModel:
    """Return the source without the parameters of heads that it lacks whole, where the run may initialise them."""
    if given.missing == "error":
        return opened
    with torch.device("meta"):
        modules = family(opened.model).configured_head(opened.model).modules(PLAIN)
    held = opened.source.shapes
    absent = {
        name
        for name, one in opened.map.parameters.items()
        if name.partition(".")[0] in modules and not one.tensors.keys() & held.keys()
    }
    kept = {name: one for name, one in opened.map.parameters.items() if name not in absent}
    return replace(opened, map=ModelMap(kept, opened.map.copies))


def _check_task_head(model: ModelConfig, opened: SourceModel, given: InitFrom) -> None:
    """Raise `ConfigError` where the source lacks the head of the run's task and the run may not initialise it."""
    if model.task_head is not None and opened.model.task_head is None and given.missing == "error":
        raise ConfigError(
            f"the run's model has a head for {model.task_head.task}, which init_from = {given.path} has not",
            "init_from.missing = initialise",
            "set it: the head then begins with initial weights of the run's seed",
        )


def _check_distilled(config: RunConfig, opened: SourceModel) -> None:
    """Raise `ConfigError` where the first run stage distils labels that the source has no head for."""
    given = config.init_from
    if given is None or not config.distils_labels(0):
        return
    with torch.device("meta"):
        heads = {*family(config.model).configured_head(without_vocabulary(config.model)).modules(PLAIN)}
    if missing := _missing(config.model, opened, lambda name: name.partition(".")[0] in heads):
        raise ConfigError(
            f"stages.0.regularization.distillation keeps what init_from = {given.path} predicts of the labels, and it "
            f"has no {missing}",
            "a start with the head of the same task, or init_from.head = new beside text that is replayed",
            "name another start, or set init_from.head",
        )


def _check_vocabulary_head(model: ModelConfig, opened: SourceModel, given: InitFrom) -> None:
    """Raise `ConfigError` where the run goes on with a head over the vocabulary that the source has not."""
    if model.task_head is None or not model.task_head.keeps_vocabulary:
        return
    if missing := _missing(model, opened, lambda name: name.startswith(("lm_head.", "head_"))):
        raise ConfigError(
            f"replayed text is to be predicted by the head of pretraining, and init_from = {given.path} has no "
            f"{missing}",
            "a start with its head over the vocabulary",
            "start from the pretrained model itself, or leave `replay` out",
        )


def _missing(model: ModelConfig, opened: SourceModel, is_needed: Callable[[str], bool]) -> str | None:
    """Return the first parameter of the model, by name, that is needed and that the source lacks; None if there is
    none."""
    needed = {spec.name for spec in family(model).specs(model) if is_needed(spec.name)}
    return min(needed - opened.map.parameters.keys(), default=None)


def _check_adapter(model: ModelConfig, opened: SourceModel, given: InitFrom) -> None:
    """Raise `ConfigError` where the source has an adapter that is not merged and the run would not go on with.

    Left out, it would take with it what a head was trained behind; of another shape, some rows would be read as others.
    """
    theirs = opened.model.adapter
    if theirs is None or _adapter_shapes(model) == _adapter_shapes(opened.model):
        return
    told = theirs.model_dump_json(exclude_defaults=True)
    ours = "no adapter" if model.adapter is None else model.adapter.model_dump_json(exclude_defaults=True)
    raise ConfigError(
        f"init_from = {given.path} has an adapter beside its weights, {told}, and model.adapter of the run is {ours}",
        "the adapter that is there, of the same shape, or a start whose adapter is merged or that has none",
        "write the same adapter to go on with it, or start from the model that it was trained on; lora, adalora and "
        "ia3 are merged",
    )


def _adapter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {spec.name: tuple(spec.shape) for spec in family(model).specs(model) if MARK in spec.name}


def _check_agrees(model: ModelConfig, opened: SourceModel, given: InitFrom) -> None:
    """Raise `ConfigError` where a run's model is another one than the source's; names every key."""
    ours, theirs = model.model_dump(mode="json"), opened.model.model_dump(mode="json")
    for head in (ours["task_head"], theirs["task_head"]):
        if head is not None:
            del head["keeps_vocabulary"]  # `_check_vocabulary_head` asks for its weights
    free = set(FREE_KEYS) | {"adapter"} | ({"task_head"} if opened.model.task_head is None else set())
    rotary = model.rotary(None)
    if not model.position_table and not (rotary and isinstance(rotary.scaling, DynamicScaling)):
        free.add("max_positions")  # no parameter has a row per position, and no frequency depends on their number
    if given.missing == "initialise":
        free |= {"vocab_size"} if model.vocab_size > opened.model.vocab_size else set()
        free |= {"pair_head"} if ours.get("pair_head") else set()
    differing = sorted(
        key for key in ours.keys() | theirs.keys() if key not in free and ours.get(key) != theirs.get(key)
    )
    if differing:
        told = ", ".join(f"model.{key} = {ours.get(key)} (there {theirs.get(key)})" for key in differing)
        raise ConfigError(
            f"the run's model is not that of init_from = {given.path}: {told}",
            "the values that are there; dropout is the run's own",
            "leave `model` out, or change these keys; init_from.missing = initialise allows more vocabulary rows and "
            "a head for pairs, init_from.head = new another task",
        )
