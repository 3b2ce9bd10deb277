"""What replay gives and costs, measured through the engine itself.

    python -m bench.continual core --output bench/results/cpu-continual-standard-library-DATE.json
    python -m bench.continual core --data FILE --output bench/results/cpu-continual-DATE.json
    python -m bench.continual methods --data FILE --output bench/results/cpu-continual-methods-DATE.json
    python -m bench.continual bert --data FILE --new FILE --output bench/results/cpu-continual-bert-DATE.json

`core`: a GPT of 0.63 million parameters learns prose (of the standard library, or of FILE: JSON lines with the key
`text`, also packed by gzip), then the standard library's source. `methods`: that GPT with each method against
forgetting, one seed. `bert`: an encoder of that size and two files.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.command import run
from bench.continual import corpora
from bench.continual.core import Experiment, bars, summarize
from bench.continual.methods import Comparison, compare, merges, verdicts
from bench.continual.report import draw, draw_methods, methods_table, table, told
from bench.continual.setup import BERT, Sizes
from bench.machine import machine

app = typer.Typer(add_completion=False, help="Experiments in continual learning.")

Output = Annotated[Path | None, typer.Option(help="Write all figures to this JSON file, and a plot beside it.")]
Processes = Annotated[int, typer.Option(min=1, help="Runs that train at a time, one thread each.")]
Scale = Annotated[
    float, typer.Option(min=0.01, max=1.0, help="Share of the steps: for a look, its figures mean little.")
]


@app.command()
def core(
    data: Annotated[Path | None, typer.Option(help="Text of the old domain; default: the standard library's.")] = None,
    output: Output = None,
    processes: Processes = 2,
    scale: Scale = 1.0,
) -> None:
    """Measure replay with a GPT: prose, then the standard library's source."""
    name, texts = _prose_and_source(data)
    found = experiment(texts, Sizes().scaled(scale), processes)
    limits = bars(found["mean"])
    # The bars are those of English prose; on other text they are shown, and nobody is held to them.
    found |= {"data": name, "scale": scale, "bars": [bar.to_json() for bar in limits]}
    _show(found, f"{name}: prose, then Python source", output)
    print("\n" + told(limits))


@app.command()
def methods(
    data: Annotated[Path | None, typer.Option(help="Text of the old domain; default: the standard library's.")] = None,
    output: Output = None,
    processes: Processes = 2,
    scale: Scale = 1.0,
) -> None:
    """Measure every method against forgetting with a GPT: prose, then the standard library's source; one seed."""
    name, texts = _prose_and_source(data)
    found = all_methods(texts, Sizes(seeds=(1,), evaluated_samples=None).scaled(scale), processes)
    found |= {"data": name, "scale": scale}
    print(f"\n{name}: {found['cpu_seconds']} CPU seconds\n\n{methods_table(found['measures'])}\n", flush=True)
    print("\n".join(f"{method}: {verdict}" for method, verdict in found["verdicts"].items()))
    if output is not None:
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        draw_methods(found["measures"], f"{name}: prose, then Python source", output.with_suffix(".png"))


@app.command()
def bert(
    data: Annotated[Path, typer.Option(help="Text of the old domain.")],
    new: Annotated[Path, typer.Option(help="Text of the new domain.")],
    output: Output = None,
    processes: Processes = 2,
    scale: Scale = 1.0,
) -> None:
    """Measure replay with an encoder: one text, then another; reported without a bar."""
    texts = {corpora.OLD: data, corpora.NEW: new}
    sizes = Sizes(model=BERT, objective="masked").scaled(scale)
    found = experiment(
        {domain: corpora.read_texts(path, corpora.TEXT_BYTES) for domain, path in texts.items()}, sizes, processes
    )
    name = f"{data.name.partition('.')[0]}, then {new.name.partition('.')[0]}"
    _show(found | {"data": name, "scale": scale}, f"encoder: {name}", output)


def experiment(texts: dict[str, list[str]], sizes: Sizes, processes: int) -> dict[str, Any]:
    """Train all runs of an experiment; return the figures of each and their means as JSON values."""
    with _written(texts, sizes) as (folder, tokens):
        seeds = Experiment(folder, sizes, tokens[corpora.OLD]).measure(processes)
    seconds = sum(one["cpu_seconds"] for runs in seeds.values() for one in runs.values())
    return _about(sizes, tokens, seconds) | {"mean": summarize(seeds), "seeds": seeds}


def all_methods(texts: dict[str, list[str]], sizes: Sizes, processes: int) -> dict[str, Any]:
    """Train with every method against forgetting; return the figures of each as JSON values."""
    with _written(texts, sizes) as (folder, tokens):
        runs = Comparison(folder, sizes).measure(processes)
    measures = compare(runs)
    merged = {one.name for one in merges(sizes)}
    seconds = sum(run["cpu_seconds"] for name, run in runs.items() if name not in merged)
    return _about(sizes, tokens, seconds) | {"measures": measures, "verdicts": verdicts(measures)}


@contextlib.contextmanager
def _written(texts: dict[str, list[str]], sizes: Sizes) -> Iterator[tuple[Path, dict[str, int]]]:
    """Yield a folder with the texts as shards, and the tokens of each domain's training half."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder), corpora.write(Path(folder), texts, "masked" if sizes.objective == "masked" else "causal")


def _about(sizes: Sizes, tokens: dict[str, int], seconds: float) -> dict[str, Any]:
    return {
        "machine": machine(1),
        "tokens": tokens,
        "steps": {corpora.OLD: sizes.old_steps, corpora.NEW: sizes.new_steps},
        "cpu_seconds": round(seconds),
    }


def _prose_and_source(data: Path | None) -> tuple[str, dict[str, list[str]]]:
    """Return the name of the old domain, and the texts of both: of a file, or of the standard library."""
    prose, source = corpora.standard_library(corpora.TEXT_BYTES, with_comments=data is not None)
    name = "standard library"
    if data is not None:
        prose, name = corpora.read_texts(data, corpora.TEXT_BYTES), data.name.partition(".")[0]
    return name, {corpora.OLD: prose, corpora.NEW: source}


def _show(found: dict[str, Any], title: str, output: Path | None) -> None:
    print(f"\n{title}: {found['cpu_seconds']} CPU seconds\n\n{table(found['mean'])}", flush=True)
    if output is not None:
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        draw(found["mean"], title, output.with_suffix(".png"))


if __name__ == "__main__":
    run(app)
