"""`palimpsest checkpoint`: lists, verifies, compares and removes checkpoints, in a folder or behind a URL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import track

from engine.errors import EXIT_FAILURE, CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

    from engine.checkpoint.compare import Difference, Opened
    from engine.checkpoint.manifest import Manifest
    from engine.checkpoint.storage import Place

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__)

Where = Annotated[
    str,
    typer.Argument(metavar="WHERE", help="Run folder, its checkpoints/, or one checkpoint: a path or an fsspec URL."),
]


@app.command("list")
def list_checkpoints(where: Where) -> None:
    """List checkpoints, newest first, by their manifests; reads none of their data."""
    from engine.checkpoint.folder import find
    from engine.checkpoint.load import open_checkpoint
    from engine.checkpoint.storage import place_of

    for path in find(place_of(where)):
        try:
            print(f"{path.name}  {_about(open_checkpoint(path))}")
        except CheckpointError as problem:
            print(f"{path.name}  damaged: {problem.wrong}")


@app.command()
def verify(where: Where) -> None:
    """Read every byte of one checkpoint, or of all of a run, against its hashes; exit code 1 where one is damaged."""
    from engine.checkpoint.folder import find
    from engine.checkpoint.storage import place_of
    from engine.checkpoint.verify import verify as damage_of

    found = {}
    for path in find(place_of(where)):
        found[path] = damage_of(path, _progress(path))
        print(f"{path}: {'DAMAGED' if found[path] else 'whole'}")
        for damage in found[path]:
            print(f"  {damage}")
    if any(found.values()):
        raise typer.Exit(EXIT_FAILURE)


@app.command()
def diff(
    first: Where,
    second: Annotated[str, typer.Argument(help="Another one, or a Hugging Face folder (weights alone are compared).")],
    limit: Annotated[int, typer.Option(min=1, help="Lines to show, the largest differences first.")] = 40,
) -> None:
    """Show the largest difference per parameter; exit code 1 where anything differs. Of a run, its newest is taken."""
    from engine.checkpoint.compare import Opened, compare
    from engine.checkpoint.folder import find
    from engine.checkpoint.storage import place_of

    left = Opened(find(place_of(first))[0])
    found = list(compare(left, _other_side(second)))
    different = [one for one in found if one.problem or one.num_different]
    for one in sorted(different, key=_rank)[:limit]:
        print(f"{one.key}  {one.problem or f'{one.largest:.3e}  in {one.num_different:,} of {one.numel:,} elements'}")
    if len(different) > limit:
        print(f"... and {len(different) - limit} more")
    print(f"{len(found) - len(different)} of {len(found)} tensors are bitwise equal")
    if different:
        raise typer.Exit(EXIT_FAILURE)


@app.command()
def prune(
    where: Where,
    keep_last: Annotated[int, typer.Option(min=1, help="The newest so many stay.")] = 2,
    keep_every: Annotated[int | None, typer.Option(min=1, help="Those of steps that are multiples stay.")] = None,
    keep_best: Annotated[int, typer.Option(min=0, help="So many with the least metric stay.")] = 0,
    metric: Annotated[
        Literal["validation_loss", "loss"], typer.Option(help="What --keep-best judges by, from metrics.jsonl.")
    ] = "validation_loss",
    yes: Annotated[bool, typer.Option("--yes", help="Remove them; without it, only say which.")] = False,
) -> None:
    """Remove what no option keeps; says only what it would do unless --yes is given. The newest that verifies stays."""
    from engine.checkpoint.folder import CHECKPOINTS, find, remove
    from engine.checkpoint.retention import Retention, newest_whole, victims
    from engine.checkpoint.storage import place_of

    place = place_of(where)
    found = find(place)
    values = _metric(place.parent if place.name == CHECKPOINTS else place, metric) if keep_best else {}
    retention = Retention(keep_last, keep_every, keep_best, values)
    verified = newest_whole(found, _progress)
    if verified is None:
        raise CheckpointError(
            f"none of the checkpoints in {where} is whole", "one that verifies", "nothing is removed: mend one by hand"
        )
    print(f"{verified.name} is the newest that verifies")
    doomed = victims(found, retention, verified)
    for path in doomed:
        if yes:
            remove(path)
        print(f"{path.name}  {'removed' if yes else 'would be removed'}")
    print(
        f"{len(found) - len(doomed)} of {len(found)} stay" + ("" if yes or not doomed else "; --yes removes the others")
    )


def _progress(path: Place) -> Callable[[list[str]], Iterable[str]]:
    return lambda names: track(names, path.name, console=Console(stderr=True), transient=True)


def _other_side(text: str) -> Opened | Mapping[str, torch.Tensor | None]:
    """A checkpoint, or the weights of a Hugging Face folder by our names."""
    from pathlib import Path

    from engine.checkpoint.compare import Opened
    from engine.checkpoint.folder import find
    from engine.checkpoint.storage import place_of

    place = place_of(text)
    if isinstance(place, Path) and (place / "config.json").is_file():
        from engine.checkpoint.interchange.huggingface import tensors_in
        from engine.serve.quiet import quiet

        quiet()
        return tensors_in(place)
    return Opened(find(place)[0])


def _metric(run: Place, name: str) -> dict[int, float]:
    from engine.train.metrics import METRICS, read_metrics

    found = {int(record["step"]): float(record[name]) for record in read_metrics(run) if name in record}
    if not found:
        raise CheckpointError(f"no {name} in {run / METRICS}", "the metrics of the run", "leave --keep-best out")
    return found


def _rank(one: Difference) -> tuple[bool, bool, float]:
    """What cannot be compared first, then NaN, then the largest."""
    return (not one.problem, one.largest == one.largest, -one.largest)


def _about(manifest: Manifest) -> str:
    state = manifest.state
    return (
        f"{state.tokens:,} tokens  {manifest.num_bytes / 1e6:,.1f} MB in {len(manifest.files)} files  "
        f"{manifest.layout}, ZeRO-{state.zero_stage}  job {manifest.job} attempt {manifest.attempt}"
    )
