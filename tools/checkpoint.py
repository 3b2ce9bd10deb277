"""`palimpsest checkpoint`: lists the checkpoints of a run and verifies every byte of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import track

from engine.errors import EXIT_FAILURE, CheckpointError

if TYPE_CHECKING:
    from engine.checkpoint.manifest import Manifest

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__)


@app.command("list")
def list_checkpoints(run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]) -> None:
    """List the checkpoints of a run, newest first, by their manifests; reads none of their data."""
    from engine.checkpoint.folder import find
    from engine.checkpoint.load import open_checkpoint

    for path in find(run):
        try:
            print(f"{path.name}  {_about(open_checkpoint(path))}")
        except CheckpointError as problem:
            print(f"{path.name}  damaged: {problem.wrong}")


@app.command()
def verify(
    where: Annotated[Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="Run folder, or one of its checkpoints.")],
) -> None:
    """Read every byte of one checkpoint, or of all of a run, against its hashes; exit code 1 where one is damaged."""
    from engine.checkpoint.folder import find
    from engine.checkpoint.verify import verify as damage_of

    progress = Console(stderr=True)
    found = {}
    for path in find(where):
        found[path] = damage_of(path, lambda names, at=path: track(names, at.name, console=progress, transient=True))
        print(f"{path}: {'DAMAGED' if found[path] else 'whole'}")
        for damage in found[path]:
            print(f"  {damage}")
    if any(found.values()):
        raise typer.Exit(EXIT_FAILURE)


def _about(manifest: Manifest) -> str:
    state = manifest.state
    return (
        f"{state.tokens:,} tokens  {manifest.num_bytes / 1e6:,.1f} MB in {len(manifest.files)} files  "
        f"{manifest.layout}, ZeRO-{state.zero_stage}  job {manifest.job} attempt {manifest.attempt}"
    )
