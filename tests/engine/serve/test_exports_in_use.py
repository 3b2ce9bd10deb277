"""Exported folders in the hands of their users: pipelines, generation, heads for classification, LoRA adapters."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.corpus.tokenizer_training import train_tokenizer
from engine.models.materialize import whole_model
from engine.serve.export import TEXT, export
from engine.serve.import_model import import_folder
from engine.serve.source import Trained, open_trained
from tests.engine.serve.runs import run_config, save

TOKENIZERS = {
    "causal": ("bpe", 400),
    "masked": ("wordpiece", 400),
    "span_corruption": ("bpe", 450),
}
FORMS = {
    "gpt2": "causal",
    "llama": "causal",
    "bert": "masked",
    "roberta": "masked",
    "modernbert": "masked",
    "t5-v1.1": "span_corruption",
}


def exported(form: str, folder: Path) -> tuple[Trained, Path]:
    """A trained model and its folder."""
    purpose = FORMS[form]
    kind, size = TOKENIZERS[purpose]
    train_tokenizer([TEXT * 3], folder / "tokenizer", kind, size, purpose=purpose)  # pyright: ignore
    config = run_config(folder / "run", form, folder / "tokenizer")
    save(config, step=3, seed=3)
    trained = open_trained(config.folder)
    export(trained, folder / "out")
    return trained, folder / "out"


@pytest.mark.parametrize("form", FORMS)
def test_pipelines_and_heads_of_theirs_load_the_folder(form, tmp_path):
    trained, folder = exported(form, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if FORMS[form] == "causal":
        [said] = transformers.pipeline("text-generation", str(folder))("Archimedes, in", max_new_tokens=3)
        assert said["generated_text"].startswith("Archimedes, in")
    if FORMS[form] == "masked":
        text = f"Archimedes, {tokenizer.mask_token} ink"
        found = transformers.pipeline("fill-mask", str(folder))(text, top_k=3)
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        at = ids[0].tolist().index(tokenizer.mask_token_id)
        with torch.no_grad():
            logits = whole_model(trained.config, trained.weights)(tokens_BT=ids)["logits_BTV"][0, at]
        assert [one["token"] for one in found] == logits.topk(3).indices.tolist()
    # A head for classes is new; everything else comes from the folder.
    head, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, output_loading_info=True
    )
    body = [
        name for name in info["missing_keys"] if not name.startswith(("classifier", "classification_head", "score"))
    ]
    assert body == []
    if tokenizer.pad_token_id is not None:
        head.config.pad_token_id = tokenizer.pad_token_id
    given = tokenizer(["In ink", "A lost work"], return_tensors="pt", padding=True)
    if form.startswith("t5"):  # its class takes the last end token of each text
        given = tokenizer(["In ink"], return_tensors="pt")
    with torch.no_grad():
        assert head.eval()(**given).logits.isfinite().all()


@pytest.mark.parametrize(("form", "targets"), [("llama", ["q_proj", "v_proj", "down_proj"]), ("gpt2", ["c_attn"])])
def test_a_merged_lora_adapter_comes_back_exactly(form, targets, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft (extra dev)")
    trained, folder = exported(form, tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    settings = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=form == "gpt2")
    model: Any = peft.get_peft_model(base, settings)
    tokens_BT = torch.arange(5, 37)[None]
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1.0)
    for _ in range(3):
        model(input_ids=tokens_BT, labels=tokens_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for path in folder.glob("tokenizer*"):
        shutil.copyfile(path, tmp_path / "merged" / path.name)
    found = import_folder(tmp_path / "merged", tmp_path / "ours", shard_bytes=10**9)
    assert found.opened.model == trained.config
    ours = open_trained(tmp_path / "ours").weights
    changed = {name for name, value in ours.items() if not torch.equal(value, trained.weights[name])}
    kinds = {name.split(".")[-2] for name in changed}
    assert kinds == ({"qkv_proj", "down_proj"} if form == "llama" else {"qkv_proj"})
    again = export(open_trained(tmp_path / "ours"), tmp_path / "back")
    for name, value in transformers.AutoModelForCausalLM.from_pretrained(again.folder).state_dict().items():
        assert torch.equal(value, merged.state_dict()[name]), name
    with torch.no_grad():
        logits = whole_model(trained.config, ours)(tokens_BT=tokens_BT)["logits_BTV"]
        torch.testing.assert_close(merged.eval()(tokens_BT).logits, logits, rtol=0, atol=1e-4)
