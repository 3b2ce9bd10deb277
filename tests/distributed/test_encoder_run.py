"""A run of a tiny BERT from text to checkpoints: sentences, pairs, masks, two losses, dropout, evaluation.

The same run in two layouts, changed at a checkpoint, logs the losses of the run on one rank: they differ by rounding,
which at this size (see `parity.py`) and over six steps stays below 1e-4.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config.load import read_tree
from engine.train.metrics import read_metrics
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import run_tree, train_rank, write_sentences

REPOSITORY = Path(__file__).parents[2]
OBJECTIVES = {
    "tiny-bert": {"name": "masked", "pairs": "next_sentence", "mask_unit": "word"},
    "tiny-modernbert": {"name": "masked", "mask_unit": "span"},
}
WAYS: tuple[tuple[int, int, dict[str, int]], ...] = (
    (3, 4, {"pipe": 2, "tensor": 2, "zero_stage": 3}),
    (6, 2, {"sequence": 2, "zero_stage": 1, "micro_batch_size": 1}),
)
"""Steps at which a start ends, its ranks and their layout."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_sentences(folder, "wordpiece", 260, "masked")
    return folder


def tree_of(corpus: Path, folder: Path, model: str, steps: int, **parallel: Any) -> dict[str, Any]:
    tree = run_tree(corpus, folder, parallel={"micro_batch_size": 2} | parallel)
    rates = {"dropout": 0.1, "attention_dropout": 0.1}
    tree["model"] = read_tree(REPOSITORY / f"configs/models/{model}.yaml")["model"] | rates
    tree["stages"][0] |= {"objective": OBJECTIVES[model], "sequence_length": 32, "duration": {"steps": steps}}
    tree["stages"][0]["schedule"] = {"shape": "constant"}
    tree["stages"][0]["data"] |= {side: str(corpus / side) for side in ("train", "validation")}
    return tree


def logged(folder: Path) -> tuple[list[float], list[float]]:
    """(losses of the steps, held-out losses)"""
    records = list(read_metrics(folder))
    return (
        [record["loss"] for record in records if "loss" in record],
        [record["validation_loss"] for record in records if "validation_loss" in record],
    )


@pytest.mark.parametrize(
    ("model", "ways"),
    [
        ("tiny-bert", WAYS),
        ("tiny-modernbert", WAYS[1:]),
        pytest.param("tiny-modernbert", WAYS, marks=pytest.mark.matrix),
    ],
    ids=["tiny-bert", "tiny-modernbert", "tiny-modernbert, all"],
)
def test_a_tiny_encoder_trains_alike_in_every_layout(corpus: Path, tmp_path: Path, model: str, ways: Any) -> None:
    run_ranks(1, train_rank, tree_of(corpus, tmp_path / "plain", model, steps=6))
    for steps, world, layout in ways:
        run_ranks(world, train_rank, tree_of(corpus, tmp_path / "changed", model, steps, **layout))
    losses, held_out = logged(tmp_path / "plain")
    assert (len(losses), len(held_out)) == (6, 2)
    assert losses[-1] < losses[0]
    found_losses, found_held_out = logged(tmp_path / "changed")
    assert found_losses == pytest.approx(losses, abs=1e-4)
    assert found_held_out == pytest.approx(held_out, abs=1e-4)


def without_pairs(trainer: Any) -> None:
    """No row of any step has a pair to predict."""
    step = trainer.feed.step

    def step_without_pairs() -> Any:
        inputs, (tokens, _) = step()
        for batch in inputs:
            if "pair_weights_B" in batch:
                batch["pair_weights_B"].zero_()
        return inputs, [tokens, 0.0]

    trainer.feed.step = step_without_pairs


def test_a_loss_without_targets_is_0_and_leaves_the_others_alone_in_every_layout(corpus: Path, tmp_path: Path) -> None:
    layouts = {"plain": (1, {}), "ranks": (2, {"sequence": 2, "zero_stage": 2, "micro_batch_size": 1})}
    for name, (world, layout) in layouts.items():
        run_ranks(world, train_rank, tree_of(corpus, tmp_path / name, "tiny-bert", 3, **layout), without_pairs)
    records = {name: [record for record in read_metrics(tmp_path / name) if "loss" in record] for name in layouts}
    assert [record["pairs_loss"] for record in records["plain"] + records["ranks"]] == [0.0] * 6
    for key in ("loss", "gradient_norm"):
        plain, ranks = ([record[key] for record in records[name]] for name in layouts)
        assert ranks == pytest.approx(plain, abs=1e-4), key
