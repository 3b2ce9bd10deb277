"""Dialogues as text: the chat template of a tokenizer, and the parts of what it writes that the model has to answer.

A template is the tokenizer's own (`chat_template.jinja`, or the key in `tokenizer_config.json`), run by transformers,
as its users will run it; a tokenizer without one gets `PLAIN`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.data.tokenizer.files import read_files
from engine.data.tokenizer.wrapping import wrap_files
from engine.errors import DataError

TEMPLATE_FILE = "chat_template.jinja"
ROLES = ("system", "user", "assistant", "tool")
"""Roles that the author of a message may have; the model learns what the assistant says."""
PLAIN = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""Template of tokenizers that have none: `User: ...`, a line for each message, and the end of text behind an answer."""

Message = dict[str, str]


class Round(NamedTuple):
    """An answer with its end, and the text before it, from the end of the answer before on."""

    prompt: str
    answer: str


class ChatTemplate:
    """Writes dialogues as the tokenizer in a folder wants them."""

    def __init__(self, tokenizer: Path) -> None:
        """Read the template. Raises `DataError` where the tokenizer cannot be read."""
        files = read_files(tokenizer)
        own = own_template(tokenizer)
        self.text = PLAIN if own is None else own
        self.is_plain = own is None
        self._wrapped = wrap_files(files)
        added = {token["content"] for token in files.tree.get("added_tokens") or [] if token.get("special")}
        spellings = sorted(added | {*self._wrapped.all_special_tokens}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, spellings)))

    def special_token_in(self, text: str) -> str | None:
        """Return a special token that a text spells, which the template's reader would take for its own."""
        found = self._special.search(text)
        return None if found is None else found.group()

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of what the template wrote, its special tokens among them, and nothing added."""
        return self._wrapped(texts, add_special_tokens=False)["input_ids"] if texts else []

    def ask(self, messages: Sequence[Message]) -> str:
        """Return a dialogue up to where the assistant's next answer begins. Raises as `rounds`."""
        return self._written(messages, asks=True)

    def rounds(self, messages: Sequence[Message]) -> list[list[Round]]:
        """Return the rounds of a dialogue, in one row or, where the template writes an earlier answer otherwise once
        the dialogue goes on, in a row for each answer.

        Raises:
            DataError: the template refuses the dialogue, or does not show where an answer begins.
        """
        asked, answers = [], []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked.append(self.ask(messages[:number]))
            whole = self._written(messages[: number + 1], asks=False)
            if not whole.startswith(asked[-1]):
                raise DataError(
                    f"the chat template asks with {asked[-1][-40:]!r}, and writes message {number + 1} otherwise",
                    "a template that begins an answer as it asks for it",
                    f"change {TEMPLATE_FILE} in the tokenizer's folder",
                )
            answers.append(whole.removeprefix(asked[-1]))
        whole = [before + answer for before, answer in zip(asked, answers, strict=True)]
        goes_on = all(after.startswith(before) for before, after in zip(whole, asked[1:], strict=False))
        if not goes_on:
            return [[self._round(*parts)] for parts in zip(asked, answers, strict=True)]
        row, seen = [], ""
        # A prompt has all that came before: with prompts A and A+a+B and answers a and b, the second round's is B.
        for before, answer in zip(asked, answers, strict=True):
            found = self._round(before.removeprefix(seen), answer)
            seen = before + found.answer
            row.append(found)
        return [row]

    def _round(self, prompt: str, answer: str) -> Round:
        """Return a round whose answer has no white space behind it: that begins the next prompt."""
        return Round(prompt, answer.rstrip() or answer)

    def _written(self, messages: Sequence[Message], asks: bool) -> str:
        written: Any = None
        try:
            written = self._wrapped.apply_chat_template(
                list(messages), chat_template=self.text, tokenize=False, add_generation_prompt=asks
            )
        except Exception as error:  # the template may raise what it likes
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"the chat template refuses the dialogue: {said}",
                "messages as the template wants them",
                f"mend or drop the row, or change {TEMPLATE_FILE} in the tokenizer's folder",
            ) from error
        return str(written)


def own_template(tokenizer: Path) -> str | None:
    """Return the chat template of the tokenizer in a folder. Raises `DataError` where the folder cannot be read."""
    path = tokenizer / TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = read_files(tokenizer).settings.get("chat_template")
    if isinstance(found, list):  # several by name
        found = {entry.get("name"): entry.get("template") for entry in found}.get("default")
    return found if isinstance(found, str) and found else None
