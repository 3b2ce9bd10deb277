"""Weights there and back through real transformers models, and what is refused.

That both tables are right is proven in `tests/engine/models/test_gpt.py` (logits and gradients); here they are
held to be inverse to each other and to notice every difference that they cannot carry.
"""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MegatronBertConfig,
    MistralConfig,
    ModernBertConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    T5Config,
)

from engine.checkpoint.interchange.forms import (
    BERT,
    BERT_WITHOUT_PAIRS,
    GPT2,
    GPT_NEOX,
    LLAMA,
    MEGATRON_BERT,
    MEGATRON_BERT_WITHOUT_PAIRS,
    MISTRAL,
    MODERN_BERT,
    QWEN2,
    QWEN3,
    ROBERTA,
    T5,
    Form,
    form_of,
    require_form,
)
from engine.checkpoint.interchange.huggingface import from_huggingface, to_huggingface
from engine.config.schema.model import BERTConfig, GPTConfig, ModelConfig, TaskHead
from engine.config.schema.model import T5Config as OurT5Config
from engine.config.schema.rotary import LinearScaling
from engine.errors import CheckpointError, ConfigError
from engine.models.materialize import whole_model
from tests.engine.models.tiny import BERT_FORMS, FORMS, T5_FORMS, random_weights, tiny, twin

ALL = FORMS | BERT_FORMS | T5_FORMS
TOKENS_BT = torch.arange(60).reshape(2, 30) * 7 % 500


@pytest.mark.parametrize("form", FORMS | BERT_FORMS)
def test_ours_to_theirs_and_back_is_bitwise_equal(form, tmp_path):
    config = (FORMS | BERT_FORMS)[form]
    weights = random_weights(config)
    theirs = twin(config, weights)
    theirs.save_pretrained(tmp_path)
    for source in (theirs, tmp_path):
        found_config, found = from_huggingface(source)
        assert to_huggingface(found_config, found)[0].to_dict() == to_huggingface(config, weights)[0].to_dict()
        assert found.keys() == weights.keys()
        for name, value in weights.items():
            assert torch.equal(found[name], value), name
            assert found[name].is_contiguous()


@pytest.mark.parametrize(
    "theirs",
    [
        GPT2LMHeadModel(GPT2Config(vocab_size=500, n_positions=64, n_embd=48, n_layer=2, n_head=3)),
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=500,
                hidden_size=48,
                intermediate_size=80,
                num_hidden_layers=2,
                num_attention_heads=6,
                num_key_value_heads=2,
                rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
            )
        ),
        GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=500,
                hidden_size=48,
                intermediate_size=80,
                num_hidden_layers=2,
                num_attention_heads=3,
                hidden_act="gelu_new",
            )
        ),
    ],
    ids=["gpt2", "llama", "neox"],
)
def test_a_model_of_theirs_computes_the_same_here_and_comes_back_whole(theirs):
    theirs = theirs.eval()
    config, weights = from_huggingface(theirs, vocab_multiple=64)
    assert config.padded_vocab_size == 512
    with torch.no_grad():
        # same derivation as in test_gpt, logits stay below 1
        distance = (
            (whole_model(config, weights)(tokens_BT=TOKENS_BT)["logits_BTV"] - theirs(TOKENS_BT).logits).abs().max()
        )
    assert distance < 4e-5
    _, state = to_huggingface(config, weights)
    # files of GPT-NeoX call the head as before transformers 5
    expected = {name.replace("lm_head", "embed_out"): value for name, value in theirs.state_dict().items()}
    if theirs.config.model_type != "gpt_neox":
        expected = theirs.state_dict()
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    assert expected.keys() - state.keys() == tied


def test_weights_do_not_share_memory_with_the_model_they_came_from():
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    _, weights = from_huggingface(theirs)
    before = {name: value.clone() for name, value in weights.items()}
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(1)
    assert all(torch.equal(weights[name], before[name]) for name in before)


def test_the_form_follows_from_the_fields():
    assert form_of(tiny("gpt2")) is GPT2
    assert form_of(tiny("llama")) is LLAMA
    assert form_of(tiny("mistral")) is MISTRAL
    assert form_of(tiny("mistral", sliding_window=None)) is LLAMA
    assert form_of(FORMS["qwen2-window"]) is QWEN2
    assert form_of(FORMS["qwen3-window"]) is QWEN3
    assert form_of(FORMS["neox-in-turn"]) is GPT_NEOX
    names = {"bert": BERT, "bert-without-pairs": BERT_WITHOUT_PAIRS, "roberta": ROBERTA, "modernbert": MODERN_BERT}
    assert {name: form_of(BERT_FORMS[name]) for name in names} == names


def test_positions_of_roberta_begin_behind_the_padding_token():
    config = BERT_FORMS["roberta"]
    weights = random_weights(config)
    theirs, state = to_huggingface(config, weights, padding_id=3)
    rows = state["roberta.embeddings.position_embeddings.weight"]
    assert (theirs.pad_token_id, theirs.max_position_embeddings, len(rows)) == (3, 132, 132)
    assert torch.equal(rows[4:], weights["embed_positions.weight"])
    assert not rows[:4].any()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tiny("gpt2", norm="rmsnorm"), r"nearest: GPT-2\): model.norm = rmsnorm\n  allowed: layernorm in GPT-2 form"),
        (tiny("gpt2", num_kv_heads=2), r"model.num_kv_heads = 2\n  allowed: 4 \(model.num_heads\) in GPT-2 form"),
        (tiny("gpt2", head_size=8), r"model.head_size = 8\n  allowed: 16 in GPT-2 form"),
        (tiny("t5", activation="swiglu"), "model.activation = swiglu\n  allowed: relu or geglu_tanh in T5 form"),
        (
            tiny("llama", bias=True, qkv_bias=False),
            r"nearest: Llama\): model.bias = True\n  allowed: False in Llama form",
        ),
        (tiny("qwen2", bias=True), r"nearest: Qwen2\): model.bias = True\n  allowed: False in Qwen2 form"),
        (tiny("qwen3", parallel_residual=True), r"nearest: Qwen3\): model.parallel_residual = True"),
        (tiny("qwen3", qkv_bias=True), r"nearest: Qwen3\): model.qkv_bias = True"),
        (tiny("mistral", first_window_layer=1), r"nearest: Mistral\): model.first_window_layer = 1\n  allowed: 0 in"),
        (tiny("llama", partial_rotary_factor=0.5), r"nearest: Llama\): model.partial_rotary_factor = 0.5"),
        (tiny("llama", num_heads=3, num_kv_heads=3, head_size=16), r"model.num_heads = 3\n  allowed: a divisor of 64"),
        (tiny("pythia", num_kv_heads=2), r"nearest: GPT-NeoX\): model.num_kv_heads = 2"),
        (tiny("pythia", sliding_window=8), r"nearest: GPT-NeoX\): model.sliding_window = 8"),
        (tiny("pythia", norm="rmsnorm"), r"nearest: GPT-NeoX\): model.norm = rmsnorm"),
        (tiny("llama", activation="gelu_tanh", position="learned", bias=True), "nearest: GPT-2.*: 2 problems"),
        (tiny("bert", activation="geglu"), r"nearest: BERT\): model.activation = geglu\n  allowed: gelu in BERT form"),
        (
            tiny("bert", norm_position="pre", embedding_norm=False, activation="gelu_tanh"),
            r"nearest: Megatron BERT\): model.activation = gelu_tanh\n  allowed: gelu in Megatron BERT form",
        ),
        (tiny("bert", token_types=0), "model.token_types = 0\n  allowed: 1 or more in BERT form"),
    ],
)
def test_a_mix_of_forms_is_refused_by_the_names_of_its_fields(config, message):
    with pytest.raises(ConfigError, match=message):
        to_huggingface(config, {})


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (
            OPTConfig(),
            "a Hugging Face model of type opt\n  allowed: gpt2 or llama or mistral or qwen2 or qwen3 or gpt_neox or",
        ),
        (BertConfig(hidden_act="relu"), "hidden_act = 'relu'\n  allowed: 'gelu'"),
        (MegatronBertConfig(hidden_act="gelu_new"), "hidden_act = 'gelu_new'\n  allowed: 'gelu'"),
        (RobertaConfig(), "type_vocab_size = 2\n  allowed: 1"),
        (
            ModernBertConfig(layer_types=["sliding_attention", "full_attention"] * 11),
            "layer_types = .*\n  allowed: full_attention for the first of every so many layers, sliding_attention for",
        ),
        (
            ModernBertConfig(layer_types=["full_attention"] * 22, mlp_bias=True),
            "biases that differ: .*'mlp_bias': True.*\n  allowed: one value",
        ),
        (GPT2Config(activation_function="relu"), "activation_function = 'relu'\n  allowed: 'gelu_new'"),
        (GPT2Config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx = True"),
        (LlamaConfig(attention_bias=True), "attention_bias = True\n  allowed: False"),
        (T5Config(feed_forward_proj="gated-silu"), "'gated-silu'\n  allowed: 'relu' or 'gated-gelu'"),
        (
            LlamaConfig(
                rope_parameters={"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "factor": 2.0}
            ),
            "rope_type = 'longrope'\n  allowed: 'default' or 'linear' or 'dynamic' or 'llama3' or 'yarn'",
        ),
        (
            LlamaConfig(rope_parameters={"rope_type": "yarn", "factor": 2.0, "mscale": 0.7, "mscale_all_dim": 1.0}),
            "this Llama model has no twin here: 2 problems(.|\n)*mscale = 0.7(.|\n)*attention_factor says the same",
        ),
        (
            LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 0.5}),
            "rope_scaling.linear.factor = 0.5 .*greater than or equal to 1",
        ),
        (LlamaConfig(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor = 0.5\n  allowed: 1.0"),
        (MistralConfig(sliding_window=1), "sliding_window = 1 .*greater than or equal to 2"),
        (
            Qwen2Config(layer_types=["sliding_attention"] + ["full_attention"] * 31),
            r"layer_types = (.|\n)*allowed: full_attention for the first layers, then sliding_attention",
        ),
        (Qwen3Config(attention_bias=True), "attention_bias = True\n  allowed: False"),
        (GPTNeoXConfig(attention_bias=False), "attention_bias = False\n  allowed: True"),
        (GPTNeoXConfig(hidden_act="silu"), "hidden_act = 'silu'\n  allowed: 'gelu' or 'gelu_pytorch_tanh' or 'relu'"),
        (LlamaConfig(hidden_act="gelu", mlp_bias=True), "this Llama model has no twin here: 2 problems"),
    ],
)
def test_what_ours_does_not_compute_is_refused(theirs, message):
    with pytest.raises(ConfigError, match=message):
        require_form(theirs).our_config(theirs, 128)


WITHOUT_MEANING: list[tuple[Form, type[ModelConfig], set[str]]] = [
    (GPT2, GPTConfig, {"rope_theta", "rope_scaling", "partial_rotary_factor", "first_window_layer"}),
    *((form, GPTConfig, {"norm_bias", "first_window_layer"}) for form in (LLAMA, MISTRAL, QWEN3)),
    (QWEN2, GPTConfig, {"norm_bias", "first_window_layer"}),
    (GPT_NEOX, GPTConfig, {"first_window_layer"}),
    *(
        (form, BERTConfig, {"rope_theta", "local_attention", "global_every", "local_rope_theta"})
        for form in (BERT, BERT_WITHOUT_PAIRS, ROBERTA, MEGATRON_BERT, MEGATRON_BERT_WITHOUT_PAIRS)
    ),
    (MODERN_BERT, BERTConfig, {"global_every"}),  # beyond the number of layers all values mean the same
    (T5, OurT5Config, {"num_kv_heads"}),
]
"""Keys of a family's section that a form has no use for, or that have one value in every run of the family."""


@pytest.mark.parametrize(("form", "section", "without"), WITHOUT_MEANING, ids=lambda value: getattr(value, "name", ""))
def test_every_key_of_the_model_comes_back_from_their_configuration(form, section, without):
    """A new key of a family's section must say what it means for the twins: changed, it is carried, or refused."""
    config = {one.name: config for config in reversed(ALL.values()) if (one := form_of(config))}[form.name]
    # an adapter is merged into the weights before they are theirs
    neither = {"vocab_multiple", "dropout", "attention_dropout", "family", "adapter", *without}
    theirs = form.their_config(config, padding_id=1)
    assert form.our_config(theirs, config.vocab_multiple) == config
    for key in section.model_fields.keys() - neither:
        other = tiny_change(config, key)
        try:
            found = form_of(other)
        except ConfigError:
            continue
        again = found.our_config(found.their_config(other, padding_id=1), other.vocab_multiple)
        assert getattr(again, key) == getattr(other, key), key


def tiny_change(config: ModelConfig, key: str) -> ModelConfig:
    """The model with another value of one key."""
    value = getattr(config, key)
    words = {
        "position": ("learned", "rope"),
        "norm": ("layernorm", "rmsnorm"),
        "activation": ("gelu", "swiglu"),
        "norm_position": ("pre", "post"),
    }
    if key in words:
        new: object = next(word for word in words[key] if word != value)
    elif isinstance(value, bool):
        new = not value
    elif key in ("num_kv_heads", "num_decoder_layers"):
        new = 1
    elif key == "task_head":
        new = TaskHead(task="classification", num_labels=3)
    elif key == "rope_scaling":
        new = LinearScaling(type="linear", factor=2.0)
    elif key == "first_window_layer":
        new = 1
    elif key == "partial_rotary_factor":
        new = value / 2
    elif value is None:
        new = 8 if key in ("local_attention", "sliding_window") else 50.0
    else:
        new = value * 2
    return config.model_copy(update={key: new})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("final_norm.bias"), "final_norm.bias: not in the source"),
        (lambda w: w.update({"extra.weight": torch.zeros(1)}), "extra.weight: not in the model"),
        (
            lambda w: w.update({"embed_tokens.weight": torch.zeros(512, 64)}),
            r"embed_tokens.weight: \(512, 64\) in the source, \(500, 64\) in the model",
        ),
        (lambda w: w.clear(), r"\.\.\. and 32 more"),
    ],
)
def test_weights_of_another_model_are_refused(change, message):
    config = tiny("gpt2")
    weights = random_weights(config)
    change(weights)
    with pytest.raises(CheckpointError, match=message):
        to_huggingface(config, weights)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read as a Hugging Face model"):
        from_huggingface(tmp_path / "nowhere")
    GPT2Config(vocab_size=10, n_embd=8, n_layer=1, n_head=2).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be read as a Hugging Face model(.|\n)*palimpsest convert"):
        from_huggingface(tmp_path)
