"""Likelihoods against one forward pass per token, and against lm-evaluation-harness; bytes against the text."""

from __future__ import annotations

import json
import math

import pytest
import torch

from engine.corpus.tokenizer_training import train_tokenizer
from engine.errors import ConfigError, DataError
from engine.evaluate.domains import Domain, named, read_documents
from engine.evaluate.likelihood import text_likelihoods, windows
from engine.evaluate.perplexity import perplexity_of
from engine.evaluate.subject import open_subject
from engine.serve.sample_text import TEXT
from tests.engine.evaluate.conftest import SENTENCES
from tests.engine.serve.runs import run_config, save

NATS = 1e-5
"""Nats per token that two orders of summing fp32 logits may differ by: about 2**-24 times the logits (below 10) times
the root of the width and of the vocabulary, with room."""


def brute_force(subject, ids: list[int]) -> float:
    """The log likelihood, a forward pass for each token, from the windows' definition in lm-evaluation-harness."""
    from lm_eval.utils import get_rolling_token_windows

    total = 0.0
    for seen, expected in get_rolling_token_windows(ids, subject.text.eos_id, subject.longest, 1):
        for back in range(len(expected)):
            row = torch.tensor([seen[: len(seen) - back]])
            with torch.no_grad():
                logits = subject.model(input_ids=row).logits[0, -1].double()
            total += float(logits.log_softmax(0)[expected[len(expected) - 1 - back]])
    return total


def test_a_likelihood_is_that_of_one_token_after_the_other(causal):
    texts = [ids.tolist() for ids in causal.text.encode(SENTENCES)]
    assert max(map(len, texts)) > causal.longest
    for ids, found in zip(texts, text_likelihoods(causal, texts), strict=True):
        assert found == pytest.approx(brute_force(causal, ids), abs=NATS * len(ids))


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 11])
def test_every_token_is_scored_once_behind_as_much_as_fits(length):
    ids = list(range(100, 100 + length))
    scored = []
    for row, count in windows(ids, 7, 4):
        assert len(row) == min(5, length + 1), "all windows of a long text are full"
        scored += row[-count:]
    assert scored == ids
    assert next(windows(ids, 7, 4)).ids[0] == 7


def test_bits_per_byte_count_the_bytes_of_the_text(causal, tmp_path):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    found = perplexity_of(causal, Domain("d", str(tmp_path / "d.jsonl")))
    num_bytes = sum(len(text.encode()) for text in SENTENCES)
    ids = causal.text.encode(SENTENCES)
    nats = -sum(brute_force(causal, each.tolist()) for each in ids)
    assert (found["documents"], found["bytes"]) == (len(SENTENCES), num_bytes)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(nats / sum(map(len, ids))), rel=1e-5)


def test_prepared_data_have_the_numbers_of_their_text(causal, tokenizer, tmp_path, capsys):
    from engine.cli import main

    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    shards = ["prepare", str(tmp_path / "d.jsonl"), "--tokenizer", str(tokenizer), "--output", str(tmp_path / "out")]
    assert main([*shards, "--validation-fraction", "0"]) == 0, capsys.readouterr().err
    (folder,) = [path.parent for path in (tmp_path / "out").rglob("index.json")]
    of_text, of_shards = (perplexity_of(causal, Domain("d", str(source))) for source in (tmp_path / "d.jsonl", folder))
    for key in ("documents", "tokens", "bytes"):
        assert of_text[key] == of_shards[key]
    assert of_text["nats"] == pytest.approx(of_shards["nats"], rel=1e-6)


def test_shards_of_another_tokenizer_are_refused(causal, tmp_path, capsys):
    from engine.cli import main

    train_tokenizer([TEXT[::-1]], tmp_path / "other", "bpe", 300)
    (tmp_path / "d.txt").write_text(TEXT)
    shards = ["prepare", str(tmp_path / "d.txt"), "--tokenizer", str(tmp_path / "other")]
    assert main([*shards, "--output", str(tmp_path / "out"), "--validation-fraction", "0"]) == 0, (
        capsys.readouterr().err
    )
    (folder,) = [path.parent for path in (tmp_path / "out").rglob("index.json")]
    with pytest.raises(DataError, match="another tokenizer than the model's"):
        read_documents(Domain("d", str(folder)), causal.text, "text", None)


@pytest.mark.parametrize(("form", "kind"), [("bert", "wordpiece"), ("t5", "bpe")])
def test_a_model_that_fills_gaps_has_a_pseudo_likelihood(form, kind, tmp_path):
    """Each token hidden by hand, a row at a time, in transformers' own terms."""
    purpose = "masked" if form == "bert" else "span_corruption"
    train_tokenizer([TEXT], tmp_path / "tokenizer", kind, 260 if form == "bert" else 460, purpose=purpose)
    config = run_config(tmp_path / "run", form, tmp_path / "tokenizer")
    save(config, step=1, seed=1)
    subject = open_subject(config.folder)
    text = "A palimpsest is a page whose ink fades, and " + "fades " * 30
    (tmp_path / "d.txt").write_text(text)
    found = perplexity_of(subject, Domain("d", str(tmp_path / "d.txt")))
    assert "perplexity" not in found
    (ids,) = subject.text.encode([text])
    framed = subject.tokenizer("", add_special_tokens=True)["input_ids"]
    room = subject.longest - len(framed)
    hidden = subject.tokenizer.convert_tokens_to_ids("[MASK]" if form == "bert" else "<extra_id_0>")
    total = 0.0
    for piece in (ids[first : first + room].tolist() for first in range(0, len(ids), room)):
        for place, token in enumerate(piece):
            row = [*piece[:place], hidden, *piece[place + 1 :]]
            with torch.no_grad():
                if form == "bert":
                    logits = subject.model(input_ids=torch.tensor([[framed[0], *row, framed[1]]])).prediction_logits
                    log = logits[0, place + 1].log_softmax(0)[token]
                else:
                    start = subject.model.config.decoder_start_token_id
                    made = subject.model(
                        input_ids=torch.tensor([[*row, *framed]]), decoder_input_ids=torch.tensor([[start, hidden]])
                    )
                    log = made.logits[0, 1].log_softmax(0)[token]
            total += float(log)
    assert found["nats"] == pytest.approx(-total, abs=NATS * len(ids))
    assert found["pseudo_bits_per_byte"] == pytest.approx(-total / math.log(2) / len(text.encode()), rel=1e-5)


def test_two_domains_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="names a twice"):
        named(["a=x", "a=y"], "--text")
    assert [domain.name for domain in named(["en=x.jsonl", "some/zh.jsonl.gz"], "--text")] == ["en", "zh"]
