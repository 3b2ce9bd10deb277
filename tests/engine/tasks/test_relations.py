"""Marks around two entities: where they stand, and one clear error for entities that are cut."""

import json

import pytest

from engine.config.schema.data import ColumnsConfig
from engine.errors import ConfigError, DataError
from engine.tasks.examples import read_examples, require_marks
from engine.tasks.framing import Framing
from engine.tasks.resolve import resolve_task
from tests.distributed.runs import write_sentences
from tests.engine.models.tiny import tiny
from tests.engine.tasks.starts import tree_of, write_start

COLUMNS = ColumnsConfig(entities_of_relation=("head", "tail"))
TEXT = "Ann Lee was born in Rome, not 在北京."


def row(head, tail, text=TEXT):
    spans = {
        "head": dict(zip(("start", "end"), head, strict=True)),
        "tail": dict(zip(("start", "end"), tail, strict=True)),
    }
    return {"text": text, "label": "born in", **spans}


def read(tmp_path, *rows):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return read_examples(str(tmp_path / "a.jsonl"), COLUMNS)


def test_marks_stand_around_both_entities_whichever_comes_first(tmp_path):
    found = read(tmp_path, row((0, 7), (20, 24)), row((31, 33), (0, 3)))
    assert found.texts == [
        "@ Ann Lee @ was born in # Rome #, not 在北京.",
        "# Ann # Lee was born in Rome, not 在@ 北京 @.",
    ]
    assert found.needed == [len("@ Ann Lee @ was born in # Rome #"), len(found.texts[1]) - 1]


@pytest.mark.parametrize(
    ("head", "tail", "said"),
    [
        ((0, 5), (20, 24), "the entity 'Ann L' at characters 0 to 5 cuts the word 'Lee'"),
        ((0, 4), (20, 24), "has blanks at its ends"),
        ((0, 7), (4, 7), "overlap: characters 0 to 7 and 4 to 7"),
        ((0, 7), (20, 99), "in column 'tail'"),
        ((7, 7), (20, 24), "in column 'head'"),
    ],
)
def test_wrong_entities_are_one_clear_error(tmp_path, head, tail, said):
    with pytest.raises(DataError, match=f"row 1 of .*{said}"):
        read(tmp_path, row(head, tail))


def test_texts_that_lose_a_mark_are_refused(tmp_path):
    write_sentences(tmp_path, "wordpiece", 260, "masked")
    framing = Framing(tmp_path / "tokenizer", tiny("bert", vocab_size=260))
    text = "the ink fades and one thrifty monk hides older lines"
    examples = read(tmp_path, row((0, 7), (len(text) - 5, len(text)), text))
    with pytest.raises(DataError, match=r"row 1 of .* is cut to 8 tokens, in which not both entities are"):
        list(framing.rows(examples, 8))
    (found,) = framing.encodings(examples.texts, None, 64)
    require_marks(examples, 0, found, framing.tokenizer.unknown_id)
    mark = next(number for number, span in zip(found.ids, found.offsets, strict=True) if span == (0, 1))
    with pytest.raises(DataError, match="the tokenizer has no token for @ or #"):
        require_marks(examples, 0, found, unknown_id=mark)


def test_variants_that_might_lose_a_mark_are_refused(tmp_path):
    (tmp_path / "start").mkdir()
    start = write_start(tmp_path / "start")
    lines = (json.dumps(row((0, 7), (20, 24)) | {"label": label}) + "\n" for label in ("born in", "died in"))
    (tmp_path / "train.jsonl").write_text("".join(lines))
    tree = tree_of(tmp_path, start)
    tree["stages"][0]["data"] = {
        "train": str(tmp_path / "train.jsonl"),
        "columns": {"entities_of_relation": ["head", "tail"]},
        "augment": {"deletion_rate": 0.1},
    }
    with pytest.raises(ConfigError, match="whose marks a variant of a text might lose"):
        resolve_task(tree, "task")
