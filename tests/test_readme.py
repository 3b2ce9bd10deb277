"""The README says what is: its tables, links, commands and run file are held to the code."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from engine import errors, outcome
from engine.checkpoint.folder import CHECKPOINTS
from engine.cli import COMMANDS
from engine.config import save
from engine.config.load import load_run
from engine.config.resolve import check, resolve
from engine.config.resume import flatten
from engine.plan.composition import MARKERS, composition_table, example
from engine.train.metrics import METRICS
from engine.train.plot import PLOT
from tests.test_rooms import REPOSITORY, ROWS, room, row, sources

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text under a heading."""
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def table(title: str) -> list[list[str]]:
    """Cells of the section's first table, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def named(cell: str) -> list[str]:
    """What a cell puts between backticks."""
    return re.findall(r"`([^`]+)`", cell)


def test_the_composition_table_is_the_rules_own() -> None:
    start, end = MARKERS
    assert README.count(start) == README.count(end) == 1
    assert README.partition(start)[2].partition(end)[0].strip() == composition_table()


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


def test_every_command_is_named_and_no_other() -> None:
    assert [named(cells[0]) for cells in table("The command")] == [[f"palimpsest {name}"] for name in COMMANDS]
    used = set(re.findall(r"palimpsest ([a-z-]+)(?= [A-Za-z-]+[./]|`| SECTION)", README))
    assert used <= COMMANDS.keys()


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_links_lead_somewhere(link: str) -> None:
    assert (REPOSITORY / link).exists()


def test_its_first_lines_lead_from_text_to_a_model(tmp_path: Path) -> None:
    """As typed into a shell, on prose of the standard library; only the activation and the number of steps differ."""
    text = tmp_path / "my-text"
    text.mkdir()
    for name in ("argparse", "json/decoder", "random", "statistics", "typing", "zipfile"):
        source = Path(sysconfig.get_path("stdlib")) / f"{name}.py"
        (text / f"{source.stem}.txt").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    shown = section("From your own text to a model").partition("```console\n")[2].partition("```")[0]
    lines = shown.replace("source .venv/bin/activate", f"PATH={Path(sys.executable).parent}:$PATH")
    lines = lines.replace("steps: 200", "steps: 6").replace("warmup: 20", "warmup: 2")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-euc", lines], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my" / "model" / "model.safetensors").is_file()
    assert "Once upon a time" in done.stdout


def test_the_run_file_starts_on_a_node_of_eight(tmp_path: Path) -> None:
    shown = section("A run file")
    path = tmp_path / "mine.yaml"
    text = shown.partition("```yaml\n")[2].partition("```")[0]
    path.write_text(text.replace("../configs", str(REPOSITORY / "configs")), encoding="utf-8")
    (overrides,) = re.findall(r"`palimpsest train runs/mine.yaml ([^`]+)`", shown)
    for config in (load_run(path), load_run(path, overrides.split())):
        assert not check(config)
        assert resolve(config, 8).world_size == 8


def test_kinds_of_keys() -> None:
    kinds = {key: kind for key, (kind, _) in flatten(example()).items()}
    shown = {key: cells[0] for cells in table("Resuming") for key in named(cells[1])}
    for key, kind in kinds.items():
        prefixes = [prefix for prefix in shown if key == prefix or key.startswith(f"{prefix}.")]
        if prefixes:
            assert shown[max(prefixes, key=len)] == kind, key
        else:
            assert key == "stages.0.name"


def test_exit_codes() -> None:
    codes = {int(cells[0]) for cells in table("How a run ends")}
    assert codes == {value for name, value in vars(errors).items() if name.startswith("EXIT_")}


def test_names_in_the_run_folder() -> None:
    shown = {name.rstrip("/") for cells in table("The run folder") for name in named(cells[0])}
    assert {save.FILE, outcome.FILE, METRICS, PLOT, CHECKPOINTS} <= shown
    assert all(field in section("The run folder") for field in ("job", "attempt", "code", "step", "rank", "error"))


def test_make_knows_what_the_readme_tells_to_type() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)\b", README)) & targets >= {"demo", "test", "test-all", "clean"}
