"""The comparison of logits of models that are too large to be compared whole, with the limit lowered."""

from __future__ import annotations

import json

import pytest

from engine.corpus.tokenizer_training import train_tokenizer
from engine.errors import CheckpointError
from engine.serve import read_back
from engine.serve.export import TEXT, export
from engine.serve.read_back import check_logits, first_layers
from engine.serve.source import open_trained
from tests.engine.models.tiny import BERT_FORMS, FORMS, T5_FORMS
from tests.engine.serve.runs import run_config, save

ROWS = 60
TOKENIZERS = {
    "gpt": ("bpe", 400, "causal"),
    "bert": ("wordpiece", 400, "masked"),
    "t5": ("bpe", 450, "span_corruption"),
}
CASES = {
    "gpt2": "layer_norm_epsilon",
    "llama": "rms_norm_eps",
    "bert": "layer_norm_eps",
    "roberta": "layer_norm_eps",
    "megatron-bert": "layer_norm_eps",
    "modernbert": "norm_eps",
    "t5-v1.1": "layer_norm_epsilon",
}


@pytest.fixture(autouse=True)
def _small_limit(monkeypatch):
    monkeypatch.setattr(read_back, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(read_back, "ROWS_OF_CUT", ROWS)


@pytest.mark.parametrize("form", CASES)
def test_first_layers_and_rows_are_compared_and_a_wrong_configuration_is_noticed(form, tmp_path):
    model = (FORMS | BERT_FORMS | T5_FORMS)[form]
    kind, size, purpose = TOKENIZERS[model.family]
    train_tokenizer([TEXT * 3], tmp_path / "tokenizer", kind, size, purpose=purpose)  # pyright: ignore
    config = run_config(tmp_path / "run", form, tmp_path / "tokenizer")
    save(config, step=3, seed=3)
    agreement = export(open_trained(config.folder), tmp_path / "out").agreement
    assert agreement is not None
    cut = first_layers(config.model)
    assert agreement.num_layers == cut.num_layers < config.model.num_layers
    assert cut.vocab_size == ROWS
    assert 0 <= agreement.largest_difference <= 1e-4 < agreement.largest_logit

    path = tmp_path / "out" / "config.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {CASES[form]: 0.3}))
    with pytest.raises(CheckpointError, match="its logits are off by"):
        check_logits(config.model, tmp_path / "out", [7, 300, 399, 12, 5, 9], tmp_path / "out")


def test_a_padding_token_behind_the_first_rows_is_kept():
    model = BERT_FORMS["roberta"]
    assert first_layers(model, padding_id=ROWS + 7).vocab_size == ROWS + 8
    assert first_layers(model, padding_id=3).vocab_size == ROWS
    assert first_layers(model.model_copy(update={"vocab_size": 20}), 3).vocab_size == 20


def test_rows_and_layers_that_are_cut_are_seen_by_the_weights(tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    from engine.serve import export as module

    train_tokenizer([TEXT], tmp_path / "tokenizer", "bpe", 400)
    config = run_config(tmp_path / "run", "gpt2", tmp_path / "tokenizer")
    save(config, step=3, seed=3)
    write_folder = module.write_folder
    for name, said in (("transformer.wte.weight", "embed_tokens"), ("transformer.h.3.mlp.c_fc.weight", "layers.3")):

        def spoilt(trained, folder, *options, name=name):
            written = write_folder(trained, folder, *options)
            state = load_file(folder / "model.safetensors")
            state[name][-1] += 1e-3
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
            return written

        monkeypatch.setattr(module, "write_folder", spoilt)
        with pytest.raises(CheckpointError, match=rf"{said}\S* has other values"):
            export(open_trained(config.folder), tmp_path / "out")
