"""Random pairs of layouts in worlds up to 1,024, in one process: what the writers of one store is, element for
element, what the ranks of the other need.

Three statements, each against an array of indices that is cut by slicing (`worlds.parts`), never by the code under
test: the writers' ranges hold every real element of a parameter exactly once; a reading rank's transfers fill every
real element of its shard exactly once; and what comes is the index that belongs there. Per pair a few parameters and
a few reading ranks are drawn, so that every kind of parameter meets every kind of layout many times over the pairs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest

from engine.checkpoint.geometry import dims, flat_index, strides
from engine.checkpoint.writers import Need, Writer, stored_range, transfers, writers_of
from engine.config.objectives import RowLengths
from engine.config.schema.model import ModelConfig, make_model
from engine.config.schema.optimizer import OptimizerConfig
from engine.models.families import FAMILIES, family
from engine.optim.groups import parameter_groups
from engine.parallel.sharding import ParameterSpec
from engine.parallel.state import Placement
from engine.plan.cut import stage_chunks, tied_stages
from engine.plan.parameters import stage_entries
from tests.engine.checkpoint.worlds import parts

LARGEST_WORLD, SEED = 1024, 31
SIZE = {"vocab_size": 90, "num_layers": 16, "hidden_size": 32, "num_heads": 16, "max_positions": 24}
LLAMA: dict[str, Any] = {
    "position": "rope",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "num_kv_heads": 8,
    "feed_forward_size": 48,
}
LENGTHS = RowLengths(8, 8, 8)


def models() -> dict[str, ModelConfig]:
    """Every family, with the embedding tied to the head and not, and grouped queries and gated feed-forward."""
    found = {}
    for name in FAMILIES:
        for form in ({}, LLAMA) if name == "gpt" else ({},):
            for tied in (True, False):
                tree = SIZE | form | {"family": name, "tie_embeddings": tied, "vocab_multiple": 16}
                kind = f"{name}{'-llama' if form else ''}{'-tied' if tied else ''}"
                found[kind] = make_model(**tree)
    return found


MODELS = models()


class Saved(NamedTuple):
    """A layout of one model: who holds what, and where."""

    model: str
    zero_stage: int
    pipe: int
    virtual: int
    data: int
    tensor: int

    def placements(self) -> dict[str, Placement]:
        """The placement of every parameter, by its first stage."""
        return _placements(self)


@cache
def specs_of(model: str) -> dict[str, ParameterSpec]:
    return {spec.name: spec for spec in family(MODELS[model]).specs(MODELS[model])}


@cache
def stages_of(model: str, pipe: int, virtual: int) -> tuple[list[list[str]], Mapping[str, tuple[int, ...]]]:
    """Names per stage, and the stages of what several hold."""
    held = [
        list(dict.fromkeys(e.name for c in chunks for e in stage_entries(MODELS[model], c.layers, c.first, c.last)))
        for chunks in stage_chunks(MODELS[model], pipe, virtual, LENGTHS)
    ]
    return held, tied_stages(MODELS[model], pipe, virtual, LENGTHS)


@cache
def _placements(saved: Saved) -> dict[str, Placement]:
    """As the ZeRO stages lay parameters out; under ZeRO-1 and 2 in one padded flat buffer per parameter group."""
    specs, placements = specs_of(saved.model), {}
    held, tied = stages_of(saved.model, saved.pipe, saved.virtual)
    for stage, names in enumerate(held):
        for group in parameter_groups([specs[name] for name in names], OptimizerConfig(), tied):
            numel = [spec.local_numel(saved.tensor) for spec in group.specs]
            shared, offset = -(-sum(numel) // (2 * saved.data)) * 2, 0
            for spec, local in zip(group.specs, numel, strict=True):
                where = {0: (0, local), 3: (0, -(-local // saved.data))}.get(saved.zero_stage, (offset, shared))
                if stage == tied.get(spec.name, (stage,))[0]:
                    placements[spec.name] = Placement(spec, tied.get(spec.name, (stage,)), *where)
                offset += local
    return placements


@cache
def indices(spec: ParameterSpec, tensor_size: int) -> list[np.ndarray]:
    """Per tensor rank its flattened local part, as indices into the padded whole."""
    return [part.ravel() for part in parts(spec, tensor_size)]


def draw_layout(draw: random.Random, model: str) -> Saved:
    """Any layout that fits the model and the largest world; small and large data sizes alike often."""
    tensor = draw.choice([size for size in (1, 2, 4, 8) if MODELS[model].num_kv_heads % size == 0])
    pipe = draw.choice([1, 2, 3, 4, 5, 8, 16])
    virtual = draw.choice([size for size in (1, 2, 3, 4) if pipe * size <= MODELS[model].num_layers]) if pipe > 1 else 1
    room = LARGEST_WORLD // (pipe * tensor)
    data = min(int(2 ** draw.uniform(0.0, math.log2(room + 1))), room)
    return Saved(model, draw.randrange(4), pipe, virtual, data, tensor)


def check_stored_once(saved: Saved, placement: Placement) -> dict[Writer, np.ndarray]:
    """What every writer stores of a parameter, as indices; together each real element once."""
    spec, stored = placement.spec, {}
    for writer in writers_of(placement, saved.data, saved.tensor):
        start, length = stored_range(placement, writer, saved.tensor)
        assert length > 0
        stored[writer] = indices(spec, saved.tensor)[writer.tensor_rank][start : start + length]
    found = np.concatenate(list(stored.values()))
    assert np.array_equal(np.sort(found), np.arange(math.prod(spec.stored_shape))), (saved, spec.name)
    return stored


def check_read(
    saved: Saved, stored: dict[Writer, np.ndarray], reader: Saved, name: str, data: int, tensor: int
) -> None:
    """A reading rank's shard of a parameter comes out of the writers' files, each real element once."""
    spec, source = specs_of(reader.model)[name], saved.placements()[name]
    start, length = reader.placements()[name].range_of(data, spec.local_numel(reader.tensor))
    expected = indices(spec, reader.tensor)[tensor][start : start + length]
    real = expected < math.prod(spec.stored_shape)  # padding is the last rows
    shard, times = np.full(length, -1), np.zeros(length, dtype=np.int64)
    shape, source_shape = dims(spec.local_shape(reader.tensor)), dims(spec.local_shape(saved.tensor))
    need = Need(spec, start, length, tensor, reader.tensor)
    for copy in transfers(need, source, saved.data, saved.tensor):
        begin, _ = stored_range(source, copy.writer, saved.tensor)
        target = _positions(copy.target.start, copy.target.size, shape) - start
        shard[target] = stored[copy.writer][_positions(copy.source.start, copy.source.size, source_shape) - begin]
        np.add.at(times, target, 1)
    assert np.array_equal(times, real.astype(np.int64)), (saved, reader, name)
    assert np.array_equal(shard[real], expected[real]), (saved, reader, name)


def _positions(start: tuple[int, ...], size: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Flat positions of a box's elements, by numpy's own arithmetic."""
    positions = np.full((1,) * len(shape), flat_index(start, shape))
    for dim, stride in enumerate(strides(shape)):
        along = np.arange(size[dim]) * stride
        positions = positions + along.reshape([-1 if other == dim else 1 for other in range(len(shape))])
    return positions.ravel()


@pytest.mark.parametrize("pairs", [500, pytest.param(5000, marks=pytest.mark.matrix)])
def test_any_pair_of_layouts(pairs):
    draw, kinds, num_reads = random.Random(SEED), sorted(MODELS), 0
    for number in range(pairs):
        model = kinds[number % len(kinds)]
        saved, reader = draw_layout(draw, model), draw_layout(draw, model)
        for name in draw.sample(sorted(specs_of(model)), 2):
            stored = check_stored_once(saved, saved.placements()[name])
            for _ in range(2):
                check_read(saved, stored, reader, name, draw.randrange(reader.data), draw.randrange(reader.tensor))
                num_reads += 1
    assert num_reads == 4 * pairs


@pytest.mark.parametrize("model", MODELS)
def test_every_rank_of_a_small_world_reads_the_whole_model_from_a_large_one(model):
    """Nothing is drawn here: all parameters, all ranks."""
    saved, reader = Saved(model, 1, 4, 2, 8, 4), Saved(model, 3, 2, 1, 3, 2)
    for name in specs_of(model):
        stored = check_stored_once(saved, saved.placements()[name])
        for data in range(reader.data):
            for tensor in range(reader.tensor):
                check_read(saved, stored, reader, name, data, tensor)
    assert saved.placements().keys() == reader.placements().keys() == specs_of(model).keys()
