"""Who stores what, and where a reader finds it: random pairs of layouts against brute-force arrays of indices."""

import math

import numpy as np
import pytest

from engine.checkpoint.geometry import dims
from engine.checkpoint.writers import Need, Writer, stored_range, transfers, writers_of
from engine.parallel.sharding import VOCABULARY, ParameterSpec
from engine.parallel.state import Placement
from tests.engine.checkpoint.worlds import World as RankWorld
from tests.engine.checkpoint.worlds import elements, layout_of, parts, random_spec, small_model


def random_placement(random: np.random.Generator, spec: ParameterSpec, tensor_size: int, data_size: int) -> Placement:
    """A placement as any ZeRO stage may make it: an offset into a longer flat buffer cut into equal partitions."""
    local = spec.local_numel(tensor_size)
    if random.integers(2):
        return Placement(spec, (0,), 0, -(-local // data_size))
    offset = int(random.integers(0, 2 * local + 1))
    total = offset + local + int(random.integers(0, 2 * local + 1))
    return Placement(spec, (0,), offset, -(-total // data_size))


def stored_elements(placement: Placement, data_size: int, tensor_size: int) -> dict[Writer, np.ndarray]:
    """Per writer the flat indices (into the padded whole) that it stores, by brute force from the definition."""
    spec, found = placement.spec, {}
    real = math.prod(spec.stored_shape)
    for tensor_rank, part in enumerate(parts(spec, tensor_size)):
        if spec.sharding.dim is None and tensor_rank > 0:
            continue
        for data_rank in range(data_size):
            flat = np.arange(part.size)
            mine = flat[(flat + placement.offset) // placement.partition == data_rank]
            held = part.ravel()[mine]
            held = held[held < real]
            if held.size:
                found[Writer(0, data_rank, tensor_rank)] = held
    return found


def test_random_layouts_find_each_element_once_where_it_was_stored():
    random = np.random.default_rng(11)
    for _ in range(2000):
        saved_size, need_size = (int(size) for size in random.choice([1, 2, 4], 2))
        data_size = int(random.integers(1, 6))
        spec = random_spec(random, max(saved_size, need_size))
        placement = random_placement(random, spec, saved_size, data_size)
        held = stored_elements(placement, data_size, saved_size)
        assert set(writers_of(placement, data_size, saved_size)) == held.keys()
        need_rank = int(random.integers(need_size))
        wanted_part, start, length = parts(spec, need_size)[need_rank].ravel(), 0, 0
        start = int(random.integers(wanted_part.size))
        length = int(random.integers(1, wanted_part.size - start + 1))
        need = Need(spec, start, length, need_rank, need_size)
        filled = np.full(wanted_part.size, -1)
        saved_parts = parts(spec, saved_size)
        for copy in transfers(need, placement, data_size, saved_size):
            source = elements(
                saved_parts[copy.writer.tensor_rank].reshape(dims(spec.local_shape(saved_size))), copy.source
            )
            assert set(source.ravel().tolist()) <= set(held[copy.writer].tolist())
            window = elements(filled.reshape(dims(spec.local_shape(need_size))), copy.target)
            assert (window == -1).all(), "an element is copied twice"
            window[...] = source
        expected = np.full(wanted_part.size, -1)
        expected[start : start + length] = wanted_part[start : start + length]
        expected[expected >= math.prod(spec.stored_shape)] = -1
        assert np.array_equal(filled, expected)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 3, 2), (2, 1, 1), (1, 5, 2)])
def test_each_real_element_is_stored_exactly_once(zero_stage, layout):
    world = RankWorld(layout_of(*layout), zero_stage, small_model())
    for spec in world.specs:
        counts = np.zeros(math.prod(spec.shape), dtype=int)
        for writer in world.writers:
            placement = next((p for p in world.placements[writer.stage] if p.spec == spec), None)
            if placement is not None:
                start, length = stored_range(placement, writer, world.layout.tensor)
                local = parts(spec, world.layout.tensor)[writer.tensor_rank].ravel()
                counts[local[start : start + length]] += 1
        real = math.prod(spec.stored_shape)
        assert (counts[:real] == 1).all(), spec.name
        assert (counts[real:] == 0).all(), spec.name


def test_file_names_come_back_as_writers_and_nothing_else_does():
    for writer in (Writer(0, 0, 0), Writer(3, 12345, 101)):
        assert Writer.parse(writer.file_name) == writer
        assert len(f'["{writer.file_name}", {10**12}, "{"0" * 16}"],') <= 150
    for name in (
        "../stage-00-data-0000-tensor-00.safetensors",
        "stage-0-data-0000-tensor-00.safetensors",
        "/etc/passwd",
    ):
        assert Writer.parse(name) is None


def test_padding_is_no_part_of_a_need():
    spec = ParameterSpec("p", (8, 2), VOCABULARY, real_rows=5)
    assert Need(spec, 0, 8, 0, 2).real_length == 8
    assert Need(spec, 0, 8, 1, 2).real_length == 2
    assert Need(spec, 4, 4, 1, 2).real_length == 0
