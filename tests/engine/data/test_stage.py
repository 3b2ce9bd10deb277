"""What a stage of a run makes of its sources: their weights, ends and refusals."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.config.schema.stage import RunStage
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.writer import ShardWriter
from engine.data.stage import open_parts, open_validation, stage_stream
from engine.errors import DataError
from tests.engine.data.corpus import EOS, VOCABULARY, made_up_documents, write_shards

DOCUMENTS = {"small": 20, "middle": 80, "large": 320}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stage")
    for seed, (name, count) in enumerate(DOCUMENTS.items()):
        write_shards(folder / name, made_up_documents(count, seed=seed), shard_tokens=2000)
    return folder


def stage(folder: Path, steps: int = 4, data: dict[str, Any] | None = None, **sources: dict[str, Any]) -> RunStage:
    """A stage over these sources, each with its keys."""
    named = [{"name": name, "path": str(folder / name), **keys} for name, keys in sources.items()]
    tree = {
        "data": {"sources": named, **(data or {})},
        "sequence_length": 16,
        "global_batch_size": 25,
        "duration": {"steps": steps},
    }
    return RunStage.model_validate(tree)


def parts_of(run_stage: RunStage):
    return open_parts(run_stage, None, VOCABULARY)


def test_tokens_weigh_to_the_power_of_one_over_the_temperature(folder):
    tokens = {name: TokenDataset(folder / name).index.num_tokens for name in DOCUMENTS}
    for temperature in (1, 2, 5):
        run_stage = stage(folder, 400, {"temperature": temperature}, small={}, middle={}, large={})
        parts = parts_of(run_stage)
        wanted = {name: count ** (1 / temperature) for name, count in tokens.items()}
        drawn = dict(zip(wanted, stage_stream(run_stage, parts, 0).mix(10_000), strict=True))
        for name, share in wanted.items():
            # counts are off by less than one sample, weights by 1/65,536 of their sum
            assert abs(drawn[name] - 10_000 * share / sum(wanted.values())) < 1 + 10_000 / 2**16, (temperature, name)


@pytest.mark.parametrize("temperature", [1e-2, 1e-3, 1e-300])
def test_a_temperature_that_leaves_a_source_nothing_is_refused(folder, temperature):
    """Small ones are powers that no float holds."""
    with pytest.raises(DataError, match="the sources' tokens do not weigh") as caught:
        stage_stream(run := stage(folder, 4, {"temperature": temperature}, small={}, large={}), parts_of(run), 0)
    assert "raise data.temperature" in caught.value.remedy


def test_each_stage_has_weights_of_its_own_over_the_same_shards(folder):
    first, second = (stage(folder, small={"weight": a}, large={"weight": b}) for a, b in ((1, 3), (0.9, 0.1)))
    mixes = [stage_stream(each, parts_of(each), 0).mix(100) for each in (first, second)]
    assert mixes == [[25, 75], [90, 10]]
    addresses = [stage_stream(each, parts_of(each), 0).next_sample_ids(100) for each in (first, second)]
    assert len(set(addresses[0]) & set(addresses[1])) > 25, "the order inside a source is not the weights'"


def test_a_source_ends_after_its_epochs_or_tokens_and_the_others_go_on(folder):
    run_stage = stage(
        folder, 400, small={"weight": 1, "epochs": 1.5}, middle={"weight": 1, "max_tokens": 1600}, large={"weight": 1}
    )
    stream = stage_stream(run_stage, parts_of(run_stage), 0)
    small, middle, large = stream.mix(10_000)
    assert small == round(1.5 * stream.samples_by_source()[0])
    assert middle == 1600 // 16
    assert small + middle + large == 10_000


def test_a_stage_that_needs_more_than_its_sources_give_is_refused(folder):
    run_stage = stage(folder, 1000, small={"weight": 1, "epochs": 1})
    with pytest.raises(DataError, match=r"trains on 25,000 samples, but its sources end after \d+\n") as caught:
        stage_stream(run_stage, parts_of(run_stage), 0)
    assert "raise data.sources.*.epochs" in caught.value.remedy


def test_a_cache_for_less_than_two_windows_is_refused_and_what_it_needs_is_said(folder, tmp_path):
    def of(num_bytes: int) -> RunStage:
        cache = {"folder": str(tmp_path / "cache"), "bytes": num_bytes}
        large = {"path": f"file://{folder / 'large'}", "weight": 1}
        return stage(folder, 4, {"cache": cache, "window_shards": 2}, large=large)

    sizes = [sum(a.stored_bytes for a in shard.arrays) for shard in TokenDataset(folder / "large").index.shards]
    needed = sum(sorted(sizes)[-4:])
    with pytest.raises(DataError, match=f"less than two windows of 2 shards\n  allowed: {needed:,} or more"):
        parts_of(of(needed - 1))
    assert len(parts_of(of(needed))) == 1


def held_out(validation: Any, tmp_path: Path | None = None) -> dict[str, str]:
    """Location of each held-out data set by name."""
    cache = None if tmp_path is None else {"folder": str(tmp_path / "cache"), "bytes": 10**6}
    run_stage = stage(Path(), data={"sources": [], "train": "unused", "validation": validation, "cache": cache})
    found = open_validation(run_stage, None, VOCABULARY)
    assert found is not None
    return {name: dataset.location for name, dataset in found}


def test_a_folder_of_data_sets_is_the_mapping_of_its_sub_folders(folder, tmp_path):
    expected = {name: str(folder / name) for name in sorted(DOCUMENTS)}
    assert held_out(str(folder)) == expected
    assert held_out(expected) == expected
    assert held_out(str(folder / "small")) == {"": str(folder / "small")}
    assert held_out(f"file://{folder}/", tmp_path) == {name: f"file://{place}" for name, place in expected.items()}
    (folder / "notes").mkdir(exist_ok=True)
    assert held_out(str(folder)) == expected, "a folder without shards is none"
    shutil.copytree(folder / "small", tmp_path / "part" / "train")
    with pytest.raises(DataError, match=r"part holds no index.json") as caught:
        held_out(str(tmp_path / "part"))
    assert caught.value.remedy == "name one of its folders: train"
    shutil.copytree(folder, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "middle" / "index.json").unlink()
    with pytest.raises(DataError, match=r"middle holds no index.json"):
        held_out(str(tmp_path / "unfinished"))


def test_sources_of_other_tokens_are_refused(folder, tmp_path):
    with ShardWriter(tmp_path / "other", VOCABULARY, EOS, "another-hash", 4000) as writer:
        for document in made_up_documents(9):
            writer.add(document)
    other = {"path": str(tmp_path / "other")}
    with pytest.raises(DataError, match=r"was written with tokenizer another-hash, .*small with tokenizer-hash"):
        parts_of(stage(folder, small={}, other=other))
    with pytest.raises(DataError, match=rf"have {VOCABULARY} tokens in their vocabulary, model.vocab_size = 999"):
        open_parts(stage(folder, small={}), None, 999)
