"""The tiny models of `configs/models`, with random values everywhere, and their transformers twins."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import transformers

from engine.checkpoint.interchange.forms import form_of
from engine.checkpoint.interchange.huggingface import to_huggingface
from engine.config.load import read_tree
from engine.config.schema.model import ModelConfig, make_model
from engine.models.families import family
from engine.models.gpt import EMBEDDING, HEAD

MODELS = Path(__file__).parents[3] / "configs" / "models"


def tiny(form: str, **changes) -> ModelConfig:
    """The tiny model of a form with some keys changed."""
    return make_model(**{**read_tree(MODELS / f"tiny-{form}.yaml")["model"], **changes})


# The second of each form also leaves the values that both libraries have by default.
FORMS = {
    "gpt2": tiny("gpt2"),
    "gpt2-untied": tiny("gpt2", tie_embeddings=False, feed_forward_size=192, norm_epsilon=1e-3),
    "llama": tiny("llama"),
    "llama-tied": tiny("llama", tie_embeddings=True, num_kv_heads=4, rope_theta=100.0, norm_epsilon=1e-3),
    "llama3": tiny("llama", rope_scaling={"type": "llama3", "factor": 8.0, "original_max_positions": 32}),
    "llama-linear": tiny("llama", rope_scaling={"type": "linear", "factor": 2.5}),
    "llama-dynamic": tiny("llama", rope_scaling={"type": "dynamic", "factor": 2.0}),
    "llama-yarn": tiny("llama", rope_scaling={"type": "yarn", "factor": 4.0, "original_max_positions": 32}),
    "mistral": tiny("mistral"),
    "mistral-wide": tiny("mistral", sliding_window=21, num_kv_heads=4, head_size=24, rope_theta=100.0),
    "qwen2": tiny("qwen2"),
    "qwen2-window": tiny("qwen2", sliding_window=5, first_window_layer=2, tie_embeddings=False, head_size=24),
    "qwen3": tiny("qwen3"),
    "qwen3-window": tiny("qwen3", sliding_window=12, tie_embeddings=False, num_kv_heads=4, norm_epsilon=1e-3),
    "pythia": tiny("pythia"),
    "neox-in-turn": tiny(
        "pythia",
        parallel_residual=False,
        tie_embeddings=True,
        partial_rotary_factor=0.5,
        rope_theta=100.0,
        feed_forward_size=96,
        activation="gelu_tanh",
        norm_epsilon=1e-3,
        rope_scaling={"type": "yarn", "factor": 2.0, "original_max_positions": 64, "attention_factor": 1.5}
        | {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False},
    ),
}

# at odd sizes
MEGATRON_BERT = {"norm_position": "pre", "embedding_norm": False, "norm_epsilon": 1e-5}
MEGATRON_BERT |= {"hidden_size": 60, "feed_forward_size": 76, "max_positions": 77}
BERT_FORMS = {
    "bert": tiny("bert"),
    "bert-wide": tiny("bert", feed_forward_size=192, norm_epsilon=1e-3, token_types=3),
    "bert-without-pairs": tiny("bert", pair_head=False),
    "roberta": tiny("bert", pair_head=False, token_types=1),
    "megatron-bert": tiny("bert", **MEGATRON_BERT),
    "megatron-bert-without-pairs": tiny("bert", **MEGATRON_BERT, pair_head=False, token_types=1),
    "modernbert": tiny("modernbert"),
    "modernbert-biased": tiny(
        "modernbert", bias=True, norm_bias=True, tie_embeddings=False, rope_theta=100.0, local_rope_theta=None
    ),
    "modernbert-wide": tiny("modernbert", local_attention=18, global_every=2, local_rope_theta=50.0),
    "modernbert-global": tiny("modernbert", local_attention=None, local_rope_theta=None),
}

T5_FORMS = {
    "t5": tiny("t5"),
    "t5-v1.1": tiny("t5", tie_embeddings=False, activation="geglu_tanh", num_decoder_layers=2, norm_epsilon=1e-3),
}


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Stored values in which nothing is 0 or 1 by accident and attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for spec in family(config).specs(config):
        value = torch.randn(spec.stored_shape, generator=generator)
        matrix = len(spec.shape) == 2
        values[spec.name] = value / math.sqrt(spec.shape[1]) if matrix else value * 0.3 + spec.name.endswith("weight")
    values[EMBEDDING] *= 2
    return values


def twin(config: ModelConfig, weights: dict[str, torch.Tensor]):
    """The Hugging Face model of our configuration and weights."""
    their_config, state = to_huggingface(config, {name: value.clone() for name, value in weights.items()})
    kind = getattr(transformers, form_of(config).architecture)
    model, info = kind.from_pretrained(None, config=their_config, state_dict=state, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert set(info["missing_keys"]) <= ({HEAD} if config.tie_embeddings else set())
    return model.eval()
