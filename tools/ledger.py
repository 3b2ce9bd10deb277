"""`palimpsest ledger`: what a run of several stages has learned and forgotten, as a table, a file and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.atomic import write_atomically
from engine.data.visible import visible
from engine.errors import ConfigError, EnvironmentProblem
from engine.redact import redact, redacted
from tools.text_table import aligned

if TYPE_CHECKING:  # pydantic would make --help slow
    from engine.train.ledger_records import Ledger

FILE = "ledger.json"


def main(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder or run file.")],
    reference: Annotated[
        list[Path] | None, typer.Option(metavar="RUN", help="A run to compare with, without replay for example.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Look for held-out documents in the training data.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show the loss of each domain after each stage, what was forgotten, what it cost and what transferred.

    Writes ledger.json and ledger.png to the run folder. A run that still goes on is shown as far as it is.
    """
    from engine.train.ledger_plot import PLOT, draw
    from engine.train.ledger_report import report

    folder, ledger = _open(run)
    others = [(label, other) for path in reference or [] for label, other in [_reference(path, ledger)]]
    found = redacted(report(ledger, others, check))
    try:
        write_atomically(folder / FILE, json.dumps(found, indent=1))
        draw(ledger, others, folder / PLOT)
    except OSError as error:
        raise EnvironmentProblem(
            f"{folder} cannot be written: {error.strerror}", "a run folder that can be written", "mend that"
        ) from error
    print(json.dumps(found, indent=1) if as_json else _clean(_text(found)))
    if not as_json:
        print(_clean(f"\nwritten to {folder / FILE}, drawn in {folder / PLOT}"))


def _open(path: Path) -> tuple[Path, Ledger]:
    """Return the run folder and the ledger of a run folder or run file."""
    from engine.checkpoint.interchange.initial import model_of
    from engine.config import save
    from engine.config.load import load_run
    from engine.train.ledger_records import read_ledger
    from engine.train.run_status import is_run_folder

    config = load_run(path, None, model_of) if path.is_file() else None
    folder = path if config is None else config.folder
    if not is_run_folder(folder):
        raise ConfigError(
            f"{folder} is no run folder", f"a folder that `train` wrote ({save.FILE}, metrics.jsonl)", "check the path"
        )
    return folder, read_ledger(folder, config or load_run(folder / save.FILE))


def _reference(path: Path, ledger: Ledger) -> tuple[str, Ledger]:
    folder, other = _open(path)
    if folder.resolve() == ledger.config.folder.resolve():
        raise ConfigError(f"--reference {path} is the run itself", "another run", "name one, or leave it out")
    if not {domain.name for domain in ledger.domains} & {domain.name for domain in other.domains}:
        raise ConfigError(
            f"--reference {path} has none of the run's held-out sets",
            ", ".join(domain.name for domain in ledger.domains),
            "name a run with the same stages before",
        )
    return folder.name, other


def _text(found: dict[str, Any]) -> str:
    """Return the ledger as tables."""
    domains, stages = found["domains"], found["stages"]
    parts = [f"run {found['run']}: {len(stages)} stages{'' if found['is_complete'] else ', the last one goes on'}"]
    rows = [["held-out loss, nats per token", *(one["domain"] for one in domains)]]
    if found["initial_loss"]:
        rows.append(["initial weights", *map(_number, found["initial_loss"])])
    rows += [[f"after {stage['name']}", *map(_number, row)] for stage, row in zip(stages, found["loss"], strict=True)]
    parts.append(aligned(rows))
    if found["measures"]:
        rows = [["measures of the task", *found["measures"]]]
        heads = ["initial weights", *(f"after {stage['name']}" for stage in stages)]
        values = zip(heads, zip(*found["measures"].values(), strict=True), strict=True)
        parts.append(aligned(rows + [[head, *map(_number, row)] for head, row in values]))
    if any(value is not None for row in found["bits_per_byte"] for value in row):
        rows = [["bits per byte", *(one["domain"] for one in domains)]]
        pairs = zip(stages, found["bits_per_byte"], strict=True)
        parts.append(aligned(rows + [[f"after {stage['name']}", *map(_number, row)] for stage, row in pairs]))
    measured = {
        "gain in its own stage": "gain",
        "forgotten since then": "forgetting_from_first",
        "forgotten since its best": "forgetting_from_best",
        "transferred before it": "forward_transfer",
    }
    rows = [["by domain", *(one["domain"] for one in domains)]]
    parts.append(aligned(rows + [[text, *(_signed(one[key]) for one in domains)] for text, key in measured.items()]))
    whole = {
        "average loss": _number(found["average"]),
        "backward transfer": _signed(found["backward_transfer"]),
        "forward transfer": _signed(found["forward_transfer"]),
        "forgetting from first": _signed(found["forgetting_from_first"]),
        "forgetting from best": _signed(found["forgetting_from_best"]),
    }
    parts.append(aligned([["over the run", ""], *([name, value] for name, value in whole.items())]))
    rows = [["tokens", ""]]
    rows += [[f"{stage['name']}: {name}", f"{count:,}"] for stage in stages for name, count in stage["tokens"].items()]
    parts.append(aligned(rows))
    parts += [_distances(found), _shared(found), *map(_compared, found["compared_with"])]
    return "\n\n".join(part for part in parts if part)


def _distances(found: dict[str, Any]) -> str:
    told = {
        name: f"{value:.3%} of their norm" if value is not None else "unknown (a checkpoint of it is gone)"
        for name, value in found["distance"].items()
    }
    rows = [["weights moved in", ""], *([name, text] for name, text in told.items())]
    return aligned(rows) if told else ""


def _shared(found: dict[str, Any]) -> str:
    if found["shared_documents"] is None:
        return ""
    lines = []
    for name, count in found["shared_documents"].items():
        if count is None:
            lines.append(f"held-out set {name}: not compared with the training data, some of which cannot be read")
        elif count:
            lines.append(
                f"held-out set {name}: {count:,} of its documents ARE IN THE TRAINING DATA; its loss is flattered"
            )
    clean = [name for name, count in found["shared_documents"].items() if count == 0]
    if clean:
        lines.append(f"no document of {', '.join(clean)} is in the training data (compared by hash)")
    return "\n".join(lines)


def _compared(other: dict[str, Any]) -> str:
    rows = [[f"beside {other['run']}", "its loss", "forgetting spared", "cost on the new domain"]]
    for name, one in other["domains"].items():
        rows.append([name, _number(one["loss"]), _percent(one["recovered_share"]), _percent(one["cost"])])
    return aligned(rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1%}"


def _clean(text: str) -> str:
    """Return the text without credentials and control characters, its lines kept."""
    return "\n".join(visible(line) for line in redact(text).split("\n"))
