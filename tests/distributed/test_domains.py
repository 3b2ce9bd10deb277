"""Losses of each source and of each held-out data set, the same in every layout, held to a plain model and to runs that
evaluate one data set alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config.schema.run import RunConfig
from engine.data.loader import Loader
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.writer import ShardWriter
from engine.data.stage import open_parts, stage_stream
from engine.data.tokenizer.folder import tokenizer_hash
from engine.data.validation import ValidationSamples
from engine.models.families import family
from engine.models.initial import initial_value
from engine.models.materialize import fill
from engine.train.metrics import read_metrics
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import LENGTH, run_config, run_tree, train_rank, write_corpus

STEPS = 4
SIZES = {"web": (0, 140, 13), "code": (140, 40, 17)}
"""First document, documents to train on, documents held out."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """`train/NAME` and `held-out/NAME`, as `prepare` writes domains."""
    folder = tmp_path_factory.mktemp("domains")
    write_corpus(folder / "both")
    written_with = tokenizer_hash(folder / "both" / "tokenizer")
    both = TokenDataset(folder / "both" / "train")
    documents = [
        shard.tokens[start:end].astype(np.int64)
        for shard in map(both.shard, range(both.num_shards))
        for start, end in zip(shard.documents[:-1], shard.documents[1:], strict=True)
    ]
    for name, (first, count, held_out) in SIZES.items():
        for side, chosen in (("train", documents[first:][:count]), ("held-out", documents[first:][:held_out])):
            with ShardWriter(folder / side / name, both.index.vocab_size, both.index.eos_id, written_with, 2000) as to:
                for document in chosen:
                    to.add(document)
    return folder


def tree_of(corpus: Path, folder: Path, validation: Any, **changes: Any) -> dict[str, Any]:
    tree = run_tree(corpus / "both", folder, evaluation={"every_steps": STEPS, "max_samples": None}, **changes)
    [stage] = tree["stages"]
    sources = [
        {"name": name, "path": str(corpus / "train" / name), "weight": w} for name, w in (("web", 3), ("code", 2))
    ]
    stage["data"] = {"sources": sources, "validation": validation, "window_shards": 2}
    stage["duration"] = {"steps": STEPS}
    return tree


def records(tree: dict[str, Any], world_size: int) -> tuple[RunConfig, list[dict[str, Any]], dict[str, Any]]:
    """The records of a run's steps, and of its evaluation at the end."""
    run_ranks(world_size, train_rank, tree)
    found = read_metrics(Path(tree["folder"]))
    [evaluation] = [record for record in found if "validation_loss" in record]
    return run_config(tree), [record for record in found if "loss" in record], evaluation


def test_losses_by_source_and_by_held_out_data_set_in_any_layout(corpus, tmp_path):
    mapping = {name: str(corpus / "held-out" / name) for name in SIZES}
    config, steps, end = records(tree_of(corpus, tmp_path / "one", str(corpus / "held-out")), 1)
    parallel = {"pipe": 2, "data": 2, "zero_stage": 1, "micro_batch_size": 1}
    _, same, same_end = records(tree_of(corpus, tmp_path / "four", mapping, parallel=parallel), 4)
    _, _, alone = records(tree_of(corpus, tmp_path / "alone", mapping["code"]), 1)
    # fp32 over some steps of another order of sums
    for mine, other in zip([*steps, end], [*same, same_end], strict=True):
        wanted = {key for key in mine if "loss" in key or "tokens/" in key}
        assert wanted == {key for key in other if "loss" in key or "tokens/" in key}
        assert {key: mine[key] for key in wanted} == pytest.approx({key: other[key] for key in wanted}, rel=1e-5)
    assert {key for key in end if "loss" in key} == {"validation_loss", "validation_loss/web", "validation_loss/code"}
    assert {key for key in alone if "loss" in key} == {"validation_loss"}
    assert alone["validation_loss"] == pytest.approx(end["validation_loss/code"], rel=1e-6)

    counted = {name: held_out_targets(config, path) for name, path in mapping.items()}
    total = sum(end[f"validation_loss/{name}"] * counted[name] for name in SIZES)
    assert end["validation_loss"] == pytest.approx(total / sum(counted.values()), rel=1e-6)
    assert abs(end["validation_loss/web"] - end["validation_loss/code"]) > 1e-3

    losses, weights = first_step(config)
    for name in SIZES:
        assert steps[0][f"loss/{name}"] == pytest.approx(losses[name] / weights[name], rel=1e-6)
    assert steps[0]["loss"] == pytest.approx(sum(losses.values()) / sum(weights.values()), rel=1e-6)
    for record in steps:
        assert record["tokens/web"] + record["tokens/code"] == record["tokens"]
        assert record["tokens/web"] == record["web_samples"] * LENGTH  # nothing is left out


def held_out_targets(config: RunConfig, path: str) -> float:
    data = config.stages[0].data
    batches = ValidationSamples(TokenDataset(path), LENGTH, data.attention).batches(0, 1, 4)
    return sum(float(batch.inputs["weights_BT"].sum()) for batch in batches)


def first_step(config: RunConfig) -> tuple[dict[str, float], dict[str, float]]:
    """Sum of the losses and weight of the targets by source in the first batch, of a whole model."""
    kind, [stage] = family(config.model), config.stages
    specs, ties = {spec.name: spec for spec in kind.specs(config.model)}, kind.ties(config.model)
    model = kind.build(config.model)
    fill(model, lambda name: initial_value(specs[ties.get(name, name)], config.model, config.seed))
    stream = stage_stream(stage, open_parts(stage, None, config.model.vocab_size), config.seed)
    [batch] = Loader(stream).step(0, 1, 8)
    losses, weights = {}, {}
    for number, name in enumerate(SIZES):
        rows = batch.domains_B == number
        inputs = {key: held[rows] for key, held in batch.inputs.items()}
        with torch.no_grad():
            losses[name] = float(model(**inputs)["losses_L"].sum())
        weights[name] = float(inputs["weights_BT"].sum())
    return losses, weights
