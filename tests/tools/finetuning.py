"""`palimpsest finetune` in a process of its own, for tests."""

import os
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

REPOSITORY = Path(__file__).parents[2]


def finetune(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from engine.cli import main; sys.exit(main(sys.argv[1:]))",
            "finetune",
            *arguments,
        ],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def write_task(folder: Path, tree: dict) -> str:
    quiet = {"tensorboard": False, "wandb": "off", "plot": False}
    with (folder / "task.yaml").open("w") as file:
        YAML().dump(tree | {"logging": quiet}, file)
    return str(folder / "task.yaml")
