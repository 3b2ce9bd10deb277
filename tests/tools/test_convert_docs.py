"""The tables of docs/convert.md are those of the code."""

from __future__ import annotations

from pathlib import Path

from engine.checkpoint.interchange.forms import FORMS
from tools.conversions import CONVERSIONS, KINDS

PAGE = Path(__file__).parents[2] / "docs" / "convert.md"


def rows(*lines: tuple[str, ...]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def test_the_table_of_conversions():
    found = [(KINDS[kind], f"`{to}`", one.carried) for (kind, to), one in CONVERSIONS.items()]
    assert rows(("SOURCE", "`--to`", "carries over"), ("---",) * 3, *found) in PAGE.read_text(encoding="utf-8")


def test_there_is_an_example_of_every_kind_and_format():
    shown = PAGE.read_text(encoding="utf-8").partition("```console\n")[2].partition("```")[0]
    examples = [line.partition("#")[0].split() for line in shown.splitlines() if line.startswith("palimpsest convert")]
    named = {line[line.index("--to") + 1] for line in examples if "--to" in line}
    # those that are written where none is named
    assert named | {"huggingface", "palimpsest"} == {to for _, to in CONVERSIONS}
    sources = {line[2] for line in examples}
    paths = {
        "palimpsest": "my/run",
        "huggingface": "their/model",
        "deepspeed": "their/zero3",
        "shards": "my/tokens/train",
    }
    paths |= {
        "megatron-lm": "their/megatron",
        "universal": "their/universal",
        "dcp": "their/dcp",
        "megatron": "my/set.bin",
    }
    assert paths.keys() == KINDS.keys()
    assert set(paths.values()) <= sources


def test_the_table_of_forms():
    found = [(form.name, f"`{form.architecture}`", _keys(form)) for form in FORMS]
    assert rows(("form", "class", "keys of `model`"), ("---",) * 3, *found) in PAGE.read_text(encoding="utf-8")


def _keys(form) -> str:
    values = {key: str(value).lower() if isinstance(value, bool) else value for key, value in form.twin.values.items()}
    chosen = [f"`{key}`: {value or 'none'}" for key, value in values.items()]
    return ", ".join([*chosen, *(f"`{key}`: {words}" for key, words in form.twin.allowed.items())])
