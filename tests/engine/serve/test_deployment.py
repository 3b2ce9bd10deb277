"""Formats for deployment: each is read again by a reader of its own, and computes the loss of the trained model."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import extras
from engine.checkpoint.interchange.sources import MemorySource
from engine.config.schema.model import TaskHead
from engine.corpus.options import PrepareOptions
from engine.corpus.prepare import prepare
from engine.corpus.tokenizer_training import Purpose, TokenizerKind, train_tokenizer
from engine.data.shards.dataset import TokenDataset
from engine.errors import CheckpointError, ConfigError, EnvironmentProblem
from engine.serve.deployment.gguf_export import export_gguf
from engine.serve.deployment.held_out_text import compare_losses, held_out_text
from engine.serve.deployment.int8_export import export_int8
from engine.serve.deployment.onnx_export import export_onnx
from engine.serve.export import TEXT, ExportOptions, export
from engine.serve.source import Trained, open_trained
from tests.engine.data.corpus import made_up_texts, write_json_lines
from tests.engine.serve.runs import run_config, save

TOKENIZERS: dict[str, tuple[TokenizerKind, int, Purpose]] = {
    "gpt": ("bpe", 400, "causal"),
    "bert": ("wordpiece", 400, "masked"),
    "t5": ("bpe", 450, "span_corruption"),
}


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)} (extra deploy)")


@pytest.fixture
def trained(request, tmp_path) -> Trained:
    form = request.param
    family = "t5" if form.startswith("t5") else "gpt" if form.startswith(("gpt2", "llama")) else "bert"
    kind, size, purpose = TOKENIZERS[family]
    train_tokenizer([TEXT * 3], tmp_path / "tokenizer", kind, size, purpose=purpose)
    config = run_config(tmp_path / "run", form, tmp_path / "tokenizer")
    save(config, step=3, seed=3)
    return open_trained(config.folder)


def forms(*names: Any):
    return pytest.mark.parametrize("trained", names, indirect=True)


@pytest.mark.timeout(1200)  # torch.export takes half a minute of CPU time
@needs("onnx", "onnxscript", "onnxruntime")
@forms(
    "llama",
    *(
        pytest.param(name, marks=pytest.mark.matrix)
        for name in ("gpt2", "bert", "bert-without-pairs", "roberta", "megatron-bert", "modernbert", "t5", "t5-v1.1")
    ),
)
def test_an_onnx_graph_computes_the_same_at_any_size(trained, tmp_path):
    import onnxruntime

    from engine.models.materialize import whole_model

    agreement = export_onnx(trained, tmp_path / "out")
    assert abs(agreement.ours - agreement.theirs) < 1e-4
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.onnx", "config.json", "tokenizer.json"} <= names
    assert not any(name.endswith(".safetensors") for name in names)
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    ours = whole_model(trained.config, trained.weights)
    for rows, length in ((1, 3), (3, 21)):
        tokens = torch.randint(5, 400, (rows, length), generator=torch.Generator().manual_seed(length))
        given = {"input_ids": tokens.numpy(), "attention_mask": np.ones((rows, length), np.int64)}
        inputs = {"tokens_BT": tokens}
        if trained.config.family == "t5":
            given["decoder_input_ids"] = tokens[:, ::2].numpy()
            inputs = {"tokens_BS": tokens, "decoder_tokens_BT": tokens[:, ::2].contiguous()}
        with torch.no_grad():
            made = ours(**inputs)
        outputs = {"logits": "logits_BTV", "pair_logits": "pair_logits_BC"}
        for output in session.get_outputs():
            [found] = session.run([output.name], given)
            torch.testing.assert_close(torch.from_numpy(found), made[outputs[output.name]], rtol=0, atol=1e-4)


@forms("llama", "bert", "t5-v1.1")
def test_folders_in_halves_are_held_to_the_loss(trained, tmp_path):
    assert export(trained, tmp_path / "fp32").losses is None
    for dtype in ("bf16", "fp16"):
        losses = export(trained, tmp_path / dtype, ExportOptions(dtype)).losses
        assert losses is not None
        assert 0 < abs(losses.ours - losses.theirs) < losses.allowed
        assert f"transformers with weights in {dtype} agrees on held-out text (a fixed text, " in str(losses)


def test_rows_are_the_runs_validation_data_where_it_has_some(tmp_path):
    texts = write_json_lines(tmp_path / "texts.jsonl", made_up_texts(200))
    train_tokenizer(made_up_texts(200), tmp_path / "tokenizer", "bpe", 300)
    prepare(PrepareOptions((str(texts),), tmp_path / "tokenizer", tmp_path / "tokens", 0.5))
    config = run_config(tmp_path / "run", "gpt2", tmp_path / "tokenizer")
    stage = config.stages[0]
    data = stage.data.model_copy(update={"validation": str(tmp_path / "tokens" / "validation")})
    save(config.model_copy(update={"stages": (stage.model_copy(update={"data": data}),)}), step=3, seed=3)
    text = held_out_text(open_trained(config.folder))
    assert text.origin == "the run's validation data"
    shard = TokenDataset(tmp_path / "tokens" / "validation").shard(0).tokens
    rows_BT = text.inputs["input_ids"]
    assert rows_BT.flatten().tolist() == shard[: rows_BT.numel()].tolist()
    assert text.num_targets == rows_BT.numel() - rows_BT.shape[0]


@needs("gguf")
@forms("gpt2", "gpt2-untied", "llama", "llama-tied")
def test_a_gguf_file_is_read_by_others(trained, tmp_path):
    import gguf

    for dtype, largest in (("fp32", 1e-4), ("fp16", 0.01), ("bf16", 0.05)):
        agreement = export_gguf(trained, tmp_path / dtype, dtype)
        assert abs(agreement.ours - agreement.theirs) < largest
        assert agreement.text.num_targets > 100
    reader = gguf.GGUFReader(tmp_path / "fp32" / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.add_bos_token"] is False
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == trained.config.vocab_size
    assert trained.tokenizer is not None
    vocabulary = json.loads((trained.tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    assert all(tokens[number] == name for name, number in vocabulary.items())
    assert fields["tokenizer.ggml.token_type"][:3] == [3, 3, 3], "special tokens"
    sizes = [(tmp_path / dtype / "model.gguf").stat().st_size for dtype in ("fp32", "fp16")]
    assert sizes[1] < 0.6 * sizes[0]


@needs("gguf")
@forms("gpt2")
def test_what_llama_cpp_has_no_counterpart_for_is_refused_by_name(trained, tmp_path):
    train_tokenizer([TEXT * 3], tmp_path / "other", "sentencepiece-unigram", 400)
    other = replace(trained, tokenizer=tmp_path / "other")
    with pytest.raises(ConfigError, match=r"which is Unigram behind Metaspace(.|\n)*byte-level BPE"):
        export_gguf(other, tmp_path / "out")
    shutil.copytree(trained.tokenizer, tmp_path / "digits")
    path = tmp_path / "digits" / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}]}
    tree["pre_tokenizer"]["pretokenizers"].append(
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    )
    path.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="BPE behind Digits and ByteLevel"):
        export_gguf(replace(trained, tokenizer=tmp_path / "digits"), tmp_path / "out")
    with pytest.raises(ConfigError, match="without a tokenizer"):
        export_gguf(replace(trained, tokenizer=None), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@needs("gguf")
@forms("bert")
def test_an_encoder_has_no_gguf_here(trained, tmp_path):
    with pytest.raises(ConfigError, match=r"in BERT form\n  allowed: GPT-2 or Llama form"):
        export_gguf(trained, tmp_path / "out")


@needs("torchao")
@forms("llama", "bert", "t5-v1.1")
def test_int8_folders_load_again(trained, tmp_path):
    found = export_int8(trained, tmp_path / "out")
    assert found.num_layers >= 4
    assert abs(found.agreement.ours - found.agreement.theirs) < 0.1


@needs("torchao")
@forms("gpt2")
def test_int8_of_a_form_without_linear_layers_is_refused(trained, tmp_path):
    with pytest.raises(ConfigError, match="whose layers are no linear layers"):
        export_int8(trained, tmp_path / "out")


@forms("llama")
def test_another_loss_is_noticed(trained, tmp_path):
    text = held_out_text(trained)
    other = {name: value * (1.1 if "down_proj" in name else 1) for name, value in trained.weights.items()}
    source = MemorySource(other, "here")
    from engine.models.materialize import whole_model

    model = whole_model(trained.config, replace(trained, source=source).weights)
    with pytest.raises(CheckpointError, match=r"gives a loss of .* on held-out text, ours is .*\n  allowed: a diff"):
        compare_losses(trained, text, lambda x: model(tokens_BT=x["input_ids"])["logits_BTV"], "fp32", "x", Path("x"))


@forms("llama")
def test_a_missing_package_is_told_with_the_line_that_installs_it(trained, tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    for write in (export_onnx, export_gguf, export_int8):
        with pytest.raises(
            EnvironmentProblem, match=r"needs \w+, which cannot(.|\n)*pip install 'palimpsest\[deploy\]'"
        ):
            write(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@forms("bert")
def test_a_model_of_a_task_is_refused(trained):
    head = TaskHead(task="classification", num_labels=2)
    classifier = replace(trained, config=trained.config.model_copy(update={"task_head": head}))
    with pytest.raises(ConfigError, match="a model with a head for classification"):
        held_out_text(classifier)
