"""Windows and answers: those of transformers' tokenizer, the best span by brute force, and SQuAD's measures by hand."""

import itertools
import json

import numpy as np
import pytest

from engine.config.schema.data import ColumnsConfig
from engine.config.schema.objective import ObjectiveConfig
from engine.data.objectives.examples import END, SECOND, START
from engine.data.shards.dataset import TokenDataset
from engine.errors import DataError
from engine.serve.language_model import read_tokenizer
from engine.serve.tokenizer_files import write_tokenizer
from engine.tasks.encode import encoded_folder
from engine.tasks.framing import Framing
from engine.tasks.kinds.question_answering import AnswerPredictions, QuestionAnswering
from engine.tasks.squad_measures import exact_match, f1
from tests.distributed.runs import write_sentences
from tests.engine.models.tiny import tiny

KIND = QuestionAnswering()
CONTEXT = "One thrifty monk hides older lines. The ink bites into parchment. This codex is a palimpsest. " * 3
ROWS = [
    ("What bites?", CONTEXT, "ink", CONTEXT.index("ink")),
    ("What is this codex?", CONTEXT, "a palimpsest", CONTEXT.rindex("a palimpsest")),
    ("Who hides older lines?", "One thrifty monk.", "One thrifty monk", 0),
    ("谁读?", "墨在纸上。僧人再读。", "僧人", 5),
]


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def start(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    is_bert = request.param == "bert"
    write_sentences(folder, "wordpiece" if is_bert else "bpe", 300, "masked" if is_bert else "causal")
    return folder / "tokenizer", tiny(request.param, vocab_size=300)


def examples_of(tmp_path, rows=ROWS):
    lines = [
        {"question": question, "context": context, "answers": [{"text": text, "start": at}] if text else []}
        for question, context, text, at in rows
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return KIND.read(str(tmp_path / "a.jsonl"), ColumnsConfig())


def objective(**keys):
    return ObjectiveConfig(name="question_answering", stride=8, **keys)


def test_windows_are_those_of_the_exported_tokenizer(tmp_path, start):
    tokenizer, model = start
    write_tokenizer(tokenizer, tmp_path / "hf", model) if (tmp_path / "hf").mkdir() is None else None
    theirs = read_tokenizer(tmp_path / "hf")
    examples = examples_of(tmp_path)
    rows = list(KIND.encode(examples, objective(), Framing(tokenizer, model), 40))
    firsts = [number for number, row in enumerate(rows) if "id" in (row.note or {})] + [len(rows)]
    assert len(rows) > len(ROWS), "some contexts take several windows"
    for number, (first, end) in enumerate(itertools.pairwise(firsts)):
        expected = theirs(
            examples.questions[number],
            examples.contexts[number],
            truncation="only_second",
            max_length=40,
            stride=8,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        assert [row.ids.tolist() for row in rows[first:end]] == expected["input_ids"]
        (answer,) = examples.answers[number]
        for row, offsets in zip(rows[first:end], expected["offset_mapping"], strict=True):
            note = row.note or {}
            at = slice(note["first"], note["first"] + len(note["offsets"]))
            context = examples.contexts[number]
            assert [context[slice(*span)].strip() for span in offsets[at]] == [
                context[slice(*span)] for span in note["offsets"]
            ]
            labels = row.columns[START], row.columns[END]
            inside = note["offsets"][0][0] <= answer[0] and answer[1] <= note["offsets"][-1][1]
            assert (labels != (0, 0)) == inside
            if inside:
                (begin, _), (_, stop) = (note["offsets"][int(label) - note["first"]] for label in labels)
                assert (begin, stop) == answer
            assert row.columns[SECOND] == note["first"]
        types = expected.get("token_type_ids")
        if types is not None:
            assert types[0] == [int(position >= rows[first].columns[SECOND]) for position in range(len(types[0]))]


def brute(rows, logits, longest):
    """The best span over all windows of a question, trying every pair of tokens of the context."""
    found = []
    for row, logits_T2 in zip(rows, logits, strict=True):
        offsets, first = row.note["offsets"], row.note["first"]
        for begin, stop in itertools.product(range(len(offsets)), repeat=2):
            if begin <= stop < begin + longest:
                score = float(logits_T2[first + begin, 0] + logits_T2[first + stop, 1])
                found.append((-score, offsets[begin][0], offsets[stop][1]))
    return min(found)


def test_the_best_answer_over_all_windows_is_that_of_brute_force(tmp_path, start):
    framing = Framing(*start)
    examples = examples_of(tmp_path)
    folder = encoded_folder(KIND, examples, objective(longest_answer=4), framing, 40, tmp_path, "validation")
    rows = list(KIND.encode(examples, objective(), framing, 40))
    generator = np.random.default_rng(2)
    logits = [generator.standard_normal((row.ids.size, 2)).astype(np.float32) for row in rows]
    predictions = KIND.decode(logits, TokenDataset(folder), objective(longest_answer=4))
    firsts = [number for number, row in enumerate(rows) if "id" in (row.note or {})] + [len(rows)]
    for one, (first, end) in zip(predictions.answered, itertools.pairwise(firsts), strict=True):
        score, begin, stop = brute(rows[first:end], logits[first:end], 4)
        best = predictions.predicted(one)
        assert best is not None
        assert (best.start, best.end) == (begin, stop)
        assert best.score == pytest.approx(-score, abs=1e-6)
        assert one.no_answer_score == pytest.approx(min(float(each[0].sum()) for each in logits[first:end]))
    found = list(predictions.rows())
    assert [row["expected"] for row in found] == [[text] for _, _, text, _ in ROWS]
    assert all(row["predicted"] == ROWS[n][1][row["start"] : row["end"]] for n, row in enumerate(found))
    assert found[0]["predicted"] == found[0]["best"][0]["text"]


def test_no_answer_is_predicted_where_the_run_allows_it(tmp_path, start):
    framing = Framing(*start)
    examples = examples_of(tmp_path, [*ROWS, ("Why?", CONTEXT, "", 0)])
    with pytest.raises(DataError, match=r"row 5 of .* has no answer, as 1 rows have"):
        list(KIND.encode(examples, objective(), framing, 40))
    allowed = objective(no_answer=True)
    folder = encoded_folder(KIND, examples, allowed, framing, 40, tmp_path, "validation")
    rows = list(KIND.encode(examples, allowed, framing, 40))
    logits = [np.zeros((row.ids.size, 2), np.float32) for row in rows]
    for row, logits_T2 in zip(rows, logits, strict=True):
        logits_T2[int(row.columns[START]), 0] = logits_T2[int(row.columns[END]), 1] = 9.0  # as the labels have it
    measures = KIND.decode(logits, TokenDataset(folder), allowed).measures()
    assert measures == {
        "examples": 5,
        "exact_match": 1.0,
        "f1": 1.0,
        "exact_match_with_answer": 1.0,
        "f1_with_answer": 1.0,
        "exact_match_without_answer": 1.0,
        "f1_without_answer": 1.0,
    }
    always: AnswerPredictions = KIND.decode(logits, TokenDataset(folder), objective())
    assert always.measures()["exact_match"] == 0.8, "an answer is forced"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("What bites? " * 9, CONTEXT, "ink", 40)], "has a question of .* in rows of 40"),
        ([("What?", CONTEXT, CONTEXT[:180].strip(), 0)], "no window of the context holds the whole answer"),
    ],
)
def test_a_wrong_example_is_one_clear_error(tmp_path, start, rows, said):
    with pytest.raises(DataError, match=f"(?s){said}"):
        list(KIND.encode(examples_of(tmp_path, rows), objective(), Framing(*start), 40))


def test_answers_that_are_cut_are_refused_or_covered(tmp_path, start):
    text, framing = "The ink bites", Framing(*start)
    (whole,) = KIND.encode(examples_of(tmp_path, [("What?", text, text, 0)]), objective(), framing, 40)
    start_of, end_of = next(span for span in (whole.note or {})["offsets"] if span[1] - span[0] > 1)
    examples = examples_of(tmp_path, [("What?", text, text[start_of : end_of - 1], start_of)])  # all but a letter of it
    with pytest.raises(DataError, match=r"(?s)row 1 of .* cuts the answer .* hold .*cut_answers=cover"):
        list(KIND.encode(examples, objective(), framing, 40))
    (row,) = KIND.encode(examples, objective(cut_answers="cover"), framing, 40)
    note = row.note or {}
    spans = [note["offsets"][int(row.columns[name]) - note["first"]] for name in (START, END)]
    assert spans == [(start_of, end_of)] * 2


def test_questions_without_any_answer_teach_nothing(tmp_path):
    with pytest.raises(DataError, match=r"no question of .* has an answer"):
        KIND.labels({"train": examples_of(tmp_path, [("Why?", CONTEXT, "", 0)])}, ())


@pytest.mark.parametrize(
    ("predicted", "expected", "exact", "overlap"),
    [
        ("The Ink!", ["ink"], 1, 1),
        ("an old  ink", ["old ink", "parchment"], 1, 1),
        ("old ink on parchment", ["ink"], 0, 0.4),
        ("ink ink", ["ink"], 0, 2 / 3),
        ("monk", ["ink", "a monk"], 1, 1),
        ("", [], 1, 1),
        ("ink", [], 0, 0),
        ("", ["ink"], 0, 0),
        ("the", ["a"], 1, 1),
        ("“僧人”。", ["僧人"], 1, 1),
        ("僧人再读", ["僧人"], 0, 2 / 3),
        ("136 次", ["136次"], 1, 1),
        ("rock-n-roll", ["rocknroll"], 1, 1),
    ],
)
def test_measures_are_squads(predicted, expected, exact, overlap):
    assert exact_match(predicted, expected) == exact
    assert f1(predicted, expected) == pytest.approx(overlap)
