"""What shards lack for an objective is told before the first batch."""

import numpy as np
import pytest

from engine.config.schema.objective import ObjectiveConfig
from engine.data.objectives.sampling import require
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.writer import ShardWriter
from engine.errors import DataError
from tests.engine.data.corpus import EOS, VOCABULARY, made_up_vocabulary


def documents_of(folder, num_sentences) -> TokenDataset:
    """Documents of so many sentences of three tokens each."""
    with ShardWriter(folder, VOCABULARY, EOS, "hash", 1000, made_up_vocabulary()) as writer:
        for count in num_sentences:
            writer.add(np.append(np.arange(1, 3 * count + 1), EOS), np.arange(count) * 3)
    return TokenDataset(folder)


@pytest.mark.parametrize("pairs", ["next_sentence", "sentence_order"])
def test_documents_of_one_sentence_have_no_pairs(tmp_path, pairs):
    objective = ObjectiveConfig(name="masked", pairs=pairs)
    with pytest.raises(DataError, match=rf"(?s)each document in .*one is one sentence.*objective\.pairs = {pairs}"):
        require(documents_of(tmp_path / "one", [1, 1, 1]), 64, objective)
    require(documents_of(tmp_path / "some", [1, 2, 1]), 64, objective)
    require(TokenDataset(tmp_path / "one"), 64, ObjectiveConfig(name="masked"))
