"""Rules of a model by itself."""

import pytest

from engine.config.rules.model import check_model
from engine.config.schema.model import make_model

GPT = {"vocab_size": 10, "num_layers": 1, "hidden_size": 8, "num_heads": 2}


def problems(**changes):
    found = []
    check_model(make_model(**(GPT | changes)), found)
    return [str(problem) for problem in found]


def test_rms_norms_have_no_shift_to_leave_out():
    [message] = problems(norm="rmsnorm", norm_bias=False)
    assert "model.norm_bias = False with model.norm = rmsnorm" in message
    assert not problems(norm_bias=False)


BERT = {"family": "bert"}
T5 = {"family": "t5", "vocab_size": 10, "num_layers": 4, "hidden_size": 8, "num_heads": 2}


ROPE = {"position": "rope", "head_size": 8}
LLAMA3 = {"type": "llama3", "factor": 8.0, "original_max_positions": 64}
YARN = {"type": "yarn", "factor": 8.0, "original_max_positions": 64}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": YARN}, "model.rope_scaling = yarn with model.position = learned\n  allowed: position rope"),
        ({"partial_rotary_factor": 0.5}, "model.partial_rotary_factor = 0.5 with model.position = learned"),
        (
            ROPE | {"partial_rotary_factor": 0.4},
            "model.partial_rotary_factor = 0.4 of model.head_size = 8 turns 3 dimensions\n  allowed: an even number",
        ),
        (ROPE | {"partial_rotary_factor": 0.1}, "turns 0 dimensions"),
        (ROPE | {"head_size": 7}, "model.position = rope needs an even head size, found 7"),
        (
            ROPE | {"partial_rotary_factor": 0.25, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "model.rope_scaling.type = dynamic with 2 rotated dimensions of a head\n  allowed: 4 or more",
        ),
        (
            ROPE | {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
            "model.rope_scaling.high_freq_factor = 1.0 with low_freq_factor = 1.0\n  allowed: more than",
        ),
        (
            ROPE | {"rope_scaling": YARN | {"beta_slow": 40.0}},
            "model.rope_scaling.beta_fast = 32.0 with beta_slow = 40.0\n  allowed: more than beta_slow",
        ),
        (ROPE | {"rope_scaling": YARN, "rope_theta": 1.0}, "model.rope_theta = 1 with model.rope_scaling.type = yarn"),
        ({"first_window_layer": 1}, "model.first_window_layer = 1 without model.sliding_window"),
        (
            {"first_window_layer": 1, "sliding_window": 4},
            "model.first_window_layer = 1 of model.num_layers = 1\n  allowed: 0 to 0",
        ),
    ],
)
def test_options_of_decoders_that_exclude_each_other(changes, message):
    [found] = problems(**changes)
    assert message in found


def test_options_of_decoders_go_together():
    changes = {"qk_norm": True, "qkv_bias": False, "parallel_residual": True, "sliding_window": 2}
    assert problems(**ROPE | changes | {"rope_scaling": YARN, "partial_rotary_factor": 0.5}) == []
    # learned positions have windows, norms of heads and parallel parts as well
    assert problems(**changes) == []


@pytest.mark.parametrize("model", [T5, GPT, T5 | {"hidden_size": 9, "head_size": 5}])
def test_whole_models_break_no_rule(model):
    assert problems(**model) == []


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (
            BERT,
            {"embedding_norm": False},
            "model.embedding_norm = False with model.norm_position = post\n  allowed: norm_position pre",
        ),
        (BERT, {"global_every": 4}, "model.global_every = 4 without model.local_attention\n  allowed: local_attention"),
        (
            BERT,
            {"local_attention": 8, "local_rope_theta": 100.0},
            "model.local_rope_theta = 100.0 with model.position = learned\n  allowed: position rope",
        ),
        (T5, {"num_decoder_layers": 4}, "model.num_decoder_layers = 4 of model.num_layers = 4"),
        (T5, {"num_layers": 1}, "model.num_decoder_layers = 1 of model.num_layers = 1"),
        (T5, {"relative_distance": 16}, "model.relative_buckets = 32\n  allowed: 17 or more"),
        (T5, {"num_kv_heads": 1}, "model.num_kv_heads = 1 with model.family = t5\n  allowed: 2 (model.num_heads)"),
        (T5, {"hidden_size": 9}, "one of 1, 3, 9\n  to do: or give model.head_size"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(model, changes, message):
    [found] = problems(**model | changes)
    assert message in found
