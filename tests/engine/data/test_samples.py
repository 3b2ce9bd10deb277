"""What is shown as the first samples is what a loader with the same seed trains on first."""

from engine.config.schema.data import DataConfig
from engine.data.loader import WINDOW_SHARDS, Loader, first_samples
from engine.data.stream import Stream
from tests.engine.data.corpus import made_up_documents, write_shards


def test_the_first_samples_are_the_loaders(tmp_path):
    dataset = write_shards(tmp_path, made_up_documents(40), shard_tokens=200)
    [batch] = Loader(Stream(dataset, 16, 6, 5, WINDOW_SHARDS, "document")).step(0, 1, 6)
    shown = first_samples(dataset, 16, seed=5, count=6)
    assert shown.sources == batch.sources
    assert shown.inputs["tokens_BT"].equal(batch.inputs["tokens_BT"])


def test_no_more_than_there_is(tmp_path):
    dataset = write_shards(tmp_path, made_up_documents(3))
    shown = first_samples(dataset, 16, 0, 10**6)
    assert 0 < shown.num_rows < 20
    assert len(set(shown.sources)) == shown.num_rows


def test_the_window_is_the_configurations_default():
    assert DataConfig.model_fields["window_shards"].default == WINDOW_SHARDS
