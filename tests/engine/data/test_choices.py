"""Questions ranked by likelihood: tokens and measures by lm-evaluation-harness's rule, rows and errors."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from engine.corpus.tokenizer_training import train_tokenizer
from engine.data.choices import Answer, ChoiceSamples, Questions, read_questions
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import DataError

TEXT = "A palimpsest is a page whose ink fades. The monk writes older lines again. 刮去旧文。"
RECORDS = [
    {"context": "A palimpsest is a ", "choices": ["page", "monk that writes"], "gold": 0},
    {"context": "", "choices": ["The ink fades.", "older"], "gold": 1},
    {"context": "刮去", "choices": ["旧文", "ink", "。"], "gold": 0},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([TEXT], folder, "bpe", 300)
    return load_tokenizer(folder)


def write(path, records=RECORDS):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_answers_have_the_tokens_of_the_harness(tokenizer, tmp_path):
    """Their own `TemplateLM` splits the pairs."""
    lm_eval = pytest.importorskip("lm_eval.api.model")
    from lm_eval.api.instance import Instance

    class Model(lm_eval.TemplateLM):
        eot_token_id = tokenizer.eos_id

        def tok_encode(self, string, add_special_tokens=None, **_):
            return tokenizer.encode([string])[0].tolist()

        def _loglikelihood_tokens(self, requests, **_):
            return [(context, continuation) for _, context, continuation in requests]

        loglikelihood_rolling = generate_until = None

    found = read_questions("q", write(tmp_path / "q.jsonl"), tokenizer)
    pairs = [(record["context"], choice) for record in RECORDS for choice in record["choices"]]
    asked = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]
    for answer, (context, continuation) in zip(found.answers, Model().loglikelihood(asked, True), strict=True):
        assert answer == Answer(context + continuation, len(continuation))


def test_measures_by_hand():
    """The first question is right by sum, the second by length alone."""
    questions = Questions("q", [["aa", "bbbb"], ["cc", "文文文文"]], [0, 1], [])
    found = questions.measures([1.0, 1.5, 3.0, 4.0])
    assert found["accuracy"] == 0.5
    assert found["accuracy_by_length"] == 0.5
    assert found["bits_per_byte"] == pytest.approx((1.0 + 4.0) / math.log(2) / (2 + 12))


@pytest.mark.parametrize("data_size", [1, 2, 3])
def test_every_answer_is_one_row_of_one_domain(tokenizer, tmp_path, data_size):
    questions = read_questions("q", write(tmp_path / "q.jsonl"), tokenizer)
    samples = ChoiceSamples(questions, 12, "document", tokenizer.eos_id, 2 * data_size * 8)
    seen = {}
    for rank in range(data_size):
        batches = list(samples.batches(rank, data_size, 2))
        assert len(batches) == samples.num_batches(data_size, 2)
        for batch in batches:
            for row in np.flatnonzero(batch.row_target_weights["causal"]):
                tokens, targets, weights = (batch.inputs[f"{key}_BT"][row] for key in ("tokens", "targets", "weights"))
                seen[int(batch.domains_B[row])] = (tokens, targets, weights)
    assert sorted(seen) == list(range(len(questions.answers)))
    for number, answer in enumerate(questions.answers):
        tokens, targets, weights = seen[number]
        ids = answer.ids[-13:]
        assert tokens[: len(ids) - 1].tolist() == ids[:-1]
        assert targets[weights > 0].tolist() == ids[-answer.num_scored :]


def test_an_answer_longer_than_a_row_is_refused_and_a_context_loses_its_beginning(tokenizer):
    questions = Questions("q", [["a", "b"]], [0], [Answer(list(range(3, 20)), 3), Answer([3, 4], 1)])
    (batch,) = ChoiceSamples(questions, 4, "row", tokenizer.eos_id, 8).batches(0, 1, 2)
    assert batch.inputs["tokens_BT"][0].tolist() == [15, 16, 17, 18]
    assert batch.inputs["targets_BT"][0][1:].tolist() == [17, 18, 19]
    assert batch.inputs["weights_BT"].tolist() == [[0, 1, 1, 1], [1, 0, 0, 0]]
    with pytest.raises(DataError, match=r"evaluation\.tasks\.q has 3 tokens"):
        ChoiceSamples(questions, 2, "row", tokenizer.eos_id, 8)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "is no question"),
        ('{"context": "a", "choices": ["b"], "gold": 0}', "is no question"),
        ('{"context": "a", "choices": ["b", ""], "gold": 0}', "is no question"),
        ('{"context": 1, "choices": ["b", "c"], "gold": 0}', "is no question"),
        ('{"context": "a", "choices": ["b", "c"], "gold": 2}', "has gold 2"),
        ('{"context": "a", "choices": ["b", "c"], "gold": true}', "has gold True"),
        ('{"context": "a", "choices": ["b", "c"]}', "has gold None"),
        ("", "holds no question"),
    ],
)
def test_wrong_lines_are_told_by_number(tokenizer, tmp_path, line, message):
    (tmp_path / "q.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        read_questions("q", tmp_path / "q.jsonl", tokenizer)
    with pytest.raises(DataError, match="cannot be read"):
        read_questions("q", tmp_path / "none.jsonl", tokenizer)
