"""Prompts and answers as tokens: the tokens that the model is asked with, and the one rule of what is cut."""

import json
import logging

import pytest
import transformers

from engine.config.schema.data import ColumnsConfig
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import DataError
from engine.tasks.answer_examples import AnswerExamples, read_answers
from engine.tasks.answer_rows import AnswerRows
from engine.tasks.dialogues import PLAIN, TEMPLATE_FILE
from engine.tasks.framing import Framing
from tests.distributed.runs import write_sentences
from tests.engine.models.tiny import tiny
from tests.engine.tasks import templates

TEXT = "the ink fades under a scraped page"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_sentences(folder, "bpe", 300, "causal")
    (folder / "tokenizer" / TEMPLATE_FILE).write_text(PLAIN)
    return folder / "tokenizer"


def pairs(*examples):
    prompts, answers = zip(*examples, strict=True)
    return AnswerExamples("file", list(prompts), list(answers), [])


def dialogues(*examples):
    return AnswerExamples("file", [], [], [[{"role": r, "content": c} for r, c in one] for one in examples])


def rows_of(examples, tokenizer, length=1000, family="gpt2", answer_length=0, **sizes):
    framing = Framing(tokenizer, tiny(family, **sizes))
    return list(AnswerRows(examples, framing, length, answer_length))


def parts_of(row):
    """Tokens of the row's parts: prompt, answer, prompt, answer."""
    ends = [*row.parts[1:].tolist(), row.ids.size]
    return [row.ids[first:end].tolist() for first, end in zip(row.parts.tolist(), ends, strict=True)]


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_prompt_and_answer_have_the_tokens_that_they_have_alone(tokenizer, family):
    loaded = load_tokenizer(tokenizer)
    examples = pairs((TEXT, " a codex"), ("ink <|endoftext|>", "so"), ("羊", "皮紙"))
    found = [parts_of(row) for row in rows_of(examples, tokenizer, family=family)]
    end = [loaded.eos_id]
    behind = end if family == "t5" else []
    for (prompt, answer), asked, said in zip(found, examples.prompts, examples.answers, strict=True):
        assert prompt == loaded.encode([asked])[0].tolist() + behind
        assert answer == loaded.encode([said])[0].tolist() + end
    # the end of text that a text spells is text
    assert found[1][0].count(loaded.eos_id) == len(behind)


def test_a_prompt_loses_its_beginning_and_an_answer_its_end(tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("palimpsest"), "propagate", True)
    loaded = load_tokenizer(tokenizer)
    prompt, answer = (loaded.encode([text])[0].tolist() for text in (TEXT, "so it was read again"))
    answer = [*answer, loaded.eos_id]
    examples = pairs((TEXT, "so it was read again"))
    for length in range(2, len(prompt) + len(answer) + 2):
        (row,) = rows_of(examples, tokenizer, length, max_positions=999)
        asked, said = parts_of(row)
        assert row.ids.size == min(length, len(prompt) + len(answer))
        assert asked == prompt[-len(asked) :]
        assert said == answer[: len(said)]
        assert asked
        assert said
        if said != answer:
            assert len(asked) == min(len(prompt), length // 2), "only a prompt of half a row costs the answer its end"
    lost = len(prompt) - 1
    assert f"1 prompts lost up to {lost} tokens, 1 answers lost their end" in caplog.text


def test_t5_loses_the_ends(tokenizer):
    loaded = load_tokenizer(tokenizer)
    prompt, answer = (loaded.encode([text])[0].tolist() for text in (TEXT, "so it was read again"))
    (row,) = rows_of(pairs((TEXT, "so it was read again")), tokenizer, 6, "t5", answer_length=4)
    assert parts_of(row) == [[*prompt[:5], loaded.eos_id], answer[:4]]
    assert row.num_decoder_tokens == 4


def test_a_prompt_that_fills_the_model_is_an_error_unless_rows_are_shorter(tokenizer):
    examples = pairs(("ink", "so"), (TEXT, "so"))
    num_tokens = load_tokenizer(tokenizer).encode([TEXT])[0].size
    with pytest.raises(DataError, match=f"row 2 of file has a prompt of {num_tokens} tokens with model.max_positions"):
        rows_of(examples, tokenizer, num_tokens, max_positions=num_tokens)
    assert len(rows_of(examples, tokenizer, num_tokens - 1, max_positions=num_tokens)) == 2
    assert len(rows_of(examples, tokenizer, num_tokens + 2, max_positions=num_tokens + 2)) == 2


ROUNDS = [("system", "be brief")] + [
    (role, text) for n in range(4) for role, text in (("user", f"{n} {TEXT}"), ("assistant", f"{n}"))
]


def test_a_dialogue_is_what_the_template_writes(tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer)
    (row,) = rows_of(dialogues(ROUNDS), tokenizer)
    messages = [{"role": role, "content": text} for role, text in ROUNDS]
    whole = theirs.apply_chat_template(messages, tokenize=False)
    assert theirs.decode(row.ids) == whole.rstrip("\n")
    parts = [theirs.decode(part) for part in parts_of(row)]
    assert parts[1::2] == [f" {n}<|endoftext|>" for n in range(4)]
    assert parts[0] == theirs.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)


def test_a_long_dialogue_loses_its_first_rounds_and_keeps_the_system(tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer)
    (whole,) = rows_of(dialogues(ROUNDS), tokenizer)
    (row,) = rows_of(dialogues(ROUNDS), tokenizer, whole.ids.size - 1, max_positions=999)
    assert theirs.decode(row.ids).startswith(f"System: be brief\nUser: 1 {TEXT}\nAssistant: 1<|endoftext|>")
    assert len(parts_of(row)) == 6
    (row,) = rows_of(dialogues(ROUNDS), tokenizer, 20, max_positions=999)
    asked, said = parts_of(row)
    assert len(asked) + len(said) == 20
    assert theirs.decode(said) == " 3<|endoftext|>"


def test_a_template_without_an_end_gets_the_end_of_text_behind_the_last_answer(tmp_path, tokenizer):
    folder = templates.with_template(tokenizer, tmp_path / "t", templates.ENDLESS)
    (row,) = rows_of(dialogues(ROUNDS[1:]), folder)
    end = load_tokenizer(folder).eos_id
    assert [part[-1] == end for part in parts_of(row)] == [False] * 7 + [True]


def test_each_answer_has_a_row_where_the_template_forgets(tmp_path, tokenizer):
    folder = templates.with_template(tokenizer, tmp_path / "t", templates.FORGETFUL)
    rows = rows_of(dialogues(ROUNDS), folder)
    assert [len(parts_of(row)) for row in rows] == [2] * 4


def test_t5_has_a_row_for_each_answer(tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer)
    rows = rows_of(dialogues(ROUNDS), tokenizer, family="t5")
    messages = [{"role": role, "content": text} for role, text in ROUNDS]
    for number, row in enumerate(rows):
        asked = theirs.apply_chat_template(messages[: 2 * number + 2], tokenize=False, add_generation_prompt=True)
        assert [theirs.decode(part) for part in parts_of(row)] == [f"{asked}<|endoftext|>", f"{number}<|endoftext|>"]


@pytest.mark.parametrize(
    ("columns", "row", "said"),
    [
        ({}, {"prompt": "a", "answer": " "}, r"row 2 of .* has an empty text in column 'answer'"),
        ({}, {"prompt": "", "answer": "a"}, r"row 2 of .* has an empty text in column 'prompt'"),
        ({}, {"prompt": "a"}, r"row 2 of .* has no column 'answer'.*data.columns"),
        ({}, {"prompt": "a", "answer": 7}, r"row 2 of .* has no text in column 'answer': 7"),
        ({}, {"prompt": ["a"], "answer": "b"}, r"row 2 of .* has no text in column 'prompt'"),
        ({"messages": "m"}, {"prompt": "a", "answer": "b"}, r"row 2 of .* has no column 'm'"),
        ({"messages": "m"}, {"m": "text"}, r"row 2 of .* has no list of messages: 'text'"),
        ({"messages": "m"}, {"m": []}, r"row 2 of .* has no list of messages"),
        ({"messages": "m"}, {"m": [{"role": "user", "content": "a"}]}, r"row 2 of .* has no message of role assistant"),
        ({"messages": "m"}, {"m": [{"role": "bot", "content": "a"}]}, r"message 1 in row 2 of .* has role 'bot'"),
        ({"messages": "m"}, {"m": [{"role": "assistant", "content": " "}]}, r"message 1 in row 2 .* has an empty text"),
        ({"messages": "m"}, {"m": [{"role": "assistant", "content": None}]}, r"message 1 in row 2 .* has no text as"),
        ({"messages": "m"}, {"m": [{"from": "gpt", "value": "a"}]}, r"message 1 in row 2 of .*an object with role"),
    ],
)
def test_a_wrong_row_is_told(tmp_path, columns, row, said):
    first = {
        "prompt": "a",
        "answer": "b",
        "m": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    }
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (first, row)))
    with pytest.raises(DataError, match=f"(?s){said}"):
        read_answers(str(tmp_path / "a.jsonl"), ColumnsConfig(**columns))


def test_no_example_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no example"):
        read_answers(str(tmp_path / "a.jsonl"), ColumnsConfig())


def test_what_is_said_after_the_last_answer_is_left_out(tmp_path):
    messages = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    (tmp_path / "a.jsonl").write_text(json.dumps({"m": messages}) + "\n")
    assert read_answers(str(tmp_path / "a.jsonl"), ColumnsConfig(messages="m")).dialogues == [messages[:2]]


def test_a_message_that_spells_a_special_token_is_told(tokenizer):
    with pytest.raises(DataError, match=r"row 1 of file cannot be written.*spells the special token '<\|endoftext\|>'"):
        rows_of(dialogues([("user", "a <|endoftext|>"), ("assistant", "b")]), tokenizer)
