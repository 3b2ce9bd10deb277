"""What a changed configuration means: every key has a kind, and only meaning is hashed."""

import pytest

from engine.config.resume import compare, flatten, meaning_hash, refuse_new_meaning
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import Duration
from engine.errors import ConfigError
from tests.engine.config.run_config import config

MEANING = ["model.num_layers=3", "seed=1", "stages.0.global_batch_size=8", "stages.0.data.attention=row"]
SCHEDULE = ["optimizer.learning_rate=1e-4", "stages.0.duration.steps=20", "stages.0.schedule.warmup=2"]
EXECUTION = ["parallel.pipe=2", "logging.wandb=off", "folder=elsewhere", "stages.0.data.train=moved", "name=other"]


@pytest.mark.parametrize("override", MEANING)
def test_meaning_changes_the_hash_and_is_refused(override: str) -> None:
    changes = compare(config(), config(override))
    assert [change.kind for change in changes] == ["meaning"]
    assert meaning_hash(config()) != meaning_hash(config(override))
    with pytest.raises(ConfigError) as caught:
        refuse_new_meaning(config(), config(override), "runs/x")
    key = override.partition("=")[0]
    assert caught.value.wrong.startswith(f"run folder runs/x belongs to another run:\n  {key}: ")
    assert "another `folder`" in caught.value.remedy


@pytest.mark.parametrize(
    ("override", "kind"), [(key, "schedule") for key in SCHEDULE] + [(key, "execution") for key in EXECUTION]
)
def test_schedule_and_execution_may_change(override: str, kind: str) -> None:
    changes = compare(config(), config(override))
    assert [change.kind for change in changes] == [kind]
    assert meaning_hash(config()) == meaning_hash(config(override))
    refuse_new_meaning(config(), config(override), "runs/x")


def test_only_meaning_is_named_in_the_refusal() -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_new_meaning(config(), config("seed=3", "parallel.pipe=2"), "runs/x")
    assert "seed: 0 -> 3" in caught.value.wrong
    assert "parallel" not in caught.value.wrong


def test_nothing_changed() -> None:
    assert compare(config(), config()) == []
    assert meaning_hash(config()) == meaning_hash(config())
    assert len(meaning_hash(config())) == 16


def test_every_leaf_is_flattened() -> None:
    """Each key of the dumped tree is there once, so no key escapes a kind."""

    def count(node: object) -> int:
        if isinstance(node, dict) and node:
            return sum(map(count, node.values()))
        if isinstance(node, list) and node and isinstance(node[0], dict):
            return sum(map(count, node))
        return 1

    assert len(flatten(config())) == count(config().model_dump(mode="json"))


def of_stages(*changes: dict[str, object]) -> RunConfig:
    """The run with one stage per change, which are named after the alphabet."""
    [stage] = config().stages
    stages = [stage.model_copy(update={"name": name} | change) for name, change in zip("abc", changes, strict=False)]
    return config().model_copy(update={"stages": tuple(stages)})


def test_an_appended_run_stage_is_no_change_of_meaning() -> None:
    one, two = of_stages({}), of_stages({}, {"sequence_length": 32})
    refuse_new_meaning(one, two, "runs/x", run_stage=0)
    assert compare(one, two, run_stage=0) == []
    assert meaning_hash(one, 0) == meaning_hash(two, 0) != meaning_hash(two, 1)


def test_a_run_stage_that_has_not_begun_may_change() -> None:
    before, after = of_stages({}, {"sequence_length": 32}), of_stages({}, {"sequence_length": 16})
    refuse_new_meaning(before, after, "runs/x", run_stage=0)
    assert meaning_hash(before, 0) == meaning_hash(after, 0)
    with pytest.raises(ConfigError, match=r"stages.1.sequence_length: 32 -> 16"):
        refuse_new_meaning(before, after, "runs/x", run_stage=1)
    assert meaning_hash(before, 1) != meaning_hash(after, 1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sequence_length": 32}, "sequence_length: 64 -> 32"),
        ({"duration": Duration(steps=7)}, "duration.steps: 10 -> 7"),
    ],
)
def test_a_completed_run_stage_that_changed_is_refused_by_name(change: dict[str, object], told: str) -> None:
    before, after = of_stages({}, {}), of_stages(change, {})
    with pytest.raises(ConfigError) as caught:
        refuse_new_meaning(before, after, "runs/x", run_stage=1)
    assert f"run stage 'a' is completed and cannot change: {told}" in caught.value.wrong
    assert "stages.0" not in caught.value.wrong


def test_folders_of_a_completed_run_stage_may_move() -> None:
    before = of_stages({}, {})
    after = of_stages({"data": before.stages[0].data.model_copy(update={"train": "moved"})}, {})
    refuse_new_meaning(before, after, "runs/x", run_stage=1)


def test_a_run_stage_that_was_begun_cannot_be_removed() -> None:
    with pytest.raises(ConfigError, match="run stage 'b' is missing, and it has been trained"):
        refuse_new_meaning(of_stages({}, {}), of_stages({}), "runs/x", run_stage=1)
