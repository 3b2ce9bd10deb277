"""Who may import whom: downwards only, by the table of rooms; read from the source, so lazy imports count, too."""

import ast
from pathlib import Path

import pytest

from tests.readme import REPOSITORY, named, table
from tests.sources import dotted, imports, sources

ROWS: list[set[str]] = [
    {"cli"},
    {"tools"},
    {"launcher"},
    {"library"},
    {"evaluate"},
    {"tasks"},
    {"serve"},
    {"train"},
    {"checkpoint"},
    {"corpus"},
    {"data", "optim"},
    {"models"},
    {"parallel"},
    {"plan"},
    {"config"},
    {"extras", "foreign", "provenance", "run_folder", "switch_files"},
    {"errors", "logs", "output", "outcome", "heartbeat"},
    {"redact", "atomic"},
]
"""Top to bottom; a room imports itself and rooms of lower rows."""
ROWS_WITHIN: dict[str, list[set[str]]] = {
    "checkpoint": [{"interchange", "node_memory"}, {""}],
    "data": [{""}, {"objectives", "replay"}, {"order"}, {"shards"}, {"tokenizer"}],
}
"""The same inside of the largest rooms, whose own files are ""."""
LAUNCHER_MAY = {
    "launcher",
    "plan",
    "config",
    "run_folder",
    "switch_files",
    "provenance",
    "errors",
    "redact",
    "atomic",
    "logs",
    "output",
    "outcome",
    "heartbeat",
}
"""The launcher runs where torch may not even be installed."""
MAY_USE_TORCH_DISTRIBUTED = {
    "engine/parallel/groups.py",
    "engine/parallel/collectives.py",
    "engine/checkpoint/interchange/sinks/dcp.py",  # writes files of torch.distributed.checkpoint, over no communicator
}


def room(module: str) -> str | None:
    """The room of a module's dotted name; None for the package itself, which holds the version."""
    parts = module.split(".")
    return parts[0] if parts[0] in ("launcher", "tools") else parts[1] if len(parts) > 1 else None


def row(name: str) -> int:
    (found,) = [number for number, rooms in enumerate(ROWS) if name in rooms]
    return found


@pytest.mark.parametrize("source", sources())
def test_imports_run_downwards(source: str) -> None:
    own = room(dotted(source))
    for module in imports(source):
        if module.split(".")[0] not in ("engine", "launcher", "tools"):
            continue
        other = room(module)
        if other in (None, "__version__", own):
            continue
        assert own is not None, f"{source} imports {module}: the package itself imports nothing"
        assert other is not None
        assert row(own) < row(other), f"{source} imports {module}: {own} may not import {other}"
        if own == "launcher":
            assert other in LAUNCHER_MAY, f"{source} imports {module}"


def sub_room(module: str, room: str) -> str:
    """The part of a room that a module's dotted name is in; "" for the room's own files."""
    parts = module.split(".")
    return parts[2] if (REPOSITORY / "engine" / room / parts[2]).is_dir() else ""


@pytest.mark.parametrize("source", [source for source in sources() if source.split("/")[1] in ROWS_WITHIN])
def test_imports_inside_of_a_room_run_downwards(source: str) -> None:
    room = source.split("/")[1]
    if source == f"engine/{room}/__init__.py":
        return
    rows = {name: number for number, names in enumerate(ROWS_WITHIN[room]) for name in names}
    own = sub_room(dotted(source), room)
    for module in imports(source):
        if module.startswith(f"engine.{room}.") and (other := sub_room(module, room)) != own:
            assert rows[own] < rows[other], f"{source} imports {module}: {own or room} may not import {other or room}"


def test_every_room_is_in_the_table() -> None:
    found = {room(dotted(source)) for source in sources()} - {None}
    assert found <= set().union(*ROWS)


def test_the_map_has_every_room_in_its_row() -> None:
    shown = {path: int(number) for number, rooms, _ in table("Map of rooms") for path in named(rooms)}
    assert all((REPOSITORY / path).exists() for path in shown)
    by_room = {Path(path).stem: number for path, number in shown.items()}
    found = {room(source.removesuffix(".py").replace("/", ".").removesuffix(".__init__")) for source in sources()}
    assert set(by_room) == found - {None}
    for upper in by_room:
        for lower in by_room:
            if row(upper) < row(lower) and (upper, lower) != ("tools", "launcher"):
                assert by_room[upper] < by_room[lower], (upper, lower)
    assert len(ROWS) > 1


@pytest.mark.parametrize("source", [source for source in sources() if source not in MAY_USE_TORCH_DISTRIBUTED])
def test_torch_distributed_has_two_doors(source: str) -> None:
    named = [module for module in imports(source) if module.startswith(("torch.distributed", "deepspeed.comm"))]
    assert not named, f"{source} imports {named}"
    text = (REPOSITORY / source).read_text(encoding="utf-8")
    if not any(f"{package}." in text for package in ("torch.distributed", "deepspeed.comm")):
        return  # spares most files the walk through their tree, which takes most of this module's time
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("torch.distributed", "deepspeed.comm")):
            raise AssertionError(f"{source}:{node.lineno} uses {ast.unparse(node)}")


def test_no_test_module_is_imported() -> None:
    """What several tests use lies in a module of its own: an import would collect nothing, but run the whole file."""
    for path in sorted((REPOSITORY / "tests").rglob("*.py")):
        source = str(path.relative_to(REPOSITORY))
        found = [name for name in imports(source) if any(part.startswith("test_") for part in name.split(".")[:-1])]
        assert not found, f"{source} imports {found}: move it to a module beside the tests"


def test_the_test_itself_sees_what_it_looks_for() -> None:
    assert {"torch.distributed", "engine.config.resolve.Layout"} <= set(imports("engine/parallel/groups.py"))
    assert (room("engine"), room("engine.cli"), room("tools.plan")) == (None, "cli", "tools")
    assert row("plan") < row("config") < row("errors")
