"""A folder whose files and configuration do not fit together is refused by the names of the tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint.interchange.huggingface import from_huggingface, open_folder, read_model
from engine.checkpoint.interchange.side import ForeignSide
from engine.checkpoint.manifest import WEIGHT
from engine.errors import ConfigError
from tests.engine.models.tiny import BERT_FORMS, FORMS, T5_FORMS, random_weights, twin

ALL = FORMS | BERT_FORMS | T5_FORMS
CLASSES = ("gpt2", "llama", "bert", "bert-without-pairs", "roberta", "modernbert", "t5", "t5-v1.1")
"""Forms of which no two have the same class and names in transformers."""
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder_of(tmp_path) -> Callable[[str], Path]:
    def make(form: str) -> Path:
        twin(ALL[form], random_weights(ALL[form])).save_pretrained(tmp_path)
        return tmp_path

    return make


def alter(folder: Path, change: Callable[[Tensors], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rename_all(state: Tensors) -> None:
    for name in list(state):
        state[f"elsewhere.{name}"] = state.pop(name)


def last(state: Tensors) -> str:
    """A weight of a norm, which no library ties or makes up."""
    return max(name for name in state if name.endswith(("orm.weight", "ln_f.weight")))


@pytest.mark.parametrize(("form", "read"), [*((form, read_model) for form in CLASSES), ("llama", from_huggingface)])
def test_a_missing_tensor_is_named(folder_of, form, read):
    folder = folder_of(form)
    name = last(load_file(folder / "model.safetensors"))
    alter(folder, lambda state: state.pop(name))
    with pytest.raises(ConfigError, match=rf"are not those of its config.json: no file holds {name}\n"):
        read(folder)


HEADS = {
    "gpt2-untied": "lm_head.weight",
    "llama": "lm_head.weight",
    "bert": "cls.seq_relationship.weight",
    "roberta": "lm_head.dense.weight",
    "modernbert": "head.dense.weight",
    "t5-v1.1": "lm_head.weight",
}


@pytest.mark.parametrize("form", HEADS)
def test_a_missing_head_is_named(folder_of, form):
    folder = folder_of(form)
    alter(folder, lambda state: state.pop(HEADS[form]))
    if form == "t5-v1.1":  # as `palimpsest convert` writes it; save_pretrained calls every T5 tied
        configure(folder, tie_word_embeddings=False)
    with pytest.raises(ConfigError, match=rf"no file holds {HEADS[form]}\n"):
        read_model(folder)


@pytest.mark.parametrize("form", CLASSES)
def test_other_names_are_missing_and_unexpected(folder_of, form):
    folder = folder_of(form)
    alter(folder, rename_all)
    with pytest.raises(ConfigError, match=r"no file holds .* and \d+ more; .* has no place for elsewhere.* and \d+ m"):
        read_model(folder)


@pytest.mark.parametrize(
    ("form", "layers", "message"),
    [
        ("gpt2", {"n_layer": 9}, r"no file holds transformer.h.\d.attn.c_attn.bias, .* more\n"),
        ("llama", {"num_hidden_layers": 1}, r"LlamaForCausalLM has no place for model.layers.1"),
        ("bert", {"num_hidden_layers": 9}, r"no file holds bert.encoder.layer"),
        ("t5", {"num_layers": 1}, r"T5ForConditionalGeneration has no place for encoder.block.1"),
        ("gpt2", {"vocab_size": 512}, r"wte.weight has shape \(500, 64\) and not \(512, 64\)(.|\n)*padded vocabulary"),
        ("llama", {"vocab_size": 490}, r"lm_head.weight has shape \(500, 64\) and not \(490, 64\); model.embed_tokens"),
    ],
)
def test_another_configuration_is_named(folder_of, form, layers, message):
    folder = folder_of(form)
    configure(folder, **layers)
    with pytest.raises(ConfigError, match=message):
        read_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(folder_of, value):
    folder = folder_of("llama")
    alter(folder, lambda state: state["model.norm.weight"].fill_(value))
    with pytest.raises(ConfigError, match=r"are not finite: model.norm.weight\n"):
        read_model(folder)


WHOLE = "model.safetensors"
CONFIGURATIONS: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: (f / WHOLE).rename(f / "pytorch_model.bin"), "as a pickle .pytorch_model.bin., which"),
    (lambda f: configure(f, quantization_config={"quant_method": "gptq", "bits": 4}), "quantised weights .*: gptq"),
    (lambda f: configure(f, hidden_size="wide"), "'hidden_size' expected int, got str"),
    (lambda f: configure(f, num_attention_heads=5), "64. is not a multiple of the number of attention heads"),
    (lambda f: configure(f, model_type="elsewhere"), "cannot be read as a Hugging Face model: .*elsewhere"),
    (lambda f: (f / "config.json").write_text("[]"), "cannot be read as a Hugging Face model"),
    (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter .* and not a whole model"),
]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / WHOLE).write_bytes((f / WHOLE).read_bytes()[:-9]), "not fully cov"),
        (lambda f: (f / WHOLE).write_bytes(b""), "cannot be read as a Hugging Face model: Error while"),
        (lambda f: (f / WHOLE).unlink(), "no file named model.safetensors"),
        *CONFIGURATIONS,
    ],
)
def test_a_folder_that_transformers_cannot_use_is_one_clear_error(folder_of, damage, message):
    folder = folder_of("llama")
    damage(folder)
    with pytest.raises(ConfigError, match=message):
        read_model(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / WHOLE).write_bytes((f / WHOLE).read_bytes()[:-9]), r"\d+ bytes announced, \d+ there"),
        (lambda f: (f / WHOLE).write_bytes(b""), "no whole safetensors file: its header does not fit in it"),
        (lambda f: (f / WHOLE).write_bytes(b"\xff" * 99), "no whole safetensors file: its header does not fit in it"),
        (lambda f: (f / WHOLE).write_bytes(b"\x08" + b"\0" * 7 + b"nothing!"), "its header is not that of a safetens"),
        (lambda f: (f / WHOLE).unlink(), "there is no file named model.safetensors or model.safetensors.index.json"),
        *CONFIGURATIONS,
    ],
)
def test_a_folder_that_ours_cannot_read_is_one_clear_error(folder_of, damage, message):
    folder = folder_of("llama")
    damage(folder)
    for read in (from_huggingface, open_folder):
        with pytest.raises(ConfigError, match=message):
            read(folder)


@pytest.mark.parametrize("form", CLASSES)
def test_for_a_comparison_absent_and_unknown_tensors_are_told(folder_of, form):
    folder = folder_of(form)
    whole = ForeignSide(open_folder(folder, vocab_multiple=1))
    weights = random_weights(ALL[form])
    assert whole.names == dict.fromkeys(weights, True)
    assert all(torch.equal(whole.rows(name, WEIGHT, 0, len(value)), value) for name, value in weights.items())

    gone = last(load_file(folder / "model.safetensors"))
    alter(folder, lambda state: state.update(extra=state.pop(gone)))
    found = ForeignSide(open_folder(folder, vocab_multiple=1))
    (absent,) = [name for name, there in found.names.items() if not there]
    assert "norm" in absent
    assert found.names.keys() - weights.keys() == {"extra"}
    assert found.states("extra") == (WEIGHT,)
