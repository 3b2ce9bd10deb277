"""What a changed configuration means: every key has a kind, and only meaning is hashed."""

import pytest

from engine.config.resume import compare, flatten, meaning_hash, refuse_new_meaning
from engine.errors import ConfigError
from tests.engine.config.test_resolve import config

MEANING = ["model.num_layers=3", "seed=1", "stages.0.global_batch_size=8", "stages.0.data.attention=row"]
SCHEDULE = ["optimizer.learning_rate=1e-4", "stages.0.duration.steps=20", "stages.0.schedule.warmup=2"]
EXECUTION = ["parallel.pipe=2", "logging.wandb=off", "folder=elsewhere", "stages.0.data.train=moved", "name=other"]


@pytest.mark.parametrize("override", MEANING)
def test_meaning_changes_the_hash_and_is_refused(override: str) -> None:
    changes = compare(config(), config(override))
    assert [change.kind for change in changes] == ["meaning"]
    assert meaning_hash(config()) != meaning_hash(config(override))
    with pytest.raises(ConfigError) as caught:
        refuse_new_meaning(changes, "runs/x")
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
    refuse_new_meaning(changes, "runs/x")


def test_only_meaning_is_named_in_the_refusal() -> None:
    changes = compare(config(), config("seed=3", "parallel.pipe=2"))
    with pytest.raises(ConfigError) as caught:
        refuse_new_meaning(changes, "runs/x")
    assert "seed: 0 -> 3" in caught.value.wrong
    assert "parallel" not in caught.value.wrong


def test_nothing_changed() -> None:
    assert compare(config(), config()) == []
    assert meaning_hash(config()) == meaning_hash(config())
    assert len(meaning_hash(config())) == 16


def test_every_leaf_is_flattened() -> None:
    """Each key of the dumped tree is there once, so no key escapes a kind."""

    def count(node: object) -> int:
        if isinstance(node, dict):
            return sum(map(count, node.values()))
        if isinstance(node, list) and node and isinstance(node[0], dict):
            return sum(map(count, node))
        return 1

    assert len(flatten(config())) == count(config().model_dump(mode="json"))


def test_another_number_of_stages_is_another_run() -> None:
    two = config().model_copy(update={"stages": config().stages * 2})
    kinds = {change.key: change.kind for change in compare(config(), two)}
    assert kinds["stages.1.sequence_length"] == "meaning"
