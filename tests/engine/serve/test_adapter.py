"""An adapter that is saved alone is loaded by peft onto the exported base model, and computes what ours does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from engine.checkpoint.interchange.forms import form_of
from engine.checkpoint.interchange.huggingface import to_huggingface
from engine.config.schema.model import ModelConfig
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import ConfigError
from engine.models.families import family
from engine.models.materialize import whole_model
from engine.serve.adapter import export_adapter
from engine.serve.answers import answer
from engine.serve.generate import without_text
from engine.serve.language_model import from_trained
from engine.serve.source import open_trained
from tests.distributed.runs import write_sentences
from tests.engine.models.tiny import tiny
from tests.engine.serve.runs import run_config, save

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "bert-lora": ("bert", {"method": "lora", "rank": 3}, {"pair_head": False}),
    "bert-adalora": ("bert", {"method": "adalora", "rank": 2, "initial_rank": 5}, {"pair_head": False}),
    "gpt2-adalora": ("gpt2", {"method": "adalora", "rank": 2, "initial_rank": 4, "targets": ["qkv", "down"]}, {}),
    "pythia-adalora": ("pythia", {"method": "adalora", "initial_rank": 9}, {}),
    "bert-ia3": ("bert", {"method": "ia3"}, {}),
    "roberta-lora": ("bert", {"method": "lora", "targets": ["*"]}, {"pair_head": False, "token_types": 1}),
    "modernbert-lora": ("modernbert", {"method": "lora", "targets": ["qkv", "gate_up", "output"]}, {}),
    "gpt2-lora": ("gpt2", {"method": "lora", "rank": 4, "targets": ["qkv", "down"]}, {}),
    "gpt2-ia3": ("gpt2", {"method": "ia3", "targets": ["qkv", "output", "down"]}, {}),
    "pythia-lora": ("pythia", {"method": "lora"}, {}),
    "pythia-ia3": ("pythia", {"method": "ia3"}, {}),
    "llama-lora": ("llama", {"method": "lora", "targets": ["query", "value", "ffn.*"]}, {}),
    "llama-ia3": ("llama", {"method": "ia3", "targets": ["key", "value", "gate", "down"]}, {}),
}
HEADS = {"bert": "classification", "modernbert": "classification"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_sentences(folder, "wordpiece", 260, "masked")
    return folder / "tokenizer"


def adapted_run(folder: Path, form: str, adapter: dict[str, Any], changes: dict[str, Any], tokenizer: Path):
    """A run folder with a checkpoint of random weights, the adapter's among them."""
    loaded = load_tokenizer(tokenizer)
    keys = {"task_head": {"task": "classification", "num_labels": 3}, "adapter": adapter} | changes
    model = tiny(form, vocab_size=loaded.vocab_size, vocab_multiple=8, **keys)
    config = run_config(folder, "bert", tokenizer)
    stage = config.stages[0].model_copy(
        update={"objective": config.stages[0].objective.model_copy(update={"name": "classification"})}
    )
    save(config.model_copy(update={"model": model, "stages": (stage,)}), 3, 0)
    return model


def base_model(folder: Path, model: ModelConfig, weights: dict[str, torch.Tensor], padding: int | None) -> Any:
    """Their model without the adapter, as a folder."""
    plain = model.model_copy(update={"adapter": None})
    held = {spec.name: weights[spec.name] for spec in family(plain).specs(plain)}
    if model.task_head is not None:
        held["classifier.weight"] = torch.zeros_like(held["classifier.weight"])  # that of the adapter's file is loaded
    config, state = to_huggingface(plain, held, padding)
    kind = getattr(transformers, form_of(plain).architecture)
    kind.from_pretrained(None, config=config, state_dict=state).save_pretrained(folder)
    return kind.from_pretrained(folder).eval()


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_it_onto_the_base_and_merges_it_as_we_do(tmp_path, tokenizer, case):
    form, adapter, changes = CASES[case]
    model = adapted_run(tmp_path / "run", form, adapter, changes, tokenizer)
    apart, together = open_trained(tmp_path / "run", merge=False), open_trained(tmp_path / "run")
    assert apart.config.adapter is not None
    assert together.config.adapter is None
    weights = apart.weights
    base = base_model(tmp_path / "base", model, weights, load_tokenizer(tokenizer).vocabulary.padding)
    export_adapter(apart, tmp_path / "adapter", str(tmp_path / "base"))
    loaded: Any = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    tokens_BT = torch.arange(5, 37)[None]
    with torch.no_grad():
        ours_BC = whole_model(apart.config, weights).eval()(tokens_BT=tokens_BT)["logits_BC"]
        merged_BC = whole_model(together.config, together.weights).eval()(tokens_BT=tokens_BT)["logits_BC"]
        theirs_BC = loaded(input_ids=tokens_BT).logits
    scale = ours_BC.abs().max().item()
    torch.testing.assert_close(theirs_BC, ours_BC, rtol=0, atol=2e-5 * scale)
    torch.testing.assert_close(merged_BC, ours_BC, rtol=0, atol=2e-5 * scale)
    plain = together.config
    _, state = to_huggingface(plain, together.weights, load_tokenizer(tokenizer).vocabulary.padding)
    merged = loaded.merge_and_unload().state_dict()
    for name, value in merged.items():
        assert torch.equal(value, state[name]), name


def test_a_model_without_an_adapter_has_none_to_export(tmp_path, tokenizer):
    save(run_config(tmp_path / "run", "bert", tokenizer), 3, 0)
    trained = open_trained(tmp_path / "run", tokenizer=None, merge=False)
    with pytest.raises(ConfigError, match="has no adapter"):
        export_adapter(trained, tmp_path / "adapter", None)


VIRTUAL: dict[str, tuple[str, dict[str, Any], bool]] = {
    "bert-prompt": ("bert", {"method": "prompt", "virtual_tokens": 3}, True),
    "gpt2-prompt": ("gpt2", {"method": "prompt", "virtual_tokens": 3}, True),
    "llama-prompt": ("llama", {"method": "prompt", "virtual_tokens": 3}, False),
    "llama-prefix": ("llama", {"method": "prefix", "virtual_tokens": 4}, False),
    "qwen3-prefix": ("qwen3", {"method": "prefix", "virtual_tokens": 2}, False),
    "gpt2-prefix": ("gpt2", {"method": "prefix", "virtual_tokens": 4}, False),
}
"""Form, adapter, and whether the model has the head of a task: peft 0.21 runs a prefix in models of the next token."""


@pytest.mark.parametrize("case", VIRTUAL)
def test_peft_puts_our_virtual_tokens_in_front_of_the_base(tmp_path, tokenizer, case):
    form, adapter, has_head = VIRTUAL[case]
    changes: dict[str, Any] = {} if has_head else {"task_head": None}
    changes |= {"sliding_window": None} if form == "qwen3" else {}
    model = adapted_run(tmp_path / "run", form, adapter, changes, tokenizer)
    trained = open_trained(tmp_path / "run")
    assert trained.config.adapter == model.adapter, "they cannot be merged"
    weights = trained.weights
    base = base_model(tmp_path / "base", model, weights, load_tokenizer(tokenizer).vocabulary.padding)
    export_adapter(trained, tmp_path / "adapter", str(tmp_path / "base"))
    loaded: Any = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    tokens_BT = torch.arange(5, 37)[None]
    with torch.no_grad():
        (ours,) = whole_model(trained.config, weights).eval()(tokens_BT=tokens_BT).values()
        theirs = loaded(input_ids=tokens_BT, attention_mask=torch.ones_like(tokens_BT)).logits[:, -ours.size(1) :]
    if not has_head:
        theirs = theirs[..., : model.vocab_size]
    torch.testing.assert_close(theirs, ours.view_as(theirs), rtol=0, atol=2e-5 * ours.abs().max().item())
    with pytest.raises(ConfigError, match="by peft onto the model that the run started from"):
        to_huggingface(model, weights)


def test_answers_of_a_run_with_a_prompt_are_its_own(tmp_path, tokenizer):
    """Greedy tokens from `generate` of peft's model, which may not cache, against our module called for each token."""
    model = adapted_run(tmp_path / "run", "llama", {"method": "prompt"}, {"task_head": None}, tokenizer)
    trained = open_trained(tmp_path / "run")
    prompts = [np.arange(5, 12), np.arange(40, 43)]
    found = answer(from_trained(trained), prompts, 6)
    ours, stop = whole_model(model, trained.weights).eval(), load_tokenizer(tokenizer).eos_id
    for prompt, answered in zip(prompts, found, strict=True):
        tokens_BT = torch.from_numpy(prompt)[None]
        for token in answered.tolist():
            with torch.no_grad():
                (logits_BTV,) = ours(tokens_BT=tokens_BT).values()
            suppressed = without_text(from_trained(trained).tokenizer, model.vocab_size)
            logits_V = logits_BTV[0, -1]
            logits_V[[one for one in suppressed or () if one < len(logits_V)]] = -torch.inf
            assert token == int(logits_V.argmax())
            tokens_BT = torch.cat((tokens_BT, torch.tensor([[token]])), 1)
        assert len(answered) == 6 or answered[-1] == stop
