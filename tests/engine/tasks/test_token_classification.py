"""Labels of words on tokens: where they stand, what is predicted of them, and measures by another count."""

import json

import numpy as np
import pytest

from engine.config.schema.data import ColumnsConfig
from engine.config.schema.objective import ObjectiveConfig
from engine.data.objectives.examples import LABEL
from engine.data.shards.dataset import TokenDataset
from engine.errors import DataError
from engine.tasks.encode import encoded_folder
from engine.tasks.framing import Framing
from engine.tasks.kinds.token_classification import TokenClassification
from engine.tasks.measures import of_entities
from tests.distributed.runs import write_sentences
from tests.engine.models.tiny import tiny

KIND = TokenClassification()
LABELS = ("O", "B-place", "I-place", "B-thing")
ROWS = [
    {"tokens": ["Ink", "fades", "unbelievably"], "tags": ["B-thing", "O", "O"]},
    {"tokens": ["One", "monk", "hides", "in", "old", "Rome"], "tags": ["O", "B-thing", "O", "O", "B-place", "I-place"]},
    {"tokens": ["\u200d", "lines"], "tags": ["O", "O"]},
]


@pytest.fixture(scope="module", params=["wordpiece", "bpe"])
def framing(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write_sentences(folder, request.param, 300, "masked" if request.param == "wordpiece" else "causal")
    form = "bert" if request.param == "wordpiece" else "gpt2"
    return Framing(folder / "tokenizer", tiny(form, vocab_size=300))


def read(tmp_path, rows, name="a"):
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return KIND.read(str(tmp_path / f"{name}.jsonl"), ColumnsConfig())


def objective(labels=LABELS):
    return ObjectiveConfig(name="token_classification", labels=labels)


def test_the_first_token_of_a_word_has_its_label(tmp_path, framing):
    examples = read(tmp_path, ROWS)
    for row, given in zip(KIND.encode(examples, objective(), framing, 64), ROWS, strict=True):
        assert row.note is not None
        labels_T = row.columns[LABEL]
        assert isinstance(labels_T, np.ndarray)
        positions = [position for position in row.note["positions"] if position >= 0]
        kept = [tag for tag, position in zip(given["tags"], row.note["positions"], strict=True) if position >= 0]
        assert positions == sorted(set(positions))
        assert [LABELS[labels_T[position]] for position in positions] == kept
        assert (np.delete(labels_T, positions) == -1).all()
        # the ids are those of the text, as AutoTokenizer encodes it
        (whole,) = framing.encodings([row.note["text"]], None, 64)
        assert row.ids.tolist() == whole.ids


def test_what_is_predicted_is_told_by_words(tmp_path, framing):
    examples = read(tmp_path, ROWS)
    folder = encoded_folder(KIND, examples, objective(), framing, 10, tmp_path, "validation")
    rows = list(KIND.encode(examples, objective(), framing, 10))
    logits = [np.zeros((row.ids.size, 4), np.float32) for row in rows]
    for row, logits_TC in zip(rows, logits, strict=True):
        labels_T = np.asarray(row.columns[LABEL])
        logits_TC[np.arange(row.ids.size), np.maximum(labels_T, 0)] = 1  # right wherever there is a token
    predictions = KIND.decode(logits, TokenDataset(folder), objective())
    unseen = sum(position < 0 for row in rows for position in (row.note or {})["positions"])
    assert unseen > 0, "ten tokens cut the second row"
    found = list(predictions.rows())
    assert [row["words"] for row in found] == [row["tokens"] for row in ROWS]
    assert found[0]["predicted"] == ROWS[0]["tags"]
    assert found[0]["entities"] == [{"start": 0, "end": 3, "label": "thing", "text": "Ink"}]
    measures = predictions.measures()
    assert measures["unseen_words"] == unseen
    assert measures["recall"] < 1.0, "words that were cut off count as not found"


def test_words_of_one_token_go_on_with_its_entity(tmp_path, framing):
    class Joined:
        """Two words in the first token, and one more token."""

        offsets, ids, special_tokens_mask = [(0, 5), (5, 8)], [7, 8], [0, 0]

    class OneToken:
        def encodings(self, texts, pairs, length):
            return [Joined() for _ in texts]

    def row(*tags):
        return read(tmp_path, [{"tokens": ["ab", "cd", "ef"], "tags": list(tags)}])

    examples = row("B-place", "I-place", "O")
    (found,) = KIND.encode(examples, objective(), OneToken(), 8)  # pyright: ignore[reportArgumentType]
    assert found.note is not None
    assert found.note["positions"] == [0, 0, 1]
    assert np.asarray(found.columns[LABEL]).tolist() == [1, 0]
    folder = encoded_folder(KIND, examples, objective(), framing, 8, tmp_path, "validation")
    (folder / "notes.jsonl").write_text(json.dumps(found.note) + "\n")
    (predicted,) = KIND.decode([np.eye(4, dtype=np.float32)[[1, 0]]], TokenDataset(folder), objective()).predicted
    assert predicted == ["B-place", "I-place", "O"]
    with pytest.raises(DataError, match="one token of 'ab cd', whose words have the tags B-place and O"):
        list(KIND.encode(row("B-place", "O", "O"), objective(), OneToken(), 8))  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="have the tags O and B-place"):
        list(KIND.encode(row("O", "B-place", "O"), objective(), OneToken(), 8))  # pyright: ignore[reportArgumentType]


def test_labels_are_found_and_checked(tmp_path, caplog):
    train = read(tmp_path, ROWS)
    assert KIND.labels({"train": train}, ()) == LABELS
    unknown = read(tmp_path, [ROWS[0], {"tokens": ["a", "b"], "tags": ["O", "B-other"]}], "validation")
    with pytest.raises(DataError, match=r"row 2 of .*validation.jsonl has tag 'B-other', which is not among"):
        KIND.labels({"train": train, "validation": unknown}, ())
    with pytest.raises(DataError, match="no example of label B-never"):
        KIND.labels({"train": train}, (*LABELS, "B-never"))
    with pytest.raises(DataError, match=r"every word of .* has tag 'O'"):
        KIND.labels({"train": read(tmp_path, [{"tokens": ["a"], "tags": ["O"]}])}, ())
    KIND.labels({"train": read(tmp_path, [{"tokens": ["a", "b"], "tags": ["O", "I-x"]}])}, ())
    assert "1 entities begin with I-" in caplog.text


def chunks(tags):
    """Entities by hand: (type, first, last) of runs that B-, O or another type end."""
    found, start = set(), None
    for position, tag in enumerate([*tags, "O"]):
        kind = tag[2:]
        goes_on = start is not None and tag.startswith("I-") and kind == tags[start][2:]
        if start is not None and not goes_on:
            found.add((tags[start][2:], start, position - 1))
            start = None
        if tag != "O" and not goes_on:
            start = position
    return found


def test_measures_are_those_of_a_count_by_hand():
    generator = np.random.default_rng(1)
    names = ["O", "B-x", "I-x", "B-y", "I-y"]
    expected, predicted = ([[names[n] for n in generator.integers(0, 5, 30)] for _ in range(20)] for _ in range(2))
    pairs = [(chunks(one), chunks(other)) for one, other in zip(expected, predicted, strict=True)]
    right = sum(len(one & other) for one, other in pairs)
    asked, given = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
    found = of_entities(expected, predicted)
    assert right > 0
    assert found["precision"] == pytest.approx(right / given)
    assert found["recall"] == pytest.approx(right / asked)
    assert found["f1"] == pytest.approx(2 * right / (asked + given))
    assert sum(found["entities"].values()) == asked
