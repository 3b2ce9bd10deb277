"""What is shown as the first samples is what a loader with the same seed trains on first."""

from engine.config.schema import DataConfig
from engine.data.loader import Loader
from engine.data.samples import WINDOW_SHARDS, first_samples
from tests.engine.data.corpus import made_up_documents, write_shards


def test_the_first_samples_are_the_loaders(tmp_path):
    dataset = write_shards(tmp_path, made_up_documents(40), shard_tokens=200)
    [batch] = Loader(dataset, 16, 6, 5, WINDOW_SHARDS, "document").step(0, 1, 6)
    shown = list(first_samples(dataset, 16, seed=5, count=6))
    assert [place for place, _ in shown] == list(batch.sources)
    assert [row.tokens[0] for _, row in shown] == batch.inputs["tokens_BT"][:, 0].tolist()


def test_no_more_than_there_is(tmp_path):
    dataset = write_shards(tmp_path, made_up_documents(3))
    assert 0 < len(list(first_samples(dataset, 16, 0, 10**6))) < 20


def test_the_window_is_the_configurations_default():
    assert DataConfig.model_fields["window_shards"].default == WINDOW_SHARDS
