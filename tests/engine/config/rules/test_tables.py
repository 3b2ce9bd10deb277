"""Tables of weights and of replay ratios: one clear error for each mistake, and no new meaning where they change."""

from collections.abc import Mapping
from typing import Any

import pytest

from engine.config.load import parse_run
from engine.config.resolve import check
from engine.config.resume import compare, meaning_hashes
from engine.config.rules.tables import replay_ratios
from engine.config.schema.run import RunConfig
from engine.errors import ConfigError

SOURCES = [{"name": "web", "path": "web"}, {"name": "code", "path": "code"}]
TABLE = [{"from_step": 0, "weights": {"web": 3, "code": 1}}, {"from_tokens": 640, "weights": {"web": 0, "code": 1}}]


def config(replay: dict[str, Any] | None = None, num_stages: int = 1, **data: Any) -> RunConfig:
    """The keys are those of the last stage."""
    sizes = {"sequence_length": 16, "global_batch_size": 4, "duration": {"steps": 30}}
    last = sizes | {"data": data or {"train": "a"}} | ({} if replay is None else {"replay": replay})
    before = [sizes | {"name": str(number), "data": {"train": "a"}} for number in range(num_stages - 1)]
    model = {"vocab_size": 300, "num_layers": 1, "hidden_size": 16, "num_heads": 4}
    return parse_run({"folder": "run", "tokenizer": "t", "model": model, "stages": [*before, last]}, "test")


def rows(*given: tuple[int, Mapping[str, float]]) -> list[dict[str, Any]]:
    return [{"from_step": step, "weights": weights} for step, weights in given]


def of_sources(table: Any, sources: list[dict[str, Any]] = SOURCES, **keys: Any) -> RunConfig:
    return config(None, sources=sources, weights_table=table, **keys)


EVEN = {"web": 1, "code": 1}


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (lambda: of_sources([]), "weights_table is empty"),
        (lambda: of_sources(rows((5, EVEN))), "weights_table.0 begins at step 5"),
        (lambda: of_sources(rows((0, EVEN), (9, EVEN), (9, EVEN))), "weights_table.2 begins at step 9, stages.0.data."),
        (lambda: of_sources([TABLE[0], {"from_tokens": 1, "weights": EVEN}, *rows((1, EVEN))]), "does not rise"),
        (
            lambda: of_sources(rows((0, EVEN | {"wbe": 1}))),
            "no source has the name 'wbe'; allowed: web, code; to",
        ),
        (lambda: of_sources(rows((0, {"web": 1}))), "weights_table.0.weights: no weight for code"),
        (lambda: of_sources(rows((0, {"web": 0, "code": 0}))), "all weights are 0 (web: 0, code: 0)"),
        (lambda: of_sources(rows((0, {"web": 1, "code": 1e-9}))), "less than 1/65,536 of the sum"),
        (lambda: of_sources([{"weights": EVEN}]), "weights_table.0: 0 beginnings"),
        (lambda: of_sources([TABLE[0] | {"from_tokens": 0}]), "weights_table.0: 2 beginnings"),
        (
            lambda: of_sources(TABLE, [item | {"weight": 1} for item in SOURCES]),
            "with the weight of web, the weight",
        ),
        (lambda: of_sources(TABLE, temperature=2), "weights_table with temperature = 2"),
        (lambda: config(None, train="a", weights_table=TABLE), "weights_table without sources"),
        (lambda: config({"ratio": 0.1}), "stages.0.replay.source is missing, and no run stage comes before"),
        (lambda: config({"ratio": 0.1}, 2), "stages.1.replay.source is missing, and this run keeps no reservoir"),
        (lambda: config({"ratio": 1, "source": "b"}), "stages.0.replay.ratio = 1; allowed: 0 or more, and less than 1"),
        (lambda: config({"ratio": -0.1, "source": "b"}, 2), "stages.1.replay.ratio = -0.1"),
        (lambda: config({"ratio": [], "source": "b"}), "replay.ratio is empty"),
        (lambda: config({"ratio": [{"from_step": 2, "ratio": 0}], "source": "b"}), "replay.ratio.0 begins at step 2"),
        (lambda: config({"ratio": [{"from_step": 0, "ratio": 2}], "source": "b"}), "replay.ratio.0.ratio = 2"),
        (lambda: config({"ratio": 0.1, "source": "s3://b"}), "data.cache is missing, and stages.0.replay.source = s3:"),
        (
            lambda: config({"ratio": 0.1, "source": "b"}, sources=[{"name": "replay", "path": "a"}]),
            "the name 'replay' is that of replayed samples",
        ),
        (
            lambda: config({"ratio": 0, "source": "b"}, sources=[{"name": str(n), "path": "a"} for n in range(16)]),
            "16 sources beside replayed samples; allowed: 15",
        ),
    ],
)
def test_a_wrong_table_is_one_error(run, says):
    [problem] = check(run())
    assert says in str(problem).replace("\n  ", "; ")
    assert problem.remedy or "beginnings" in says


@pytest.mark.parametrize(
    ("ratio", "says"),
    [
        ("a lot", "stages.0.replay.ratio = 'a lot' is not allowed\n  allowed: input should be a valid number"),
        ([{"from_stp": 0, "ratio": 0.1}], "unknown key stages.0.replay.ratio.0.from_stp\n"),
        ([{"from_step": -1, "ratio": 0.1}], "stages.0.replay.ratio.0.from_step = -1 is not allowed"),
    ],
)
def test_a_ratio_that_is_none_is_told_by_its_own_key(ratio, says):
    with pytest.raises(ConfigError) as caught:
        config({"ratio": ratio, "source": "b"})
    assert says in str(caught.value)
    assert "2 problems" not in str(caught.value)


def test_ratios_are_the_fractions_that_were_written_and_tokens_are_rounded_up_to_steps():
    run = config({"ratio": [{"from_step": 0, "ratio": 0.1}, {"from_tokens": 65, "ratio": 0.25}], "source": "b"})
    assert [(step, str(ratio)) for step, ratio in replay_ratios(run.stages[0]) or ()] == [(0, "1/10"), (2, "1/4")]
    assert replay_ratios(config().stages[0]) is None


def test_shares_and_loss_weights_change_no_meaning_and_a_new_source_does():
    one = config({"ratio": 0.1, "source": "b"}, sources=SOURCES, weights_table=TABLE)
    two = config(
        {"ratio": [{"from_step": 0, "ratio": 0.5}], "source": "elsewhere", "loss_weight": 2},
        sources=[item | {"loss_weight": 3} for item in SOURCES],
        weights_table=rows((0, EVEN)),
    )
    assert {change.kind for change in compare(one, two)} == {"schedule", "execution"}
    assert [change.key for change in compare(one, two) if change.kind == "execution"] == ["stages.0.replay.source"]
    assert meaning_hashes(one) == meaning_hashes(two)
    plain = config(sources=SOURCES)
    weighed = config(sources=[item | {"weight": 1} for item in SOURCES])
    assert meaning_hashes(plain) == meaning_hashes(weighed) != meaning_hashes(one), "what is replayed is another source"
