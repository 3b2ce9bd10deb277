"""Dialogues under chat templates: parts join to what the template writes; answers are what the assistant says."""

import json
import random
import re

import pytest
import transformers

from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import DataError
from engine.tasks.dialogues import PLAIN, ChatTemplate, own_template
from tests.distributed.runs import write_sentences
from tests.engine.tasks import templates

ENDS = {
    templates.CHATML: "<|im_end|>",
    templates.MARKED: "<|im_end|>",
    templates.HEADERS: "<|im_end|>",
    templates.INSTRUCTION: "<|endoftext|>",
    templates.ENDLESS: "",
    None: "<|endoftext|>",
}
"""What ends an answer, by template."""
NAMES = {getattr(templates, name): name for name in dir(templates) if name.isupper()} | {None: "PLAIN"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_sentences(folder, "bpe", 300, "causal")
    return folder / "tokenizer"


def dialogue(draw, has_system):
    """Of one to four rounds; what the assistant says is in capitals, and nothing else is."""
    words = ["ink", "monk", "page 7", "羊皮紙", "a\nline", "so"]

    def text():
        return " ".join(draw.choices(words, k=draw.randint(1, 6)))

    messages = [{"role": "system", "content": text()}] if has_system and draw.random() < 0.5 else []
    for _ in range(draw.randint(1, 4)):
        messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": text().upper()}]
    return messages


def written(folder, messages, asks=False):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    how = {} if theirs.chat_template else {"chat_template": PLAIN}
    return theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks, **how)


@pytest.mark.parametrize("text", ENDS, ids=NAMES.get)
def test_the_answers_are_what_the_assistant_says(tmp_path, tokenizer, text):
    folder = templates.with_template(tokenizer, tmp_path / "t", text)
    template, draw = ChatTemplate(folder), random.Random(0)
    assert own_template(folder) == text
    assert template.is_plain == (text is None)
    for _ in range(15):
        messages = dialogue(draw, has_system=text != templates.INSTRUCTION)
        (row,) = template.rounds(messages)
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        assert [found.answer.strip() for found in row] == [content + ENDS[text] for content in said]
        assert not any(re.search(r"\b(INK|MONK|PAGE|LINE|SO)\b", found.prompt) for found in row)
        whole = written(folder, messages)
        assert whole.startswith("".join(part for found in row for part in found))
        assert row[0].prompt == written(folder, messages[: [m["role"] for m in messages].index("assistant")], asks=True)
        # what the model is asked later is what it was shown before
        last = written(folder, messages[:-1], asks=True)
        assert "".join(part for found in row for part in found).startswith(last)


def test_marks_in_a_template_say_the_same(tmp_path, tokenizer):
    """transformers' own mask of what the assistant says, token by token."""
    folder = templates.with_template(tokenizer, tmp_path / "t", templates.MARKED)
    template, theirs, draw = ChatTemplate(folder), transformers.AutoTokenizer.from_pretrained(folder), random.Random(1)
    for _ in range(15):
        messages = dialogue(draw, has_system=True)
        expected = theirs.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        (row,) = template.rounds(messages)
        ids = template.ids([part for found in row for part in found])
        mask = [number % 2 for number, part in enumerate(ids) for _ in part]
        flat = [token for part in ids for token in part]
        assert flat == expected["input_ids"][: len(flat)]
        assert mask == expected["assistant_masks"][: len(flat)]
        assert not any(expected["assistant_masks"][len(flat) :])


def test_an_answer_that_a_template_rewrites_later_is_learned_as_it_is_asked_for(tmp_path, tokenizer):
    folder = templates.with_template(tokenizer, tmp_path / "t", templates.FORGETFUL)
    messages = dialogue(random.Random(4), has_system=True)
    rows = ChatTemplate(folder).rounds(messages)
    said = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(rows) == len(said) > 1
    for (found,), number in zip(rows, said, strict=True):
        assert found.prompt == written(folder, messages[:number], asks=True)
        assert found.answer == f"<think>\n\n</think>\n\n{messages[number]['content']}<|im_end|>"


def test_a_template_of_the_settings_counts(tmp_path, tokenizer):
    folder = templates.with_template(tokenizer, tmp_path / "t", None)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for given in (
        templates.CHATML,
        [{"name": "tools", "template": "x"}, {"name": "default", "template": templates.CHATML}],
    ):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": given}))
        assert ChatTemplate(folder).text == templates.CHATML


@pytest.mark.parametrize(
    ("text", "messages", "said"),
    [
        (templates.INSTRUCTION, ["system", "user", "assistant"], "refuses the dialogue: no messages of the system"),
        (templates.INSTRUCTION, ["user", "user", "assistant"], "refuses the dialogue: roles must alternate"),
        (templates.HIDDEN, ["user", "assistant"], "asks with .*your turn:"),
        ("{{ nothing.at.all }}", ["user", "assistant"], "refuses the dialogue"),
        ("{% for", ["user", "assistant"], "refuses the dialogue"),
    ],
    ids=["system", "order", "hidden", "undefined", "syntax"],
)
def test_a_template_that_cannot_be_used_is_told(tmp_path, tokenizer, text, messages, said):
    folder = templates.with_template(tokenizer, tmp_path / "t", text)
    with pytest.raises(DataError, match=f"(?s){said}"):
        ChatTemplate(folder).rounds([{"role": role, "content": "ink"} for role in messages])


def test_special_tokens_in_a_text_are_found(tmp_path, tokenizer):
    template = ChatTemplate(templates.with_template(tokenizer, tmp_path / "t", templates.CHATML))
    assert template.special_token_in("a <|im_end|> b") == "<|im_end|>"
    assert template.special_token_in("a <|endoftext|> b") == "<|endoftext|>"
    assert template.special_token_in("a <|im_ b") is None
    assert load_tokenizer(tokenizer).vocab_size == 300
