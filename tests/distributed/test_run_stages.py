"""Runs of two stages are the same run in every layout, killed in either stage and between them, too.

The second stage has rows of another length, another batch and a schedule of its own, and it replays earlier data. The
reference is the run in one process. Layouts differ by rounding alone, which over six steps of these models leaves a
loss within 2e-6, as derived in `test_parity`; the tests of the loop itself, which need no ranks, are
tests/engine/train/test_run_stages.py.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.folder import committed
from engine.checkpoint.load import read_state
from engine.errors import EXIT_DONE
from engine.train.metrics import read_metrics
from tests.distributed.cases import MODELS
from tests.distributed.pairs import OBJECTIVES, VOCAB, write_families
from tests.distributed.ranks import RankFailed, run_ranks
from tests.distributed.runs import LENGTH, run_tree, train_rank

BORDER, LAST = 3, 6
matrix = pytest.mark.matrix
SECOND: dict[str, dict[str, Any]] = {
    "gpt2-dropout": {
        "learning_rate_factors": {"layers.0.*": 0.5, "*.bias": 2.0},
        "replay": {"ratio": [{"from_step": 0, "ratio": 0.5}, {"from_step": 1, "ratio": 0.3}], "loss_weight": 0.5},
    },
    "bert": {"data": {"attention": "row"}, "replay": {"ratio": 0.4, "loss_weight": 3}},
    "t5": {"optimizer_state": "reset", "replay": {"ratio": 0.25}},
}
"""By model, what the second stage has beside its length and its batch."""
REPLAYED = {"gpt2-dropout": [2, 3, 4], "bert": [1, 3, 4], "t5": [1, 2, 3]}
"""By model, the samples replayed after each step of the second stage, of four each."""
LAYOUTS = (
    ("gpt2-dropout", {"zero_stage": 3, "pipe": 2, "data": 2}),
    pytest.param("gpt2-dropout", {"zero_stage": 1, "tensor": 2, "data": 2}, marks=matrix),
    ("bert", {"zero_stage": 1, "pipe": 2}),
    pytest.param("bert", {"zero_stage": 2, "data": 2, "micro_batch_size": 1}, marks=matrix),
    ("t5", {"zero_stage": 3, "tensor": 2}),
    pytest.param("t5", {"zero_stage": 2, "pipe": 2, "data": 2}, marks=matrix),
    # these complete the pairs of ZeRO, pipeline, tensor and sequence ranks: see the test below
    pytest.param("t5", {"zero_stage": 0, "pipe": 2, "tensor": 2}, marks=matrix),
    pytest.param("gpt2-dropout", {"zero_stage": 0, "sequence": 2}, marks=matrix),
    pytest.param("bert", {"zero_stage": 2, "tensor": 2, "sequence": 2}, marks=matrix),
    pytest.param("t5", {"zero_stage": 1, "pipe": 2, "sequence": 2}, marks=matrix),
    pytest.param("gpt2-dropout", {"zero_stage": 3, "sequence": 2}, marks=matrix),
)
FACTORS = {"zero_stage": (0, 1, 2, 3), "pipe": (1, 2), "tensor": (1, 2), "sequence": (1, 2)}
"""Values of which any two stand together in one of the layouts: all of them compose."""
WORLDS = (
    {"zero_stage": 1, "data": 2},
    {"zero_stage": 3, "pipe": 2},
    {"zero_stage": 2, "tensor": 2},
    {"zero_stage": 0},
)
"""Layouts in turn, between them a kill: in the first stage, between the two, and in the second stage."""
KILLS = (1, BORDER, 4)
"""Steps (from 0) in which a rank is killed."""


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per family."""
    folder = tmp_path_factory.mktemp("corpora")
    write_families(folder)
    return folder


def two_stages(corpora: Path, folder: Path, model: str, parallel: dict[str, Any], url: bool = False) -> dict[str, Any]:
    shape = MODELS[model] | {"max_positions": LENGTH, "num_layers": 4}
    family = shape.get("family", "gpt")
    tree = run_tree(
        corpora / family,
        folder,
        model=shape | {"vocab_size": VOCAB[family]},
        parallel=parallel,
        optimizer={"learning_rate": 2e-3, "epsilon": 1e-5},
        evaluation={"every_steps": None},
        checkpoint={"every_steps": 1},
    )
    [stage] = tree["stages"]
    stage |= {"objective": OBJECTIVES[family], "duration": {"steps": BORDER}}
    other = SECOND[model]
    # Held-out sets of its own, so that the first stage's are evaluated beside them.
    held_out = {"validation": {"second": str(corpora / family / "train")}}
    second = stage | other | {"data": stage["data"] | other.get("data", {}) | held_out, "name": "second"}
    old = str(corpora / family / "train")
    second["replay"] = other["replay"] | {"source": f"file://{old}" if url else old}
    if url:
        second["data"] |= {"train": f"file://{old}", "cache": {"folder": str(folder / "cache"), "bytes": 10**7}}
    lengths = (LENGTH, 3 * LENGTH // 4)  # the cut is made for the longer one
    stage["sequence_length"], second["sequence_length"] = reversed(lengths) if family == "bert" else lengths
    second |= {"global_batch_size": 4}
    second |= {"schedule": {"shape": "constant", "learning_rate": 1e-3}}
    return tree | {"stages": [stage | {"name": "first"}, second]}


def world_size(parallel: dict[str, Any]) -> int:
    return math.prod(parallel.get(axis, 1) for axis in ("pipe", "tensor", "sequence", "data"))


def values(folder: Path, key: str) -> dict[int, float]:
    return {record["step"]: record[key] for record in read_metrics(folder) if key in record}


@pytest.fixture(scope="module")
def alone(corpora, tmp_path_factory):
    """The run of a model in one process, made once; and its samples by step."""
    made: dict[str, Path] = {}

    def run(model: str) -> Path:
        if model not in made:
            folder = tmp_path_factory.mktemp(model) / "run"
            prepare = partial(watch, log=folder.parent / "samples", kills=None)
            (rank,) = run_ranks(1, train_rank, two_stages(corpora, folder, model, {}), prepare)
            assert (rank["code"], rank["state"].run_stage) == (EXIT_DONE, 1)
            made[model] = folder
        return made[model]

    return run


def test_any_two_of_zero_pipeline_tensor_and_sequence_stand_together():
    layouts: list[Any] = [getattr(given, "values", given)[1] for given in LAYOUTS]
    chosen = [{name: layout.get(name, values[0]) for name, values in FACTORS.items()} for layout in layouts]
    missing = [
        ((one, a), (other, b))
        for one, other in itertools.combinations(FACTORS, 2)
        for a, b in itertools.product(FACTORS[one], FACTORS[other])
        if not any(layout[one] == a and layout[other] == b for layout in chosen)
    ]
    assert not missing


@pytest.mark.parametrize(("model", "parallel"), LAYOUTS)
def test_two_stages_are_the_run_of_one_process(corpora, alone, tmp_path, model, parallel):
    tree = two_stages(corpora, tmp_path / "run", model, parallel)
    ranks = run_ranks(world_size(parallel), train_rank, tree)
    assert {rank["code"] for rank in ranks} == {EXIT_DONE}
    check_equal(tmp_path / "run", alone(model))
    replayed = values(tmp_path / "run", "replay_samples")
    assert [replayed[step] for step in range(BORDER + 1, LAST + 1)] == REPLAYED[model]


@matrix
@pytest.mark.parametrize("model", SECOND)
def test_data_that_is_streamed_from_a_url_is_the_same_run(corpora, alone, tmp_path, model):
    parallel = {"zero_stage": 1, "data": 2}
    run_ranks(2, train_rank, two_stages(corpora, tmp_path / "run", model, parallel, url=True))
    check_equal(tmp_path / "run", alone(model))


def check_equal(folder: Path, expected: Path) -> None:
    assert [*values(folder, "loss")] == list(range(1, LAST + 1))
    assert [*values(folder, "validation_loss")] == [BORDER, LAST]
    of_sets = {"validation_loss/first": [LAST], "validation_loss/second": [BORDER, LAST], "forgetting/first": [LAST]}
    of_sets |= {"initial_loss/first": [0], "initial_loss/second": [0, BORDER]}
    assert {key: [*values(folder, key)] for key in of_sets} == of_sets
    for key in ("loss", "validation_loss", "loss/replay", "loss/new", *of_sets):
        # a difference of two losses has the error of both
        error = 4e-6 if key.startswith("forgetting") else 2e-6
        assert values(folder, key) == pytest.approx(values(expected, key), rel=0, abs=error), key
    for key in ("samples", "tokens", "learning_rate", "run_stage", "replay_samples", "replay_ratio", "tokens/replay"):
        assert values(folder, key) == values(expected, key), key


def watch(trainer: Any, log: Path, kills: int | None) -> None:
    """Note the samples of each step in `log`, on rank 0, and kill the last rank in step `kills`."""
    step, groups = trainer._step, trainer.groups

    def watched() -> bool:
        stream, number = trainer.feed.stream, trainer.state.step
        ids = stream.next_sample_ids(stream.batch_size)
        if number == kills and groups.global_rank == groups.world.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        stop = step()
        if groups.global_rank == 0:
            with log.open("a") as file:
                file.write(json.dumps([number, ids]) + "\n")
        return stop

    trainer._step = watched


def samples_by_step(log: Path) -> dict[int, Any]:
    return dict(json.loads(line) for line in log.read_text().splitlines())


def test_kills_in_both_stages_and_between_them_in_changing_layouts(corpora, alone, tmp_path):
    model, folder, log = "gpt2-dropout", tmp_path / "run", tmp_path / "samples"
    for parallel, kills in zip(WORLDS, (*KILLS, None), strict=True):
        tree = two_stages(corpora, folder, model, parallel)
        tree["checkpoint"]["asynchronous"] = False  # what a step saved is there when the next one is killed
        prepare = partial(watch, log=log, kills=kills)
        if kills is None:
            ranks = run_ranks(world_size(parallel), train_rank, tree, prepare)
            assert {rank["started_at"] for rank in ranks} == {KILLS[-1]}
        else:
            with pytest.raises(RankFailed):
                run_ranks(world_size(parallel), train_rank, tree, prepare)
    check_equal(folder, alone(model))
    assert samples_by_step(log) == samples_by_step(alone(model).parent / "samples")


def of_reservoir(corpora: Path, folder: Path, parallel: dict[str, Any]) -> dict[str, Any]:
    """The run of two stages, which replays its own reservoir: parts of 8 tokens of the documents of its first stage."""
    tree = two_stages(corpora, folder, "gpt2-dropout", parallel)
    del tree["stages"][1]["replay"]["source"]
    tree["checkpoint"]["asynchronous"] = False
    return tree | {"reservoir": {"rows": 200, "span_tokens": 8}}


def test_the_reservoir_is_the_same_in_every_layout_and_after_a_kill(corpora, tmp_path):
    """Two ranks fill it, one is killed where it is replayed, and two stages of a pipeline go on."""
    logs = [tmp_path / name for name in ("samples", "samples of one")]
    whole = of_reservoir(corpora, tmp_path / "one", {})
    run_ranks(1, train_rank, whole, partial(watch, log=logs[1], kills=None))
    folder, killed = tmp_path / "run", LAST - 2
    tree = of_reservoir(corpora, folder, {"zero_stage": 3, "data": 2})
    with pytest.raises(RankFailed):
        run_ranks(2, train_rank, tree, partial(watch, log=logs[0], kills=killed))
    tree = of_reservoir(corpora, folder, {"zero_stage": 3, "pipe": 2})
    ranks = run_ranks(2, train_rank, tree, partial(watch, log=logs[0], kills=None))
    assert {(rank["code"], rank["started_at"]) for rank in ranks} == {(EXIT_DONE, killed)}
    check_equal(folder, tmp_path / "one")
    assert samples_by_step(logs[0]) == samples_by_step(logs[1])
    found = [read_state(committed(each / "checkpoints")[0]).sections for each in (folder, tmp_path / "one")]
    assert found[0]["reservoir"] == found[1]["reservoir"]
    assert found[0]["reservoir"]["generation"] is not None


RATIOS, RAISED = [0.25, 0.5], [0, 0.25, 0.5]
"""Ratios of replay that alarms may raise it to, and those of the second stage's steps."""


def raising(corpora: Path, folder: Path, model: str, parallel: dict[str, Any]) -> dict[str, Any]:
    """A run whose second stage has a learning rate that ruins the model at every step, and begins without replay."""
    tree = two_stages(corpora, folder, model, parallel)
    second = tree["stages"][1]
    second["replay"] = second["replay"] | {"ratio": 0}
    second["schedule"] = {"shape": "constant", "learning_rate": 30.0}
    alarm = {"every_steps": 1, "forgetting_limit": 0.01, "on_forgetting": "raise", "raised_ratios": RATIOS}
    tree["checkpoint"]["asynchronous"] = False
    return tree | {"evaluation": tree["evaluation"] | alarm}


@pytest.mark.parametrize(
    ("model", "worlds"),
    [
        ("gpt2-dropout", [({"zero_stage": 1, "data": 2}, 4), ({"zero_stage": 3, "pipe": 2}, None)]),
        pytest.param(
            "t5",
            [
                ({"zero_stage": 2, "pipe": 2}, 4),
                ({"zero_stage": 1, "tensor": 2}, 5),
                ({"zero_stage": 3, "data": 2}, None),
            ],
            marks=matrix,
        ),
    ],
)
def test_a_raised_ratio_goes_on_in_another_layout(corpora, tmp_path, model, worlds):
    """Ranks are killed in the first step that a raised ratio is in force for, and in the next one."""
    logs = [tmp_path / name for name in ("samples", "samples of one")]
    run_ranks(1, train_rank, raising(corpora, tmp_path / "one", model, {}), partial(watch, log=logs[1], kills=None))
    for parallel, kills in worlds:
        tree = raising(corpora, tmp_path / "run", model, parallel)
        prepare = partial(watch, log=logs[0], kills=kills)
        if kills is None:
            ranks = run_ranks(2, train_rank, tree, prepare)
            assert {rank["code"] for rank in ranks} == {EXIT_DONE}
        else:
            with pytest.raises(RankFailed):
                run_ranks(2, train_rank, tree, prepare)
    for folder in (tmp_path / "one", tmp_path / "run"):
        found = {step: value for step, value in values(folder, "replay_ratio").items() if step > BORDER}
        assert [*found.values()] == RAISED
        assert [*values(folder, "replay_samples").values()][-3:] == [0, 1, 3]
    # the ratio decides which samples come: each is the one of a process alone
    assert samples_by_step(logs[0]) == samples_by_step(logs[1])
    states = [read_state(committed(tmp_path / name / "checkpoints")[0]).sections for name in ("one", "run")]
    assert states[0]["progress"]["raised_ratios"] == states[1]["progress"]["raised_ratios"]
    assert len(states[0]["progress"]["raised_ratios"]) == len(RATIOS)
