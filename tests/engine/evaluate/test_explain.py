"""Attributions by their axiom: they sum to the difference of the logits; and by a model whose gradients are known."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertForTokenClassification

from engine.errors import ConfigError, EnvironmentProblem
from engine.evaluate.explain import TOLERANCE, explain
from engine.evaluate.subject import open_subject
from tests.engine.evaluate.conftest import TEXTS, classifier_run

pytest.importorskip("captum")


@pytest.mark.parametrize("form", ["bert", "roberta", "gpt2"])
def test_attributions_sum_to_the_difference_from_the_baseline(form, tmp_path, wordpiece, tokenizer):
    subject = open_subject(classifier_run(tmp_path / "run", wordpiece if form != "gpt2" else tokenizer, form))
    (found,) = explain(subject, TEXTS[1])
    ids = torch.tensor([subject.tokenizer(TEXTS[1])["input_ids"]])
    special = torch.tensor([subject.tokenizer(TEXTS[1], return_special_tokens_mask=True)["special_tokens_mask"]])
    padding = subject.tokenizer.pad_token_id
    with torch.no_grad():
        logits = subject.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        baseline = torch.where(special.bool(), ids, padding)
        embedded = subject.model.get_input_embeddings()(baseline)
        bare = subject.model(inputs_embeds=embedded, attention_mask=torch.ones_like(ids)).logits[0]
    label = int(logits.argmax())
    difference = float(logits[label] - bare[label])
    assert found.label == subject.model.config.id2label[label]
    assert found.difference == pytest.approx(difference, abs=1e-5)
    assert sum(value for _, value in found.pieces) == pytest.approx(difference, abs=TOLERANCE * max(1, abs(difference)))
    assert found.is_complete
    assert "".join(piece for piece, _ in found.pieces if not piece.startswith("[")) == TEXTS[1]


def test_a_linear_model_has_the_attributions_of_its_weights(classifier, monkeypatch):
    """Of a linear model the path does not matter: weight times distance from the baseline."""
    weight_D = torch.randn(classifier.model.config.hidden_size)
    embed = classifier.model.get_input_embeddings()

    def forward(input_ids=None, inputs_embeds=None, **_):
        hidden_BTD = embed(input_ids) if inputs_embeds is None else inputs_embeds
        logit_B = hidden_BTD.sum(1) @ weight_D
        return type("Output", (), {"logits": torch.stack((logit_B, logit_B * 0 - 1e6), 1)})()

    monkeypatch.setattr(classifier.model, "forward", forward)
    (found,) = explain(classifier, "the ink fades")
    ids = classifier.tokenizer("the ink fades", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        distance_TD = embed(torch.tensor(ids)) - embed(torch.tensor(classifier.tokenizer.pad_token_id))
    inner = [value for piece, value in found.pieces if not piece.startswith("[")]
    assert inner == pytest.approx((distance_TD @ weight_D).tolist(), abs=1e-4)
    assert found.num_steps == 32


def test_every_entity_is_explained_by_itself(classifier):
    """Of a model of entities the logit is that of one token; the sum is complete for each."""
    torch.manual_seed(0)
    labels = {0: "O", 1: "B-thing", 2: "I-thing"}
    config = BertConfig(
        vocab_size=classifier.model.config.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        id2label=labels,
        label2id={label: number for number, label in labels.items()},
        pad_token_id=classifier.tokenizer.pad_token_id,
        initializer_range=0.3,
    )
    subject = replace(classifier, model=BertForTokenClassification(config).eval(), kind="tokens")
    with torch.no_grad():
        subject.model.classifier.bias[0] -= 5.0  # else random weights may call all tokens O
    text = "the ink fades and a monk reads 新文"
    encoded = subject.tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
    words = encoded.word_ids()
    with torch.no_grad():
        logits_TC = subject.model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits[0]
    expected = [
        (text[start:end], labels[int(logits_C.argmax())])
        for place, ((start, end), logits_C) in enumerate(
            zip(encoded["offset_mapping"][0].tolist(), logits_TC, strict=True)
        )
        if words[place] is not None and words[place] != words[place - 1] and int(logits_C.argmax())
    ]
    found = explain(subject, text)
    assert [(one.place, one.label) for one in found] == expected
    assert len(found) > 1
    assert all(one.is_complete for one in found)
    assert all("".join(piece for piece, _ in one.pieces[1:-1]) == text for one in found)


def test_what_has_no_labels_is_not_explained(causal, classifier):
    with pytest.raises(ConfigError, match="--explain with step 3 of gpt2"):
        explain(causal, "x")
    with pytest.raises(ConfigError, match="a text with a token"):
        explain(classifier, "  ")


def test_the_missing_package_is_told_with_its_extra(classifier, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(EnvironmentProblem, match=r"palimpsest\[evaluate\]"):
        explain(classifier, "x")
