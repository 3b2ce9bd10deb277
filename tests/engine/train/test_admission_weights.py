"""Documents with weights of their own are admitted with keys of the closed form, whatever stops the run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.corpus.options import PrepareOptions
from engine.corpus.prepare import prepare
from engine.data.replay.keys import row_keys
from engine.data.replay.rows import INSIDE, SHARD_SHIFT, documents_of
from engine.data.shards.dataset import TokenDataset
from engine.errors import EXIT_DONE, DataError
from tests.engine.data.corpus import made_up_texts
from tests.engine.train.fake import fake_run, fake_trainer, stopped_run
from tests.engine.train.reservoirs import LAST, admitting_tree, bytes_of, hook_of


@pytest.fixture(scope="module")
def weighed(corpus, tmp_path_factory) -> Path:
    """Shards of documents of which every third weighs a thousand times as much as the others."""
    folder = tmp_path_factory.mktemp("weighed")
    rows = [{"text": text, "quality": 10.0 if n % 3 == 0 else 0.01} for n, text in enumerate(made_up_texts(150))]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = (str(folder / "texts.jsonl"),)
    how = {"validation_fraction": 0.1, "shard_bytes": 2000, "weight_key": "quality"}
    prepare(PrepareOptions(source, corpus / "tokenizer", folder / "data", **how))
    return folder / "data"


def weighed_tree(corpus: Path, weighed: Path, folder: Path, **reservoir: Any) -> dict[str, Any]:
    tree = admitting_tree(corpus, folder, **({"weight_column": "weight", "rows": 30} | reservoir))
    for stage in tree["stages"]:
        stage["data"] |= {"train": str(weighed / "train"), "validation": str(weighed / "validation")}
    return tree


def weights_by_shard(weighed: Path) -> dict[str, np.ndarray]:
    dataset = TokenDataset(weighed / "train")
    return {entry.content_hash: dataset.column("weight", number) for number, entry in enumerate(dataset.index.shards)}


@pytest.mark.parametrize("recency", [1.0, 3.0])
def test_keys_are_those_of_the_documents_weights(corpus, weighed, tmp_path, recency):
    known = weights_by_shard(weighed)
    with fake_trainer(weighed_tree(corpus, weighed, tmp_path, recency=recency, rows=1000)) as trainer:
        assert trainer.fit() == EXIT_DONE
        reservoir = hook_of(trainer).reservoir
        seed = trainer.config.seed
    for domain, factor in (("one", 1.0), ("two", recency)):
        entries = reservoir.entries[domain]
        assert entries.size > 20
        for number, name in enumerate(reservoir.shards):
            mine = entries.row_ids >> SHARD_SHIFT == number
            inside = entries.row_ids[mine] & INSIDE
            weights = known[name][documents_of(entries.row_ids[mine])] * factor
            assert np.array_equal(entries.keys[mine], row_keys(seed, name, inside, weights))


def test_heavy_documents_stay(corpus, weighed, tmp_path):
    """Of weights 10 and 0.01, one in three heavy: a reservoir that is smaller than what was trained on is of those."""
    known = weights_by_shard(weighed)

    def share_of_heavy(folder: Path, **reservoir: Any) -> float:
        with fake_trainer(weighed_tree(corpus, weighed, folder, **reservoir)) as trainer:
            assert trainer.fit() == EXIT_DONE
            generation = hook_of(trainer).reservoir.freeze()
        heavy = [
            known[generation.shards[int(row_id >> SHARD_SHIFT)]][int(documents_of(np.array([row_id]))[0])] > 1
            for domain in generation.domains.values()
            for row_id in domain.row_ids
        ]
        assert len(heavy) == 30
        return float(np.mean(heavy))

    # a light row stays beside a heavy one with a chance of about 1 in 1,000
    assert share_of_heavy(tmp_path / "weighed") > 0.9
    assert share_of_heavy(tmp_path / "equal", weight_column=None) < 0.7


@pytest.mark.parametrize("stop", [3, 4, 7])
def test_a_stopped_run_ends_with_the_same_bytes(corpus, weighed, tmp_path, stop):
    fake_run(weighed_tree(corpus, weighed, tmp_path / "whole"))
    stopped_run(weighed_tree(corpus, weighed, tmp_path / "parts"), stop)
    assert fake_run(weighed_tree(corpus, weighed, tmp_path / "parts")).code == EXIT_DONE
    assert bytes_of(tmp_path / "parts", LAST) == bytes_of(tmp_path / "whole", LAST)


def test_data_without_weights_is_refused_by_its_name(corpus, tmp_path):
    with pytest.raises(DataError, match=r"reservoir\.weight_column = weight, and the data of one in .*train") as caught:
        fake_run(admitting_tree(corpus, tmp_path, weight_column="weight"))
    assert "--weight-key" in caught.value.allowed
    assert "reservoir.weight_column" in caught.value.remedy
