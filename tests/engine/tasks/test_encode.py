"""Encoded examples: ids and types are those of `AutoTokenizer` beside the exported model, cut as it cuts."""

import numpy as np
import pytest

from engine.config.schema.model import make_model
from engine.config.schema.objective import ObjectiveConfig
from engine.data.objectives.examples import LABEL, SECOND
from engine.data.shards.dataset import TokenDataset
from engine.errors import DataError
from engine.serve.language_model import read_tokenizer
from engine.serve.tokenizer_files import write_tokenizer
from engine.tasks.encode import encoded_folder, longest, notes
from engine.tasks.examples import TextExamples
from engine.tasks.framing import Framing
from engine.tasks.kinds import KINDS
from tests.distributed.runs import write_sentences
from tests.engine.models.tiny import tiny

TEXTS = ["The ink fades.", "One thrifty monk hides older lines. " * 4, "Heiberg", "a [SEP] b [MASK]"]
PAIRS = ["This codex is a palimpsest. " * 3, "short", "The prayer book was read again.", "c"]
EXAMPLES = TextExamples("f", TEXTS, None, ["0", "1", "0", "1"])
WITH_PAIRS = TextExamples("f", TEXTS, PAIRS, ["0", "1", "0", "1"])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write_sentences(folder, "wordpiece", 260, "masked")
    return folder / "tokenizer"


def model_of(form):
    changes = {"pair_head": False, "token_types": 1} if form == "roberta" else {}
    return make_model(**(tiny("bert" if form == "roberta" else form).model_dump() | changes | {"vocab_size": 300}))


@pytest.mark.parametrize("form", ["bert", "roberta", "gpt2"])
@pytest.mark.parametrize("examples", [EXAMPLES, WITH_PAIRS], ids=["texts", "pairs"])
def test_ids_are_those_of_the_exported_tokenizer(tmp_path, tokenizer, form, examples):
    model = model_of(form)
    write_tokenizer(tokenizer, tmp_path, model)
    theirs = read_tokenizer(tmp_path)
    found = list(Framing(tokenizer, model).rows(examples, 24))
    for number in range(3):  # the last text spells special tokens, which theirs reads and ours does not
        pair = None if examples.pairs is None else examples.pairs[number]
        expected = theirs(examples.texts[number], pair, truncation=True, max_length=24, return_token_type_ids=True)
        assert found[number].ids.tolist() == expected["input_ids"]
        if model.tells_segments_apart:
            second = found[number].columns.get(SECOND, len(expected["input_ids"]))
            types = np.arange(len(expected["input_ids"])) >= second
            assert types.astype(int).tolist() == expected["token_type_ids"]


def test_a_special_token_that_a_text_spells_stays_text(tokenizer):
    model = model_of("bert")
    framing = Framing(tokenizer, model)
    *_, last = framing.rows(EXAMPLES, 64)
    special = framing.tokenizer.vocabulary.separate
    assert last.ids.tolist().count(special) == 1
    assert framing.tokenizer.vocabulary.mask not in last.ids


def test_a_folder_is_written_once_and_named_by_its_content(tmp_path, tokenizer):
    framing = Framing(tokenizer, model_of("bert"))

    def folder(examples, labels=("0", "1"), length=24):
        objective = ObjectiveConfig(name="classification", labels=labels)
        return encoded_folder(KINDS["classification"], examples, objective, framing, length, tmp_path, "train")

    first = folder(WITH_PAIRS)
    before = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    assert folder(WITH_PAIRS) == first
    assert {path.name: path.stat().st_mtime_ns for path in first.iterdir()} == before
    others = [folder(WITH_PAIRS, labels=("1", "0")), folder(WITH_PAIRS, length=20), folder(EXAMPLES)]
    assert len({first, *others}) == 4
    dataset = TokenDataset(first)
    assert dataset.index.columns == (LABEL, SECOND)
    assert dataset.column(LABEL, 0).tolist() == [0, 1, 0, 1]
    assert all((np.diff(dataset.offsets(number)[0]) > 0).all() for number in range(dataset.num_shards))
    with pytest.raises(DataError, match=r"notes\.jsonl cannot be read"):
        notes(first)


def test_the_longest_row_counts_what_frames_it(tokenizer):
    framing = Framing(tokenizer, model_of("bert"))
    expected = max(row.ids.size for row in framing.rows(EXAMPLES, 1000))
    assert longest(framing.rows(EXAMPLES, 1000)) == (expected, 0)
    assert longest(framing.rows(EXAMPLES, 10)) == (10, 0)
