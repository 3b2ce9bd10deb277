"""Runs that start from a Hugging Face folder or from a checkpoint of another run, under several layouts.

The first held-out loss is that of transformers on the same rows, and each rank reads its own rows alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

from engine.checkpoint.interchange.forms import form_of
from engine.checkpoint.interchange.huggingface import to_huggingface
from engine.config.load import parse_run
from engine.config.schema.model import ModelConfig
from engine.data.shards.dataset import TokenDataset
from engine.data.tokenizer.folder import load_tokenizer
from engine.data.validation import ValidationSamples
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import run_tree, train_rank, write_corpus, write_sentences
from tests.engine.models.tiny import random_weights, tiny

TOLERANCE = 1e-6
"""Both sides compute in fp32: losses of about 6 differ in their last digits."""
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "llama": ("causal", 4, {"zero_stage": 3, "pipe": 2}),
    "t5-v1.1": ("span_corruption", 2, {"zero_stage": 1, "tensor": 2}),
    "roberta": ("masked", 2, {"zero_stage": 2}),
    "pythia": ("causal", 2, {"zero_stage": 2, "tensor": 2}),
    "qwen3": ("causal", 2, {"zero_stage": 3, "tensor": 2}),
    "mistral": ("causal", 4, {"zero_stage": 3, "pipe": 2}),
}
LONG = ("pythia", "mistral")
OBJECTIVES: dict[str, Any] = {"causal": {"name": "causal"}, "span_corruption": {"name": "span_corruption"}}


def model_of(form: str, vocab_size: int) -> ModelConfig:
    sizes = {"vocab_size": vocab_size, "vocab_multiple": 8, "max_positions": 32}
    if form in ("llama", "pythia", "qwen3", "mistral"):
        return tiny(form, **sizes, num_layers=2)
    if form == "roberta":
        return tiny("bert", **sizes, pair_head=False, token_types=1, num_layers=2)
    return tiny("t5", **sizes, tie_embeddings=False, activation="geglu_tanh")


def save_theirs(folder: Path, model: ModelConfig, tokenizer: Path) -> Any:
    """A folder of theirs with random weights; returns the live model."""
    padding = load_tokenizer(tokenizer).vocabulary.padding
    config, state = to_huggingface(model, random_weights(model, seed=2), padding)
    kind = getattr(transformers, form_of(model).architecture)
    theirs = kind.from_pretrained(None, config=config, state_dict=state).eval()
    theirs.save_pretrained(folder)
    return theirs


def tree_of(
    corpus: Path, folder: Path, purpose: str, model: ModelConfig, source: object, **parallel: Any
) -> dict[str, Any]:
    tree = run_tree(corpus, folder, parallel={"micro_batch_size": 2} | parallel, init_from=source)
    tree["model"] = model.model_dump(mode="json")
    objective = OBJECTIVES.get(purpose, {"name": "masked"})
    tree["stages"][0] |= {"objective": objective, "sequence_length": 32, "duration": {"steps": 2}}
    tree["stages"][0]["data"]["attention"] = "row"
    del tree["evaluation"]["max_samples"]
    return tree


def start(environment: Any, tree: dict[str, Any]) -> dict[str, Any]:
    """One rank: the held-out loss before the first step, and the bytes that were read of the source."""
    from engine.config.resolve import resolve
    from engine.heartbeat import Heartbeat
    from engine.train import current_run_stage, trainer
    from engine.train.build import join_groups
    from engine.train.evaluation import evaluate
    from engine.train.signals import StopSignals

    opened = []

    class Watched(current_run_stage.StartingWeights):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            opened.append(self)

    current_run_stage.StartingWeights = Watched
    config = parse_run(tree, "test run")
    groups = join_groups(config, resolve(config, environment.world_size), environment.global_rank)
    trained = trainer.Trainer(config, groups, environment, torch.device("cpu"), StopSignals(), Heartbeat(None, 0))
    feed = trained.feed
    assert feed.validation is not None
    found = evaluate(trained.pipeline, feed, trained.sums, lambda: None, lambda: False, feed.validation)
    code = trained.fit()
    trained.close()
    assert found is not None
    read = sum(one.bytes_read for one in opened)
    assert trained.config.init_from is not None
    fingerprint = trained.config.init_from.fingerprint
    return {"loss": found["validation_loss"], "read": read, "code": code, "fingerprint": fingerprint}


def their_loss(theirs: Any, tree: dict[str, Any]) -> float:
    """The mean over all targets of the held-out rows, computed by transformers."""
    stage = parse_run(dict(tree), "test").stages[0]
    assert isinstance(stage.data.validation, str)
    data = TokenDataset(stage.data.validation)
    samples = ValidationSamples(data, stage.sequence_length, stage.data.attention, objective=stage.objective)
    total, weight = 0.0, 0.0
    for batch in samples.batches(0, 1, 4):
        given = batch.inputs
        targets, weights = next(
            (given[f"targets_{key}"], given[f"weights_{key}"]) for key in ("BT", "BM") if f"targets_{key}" in given
        )
        with torch.no_grad():
            if "tokens_BS" in given:
                seen = 1 - given["segments_BS"].clamp(max=1)
                logits = theirs(
                    input_ids=given["tokens_BS"], attention_mask=seen, decoder_input_ids=given["decoder_tokens_BT"]
                ).logits
            elif "masked_BM" in given:
                seen = (given["segments_BT"] == given["segments_BT"][:, :1]).long()
                logits = theirs(input_ids=given["tokens_BT"], attention_mask=seen).logits
                logits = logits.gather(1, given["masked_BM"][..., None].expand(-1, -1, logits.size(-1)))
            else:
                logits = theirs(input_ids=given["tokens_BT"]).logits
        losses = F.cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), reduction="none")
        total += float((losses * weights.flatten().double()).sum())
        weight += float(weights.sum())
    return total / weight


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[pytest.mark.matrix] if form in LONG else []) for form in CASES]
)
def test_the_first_held_out_loss_is_theirs(tmp_path, form):
    purpose, world_size, parallel = CASES[form]
    if purpose == "masked":
        write_sentences(tmp_path, "wordpiece", 260, "masked")
    else:
        write_corpus(tmp_path, purpose)  # pyright: ignore[reportArgumentType]
    model = model_of(form, load_tokenizer(tmp_path / "tokenizer").vocab_size)
    theirs = save_theirs(tmp_path / "theirs", model, tmp_path / "tokenizer")
    tree = tree_of(tmp_path, tmp_path / "run", purpose, model, str(tmp_path / "theirs"), **parallel)
    found = run_ranks(world_size, start, tree)
    expected = their_loss(theirs, tree)
    assert {one["code"] for one in found} == {0}
    assert len({one["fingerprint"] for one in found}) == 1
    for one in found:
        assert one["loss"] == pytest.approx(expected, abs=TOLERANCE)
    # Each row is read by the ranks that hold a part of it: those of the data axis may share one at a border.
    weights = random_weights(model)
    num_bytes = sum(value.nbytes for value in weights.values())
    borders = world_size * sum(value[0].nbytes for value in weights.values())
    copies = parallel.get("tensor", 1)  # replicated and row-parallel weights are read by each tensor rank
    assert num_bytes <= sum(one["read"] for one in found) <= copies * num_bytes + borders
    assert max(one["read"] for one in found) < num_bytes


def test_moments_of_another_run_come_along_under_another_layout(tmp_path):
    write_corpus(tmp_path)
    before = run_tree(tmp_path, tmp_path / "before", parallel={"micro_batch_size": 2, "zero_stage": 1})
    before["stages"][0]["duration"] = {"steps": 3}
    trained = run_ranks(2, train_rank, before)
    source = {"path": str(tmp_path / "before"), "moments": True}
    after = run_tree(tmp_path, tmp_path / "after", parallel={"micro_batch_size": 2, "zero_stage": 3, "pipe": 2})
    after["stages"][0]["duration"] = {"steps": 3}
    found = run_ranks(4, train_rank, after | {"init_from": source})
    # weights and moments, whatever the layout
    assert {one["at_start"] for one in found} == {one["at_end"] for one in trained}
    assert {(one["started_at"], one["code"]) for one in found} == {(0, 0)}
    assert {one["state"].updates for one in found} == {3 + 3}
    alone = run_ranks(
        1, train_rank, after | {"folder": str(tmp_path / "b"), "init_from": source["path"], "parallel": {}}
    )
    assert alone[0]["at_start"] != trained[0]["at_end"], "the optimizer begins anew where moments are not asked for"
