"""`palimpsest checkpoint`: lists, verifies, compares, merges and removes checkpoints, in a folder or behind a URL."""

from __future__ import annotations

import contextlib
from contextlib import suppress
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer
from rich.console import Console
from rich.progress import track

from engine.errors import EXIT_FAILURE, CheckpointError, ConfigError
from engine.redact import redact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from engine.checkpoint.compare import Difference, Side
    from engine.checkpoint.manifest import Manifest
    from engine.checkpoint.merge import Member, Sources
    from engine.checkpoint.storage import Location
    from engine.config.schema.model import ModelConfig
    from engine.data.shards.dataset import TokenDataset

Result = TypeVar("Result")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__)

RunFile = Annotated[Path | None, typer.Option(help="Run file of the model, where no source says which model it is of.")]
Source = Annotated[
    str,
    typer.Argument(
        help="Run folder or checkpoint, Hugging Face folder, checkpoint of DeepSpeed's or of DCP: a path or a URL."
    ),
]
Where = Annotated[
    str,
    typer.Argument(metavar="WHERE", help="Run folder, its checkpoints/, or one checkpoint: a path or an fsspec URL."),
]


@app.command("list")
def list_checkpoints(where: Where) -> None:
    """List checkpoints, newest first, by their manifests; reads none of their data."""
    for path, (about, damage) in _each(where, _read_manifest):
        print(f"{path.name}  {about}" if not damage else f"{path.name}  damaged: {damage}")


@app.command()
def verify(where: Where) -> None:
    """Read every byte of one checkpoint, or of all of a run, against its hashes; exit code 1 where one is damaged."""
    # Here and not above, as in every command: torch takes seconds to import, and `--help` does without it.
    from engine.checkpoint.verify import verify as damage_of

    whole = True
    for path, damages in _each(where, lambda path: damage_of(path, _progress(path))):
        print(f"{redact(str(path))}: {'DAMAGED' if damages else 'whole'}")
        for damage in damages:
            print(f"  {damage}")
        whole = whole and not damages
    if not whole:
        raise typer.Exit(EXIT_FAILURE)


@app.command()
def diff(
    first: Source,
    second: Source,
    run: RunFile = None,
    limit: Annotated[int, typer.Option(min=1, help="Lines to show, the largest differences first.")] = 40,
) -> None:
    """Show the largest difference per parameter; exit code 1 where anything differs. Of a run, its newest is taken."""
    from engine.checkpoint.compare import compare

    model = _model_for([first, second], run)
    found = list(compare(_side(first, model), _side(second, model)))
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
    keep_best: Annotated[int, typer.Option(min=0, help="So many with the best metric stay.")] = 0,
    metric: Annotated[
        str, typer.Option(help="What --keep-best judges by, from metrics.jsonl: a loss, or a measure of a task.")
    ] = "validation_loss",
    yes: Annotated[bool, typer.Option("--yes", help="Remove them; without it, only say which.")] = False,
) -> None:
    """Remove what no option keeps; says only what it would do unless --yes is given. The newest that verifies stays,
    and the last of each run stage."""
    from engine.checkpoint.folder import find, remove
    from engine.checkpoint.retention import Retention, newest_whole, victims
    from engine.checkpoint.storage import location_of

    location = location_of(where)
    found, verified = find(location), None
    judged = _metric(location, metric) if keep_best else {}
    while verified is None:
        # The newest whole one has to stay, so it is found by reading; a live run may save and remove meanwhile.
        verified, before = newest_whole(found, _progress), found
        found = find(location)
        if found == before:  # else a live run has removed what was read, and there is a newer one
            break
    if verified is None:
        raise CheckpointError(
            f"none of the checkpoints in {where} is whole", "one that verifies", "nothing is removed: mend one by hand"
        )
    print(f"{verified.name} is the newest that verifies")
    retention = Retention(keep_last, keep_every, keep_best, judged, _run_stage_ends(found))
    # None that is newer than the verified one: a live run may have saved it meanwhile.
    doomed = victims(found, retention, verified)
    for path in doomed:
        if yes:
            remove(path)
        print(f"{path.name}  {'removed' if yes else 'would be removed'}")
    print(
        f"{len(found) - len(doomed)} of {len(found)} stay" + ("" if yes or not doomed else "; --yes removes the others")
    )


@app.command()
def merge(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="Checkpoints, runs (their newest), models of other formats."),
    ],
    output: Annotated[Path, typer.Option(help="Run folder to write; must be new.")],
    last: Annotated[int | None, typer.Option(min=2, help="The newest so many checkpoints of the one SOURCE.")] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="W,...", help="A weight for each source (default: equal); they add up to 1.")
    ] = None,
    wsm: Annotated[
        Literal["linear", "1-sqrt", "cosine"] | None,
        typer.Option(help="Coefficients that stand for a decay of this shape over the sources."),
    ] = None,
    run: RunFile = None,
    verify_on: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of held-out shards: tell the loss of the mean and of each source. Repeatable."),
    ] = None,
) -> None:
    """Write the mean of checkpoints of one model, of any layouts and run stages: weights in fp32, summed in fp64, no
    optimizer state.

    `convert` and `generate` read the output; `train` with its folder as the run folder goes on from it, with an
    optimizer that begins anew.
    """
    from engine.checkpoint.folder import CHECKPOINTS
    from engine.checkpoint.merge import merge as write_merged
    from engine.config.load import parse_run
    from engine.config.save import save_run
    from engine.data.shards.dataset import TokenDataset
    from engine.serve.new_folder import new_folder

    if weights is not None and wsm is not None:
        raise ConfigError("--weights and --wsm are named both", "one of them", "leave one out")
    opened, chosen = _coefficients(_members(sources, last, run), weights, wsm)
    held_out = {folder: TokenDataset(folder) for folder in verify_on or ()}
    with new_folder(output) as partial:
        path = write_merged(opened, chosen, partial / CHECKPOINTS)
        if "stages" in opened.newest.config:  # a converted checkpoint has no run behind it
            save_run(parse_run(opened.newest.config | {"folder": str(output)}, f"in {path}"), partial)
    _carry_tombstones(opened, output)
    for one, weight in zip(opened.members, chosen, strict=True):
        print(f"{weight:.6f}  {one.origin}")
    written = output / CHECKPOINTS / path.name
    print(f"wrote {written}: {len(opened.members[0].shapes):,} parameters, weights alone")
    _tell_losses(written, opened, held_out)


def _coefficients(
    members: list[Location | Member], weights: str | None, wsm: Literal["linear", "1-sqrt", "cosine"] | None
) -> tuple[Sources, list[float]]:
    """Return the sources of a merge in its order, and the coefficient of each."""
    from engine.checkpoint.merge import Sources, check_weights, wsm_coefficients

    opened = Sources(members)
    count = len(opened.members)
    if wsm is not None:
        # a decay has an order: that of the steps
        by_step: list[Member] = sorted(opened.members, key=lambda one: one.state.step)
        opened = Sources(by_step)
        return opened, wsm_coefficients([one.state.step for one in opened.members], wsm)
    chosen = [1 / count] * count if weights is None else _numbers(weights)
    check_weights(chosen, count)
    return opened, chosen


def _carry_tombstones(opened: Sources, output: Path) -> None:
    """Note in a merged run what one of its runs was told to forget, so that training does not read it again.

    Call it once the folder has its name: the note locks the folder.
    """
    from engine.checkpoint.folder import run_of
    from engine.data.shards.tombstones import add_tombstones, read_tombstones

    forgotten = [read_tombstones(Path(str(run_of(source)))) for source in opened.paths]
    if forgotten and len(forgotten := reduce(or_, forgotten)):
        add_tombstones(output, forgotten)


def _tell_losses(written: Path, opened: Sources, held_out: dict[Path, TokenDataset]) -> None:
    """Print the loss of a merge, and of each of its checkpoints of ours, on held-out data sets."""
    from engine.serve.held_out import held_out_loss

    for folder, dataset in held_out.items():
        print(f"held-out loss on {folder}: {held_out_loss(written, dataset):.6f}")
        for source in opened.paths:
            print(f"  of {source} alone: {held_out_loss(Path(str(source)), dataset):.6f}")


def _members(sources: list[str], last: int | None, run: Path | None) -> list[Location | Member]:
    """Return what is to be merged: verified checkpoints of ours, and models of other formats.

    Raises:
        ConfigError, CheckpointError: there are too few, one is named twice, or one cannot be read.
    """
    from engine.checkpoint.interchange.side import is_foreign, member_of, open_checked

    if last is not None:
        return list(_last_paths(sources, last))
    model = _model_for(sources, run)
    found = [member_of(open_checked(one, model)) if is_foreign(one) else _own(one) for one in sources]
    names = [str(one.resolve()) if isinstance(one, Path) else str(getattr(one, "origin", one)) for one in found]
    _refuse_repeats(names)
    return found


def _own(text: str) -> Location:
    from engine.serve.source import find_checkpoint

    return find_checkpoint(Path(text))


def _last_paths(sources: list[str], last: int) -> list[Path]:
    """Return the newest `last` checkpoints of one run folder, verified."""
    from engine.checkpoint.folder import CHECKPOINTS, committed
    from engine.serve.source import find_checkpoint

    if len(sources) != 1:
        raise ConfigError(f"--last {last} of {len(sources)} sources", "one run folder", "name one, or leave it out")
    folder = Path(sources[0])
    found = committed(folder / CHECKPOINTS) or committed(folder)
    if len(found) < last:
        raise ConfigError(
            f"--last {last}: {folder} holds {len(found)} checkpoints",
            f"a run folder with {last} or more (checkpoint.keep_last, checkpoint.keep_every)",
            "name a smaller number, or check the path",
        )
    return [find_checkpoint(path) for path in found[:last]]


def _refuse_repeats(names: list[str]) -> None:
    """Raise `ConfigError` unless there are two sources or more, each named once."""
    if len(set(names)) < max(2, len(names)):
        raise ConfigError(
            f"{', '.join(names)}: these are {len(set(names))} checkpoints",
            "two or more different ones",
            "name each once, or --last K with a run folder",
        )


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--weights {text}: {error}", "numbers with commas between them", "mend it") from error


def _each(where: str, read: Callable[[Location], Result]) -> Iterator[tuple[Location, Result]]:
    """Yield each checkpoint and what `read` returns of it, newest first, without those that a live run removes
    meanwhile; where it removes them all, there are newer ones."""
    from engine.checkpoint.folder import find
    from engine.checkpoint.storage import location_of
    from engine.checkpoint.verify import Removed

    num_read = 0
    while not num_read:
        for path in find(location_of(where)):
            # A live run's retention has removed it between the listing and the read, which is no damage.
            with suppress(Removed):
                result = read(path)
                num_read += 1
                yield path, result


def _read_manifest(path: Location) -> tuple[str, str]:
    """Return (a line about a checkpoint, ""), or ("", the damage in words)."""
    from engine.checkpoint.load import open_checkpoint
    from engine.checkpoint.verify import identity, still_there

    while True:
        # A folder that is removed while it is read looks damaged; it is damaged only if it is the same one afterwards.
        before = identity(path)
        try:
            return _about(open_checkpoint(path)), ""
        except CheckpointError as problem:
            if still_there(path, before):
                return "", problem.wrong


def _progress(path: Location) -> Callable[[list[str]], Iterable[str]]:
    # On standard error, so that the list itself can be piped.
    return lambda names: track(names, path.name, console=Console(stderr=True), transient=True)


def _side(text: str, model: ModelConfig | None) -> Side:
    """Open one side of a comparison; `model` is that of files which do not say which model they are of."""
    from engine.checkpoint.compare import Opened
    from engine.checkpoint.folder import find
    from engine.checkpoint.interchange.initial import open_source
    from engine.checkpoint.interchange.side import ForeignSide, is_foreign
    from engine.checkpoint.storage import location_of
    from engine.serve.quiet import quiet

    if not is_foreign(text):
        return Opened(find(location_of(text))[0])
    quiet()
    return ForeignSide(open_source(text, vocab_multiple=1, model=model))


def _model_for(sources: list[str], run: Path | None) -> ModelConfig | None:
    """Return the model of the run file, or of the first of some sources that says it; None where it is not needed."""
    from engine.checkpoint.interchange.initial import model_of
    from engine.checkpoint.interchange.side import is_foreign
    from engine.config.load import load_run
    from engine.config.schema.model import make_model

    if run is not None:
        return load_run(run, []).model
    for one in sources if any(map(is_foreign, sources)) else ():
        # a source that cannot be read is told by whoever opens it
        with suppress(ConfigError, CheckpointError, ValueError):
            return make_model(**model_of(one))
    return None


def _metric(location: Location, name: str) -> dict[int, float]:
    """Return the metric of each step as a cost. Raises `CheckpointError` where no record has it."""
    from engine.checkpoint.folder import run_of
    from engine.config.metrics import cost
    from engine.train.records import METRICS, read_metrics

    run = run_of(location)
    found = {int(record["step"]): cost(name, float(record[name])) for record in read_metrics(run) if name in record}
    if not found:
        raise CheckpointError(
            f"no {name} in {run / METRICS}", "the metrics of the run", "name the run folder, or leave --keep-best out"
        )
    return found


def _run_stage_ends(found: list[Location]) -> frozenset[int]:
    """Return the steps at which the run stages of some checkpoints began, where those before them have ended."""
    from engine.checkpoint import manifest_json

    ends = set()
    for path in found:
        with contextlib.suppress(CheckpointError, KeyError):  # damaged, or of weights alone
            progress = manifest_json.read(path).state.sections["progress"]
            ends.add(int(progress["step"]) - int(progress["stage_step"]))
    return frozenset(ends)


def _rank(one: Difference) -> tuple[bool, bool, float]:
    """Return the sort key: what cannot be compared comes first, then NaN, then the largest difference."""
    # NaN is the one number that differs from itself; False sorts before True.
    return (not one.problem, one.largest == one.largest, -one.largest)


def _about(manifest: Manifest) -> str:
    state = manifest.state
    return (
        f"{state.tokens:,} tokens  {manifest.num_bytes / 1e6:,.1f} MB in {len(manifest.files)} files  "
        f"{manifest.layout}, ZeRO-{state.zero_stage}  job {manifest.job} attempt {manifest.attempt}"
    )
