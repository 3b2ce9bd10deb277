"""Names for the tensors of a folder of others: whose they are, and which of our parameters each is.

DeepSpeed, DCP and their kin store a module's own names, which may be ours, those of Hugging Face's class of the same
form, or Megatron's, behind a prefix of the wrapper that trained it (`module.`, `model.`). The table that the folder
holds whole decides; where none is, the nearest one says by name what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from engine.checkpoint.interchange.forms import form_of
from engine.checkpoint.interchange.mapping import ModelMap, unchanged
from engine.checkpoint.interchange.megatron_names import (
    IS_MEGATRON,
    PADDED,
    blocks_of,
    check_settings,
    megatron_map,
    unified,
)
from engine.checkpoint.interchange.source_model import SourceModel
from engine.checkpoint.interchange.sources.source import listed
from engine.checkpoint.interchange.sources.stored import StoredSource, StoredTensor
from engine.checkpoint.interchange.sources.unnamed import Parts, Unnamed, joined
from engine.checkpoint.manifest import WEIGHT
from engine.config.schema.model import ModelConfig
from engine.errors import CheckpointError, ConfigError
from engine.models.families import family


@dataclass(frozen=True)
class Naming:
    """One way in which a model's tensors may be called."""

    map: ModelMap
    unused: tuple[str, ...] = ()
    """Patterns of tensors that mean nothing."""
    blocks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Rows of the blocks of a fused tensor, of each of which a tensor rank has a share; without an entry one block."""
    padded: frozenset[str] = frozenset()
    """Tensors that files have with rows beyond the vocabulary's."""


def named(found: Unnamed, model: ModelConfig) -> SourceModel:
    """Return a folder's tensors as those of a model of ours.

    Raises:
        ConfigError: the arguments of its program are those of another model.
        CheckpointError: it lacks tensors of the model, has others, or has them in other shapes.
    """
    is_megatron = any(map(IS_MEGATRON.match, found.weights))
    if is_megatron or found.settings:
        check_settings(found, model)
    spellings = [(found, naming) for naming in _namings(model)]
    if is_megatron and (theirs := megatron_map(model)) is not None:
        spelled = replace(found, states={state: unified(parts) for state, parts in found.states.items()})
        spellings.append((spelled, Naming(theirs, blocks=blocks_of(model), padded=PADDED)))
    found, naming, prefix = max(
        ((held, naming, prefix) for held, naming in spellings for prefix in _prefixes(held.weights, naming.map)),
        key=lambda one: sum(one[2] + name in one[0].weights for name in one[1].map.tensors),
    )
    states = {
        state: _pieces(found, state, naming, prefix if state == WEIGHT else _prefix_in(parts, prefix, naming))
        for state, parts in found.states.items()
    }
    weights = StoredSource(states.pop(WEIGHT), found.origin)
    moments = {
        state: StoredSource(tensors, found.origin)
        for state, tensors in states.items()
        if tensors.keys() & naming.map.tensors.keys()
    }
    return SourceModel(
        model=model,
        map=naming.map,
        source=weights,
        unused=naming.unused,
        moments=moments,
        step=found.facts.get("step") if found.step is None else found.step,
        kind=found.kind,
        described_by="the model",
    )


def _namings(model: ModelConfig) -> Iterator[Naming]:
    # a module of ours whose head is tied names it, too
    yield Naming(ModelMap(unchanged(family(model).specs(model)).parameters, family(model).ties(model)))
    try:
        form = form_of(model)
    except ConfigError:
        return  # a mix, which Hugging Face's library has no class for
    padding = form.their_config(model).pad_token_id
    yield Naming(form.mapping(model, padding), form.unused)


def _prefixes(held: Parts, model_map: ModelMap) -> set[str]:
    """Return the prefixes under which a folder may hold the tensors of a map."""
    first = next(iter(model_map.tensors))
    return {name.removesuffix(first) for name in held if name == first or name.endswith(f".{first}")} or {""}


def _prefix_in(parts: Parts, prefix: str, naming: Naming) -> str:
    """Return the prefix of a moment's names: that of the weights, or a shorter one."""
    first = next(iter(naming.map.tensors))
    fitting = [one for one in (prefix, *_prefixes(parts, naming.map)) if one + first in parts]
    return fitting[0] if fitting else prefix


def _pieces(found: Unnamed, state: str, naming: Naming, prefix: str) -> dict[str, StoredTensor]:
    """Return the tensors of one state by a naming's names, each of the shape that the model has.

    Raises:
        CheckpointError: of the weights, a tensor has another shape.
    """
    shapes = dict(naming.map.tensors)
    shapes |= {copy: shapes[of] for copy, of in naming.map.copies.items()}
    made, misshapen = {}, []
    for name, parts in found.states[state].items():
        if not name.startswith(prefix):
            continue  # another part of a training state: a second model, an average
        own = name.removeprefix(prefix)
        if own not in shapes:
            made[own] = parts[0]  # told by name as unknown
            continue
        tensor = joined(parts, shapes[own], naming.blocks.get(own, ()), own in naming.padded)
        if tensor is None:
            misshapen.append(f"{name} has shape {parts[0].shape} in {len(parts)} parts and not {shapes[own]}")
        else:
            made[own] = tensor
    if misshapen and state != WEIGHT:
        return {}  # flat buckets of moments: they are not those of named parameters
    if misshapen:
        raise CheckpointError(
            f"{found.origin} holds {found.kind} of another model: {listed(misshapen, '; ')}",
            "tensors of the shapes that the model has",
            "name the run file of the model that it is of",
        )
    return made
