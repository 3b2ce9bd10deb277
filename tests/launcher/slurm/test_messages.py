"""docs/cluster.md says what to do for every message of launcher/slurm, and of the commands in front of it."""

from __future__ import annotations

import ast
import re

import pytest

from tests.readme import REPOSITORY

RAISED = ("ConfigError", "EnvironmentProblem", "NotOurs", "ControllerAway")
TOLD = ("say", "tell", "warning", "phase")
GAP = "\0"
"""Stands for what is put into a message."""
FEWEST_LETTERS = 8
"""Messages with fewer letters of their own pass another one on, which has its row."""


def text_of(node: ast.expr) -> str:
    """Return the constant text of a message, with gaps; empty for one that is made elsewhere."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sd]|%\.0f", GAP, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else GAP for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + GAP
    return ""


def messages() -> list[tuple[str, str]]:
    """Return (file, text) of every message, from the sources."""
    found = []
    tools = [REPOSITORY / "tools" / name for name in ("job.py", "slurm_options.py")]
    for path in [*sorted((REPOSITORY / "launcher" / "slurm").glob("*.py")), *tools]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args:
                function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                text = text_of(node.args[0]) if function in (*RAISED, *TOLD) else ""
                if len(re.sub(r"[^a-z]", "", text)) >= FEWEST_LETTERS:
                    found.append((path.name, text))
    return found


def rows() -> list[str]:
    """Return the messages of the tables, with gaps for single capital letters and dots."""
    page = (REPOSITORY / "docs" / "cluster.md").read_text(encoding="utf-8")
    section = page[page.index("## Messages, and what to do") : page.index("## Why not torchrun")]
    shown = [
        word
        for line in section.splitlines()
        if line.startswith("| `")
        for word in re.findall(r"`([^`]+)`", line.split(" | ")[0])
    ]
    return [re.sub(r"\.\.\.|\b[A-Z]\b", GAP, word) for word in shown]


def is_found(text: str, where: str) -> bool:
    """Return True if one text stands in another, whatever fills its gaps."""
    return re.search(".*".join(map(re.escape, text.split(GAP))), where, re.DOTALL) is not None


@pytest.mark.parametrize(("file", "text"), messages(), ids=lambda value: value.replace(GAP, "_")[:60])
def test_every_message_has_its_row(file: str, text: str) -> None:
    # Either may say more: a row shows the part by which a user knows it, or an example.
    known = [row for row in rows() if is_found(row, text) or is_found(text, row)]
    assert known, f"{file}: {text.replace(GAP, '...')}"


def test_messages_are_found() -> None:
    texts = [text.replace(GAP, "_") for _, text in messages()]
    assert "node _ is lost: _" in texts
    assert "Slurm refuses the job: _" in texts
    assert len(texts) > 40
