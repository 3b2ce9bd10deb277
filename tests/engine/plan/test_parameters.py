"""Parameter counts against published sizes, closed forms and the models that are built."""

import pytest

from engine.config.objectives import RowLengths
from engine.config.schema.adapter import (
    AdaLoRAConfig,
    BottleneckConfig,
    IA3Config,
    LoRAConfig,
    PrefixConfig,
    PromptConfig,
)
from engine.config.schema.model import GPTConfig, ModelConfig, T5Config, make_model
from engine.plan import gpt, parts
from engine.plan.cut import cut_layers
from engine.plan.parameters import counted_entries, model_entries, num_parameters, stage_entries

GPT2 = GPTConfig(vocab_size=50257, num_layers=12, hidden_size=768, num_heads=12)
LLAMA = GPTConfig(
    vocab_size=32000,
    num_layers=22,
    hidden_size=2048,
    num_heads=32,
    num_kv_heads=4,
    feed_forward_size=5632,
    position="rope",
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
    tie_embeddings=False,
)
T5 = T5Config(
    family="t5",
    vocab_size=32128,
    num_layers=24,
    hidden_size=768,
    num_heads=12,
    feed_forward_size=3072,
    norm="rmsnorm",
    activation="relu",
    bias=False,
)
SMALL = [
    GPTConfig(vocab_size=500, num_layers=3, hidden_size=32, num_heads=4),
    GPTConfig(vocab_size=500, num_layers=2, hidden_size=32, num_heads=4, bias=False, tie_embeddings=False),
    LLAMA.model_copy(
        update={
            "vocab_size": 300,
            "num_layers": 2,
            "hidden_size": 32,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_size": 8,
        }
        | {"feed_forward_size": 48}
    ),
    LLAMA.model_copy(
        update={"vocab_size": 300, "num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2}
        | {"head_size": 6, "feed_forward_size": 48, "qkv_bias": True, "qk_norm": True, "parallel_residual": True}
    ),
    *(
        make_model(
            **{"family": "bert", "vocab_size": 500, "num_layers": 3, "hidden_size": 32, "num_heads": 4} | changes
        )
        for changes in (
            {"norm_position": "post", "token_types": 2, "pair_head": True, "activation": "gelu"},
            {"position": "rope", "bias": False, "norm_bias": False, "activation": "geglu", "tie_embeddings": False},
        )
    ),
    T5.model_copy(
        update={
            "vocab_size": 300,
            "num_layers": 5,
            "num_decoder_layers": 2,
            "hidden_size": 32,
            "num_heads": 4,
            "num_kv_heads": 4,
        }
        | {"head_size": 6, "activation": "geglu_tanh", "tie_embeddings": False, "feed_forward_size": 40}
    ),
]
SMALL[3:3] = [
    SMALL[0].model_copy(update={"adapter": LoRAConfig(method="lora", rank=3, targets=("*",))}),
    SMALL[2].model_copy(update={"adapter": IA3Config(method="ia3")}),
]
SMALL += [
    SMALL[-1].model_copy(update={"adapter": BottleneckConfig(method="bottleneck", size=5)}),
    SMALL[0].model_copy(update={"adapter": BottleneckConfig(method="bottleneck", targets=("ffn",))}),
]
SMALL += [
    SMALL[2].model_copy(update={"adapter": AdaLoRAConfig(method="adalora", rank=2, initial_rank=3)}),
    SMALL[0].model_copy(update={"adapter": PromptConfig(method="prompt", virtual_tokens=3)}),
    SMALL[2].model_copy(update={"adapter": PrefixConfig(method="prefix", virtual_tokens=3)}),
    SMALL[6].model_copy(update={"adapter": PromptConfig(method="prompt", virtual_tokens=3)}),
]
SMALL.append(
    make_model(
        **{"family": "bert", "vocab_size": 500, "num_layers": 3, "hidden_size": 32, "num_heads": 4}
        | {"norm_position": "pre", "embedding_norm": False, "pair_head": True}
    )
)
SMALL.append(SMALL[8].model_copy(update={"adapter": LoRAConfig(method="lora", targets=("*",))}))
FORMS = ["gpt2 form", "untied", "llama form", "lora", "ia3", "options", "bert form", "modern encoder", "t5"]
FORMS += ["t5 bottleneck", "bottleneck", "adalora", "prompt", "prefix", "bert prompt", "megatron bert", "t5 lora"]


@pytest.mark.parametrize(
    ("model", "published"),
    [
        (GPT2, 124_439_808),
        (GPTConfig(vocab_size=50257, num_layers=24, hidden_size=1024, num_heads=16), 354_823_168),
        (GPTConfig(vocab_size=50257, num_layers=48, hidden_size=1600, num_heads=25), 1_557_611_200),
        (LLAMA, 1_100_048_384),
        (T5, 222_903_552),
        (
            T5.model_copy(update={"activation": "geglu_tanh", "feed_forward_size": 2048, "tie_embeddings": False}),
            247_577_856,
        ),
    ],
    ids=["gpt2", "gpt2-medium", "gpt2-xl", "tinyllama", "t5-base", "t5-v1.1-base"],
)
def test_published_sizes(model: ModelConfig, published: int) -> None:
    assert num_parameters(model) == published


def test_padding_adds_rows_to_every_vocabulary_matrix() -> None:
    untied = GPT2.model_copy(update={"tie_embeddings": False})
    assert num_parameters(GPT2, padded=True) - num_parameters(GPT2) == (50304 - 50257) * 768
    assert num_parameters(untied, padded=True) - num_parameters(untied) == 2 * (50304 - 50257) * 768


@pytest.mark.parametrize("model", SMALL, ids=FORMS)
def test_the_list_is_that_of_the_model_that_is_built(model: ModelConfig) -> None:
    from engine.models.families import family

    built = {spec.name: spec for spec in family(model).specs(model)}
    planned = {entry.name: entry for entry in model_entries(model)}
    assert planned.keys() == built.keys()
    for name, entry in planned.items():
        assert entry.shape == built[name].shape, name
        assert entry.local_numel(2) == built[name].local_numel(2), name


@pytest.mark.parametrize("model", SMALL[:8], ids=FORMS[:8])
def test_stages_together_hold_the_model_and_a_tied_matrix_twice(model: ModelConfig) -> None:
    whole = sum(entry.numel for entry in model_entries(model))
    stages = [
        stage_entries(model, layers, is_first=stage == 0, is_last=stage == 1)
        for stage, layers in enumerate(cut_layers(model, 2, RowLengths(1024, predicted=1024)))
    ]
    twice = model.padded_vocab_size * model.hidden_size if model.tie_embeddings else 0
    assert sum(entry.numel for entries in stages for entry in entries) == whole + twice


def test_matrices_of_a_gpt2_layer_are_12_squares() -> None:
    assert parts.matrix_elements(gpt.layer_entries(GPT2, 3)) == 12 * 768**2


@pytest.mark.parametrize("model", SMALL, ids=FORMS)
def test_equal_layers_are_counted_as_one_parameter_each(model: ModelConfig) -> None:
    layers = range(1, model.num_layers)
    whole = stage_entries(model, layers, is_first=False, is_last=True)
    counted = {entry.name: entry for entry in counted_entries(model, layers, False, True)}
    assert sum(entry.count for entry in counted.values()) == len(whole)
    assert sum(entry.numel * entry.count for entry in counted.values()) == sum(entry.numel for entry in whole)
    if model.num_layers > 6:
        assert len(counted) < len(whole)


@pytest.mark.parametrize("model", SMALL, ids=FORMS)
def test_the_matrices_of_muon_are_those_of_the_optimizer(model: ModelConfig) -> None:
    from engine.config.schema.optimizer import OptimizerConfig
    from engine.models.families import family
    from engine.optim.groups import by_muon

    muon = OptimizerConfig(name="muon")
    updated = {spec.name for spec in family(model).specs(model) if by_muon(spec, muon)}
    assert {entry.name for entry in model_entries(model) if entry.is_linear} == updated
    assert updated
