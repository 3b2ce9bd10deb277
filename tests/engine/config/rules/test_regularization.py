"""Rules of what a run stage keeps against forgetting: each one broken by itself, and its keys on resume."""

import pytest

from engine.config.resolve import examine
from engine.config.resume import compare
from tests.engine.config.run_config import config


def problems(*overrides: str) -> list[tuple[str, str, str]]:
    return [(one.wrong, one.allowed, one.remedy) for one in examine(config(*overrides), 1)[1]]


@pytest.mark.parametrize(
    ("override", "wrong", "allowed"),
    [
        (
            "stages.0.regularization={ewc: {strength: 1.0}}",
            "stages.0.regularization.ewc: no run stage comes before it whose data its Fisher information could be "
            "estimated on",
            "ewc from the second run stage on",
        ),
        (
            "stages.0.regularization={distillation: {strength: 1.0, top_k: 501}}",
            "stages.0.regularization.distillation.top_k = 501 is more than the 500 tokens of the vocabulary",
            "1 to 500",
        ),
        (
            "stages.0.ema={decay: 0.9, every_steps: 11}",
            "stages.0.ema.every_steps = 11 is never reached in a run stage of 10 steps",
            "1 to 10",
        ),
        (
            "stages.0.reptile={step_size: 0.3, every_steps: 11}",
            "stages.0.reptile.every_steps = 11 is never reached in a run stage of 10 steps",
            "1 to 10",
        ),
    ],
)
def test_a_broken_rule_names_key_value_and_way_out(override, wrong, allowed):
    [(found, may, remedy)] = problems(override)
    assert (found, may) == (wrong, allowed)
    assert "stages.0" in remedy


def two_stages(more: str) -> list[str]:
    rows = "data: {train: d}, sequence_length: 64, global_batch_size: 24"
    first, second = f"name: first, {rows}, duration: {{steps: 10}}", f"name: second, {rows}, duration: {{steps: 5}}"
    return [f"stages=[{{{first}}}, {{{second}, {more}}}]"]


def test_the_fisher_information_takes_no_more_batches_than_the_stage_before_has():
    assert problems(*two_stages("regularization: {ewc: {strength: 1.0, batches: 10}}")) == []
    [(wrong, allowed, remedy)] = problems(*two_stages("regularization: {ewc: {strength: 1.0, batches: 11}}"))
    key = "stages.1.regularization.ewc.batches"
    assert wrong == f"{key} = 11 is more than the 10 steps of the run stage before, first"
    assert (allowed, remedy) == ("1 to 10", f"lower {key}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.ema={decay: 1.0}", "less than 1"),
        ("stages.0.ema={decay: 0}", "greater than 0"),
        ("stages.0.reptile={every_steps: 2, step_size: 1.0}", "less than 1"),
        ("stages.0.regularization={l2_sp: {strength: 0}}", "greater than 0"),
        ("stages.0.regularization={l2sp: {strength: 1}}", "l2_sp"),
    ],
)
def test_values_out_of_range_and_unknown_keys_are_refused(override, message):
    with pytest.raises(Exception, match=message):
        config(override)


def test_a_stage_names_the_values_that_it_keeps():
    assert config().stages[0].added_moments == ()
    distilled = config("stages.0.regularization={distillation: {strength: 1.0}}")
    assert distilled.stages[0].added_moments == ("first_weights",)
    everything = two_stages(
        "regularization: {l2_sp: {strength: 1.0}, ewc: {strength: 1.0}}, ema: {decay: 0.9}, "
        "reptile: {every_steps: 2, step_size: 0.5}"
    )
    assert config(*everything).stages[1].added_moments == ("first_weights", "fisher", "ema", "reptile")


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        ("regularization={l2_sp: {strength: 1.0}}", "regularization={l2_sp: {strength: 2.0}}", "meaning"),
        ("regularization={}", "regularization={l2_sp: {strength: 2.0}}", "meaning"),
        ("regularization={l2_sp: {strength: 2.0}}", "regularization={}", "meaning"),
        ("ema=null", "ema={decay: 0.9}", "schedule"),
        ("ema={decay: 0.9}", "ema=null", "schedule"),
        ("reptile=null", "reptile={every_steps: 2, step_size: 0.5}", "meaning"),
        ("reptile={every_steps: 2, step_size: 0.5}", "reptile={every_steps: 2, step_size: 0.4}", "meaning"),
    ],
)
def test_the_average_may_come_and_go_within_a_stage_and_what_shapes_the_training_may_not(before, after, kind):
    changes = compare(config(f"stages.0.{before}"), config(f"stages.0.{after}"))
    strictest = "meaning" if any(change.kind == "meaning" for change in changes) else "schedule"
    assert changes
    assert strictest == kind
