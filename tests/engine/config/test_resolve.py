"""Rules that join fields: each one broken by itself, and all of them in one report."""

from pathlib import Path

import pytest

from engine.config.resolve import Layout, examine, num_micro_batches, resolve
from engine.config.rules.model import divisors
from engine.config.schema.objective import ObjectiveConfig
from engine.errors import ConfigError
from tests.engine.config.run_config import config


@pytest.mark.parametrize(
    ("overrides", "world_size", "expected"),
    [
        ([], 1, Layout(1, 1, 1, 1)),
        ([], 8, Layout(1, 8, 1, 1)),
        (["parallel.pipe=2", "parallel.tensor=2"], 8, Layout(2, 2, 1, 2)),
        (["parallel.data=3", "parallel.pipe=2"], 6, Layout(2, 3, 1, 1)),
    ],
)
def test_layouts(overrides: list[str], world_size: int, expected: Layout) -> None:
    layout = resolve(config(*overrides), world_size)
    assert layout == expected
    assert layout.world_size == world_size


def test_micro_batches() -> None:
    run = config("parallel.micro_batch_size=2")
    assert num_micro_batches(24, run.parallel, 3) == 4


@pytest.mark.parametrize(
    ("overrides", "world_size", "wrong", "allowed"),
    [
        (["model.num_heads=5"], 1, "model.num_heads = 5 does not divide model.hidden_size = 64", "1, 2, 4, 8"),
        (
            ["launch.collective_limit_seconds=1800"],
            1,
            "launch.collective_limit_seconds = 1800 with launch.start_limit_seconds = 1800 and "
            "launch.save_limit_seconds = 1800",
            "more than 1800 seconds",
        ),
        (
            ["launch.save_limit_seconds=4000"],
            1,
            "launch.collective_limit_seconds = 3600 with",
            "more than 4000 seconds",
        ),
        (
            ["model.num_kv_heads=3"],
            1,
            "model.num_kv_heads = 3 does not divide model.num_heads = 4",
            "one of 1, 2, 4",
        ),
        (
            ["model.position=rope", "model.num_heads=64"],
            1,
            "model.position = rope needs an even head size, found 1",
            "even",
        ),
        (["parallel.pipe=5"], 5, "parallel.pipe = 5 is more than model.num_layers = 4", "1 to 4"),
        (
            ["parallel.tensor=3", "model.hidden_size=66", "model.num_heads=6", "model.feed_forward_size=66"],
            3,
            "parallel.tensor = 3 does not divide the padded vocabulary = 512",
            "one of 1, 2",
        ),
        (
            ["parallel.tensor=4", "model.num_kv_heads=2"],
            4,
            "parallel.tensor = 4 does not divide model.num_kv_heads = 2",
            "one of 1, 2",
        ),
        (
            ["parallel.tensor=4", "model.feed_forward_size=102"],
            4,
            "parallel.tensor = 4 does not divide model.feed_forward_size = 102",
            "one of 1, 2",
        ),
        (["parallel.zero_stage=0"], 1, "parallel.zero_stage = 0 with precision.dtype = bf16", "zero_stage 1, 2 or 3"),
        (
            ["precision.dtype=fp32", "precision.reduce_dtype=bf16"],
            1,
            "precision.reduce_dtype = bf16 with precision.dtype = fp32",
            "fp32",
        ),
        (
            ["stages.0.sequence_length=256"],
            1,
            "stages.0.sequence_length = 256 is more than model.max_positions = 128",
            "1 to 128",
        ),
        (["stages.0.duration={}"], 1, "stages.0.duration", "exactly one of steps and tokens"),
        (["stages.0.duration.tokens=100"], 1, "stages.0.duration", "exactly one of steps and tokens"),
        (
            ["stages.0.schedule.warmup=11"],
            1,
            "stages.0.schedule: warmup 11 is more than the stage's 10 steps",
            "0 to 10",
        ),
        (["parallel.pipe=2"], 3, "a world of 3 does not fit pipe 2 x tensor 1", "a multiple of 2 ranks"),
        (["parallel.data=4"], 3, "a world of 3 does not fit pipe 1 x tensor 1 x data 4", "4 ranks"),
        (["parallel.pipe=4"], 2, "a world of 2 does not fit pipe 4", "a multiple of 4 ranks"),
        (
            [],
            5,
            "stages.0.global_batch_size = 24 is no multiple of micro_batch_size 1 x data 5",
            "a multiple of 5",
        ),
    ],
)
def test_each_rule(overrides: list[str], world_size: int, wrong: str, allowed: str) -> None:
    run = config(*overrides)
    with pytest.raises(ConfigError) as caught:
        resolve(run, world_size)
    plural = "s" if world_size > 1 else ""
    assert caught.value.wrong.startswith(f"this run cannot start on {world_size} rank{plural}: {wrong}")
    assert allowed in caught.value.allowed
    layout, problems = examine(run, world_size)
    assert [problem.wrong for problem in problems] == [
        caught.value.wrong.removeprefix(f"this run cannot start on {world_size} rank{plural}: ")
    ]
    assert (layout is None) == ("does not fit" in wrong)


def test_run_stages_have_names_of_their_own():
    run = config()
    twice = run.model_copy(update={"stages": run.stages * 2})
    with pytest.raises(ConfigError, match="stages: the name 'pretrain' is used twice"):
        resolve(twice, 1)
    [stage] = run.stages
    named = run.model_copy(update={"stages": (stage, stage.model_copy(update={"name": "more"}))})
    assert resolve(named, 1) == Layout(1, 1, 1, 1)


def test_the_rules_hold_for_every_run_stage():
    """What cannot follow in the later one is told with its own key."""
    run = config()
    [stage] = run.stages
    other = {"name": "more", "sequence_length": 256, "objective": ObjectiveConfig(name="masked")}
    long = run.model_copy(update={"stages": (stage, stage.model_copy(update=other))})
    with pytest.raises(ConfigError) as caught:
        resolve(long, 1)
    assert "stages.1.sequence_length = 256 is more than model.max_positions = 128" in str(caught.value)
    assert "stages.1.objective.name = masked with model.family = gpt" in str(caught.value)


def test_the_first_run_stage_has_no_optimizer_state_to_reset():
    with pytest.raises(ConfigError, match=r"stages.0.optimizer_state = reset: no run stage comes before it"):
        resolve(config("stages.0.optimizer_state=reset"), 1)


def test_every_problem_is_in_one_report() -> None:
    run = config("model.num_kv_heads=3", "parallel.zero_stage=0", "parallel.pipe=8", "stages.0.sequence_length=512")
    with pytest.raises(ConfigError) as caught:
        resolve(run, 12)
    text = str(caught.value)
    assert text.startswith("this run cannot start on 12 ranks: 5 problems")
    for part in ("num_kv_heads", "zero_stage", "parallel.pipe", "sequence_length", "a world of 12"):
        assert part in text


def test_a_constant_schedule_has_no_end_to_overrun() -> None:
    assert resolve(config("stages.0.schedule={shape: constant, warmup: 50}"), 1)


def test_divisors() -> None:
    for number in range(1, 300):
        assert divisors(number) == [one for one in range(1, number + 1) if number % one == 0]


REPOSITORY = Path(__file__).parents[3]
WORLDS = {"zero3-pipe": 2, "gpt2-124m": 8, "llama-1b": 16, "bert-base": 8}
RUNS = sorted(path for folder in ("smoke", "runs", "examples") for path in REPOSITORY.glob(f"configs/{folder}/*.yaml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_run_that_is_shipped_resolves(path: Path) -> None:
    from engine.config.load import load_run

    run = load_run(path)
    assert resolve(run, WORLDS.get(path.stem, run.parallel.pipe * run.parallel.tensor * (run.parallel.data or 1)))


SHOWN = {
    "batch-ramp": ["stages.0.batch_ramp"],
    "distillation": ["stages.1.regularization.distillation.top_k"],
    "ema": ["stages.1.ema.decay"],
    "ewc": ["stages.1.regularization.ewc.batches"],
    "freeze": ["stages.1.freeze"],
    "gather-and-reduce": ["parallel.gather_within", "parallel.reduce"],
    "l2-sp": ["stages.1.regularization.l2_sp.strength"],
    "memory-checkpoints": ["checkpoint.memory"],
    "mixture": ["stages.0.data.sources"],
    "recompute-budget": ["parallel.activation_gib"],
    "replay": ["stages.1.replay.ratio"],
    "replay-reservoir": ["reservoir.rows", "stages.1.replay.ratio"],
    "reptile": ["stages.1.reptile.step_size"],
    "rollback": ["stability.rollback_spikes"],
    "url-cache": ["stages.0.data.cache"],
    "weights-table": ["stages.0.data.weights_table", "stages.0.data.sources.2.loss_weight"],
    "wsd": ["stages.0.schedule.decay"],
}
"""Keys that an example is there to show."""


def test_each_example_has_comments_and_the_keys_that_it_shows() -> None:
    from engine.config.load import load_run

    examples = {path.stem: path for path in RUNS if path.parent.name == "examples"}
    assert examples.keys() == SHOWN.keys()
    for name, path in examples.items():
        lines, run = path.read_text(encoding="utf-8").splitlines(), load_run(path)
        assert lines[0].startswith("# ")
        assert sum("#" in line for line in lines) >= 4, name
        for key in SHOWN[name]:
            value: object = run
            for part in key.split("."):
                value = value[int(part)] if isinstance(value, tuple) else getattr(value, part)
            assert value, f"{name}: {key}"
