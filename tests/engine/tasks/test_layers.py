"""Layer-wise rates and gradual unfreezing: what a task file's keys become, and that one learning rate runs through."""

import pytest

from engine.config.parameter_patterns import matches, rate_factors
from engine.config.schema.model import GPTConfig
from engine.config.schema.stage import UnfreezingConfig
from engine.errors import ConfigError
from engine.optim.schedules import learning_rate
from engine.plan.frozen import check_patterns
from engine.plan.parameters import model_entries
from engine.tasks.layers import decayed_rates, unfrozen_stages
from engine.tasks.resolve import resolve_task
from tests.engine.config.run_config import config
from tests.engine.tasks.starts import tree_of, write_examples, write_start

MODEL = GPTConfig(vocab_size=500, num_layers=3, hidden_size=64, num_heads=4)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("start"))


def test_rates_fall_from_the_head_to_the_embeddings():
    run_stage = config().stages[0].model_copy(update={"learning_rate_factors": decayed_rates(MODEL, 0.5)})
    names = ("final_norm.weight", "layers.2.ffn.up_proj.weight", "layers.0.attention.qkv_proj.bias")
    found = [rate_factors(name, [run_stage])[0] for name in (*names, "embed_tokens.weight")]
    assert found == [1.0, 0.5, 0.125, 0.0625]


def test_layers_are_unfrozen_from_the_last_to_the_first(tmp_path, start):
    """BERT's 4 layers, two at a time: run stages of half an epoch, the last one to the end; each trains more."""
    write_examples(tmp_path, count=20)
    keys = {"global_batch_size": 5, "duration": {"epochs": 3}, "unfreezing": {"layers": 2, "epochs": 0.5}}
    run = resolve_task(tree_of(tmp_path, start, **keys), "task")
    assert [stage.num_steps for stage in run.stages] == [2, 2, 8]
    assert [stage.name for stage in run.stages] == [f"classification-{number}" for number in (1, 2, 3)]
    names = [entry.name for entry in model_entries(run.model)]
    trained = [{name.split(".")[1] for name in names if name.startswith("layers.") and not matches(name, stage.freeze)}
               for stage in run.stages]  # fmt: skip
    assert trained == [{"2", "3"}, {"0", "1", "2", "3"}, {"0", "1", "2", "3"}]
    assert [matches("embed_tokens.weight", stage.freeze) for stage in run.stages] == [True, True, False]
    assert not any(matches(name, stage.freeze) for name in ("classifier.weight", "pooler.bias") for stage in run.stages)
    assert check_patterns(run) == []
    # the learning rate is that of one run stage
    plain = resolve_task(tree_of(tmp_path, start, **{key: keys[key] for key in ("global_batch_size", "duration")}), "t")
    rates = [learning_rate(run.optimizer, stage, step) for stage in run.stages for step in range(stage.num_steps)]
    (whole,) = plain.stages
    expected = [learning_rate(plain.optimizer, whole, step) for step in range(whole.num_steps)]
    assert rates == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_a_layer_decay_is_a_key_of_a_task_file(tmp_path, start):
    write_examples(tmp_path)
    run = resolve_task(tree_of(tmp_path, start, layer_decay=0.9, learning_rate_factors={"pooler.*": 2.0}), "task")
    assert run.stages[0].learning_rate_factors["layers.3.*"] == 0.9
    assert run.stages[0].learning_rate_factors["pooler.*"] == 2.0
    assert run.stages[0].layer_decay is None
    with pytest.raises(ConfigError, match=r"stages\.0\.layer_decay = 1\.5"):
        resolve_task(tree_of(tmp_path, start, layer_decay=1.5), "task")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"duration": {"steps": 9}}, "takes 3 x 3 steps"),
        ({"schedule": {"shape": "cosine"}}, "shape = cosine with stages.0.unfreezing"),
        ({"schedule": {"shape": "linear", "warmup": 4}}, "whose first run stage has 3 steps"),
    ],
)
def test_an_unfreezing_that_does_not_fit_is_refused(changes, said):
    stage = {"name": "task", "duration": {"steps": 20}, "schedule": {"shape": "linear", "warmup": 1}} | changes
    with pytest.raises(ConfigError, match=said):
        unfrozen_stages(stage, MODEL, UnfreezingConfig(), 3.0, 1e-3)
