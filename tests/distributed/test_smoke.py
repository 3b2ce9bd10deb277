"""The smallest runs, as their files say they are started: on the text of the demonstration, by the real command."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from engine import cli
from engine.config.load import load_run
from engine.errors import EXIT_DONE
from engine.train.metrics import read_metrics
from tests.distributed.ranks import run_commands
from tools.demo.text import Document, topics

SMOKE = Path(__file__).parents[2] / "configs" / "smoke"
DEMO = (
    "palimpsest tokenizer .demo/text --vocab-size 4096 --output .demo/tokenizer",
    "palimpsest prepare .demo/text --tokenizer .demo/tokenizer --output .demo/tokens",
)
"""What `make demo` does first."""
STEPS = 4
LAYOUTS = {
    "gpt2": (),
    "llama": ("parallel.tensor=2",),
    "zero3-pipe": (),
    "bert": ("parallel.pipe=2", "parallel.zero_stage=3"),
    "t5": ("parallel.pipe=2", "parallel.zero_stage=2"),
}


def commands(name: str) -> tuple[str, ...]:
    """What the file says to do first; where it says nothing, what the demonstration does."""
    lines = (SMOKE / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return tuple(line.removeprefix("# $ ") for line in lines if line.startswith("# $ ")) or DEMO


def write_text(folder: Path) -> None:
    """Documents in the form of the demonstration's."""
    documents: list[Document] = topics() or [("license", (SMOKE.parents[1] / "LICENSE").read_text(encoding="utf-8"))]
    folder.mkdir(parents=True)
    lines = [json.dumps({"name": name, "text": text}) for name, text in documents]
    (folder / "topics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.matrix
@pytest.mark.parametrize("name", [path.stem for path in sorted(SMOKE.glob("*.yaml"))])
def test_a_smallest_run_trains_on_what_its_file_prepares(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(Path(".demo/text"))
    for command in commands(name):
        assert cli.main(shlex.split(command)[1:]) == EXIT_DONE, command
    path = SMOKE / f"{name}.yaml"
    changes = (*LAYOUTS[name], f"stages.0.duration.steps={STEPS}", "stages.0.schedule.warmup=1", "logging.wandb=off")
    parallel = load_run(path, list(changes)).parallel
    world_size = parallel.pipe * parallel.tensor
    ends = run_commands(world_size, "train", str(path), *changes)
    assert [code for code, _ in ends] == [EXIT_DONE] * world_size, ends
    losses = [record["loss"] for record in read_metrics(Path("runs") / f"smoke-{name}") if "loss" in record]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
