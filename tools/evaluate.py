"""`palimpsest evaluate`: measure models that are there, in the terminal, as JSON and as a page."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.data.visible import visible
from tools.path_labels import path_labels

if TYPE_CHECKING:  # torch would make --help slow
    from engine.evaluate.tables import Table

JSON, PAGE = "evaluation.json", "evaluation.html"
"""Names of the files in the output folder."""
_WIDEST = 100
"""Characters of a cell of a table at the most."""

Texts = Annotated[
    list[str] | None, typer.Option(metavar="NAME=SOURCE", help="Text or token shards: bits per byte, perplexity.")
]
Harness = Annotated[
    list[str] | None, typer.Option(metavar="TASK", help="A task of lm-evaluation-harness: its YAML file.")
]
Labelled = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=FILE", help="Labelled examples, for a fine-tuned model: its measures."),
]


def main(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL...", help="A run folder, one of its checkpoints, or a Hugging Face folder."),
    ],
    text: Texts = None,
    harness: Harness = None,
    labelled: Labelled = None,
    column: Annotated[
        list[str] | None, typer.Option(metavar="KEY=NAME", help="A column of the sets, as data.columns has them.")
    ] = None,
    faults: Annotated[
        bool, typer.Option("--faults", help="Measure the sets again with typing errors in their texts.")
    ] = False,
    bias: Annotated[list[str] | None, typer.Option(metavar="en|zh", help="Bias probes of a language.")] = None,
    explain: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Show which parts of a text a prediction rests on.")
    ] = None,
    explain_examples: Annotated[
        int, typer.Option(min=0, help="So for this many examples of each set, the surest errors first.")
    ] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Use this many documents or examples of each.")] = None,
    text_key: Annotated[str, typer.Option(help="Key of the text in JSON lines.")] = "text",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Equal seeds make equal faults.")] = 0,
    tokenizer: Annotated[Path | None, typer.Option(help="The tokenizer's folder, if it was moved.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="FOLDER", help=f"Folder for {PAGE} and {JSON}.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Measure a model: on text, on benchmarks, on labelled sets, with faults, for bias, and why it predicts so.

    Several models are measured the same way and stand side by side in one table. Nothing is fetched from the network.
    """
    _keep_offline()
    from engine.evaluate.report import Request, evaluate, evaluate_each
    from engine.logs import configure
    from engine.serve.quiet import quiet

    configure()
    quiet()
    _check_output(output)
    models = list(dict.fromkeys(sources))
    request = Request(
        source=models[0],
        tokenizer=tokenizer,
        texts=text or [],
        text_key=text_key,
        harness=harness or [],
        sets=labelled or [],
        columns=column or [],
        faults=faults,
        bias=bias or [],
        explained=explain or [],
        num_explained=explain_examples,
        limit=limit,
        seed=seed,
    )
    if len(models) == 1:
        report = evaluate(request, _progress)
    else:
        report = evaluate_each(request, models, path_labels(models), _progress)
    if output is not None:
        _write(report, output)
    print(json.dumps(report, indent=1, ensure_ascii=False) if as_json else _text(report))
    if output is not None and not as_json:
        print(f"\nwritten to {output / PAGE} and {output / JSON}")


def _keep_offline() -> None:
    """Keep Hugging Face's libraries and lm_eval off the network, and their bars off a log: they read this on import."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def _check_output(output: Path | None) -> None:
    from engine.errors import ConfigError

    if output is not None and output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output} is a file", "a folder, new or not", "name another one")


@contextlib.contextmanager
def _progress(part: str) -> Iterator[Callable[[int], None]]:
    """Show a part while it goes on, with the number of documents that are done; nothing where nobody looks."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description} {task.fields[count]}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task, total = progress.add_task(visible(part).replace("[", r"\["), total=None, count=""), 0

        def done(count: int) -> None:
            nonlocal total
            total += count
            progress.update(task, count=f"{total:,}")

        yield done


def _write(report: dict[str, Any], output: Path) -> None:
    from engine.atomic import write_atomically
    from engine.evaluate.page import page

    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / JSON, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_atomically(output / PAGE, page(report))


def _text(report: dict[str, Any]) -> str:
    """Return a report for the terminal: of several models the table of all, and what explains their predictions."""
    from engine.evaluate.comparison import comparison
    from engine.evaluate.tables import tables

    if "models" not in report:
        return "\n\n".join([_head(report), *map(_table, tables(report)), *_explanations(report)])
    models = report["models"]
    heads = "\n".join(f"{visible(one['label'])} is {_head(one)}" for one in models)
    explained = ["\n\n".join([visible(one["label"]), *rows]) for one in models if (rows := _explanations(one))]
    return "\n\n".join([heads, _table(comparison(report)), *explained])


def _head(report: dict[str, Any]) -> str:
    return visible(f"{report['origin']}: {report['class']}, {report['parameters']:,} parameters")


def _table(table: Table) -> str:
    from tools.text_table import aligned

    rows = [[visible(cell)[:_WIDEST] for cell in row] for row in table.rows]
    return "\n".join([visible(table.title), aligned(rows), *([table.note] if table.note else [])])


def _explanations(report: dict[str, Any]) -> list[str]:
    return [_explanation(row) for row in report.get("explanations", [])]


def _explanation(row: dict[str, Any]) -> str:
    """Return an explanation: the text coloured where it goes to a terminal, else the parts with their numbers."""
    share = "" if row["probability"] is None else f" ({row['probability']:.1%})"
    place = "" if row["place"] is None else f" of {row['place']!r}"
    whole = "complete" if row["complete"] else "NOT complete"
    head = visible(
        f"{row['label']}{share}{place}: parts sum to {row['sum']:+.4f}, the logits differ by {row['difference']:+.4f} "
        f"({whole}, {row['steps']} steps)"
    )
    if sys.stdout is not None and sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        return f"{head}\n{_coloured(row['pieces'])}"
    numbers = [f"{value:+.4f}  {visible(piece).strip()}" for piece, value in row["pieces"]]
    return "\n".join([head, *numbers])


def _coloured(pieces: list[tuple[str, float]]) -> str:
    """Return the parts of a text in blue (for the label) and red (against it), the stronger the deeper."""
    largest = max((abs(value) for _, value in pieces), default=0.0) or 1.0
    shown = []
    for piece, value in pieces:
        light = round(255 * (1 - 0.75 * abs(value) / largest))
        red, green, blue = (light, light, 255) if value >= 0 else (255, light, light)
        shown.append(f"\x1b[48;2;{red};{green};{blue}m\x1b[38;2;0;0;0m{visible(piece)}\x1b[0m")
    return "".join(shown)
