"""The README says what is: its tables, links, commands and run file are held to the code."""

import re
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
from tests.readme import README, REPOSITORY, named, section, table


def test_the_composition_table_is_the_rules_own() -> None:
    start, end = MARKERS
    assert README.count(start) == README.count(end) == 1
    assert README.partition(start)[2].partition(end)[0].strip() == composition_table()


def test_every_command_is_named_and_no_other() -> None:
    assert [named(cells[0]) for cells in table("The command")] == [[f"palimpsest {name}"] for name in COMMANDS]
    used = set(re.findall(r"palimpsest ([a-z-]+)(?= [A-Za-z-]+[./]|`| SECTION)", README))
    assert used <= COMMANDS.keys()


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_links_lead_somewhere(link: str) -> None:
    assert (REPOSITORY / link).exists()


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
