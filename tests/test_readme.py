"""README, CONTRIBUTING.md and docs/ say what is: tables, links, paths, commands and run file are held to the code."""

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
from tests.readme import PAGES, REPOSITORY, named, section, table, text_of

LARGEST_README = 180
"""Lines; what is longer is a page of its own."""
FOLDERS = "engine|launcher|tools|tests|bench|configs|docs"


def test_the_composition_table_is_the_rules_own() -> None:
    start, end = MARKERS
    layouts = text_of("docs/layouts.md")
    assert layouts.count(start) == layouts.count(end) == 1
    assert layouts.partition(start)[2].partition(end)[0].strip() == composition_table()


def test_the_readme_is_read_at_one_sitting() -> None:
    assert len(text_of("README.md").splitlines()) <= LARGEST_README


def test_every_command_is_named_and_no_other() -> None:
    assert [named(cells[0]) for cells in table("The command")] == [[f"palimpsest {name}"] for name in COMMANDS]


@pytest.mark.parametrize("page", PAGES)
def test_commands_links_paths_and_modules_are_there(page: str) -> None:
    """A path or a module is what stands between backticks and begins with a folder of the repository."""
    text = text_of(page)
    assert set(re.findall(r"palimpsest ([a-z-]+)(?= [A-Za-z-]+[./]|`| SECTION)", text)) <= COMMANDS.keys()
    for link in re.findall(r"\]\((?!https?:)([^)#\s]+)[^)]*\)", text):
        assert ((REPOSITORY / page).parent / link).exists(), link
    for path, name in re.findall(rf"`((?:{FOLDERS})/[\w./-]*)(?:::(\w+))?`", text):
        assert (REPOSITORY / path).exists(), path
        assert not name or f"def {name}(" in text_of(path), f"{path}::{name}"
    for module in re.findall(r"`((?:engine|launcher|tools|bench)(?:\.\w+)+)`", text):
        assert defines(module), module


def defines(dotted: str) -> bool:
    """Return True for a module of ours, or a name that one has."""
    path, (parent, _, name) = dotted.replace(".", "/"), dotted.replace(".", "/").rpartition("/")
    if (REPOSITORY / f"{path}.py").exists() or (REPOSITORY / path / "__init__.py").exists():
        return True
    file = REPOSITORY / f"{parent}.py"
    return file.exists() and re.search(rf"^(def|class) {name}\b|^{name}\b", file.read_text("utf-8"), re.M) is not None


@pytest.mark.parametrize("dotted", ["engine.nowhere", "engine.errors.Nothing", "tools.plan.nothing"])
def test_a_module_that_is_not_there_is_seen(dotted: str) -> None:
    assert not defines(dotted)


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
    assert set(re.findall(r"make ([a-z-]+)\b", text_of("README.md"))) & targets >= {"demo", "test", "test-all", "clean"}


def test_the_index_of_distributed_tests_is_complete() -> None:
    folder = Path(__file__).parent / "distributed"
    named = re.findall(r"^\| `(test_\w+\.py)`", (folder / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert named == sorted(path.name for path in folder.glob("test_*.py"))
