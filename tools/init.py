"""`palimpsest init`: a first run file with comments, for a family, a size, prepared data and a number of GPUs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.config.schema.model import FamilyName
from engine.errors import ConfigError

if TYPE_CHECKING:  # numpy would make --help slow
    from tools.init_text import Data

TINY = {"num_layers": 4, "hidden_size": 128, "num_heads": 4}
SIZES: dict[FamilyName, dict[str, dict[str, Any]]] = {
    "gpt": {
        "tiny": TINY,
        "124m": {"num_layers": 12, "hidden_size": 768, "num_heads": 12},
        "355m": {"num_layers": 24, "hidden_size": 1024, "num_heads": 16},
        "774m": {"num_layers": 36, "hidden_size": 1280, "num_heads": 20},
        "1.5b": {"num_layers": 48, "hidden_size": 1600, "num_heads": 25},
    },
    "bert": {
        "tiny": TINY,
        "base": {"num_layers": 12, "hidden_size": 768, "num_heads": 12},
        "large": {"num_layers": 24, "hidden_size": 1024, "num_heads": 16},
    },
    "t5": {
        "tiny": TINY,
        "small": {"num_layers": 12, "hidden_size": 512, "num_heads": 8},
        "base": {"num_layers": 24, "hidden_size": 768, "num_heads": 12},
        "large": {"num_layers": 48, "hidden_size": 1024, "num_heads": 16},
    },
}
"""Published sizes of each family (Radford et al. 2019, Devlin et al. 2019, Raffel et al. 2020), and one for trials."""
LARGEST_GPUS = 2**16


def main(
    family: Annotated[FamilyName | None, typer.Option(help="Family of the model.")] = None,
    size: Annotated[str | None, typer.Option(help="Size of the model: tiny, 124m, base, ...")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder that `palimpsest prepare` wrote.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, max=LARGEST_GPUS, help="Number of GPUs.")] = None,
    output: Annotated[Path | None, typer.Option(help="Run file to write; one that exists is not replaced.")] = None,
) -> None:
    """Write a run file with comments. On a terminal, asks for what no option says."""
    from tools.init_text import read_data, run_text

    family = family or _family(_asked("family", f"Family of the model ({', '.join(SIZES)})"))
    sizes = ", ".join(SIZES[family])
    size = size or _asked("size", f"Size of the model ({sizes})")
    if size not in SIZES[family]:
        raise ConfigError(f"--size {size} is no size of family {family}", sizes, "name one of these")
    # Read before the next question: a wrong folder is told at once.
    found: Data = read_data(data or Path(_asked("data", "Folder that `palimpsest prepare` wrote")))
    gpus = gpus or _number(_asked("gpus", "Number of GPUs"))
    path = output or Path(_asked("output", "Run file to write"))
    if path.exists():
        raise ConfigError(f"{path} exists", "a new file", "name another one, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = run_text(family, size, SIZES[family][size], found, gpus, path.stem)
    with path.open("x", encoding="utf-8") as file:  # never over a file that came to be meanwhile
        file.write(text)
    print(f"{path} is written. Next: palimpsest plan {path} --world {gpus}")


def _asked(option: str, question: str) -> str:
    """Return the answer to a question. Raises `ConfigError` where nobody can be asked."""
    if not sys.stdin.isatty():
        raise ConfigError(f"--{option} is missing", question[0].lower() + question[1:], f"give --{option}")
    return typer.prompt(question, err=True).strip()


def _family(answer: str) -> FamilyName:
    for name in SIZES:
        if name == answer:
            return name
    raise ConfigError(f"family {answer!r} is unknown", ", ".join(SIZES), "name one of these")


def _number(answer: str) -> int:
    if not answer.isdecimal() or not 1 <= int(answer) <= LARGEST_GPUS:
        raise ConfigError(f"{answer!r} GPUs", f"1 to {LARGEST_GPUS}", "write a whole number")
    return int(answer)
