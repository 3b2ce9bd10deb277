"""Key values of published configurations, by the name of their repository on the Hugging Face hub, whose `config.json`
is the source of each row. Values are facts; no file is copied, and keys that say nothing of the model are left out.

`parameters` is the number that transformers counts, with a head that is tied once, and without what ours lacks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """A published configuration: its model type, its keys, and what becomes of it here."""

    model_type: str
    keys: dict[str, Any]
    form: str = ""
    """Name of the form that a model of ours with these keys has; empty where it is refused."""
    parameters: int = 0
    refused: str = ""
    """Pattern of the error that refuses it."""
    architecture: str = ""


def _gpt2(layers: int, width: int, heads: int, parameters: int) -> Published:
    keys = {"vocab_size": 50257, "n_positions": 1024, "n_ctx": 1024, "n_layer": layers, "n_embd": width}
    keys |= {"n_head": heads, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
    return Published("gpt2", keys, "GPT-2", parameters)


def _llama(form: str, sizes: tuple[int, ...], parameters: int, model_type: str = "llama", **keys: Any) -> Published:
    names = ("vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size")
    names += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    tied = {"tie_word_embeddings": False, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
    return Published(model_type, dict(zip(names, sizes, strict=True)) | tied | keys, form, parameters)


def _llama3(factor: float) -> dict[str, Any]:
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
    return {"rope_theta": 500000.0, "rope_scaling": scaling | {"original_max_position_embeddings": 8192}}


def _qwen(version: int, sizes: tuple[int, ...], parameters: int, **keys: Any) -> Published:
    window = {"use_sliding_window": False, "sliding_window": sizes[-1], "max_window_layers": sizes[1]}
    common = {"rms_norm_eps": 1e-6, "rope_theta": 1000000.0} | window
    if version == 3:
        common |= {"head_dim": 128, "attention_bias": False, "sliding_window": None}
    return _llama(f"Qwen{version}", sizes, parameters, f"qwen{version}", **common, **keys)


def _pythia(layers: int, width: int, heads: int, vocab_size: int, parameters: int) -> Published:
    keys = {"vocab_size": vocab_size, "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    keys |= {"intermediate_size": 4 * width, "max_position_embeddings": 2048, "layer_norm_eps": 1e-5}
    keys |= {"hidden_act": "gelu", "rotary_pct": 0.25, "rotary_emb_base": 10000, "use_parallel_residual": True}
    return Published("gpt_neox", keys | {"tie_word_embeddings": False}, "GPT-NeoX", parameters)


def _bert(
    form: str,
    vocab_size: int,
    layers: int,
    width: int,
    parameters: int,
    architecture: str = "BertForPreTraining",
    model_type: str = "bert",
) -> Published:
    keys = {"vocab_size": vocab_size, "num_hidden_layers": layers, "hidden_size": width}
    keys |= {"num_attention_heads": width // 64, "intermediate_size": 4 * width, "max_position_embeddings": 512}
    keys |= {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
    return Published(model_type, keys, form, parameters, architecture=architecture)


def _t5(sizes: tuple[int, ...], parameters: int, model_type: str = "t5", **keys: Any) -> Published:
    names = ("vocab_size", "num_layers", "num_decoder_layers", "d_model", "d_ff", "num_heads", "d_kv")
    common = {"relative_attention_num_buckets": 32, "layer_norm_epsilon": 1e-6}
    return Published(model_type, dict(zip(names, sizes, strict=True)) | common | keys, "T5", parameters)


V11 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

PUBLISHED: dict[str, Published] = {
    "openai-community/gpt2": _gpt2(12, 768, 12, 124_439_808),
    "openai-community/gpt2-medium": _gpt2(24, 1024, 16, 354_823_168),
    "openai-community/gpt2-large": _gpt2(36, 1280, 20, 774_030_080),
    "openai-community/gpt2-xl": _gpt2(48, 1600, 25, 1_557_611_200),
    "meta-llama/Llama-2-7b-hf": _llama("Llama", (32000, 32, 4096, 11008, 32, 32, 4096), 6_738_415_616),
    "meta-llama/Llama-2-70b-hf": _llama("Llama", (32000, 80, 8192, 28672, 64, 8, 4096), 68_976_648_192),
    "meta-llama/Meta-Llama-3-8B": _llama(
        "Llama", (128256, 32, 4096, 14336, 32, 8, 8192), 8_030_261_248, rope_theta=500000.0
    ),
    "meta-llama/Llama-3.1-8B": _llama("Llama", (128256, 32, 4096, 14336, 32, 8, 131072), 8_030_261_248, **_llama3(8.0)),
    "meta-llama/Llama-3.2-1B": _llama(
        "Llama",
        (128256, 16, 2048, 8192, 32, 8, 131072),
        1_235_814_400,
        **_llama3(32.0) | {"head_dim": 64, "tie_word_embeddings": True},
    ),
    "meta-llama/Llama-3.2-3B": _llama(
        "Llama",
        (128256, 28, 3072, 8192, 24, 8, 131072),
        3_212_749_824,
        **_llama3(32.0) | {"head_dim": 128, "tie_word_embeddings": True},
    ),
    "mistralai/Mistral-7B-v0.1": _llama(
        "Mistral",
        (32000, 32, 4096, 14336, 32, 8, 32768),
        7_241_732_096,
        "mistral",
        sliding_window=4096,
        rope_theta=10000.0,
    ),
    "mistralai/Mistral-7B-v0.3": _llama(
        "Llama",
        (32768, 32, 4096, 14336, 32, 8, 32768),
        7_248_023_552,
        "mistral",
        sliding_window=None,
        rope_theta=1000000.0,
    ),
    "Qwen/Qwen2-0.5B": _qwen(2, (151936, 24, 896, 4864, 14, 2, 131072), 494_032_768, tie_word_embeddings=True),
    "Qwen/Qwen2.5-7B": _qwen(2, (152064, 28, 3584, 18944, 28, 4, 131072), 7_615_616_512),
    # with the scaling to longer rows that its card recommends
    "Qwen/Qwen2.5-7B-Instruct": _qwen(
        2, (152064, 28, 3584, 18944, 28, 4, 32768), 7_615_616_512, rope_scaling=dict(YARN)
    ),
    "Qwen/Qwen3-0.6B": _qwen(3, (151936, 28, 1024, 3072, 16, 8, 40960), 596_049_920, tie_word_embeddings=True),
    "Qwen/Qwen3-8B": _qwen(3, (151936, 36, 4096, 12288, 32, 8, 40960), 8_190_735_360),
    "EleutherAI/pythia-160m": _pythia(12, 768, 12, 50304, 162_322_944),
    "EleutherAI/pythia-1.4b": _pythia(24, 2048, 16, 50304, 1_414_647_808),
    "EleutherAI/pythia-6.9b": _pythia(32, 4096, 32, 50432, 6_857_302_016),
    "google-bert/bert-base-uncased": _bert("BERT", 30522, 12, 768, 110_106_428),
    "google-bert/bert-large-uncased": _bert("BERT", 30522, 24, 1024, 336_226_108),
    "google-bert/bert-base-chinese": _bert("BERT without pairs", 21128, 12, 768, 102_290_312, "BertForMaskedLM"),
    # 124,697,433 with the positions of the padding token and before it
    "FacebookAI/roberta-base": Published(
        "roberta",
        {"vocab_size": 50265, "num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12}
        | {"intermediate_size": 3072, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
        | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
        "RoBERTa",
        124_697_433 - 2 * 768,
    ),
    # without a config.json: these are the keys that transformers' own conversion of Megatron-LM's checkpoint writes
    "nvidia/megatron-bert-uncased-345m": _bert(
        "Megatron BERT", 30592, 24, 1024, 336_297_858, "MegatronBertForPreTraining", "megatron-bert"
    ),
    "answerdotai/ModernBERT-base": Published(
        "modernbert",
        {"vocab_size": 50368, "num_hidden_layers": 22, "hidden_size": 768, "num_attention_heads": 12}
        | {"intermediate_size": 1152, "max_position_embeddings": 8192, "local_attention": 128, "norm_eps": 1e-5}
        | {"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0}
        | {"attention_bias": False, "mlp_bias": False, "norm_bias": False, "classifier_bias": False}
        | {"hidden_activation": "gelu", "decoder_bias": True, "tie_word_embeddings": True},
        "ModernBERT",
        149_655_232,
    ),
    "google-t5/t5-small": _t5((32128, 6, 6, 512, 2048, 8, 64), 60_506_624, n_positions=512),
    "google-t5/t5-base": _t5((32128, 12, 12, 768, 3072, 12, 64), 222_903_552, n_positions=512),
    "google/t5-v1_1-base": _t5((32128, 12, 12, 768, 2048, 12, 64), 247_577_856, **V11),
    "google/mt5-small": _t5((250112, 8, 8, 512, 1024, 6, 64), 300_176_768, "mt5", **V11),
    # refused
    "microsoft/Phi-3-mini-128k-instruct": Published("phi3", {}, refused="a Hugging Face model of type phi3"),
    "openai-community/openai-gpt": Published("openai-gpt", {}, refused="a Hugging Face model of type openai-gpt"),
    "microsoft/phi-2": Published("phi", {}, refused="a Hugging Face model of type phi"),
}
