"""Sources that are read together make the rows that each of them makes alone."""

from dataclasses import replace

import pytest

from engine.config.schema.objective import ObjectiveConfig
from engine.data.loader import Loader
from engine.data.source import WeightedDataset
from engine.data.stream import Stream
from tests.engine.data.corpus import write_sentences


@pytest.mark.parametrize("name", ["causal", "fill_in_the_middle", "masked", "span_corruption"])
def test_rows_are_those_of_each_source_alone(tmp_path, name):
    sets = [write_sentences(tmp_path / str(number), 60, seed=number) for number in range(3)]
    parts = [WeightedDataset(dataset, "abc"[number], 3 - number) for number, dataset in enumerate(sets)]
    parts[1] = replace(parts[1], loss_weight=0.1)
    streams = [Stream(parts, 24, 10, 5, 2, "document", objective=ObjectiveConfig(name=name)) for _ in range(2)]
    assert streams[0].order.joined is not None
    streams[1]._order = replace(streams[1].order, joined=None)
    loaders = [Loader(stream) for stream in streams]
    together, alone = ([batch for _ in range(12) for batch in loader.step(0, 1, 4)] for loader in loaders)
    for mine, other in zip(together, alone, strict=True):
        assert mine.sources == other.sources
        assert mine.inputs.keys() == other.inputs.keys()
        for key in mine.inputs:
            assert mine.inputs[key].equal(other.inputs[key]), key
            assert mine.inputs[key].dtype == other.inputs[key].dtype
        assert mine.weights == other.weights
        assert mine.documents.equal(other.documents)
        assert mine.row_weights_B.equal(other.row_weights_B)
