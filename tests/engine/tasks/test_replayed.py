"""Text that a task replays: its head, its steps and its source, from a folder or from the reservoir of the start."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from engine.config.parameter_patterns import matches
from engine.config.resolve import resolve
from engine.config.save import save_run
from engine.config.schema.model import without_vocabulary
from engine.data.shards.dataset import TokenDataset
from engine.errors import ConfigError
from engine.tasks.replayed import set_replayed_source
from engine.tasks.resolve import resolve_task
from engine.train.starting_weights import StartingWeights
from tests.distributed.runs import run_tree
from tests.engine.tasks.answer_starts import answer_tree, write_pairs
from tests.engine.tasks.starts import tree_of, write_examples, write_start
from tests.engine.train.fake import fake_run
from tests.engine.train.reservoirs import admitting_tree

RATIO = 0.25


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("start"))


def replaying(folder: Path, start: Path, **replay: Any) -> dict[str, Any]:
    write_examples(folder)
    given = {"ratio": RATIO, "source": str(start / "train")} | replay
    return tree_of(folder, start, replay=given, global_batch_size=8, sequence_length=24, duration={"epochs": 3})


def test_the_head_of_pretraining_stays_and_an_epoch_is_one_of_the_examples(tmp_path, start):
    run = resolve_task(replaying(tmp_path, start), "task")
    stage = run.stages[0]
    assert run.model.task_head is not None
    assert run.model.task_head.keeps_vocabulary
    assert stage.replayed_objective is not None
    assert stage.replayed_objective.name == "masked"
    # 20 examples, 6 of them in a step of 8: 3 epochs are 10 steps
    assert stage.num_steps == 10
    assert stage.data.row_lengths == ()
    assert resolve(run, 1).world_size == 1
    # weights of both heads begin where they come from
    weights = StartingWeights(run)
    assert "lm_head.bias" in weights._opened.map.parameters
    assert without_vocabulary(run.model).task_head == run.model.task_head.model_copy(update={"keeps_vocabulary": False})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 1.5}, "replay.ratio = 1.5"),
        ({"ratio": 1.0}, "replay.ratio = 1:?"),
        ({"objective": "causal"}, "replay.objective.name = causal with .* model.family = bert"),
        ({"objective": {"name": "masked", "pairs": "next_sentence"}}, "replay.objective.pairs = next_sentence"),
        ({"objective": {"name": "masked", "fill_rate": 0.1}}, "replay.objective.fill_rate = 0.1"),
        ({"validation": {" x": "somewhere"}}, "replay.validation: ' x' is no name"),
        ({"validation": {}}, r"replay.validation = \{\} names no data set"),
        ({"validation": "s3://b/text"}, r"data.cache is missing, and stages\.0\.replay\.validation names s3://b/text"),
    ],
)
def test_what_does_not_fit_is_one_error(tmp_path, start, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(resolve_task(replaying(tmp_path, start, **changes), "task"), 1)
    assert "this run cannot start" in str(caught.value)
    assert str(caught.value).count("allowed:") == 1


def test_a_start_without_a_reservoir_or_a_head_is_refused(tmp_path, start):
    with pytest.raises(ConfigError, match=r"no reservoir is there .* a Hugging Face folder") as caught:
        resolve_task(replaying(tmp_path, start, source=None), "task")
    assert "replay.source" in str(caught.value)
    fine_tuned = write_start(tmp_path / "tuned", task_head={"task": "classification", "num_labels": 2})
    with pytest.raises(ConfigError, match="a head for classification and none over the vocabulary"):
        resolve_task(replaying(tmp_path, fine_tuned), "task")
    bare = tmp_path / "bare"
    shutil.copytree(start / "hf", bare / "hf")
    path = bare / "hf" / "model.safetensors"
    kept = {name: one for name, one in load_file(path).items() if not name.startswith("cls.predictions")}
    save_file(kept, path, {"format": "pt"})
    tree = replaying(tmp_path, start) | {"init_from": str(bare / "hf")}
    with pytest.raises(ConfigError, match=r"has no head_norm\.bias"):
        StartingWeights(resolve_task(tree, "task"))


def test_virtual_tokens_are_not_put_in_front_of_text(tmp_path, start):
    tree = replaying(tmp_path, start) | {"adapter": {"method": "prompt", "virtual_tokens": 2}}
    with pytest.raises(ConfigError, match=r"prompt with stages\.0\.replay\.objective"):
        resolve(resolve_task(tree, "task"), 1)


def test_lora_beside_text_leaves_the_head_of_pretraining_as_it_is(tmp_path, start):
    run = resolve_task(replaying(tmp_path, start) | {"adapter": {"method": "lora"}}, "task")
    frozen = {name for name in ("lm_head.bias", "head_transform.weight") if matches(name, run.stages[0].freeze)}
    assert frozen == {"lm_head.bias", "head_transform.weight"}
    assert not matches("classifier.weight", run.stages[0].freeze)
    assert resolve(run, 1).world_size == 1


def test_a_table_of_ratios_needs_steps(tmp_path, start):
    table = [{"from_step": 0, "ratio": 0.5}, {"from_step": 2, "ratio": 0.1}]
    tree = replaying(tmp_path, start, ratio=table)
    with pytest.raises(ConfigError, match=r"ratio is a table, and stages\.0\.duration has 3 epochs"):
        resolve_task(tree, "task")
    tree = replaying(tmp_path, start, ratio=table)
    del tree["stages"][0]["duration"]
    with pytest.raises(ConfigError, match=r"ratio is a table, and stages\.0\.duration is left out"):
        resolve_task(tree, "task")
    tree = replaying(tmp_path, start, ratio=table)
    tree["stages"][0]["duration"] = {"steps": 4}
    assert resolve_task(tree, "task").stages[0].num_steps == 4


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    """A GPT's run that keeps a reservoir; its weights are those of the fake pipeline."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    tree = admitting_tree(corpus, folder)
    tree["model"]["max_positions"] = 64
    fake_run(tree)
    return folder


def documents(location: str) -> set[tuple[int, ...]]:
    dataset = TokenDataset(location)
    return {
        tuple(row.tolist())
        for number in range(dataset.num_shards)
        for row in np.split(dataset.shard(number).tokens, dataset.offsets(number)[0][1:-1])
    }


def test_text_of_the_start_is_copied_as_far_as_it_can_be_replayed(corpus, trained, tmp_path):
    write_pairs(tmp_path)
    replay = {"ratio": RATIO}
    tree = answer_tree(tmp_path, trained, replay=replay, global_batch_size=8, duration={"steps": 3})
    run = resolve_task(tree, "task")
    assert run.stages[0].replay is not None
    source = run.stages[0].replay.source
    assert source is not None
    assert Path(source).parent == run.folder / "examples"
    copied, whole = documents(source), documents(str(corpus / "train"))
    assert all(any(row == one[: len(row)] or set(row) <= set(one) for one in whole) for row in copied)
    length = run.stages[0].sequence_length
    assert 7 * length <= TokenDataset(source).index.num_tokens < 7 * length + max(map(len, whole))
    assert resolve(run, 1).world_size == 1
    # the copy serves where the start is gone
    moved = trained.rename(trained.with_name("moved"))
    try:
        stage = {
            "replay": dict(replay),
            "sequence_length": length,
            "global_batch_size": 8,
            "duration": {"steps": 3},
        }
        set_replayed_source(stage, str(trained), run.folder / "examples", 0)
        assert stage["replay"]["source"] == source
    finally:
        moved.rename(trained)


def test_a_run_that_has_begun_is_extended_on_its_own_text(trained, tmp_path):
    """Its loader refuses other data, and keys of the schedule may change: here they ask for more text."""
    write_pairs(tmp_path)

    def run_of(steps: int, ratio: float):
        given = {"replay": {"ratio": ratio}, "global_batch_size": 8, "duration": {"steps": steps}}
        return resolve_task(answer_tree(tmp_path, trained, **given), "task")

    def source_of(run) -> str:
        return run.stages[0].replay.source

    begun = run_of(3, RATIO)
    save_run(begun, begun.folder)
    assert source_of(run_of(5, RATIO)) != source_of(begun), "without a checkpoint nothing has been trained on it"
    (begun.folder / "checkpoints" / "step-00000003").mkdir(parents=True)
    longer = run_of(5, 0.5)
    assert source_of(longer) == source_of(begun)
    assert longer.stages[0].num_steps == 5
    # also under another name, and not where the copy is gone
    moved = tmp_path / "moved"
    begun.folder.rename(moved)
    stage = {"replay": {"ratio": 0.5}, "sequence_length": 8, "global_batch_size": 8, "duration": {"steps": 7}}
    set_replayed_source(stage, str(trained), moved / "examples", 0)
    assert stage["replay"].pop("source") == str(moved / "examples" / Path(source_of(begun)).name)
    shutil.rmtree(moved / "examples" / Path(source_of(begun)).name)
    set_replayed_source(stage, str(trained), moved / "examples", 0)
    assert Path(stage["replay"]["source"]).name != Path(source_of(begun)).name


def test_a_checkpoint_without_a_reservoir_is_refused(corpus, tmp_path):
    fake_run(
        run_tree(corpus, tmp_path / "plain") | {"model": run_tree(corpus, tmp_path)["model"] | {"max_positions": 64}}
    )
    write_pairs(tmp_path)
    tree = answer_tree(
        tmp_path, tmp_path / "plain", replay={"ratio": RATIO}, global_batch_size=8, duration={"steps": 3}
    )
    with pytest.raises(ConfigError, match=r"no reservoir is there to replay from: .* a checkpoint without one"):
        resolve_task(tree, "task")
