"""Rules of a model by itself."""

import pytest

from engine.config.model import ONLY, check_model
from engine.config.schema import ModelConfig

GPT = {"vocab_size": 10, "num_layers": 1, "hidden_size": 8, "num_heads": 2}


def problems(**changes):
    found = []
    check_model(ModelConfig.model_validate(GPT | changes), found)
    return [str(problem) for problem in found]


@pytest.mark.parametrize(
    ("key", "value"), [("token_types", 2), ("pair_head", True), ("norm_position", "post")], ids=lambda value: str(value)
)
def test_keys_of_other_families_are_refused(key, value):
    [message] = problems(**{key: value})
    assert (
        f"model.{key} = {value} with model.family = gpt, which does not use it\n  allowed: model.family bert" in message
    )
    assert not problems(family="bert", **{key: value})


def test_every_such_key_is_one_of_the_model():
    assert ONLY.keys() <= ModelConfig.model_fields.keys()


def test_rms_norms_have_no_shift_to_leave_out():
    [message] = problems(norm="rmsnorm", norm_bias=False)
    assert "model.norm_bias = False with model.norm = rmsnorm" in message
    assert not problems(norm_bias=False)
