"""`palimpsest convert`: models and token files from one format to another; kinds are detected, or named."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from engine.config.paths import disk_path, expand
from engine.errors import ConfigError, DataError

To = Literal["huggingface", "palimpsest", "dcp", "universal", "megatron", "shards"]
Kind = Literal["palimpsest", "huggingface", "deepspeed", "shards", "megatron"]
_USUAL: dict[Kind, To] = {
    "palimpsest": "huggingface",
    "huggingface": "palimpsest",
    "deepspeed": "palimpsest",
    "shards": "megatron",
    "megatron": "shards",
}
"""Format that a kind of source is converted to where none is named."""
CARRIED: dict[tuple[Kind, To], str] = {
    ("palimpsest", "huggingface"): "weights (fp32, bf16 or fp16), tokenizer, model card",
    ("palimpsest", "dcp"): "weights, all moments",
    ("palimpsest", "universal"): "weights, Adam's moments, the step",
    ("huggingface", "palimpsest"): "weights (as fp32), tokenizer, all small files for the way back",
    ("deepspeed", "palimpsest"): "weights (the fp32 masters)",
    ("shards", "megatron"): "tokens, documents",
    ("megatron", "shards"): "tokens, documents (in place)",
}
"""Data that a conversion carries over."""
KINDS: dict[Kind, str] = {
    "palimpsest": "a run folder or a checkpoint of ours",
    "huggingface": "a Hugging Face folder",
    "deepspeed": "a checkpoint of DeepSpeed's (ZeRO 1 to 3)",
    "shards": "a folder of token shards",
    "megatron": "Megatron's token files (.bin, .idx)",
}
_ONLY_WITH: dict[str, tuple[To, ...]] = {
    "--names": ("universal",),
    "--license": ("huggingface",),
    "--weights": ("huggingface",),
    "--dtype": ("huggingface",),
    "--shard-size": ("huggingface", "palimpsest"),
    "--verify": ("huggingface", "palimpsest"),
    "--run": ("palimpsest",),
}
"""Formats that an option has a meaning for."""
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(
    source: Annotated[
        str,
        typer.Argument(
            help="A run folder, a checkpoint (DeepSpeed's, too), a Hugging Face folder or its URL, a folder of shards, "
            "or a .bin/.idx."
        ),
    ],
    output: Annotated[Path, typer.Option(help="What to write (megatron: PREFIX of .bin and .idx); must be new.")],
    to: Annotated[
        To | None, typer.Option(help="The format to write; by default Hugging Face's of ours, and ours of others.")
    ] = None,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        typer.Option(help="Dtype of the weights in a Hugging Face folder (default: fp32, or that of their source)."),
    ] = None,
    shard_size: Annotated[str | None, typer.Option(help="Size of one file at the most, such as 5GB (default).")] = None,
    verify: Annotated[
        Literal["full", "sample", "none"] | None,
        typer.Option(help="Weights that are read back and compared (default: full)."),
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Run file of the model, for a checkpoint of DeepSpeed's.")] = None,
    names: Annotated[
        Literal["ours", "huggingface"] | None, typer.Option(help="Whose parameter names, for --to universal.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The tokenizer's folder: needed for shards, else if it was moved.")
    ] = None,
    weights: Annotated[
        Literal["trained", "ema"] | None,
        typer.Option(help="Which weights: as trained (default), or their average (a stage's `ema`)."),
    ] = None,
    license_id: Annotated[
        str | None, typer.Option("--license", help="The model's license, for the card of --to huggingface.")
    ] = None,
) -> None:
    """Convert a model: ours -> Hugging Face, torch's DCP or DeepSpeed's universal checkpoint; Hugging Face's or
    DeepSpeed's -> ours; or token files: shards -> Megatron's, and those -> shards, without a copy.

    What was written is read back and compared; a conversion to Hugging Face that was killed goes on where it stood.
    """
    kind, to = _formats(source, to)
    given = {"--names": names, "--license": license_id, "--dtype": dtype, "--shard-size": shard_size}
    _check_options(to, given | {"--weights": weights, "--verify": verify, "--run": run})
    shard_bytes = 5 * 10**9 if shard_size is None else _bytes(shard_size)
    if to == "huggingface":
        options = {"license_id": license_id, "dtype": dtype, "shard_bytes": shard_bytes, "verify": verify or "full"}
        _to_huggingface(_local(source), output, tokenizer, weights == "ema", options)
    elif kind == "huggingface":
        _from_huggingface(source, output, shard_bytes, verify or "full")
    elif to == "dcp":
        _to_dcp(_local(source), output)
    elif to == "universal":
        _to_universal(_local(source), output, names or "ours", tokenizer)
    elif kind == "deepspeed":
        _from_deepspeed(_local(source), output, run, shard_bytes)
    elif to == "megatron":
        _to_megatron(_local(source), output)
    else:
        _from_megatron(_local(source), output, tokenizer)


def _kind_of(source: str, to: To | None) -> Kind:
    """Return the kind of a source by its files alone; where these say nothing, the one that `to` is made from.

    Raises:
        ConfigError: it is nothing that can be converted.
    """
    from engine.checkpoint.folder import CHECKPOINTS
    from engine.checkpoint.storage import MANIFEST, location_of

    location = location_of(source)
    # A prefix of .bin and .idx is no file itself.
    if isinstance(location, Path) and any(Path(f"{location}{end}").is_file() for end in (".idx", ".bin")):
        return "megatron"
    if location.is_file() and location.name.endswith((".bin", ".idx")):
        return "megatron"
    if (location / MANIFEST).is_file() or (location / CHECKPOINTS).is_dir():
        return "palimpsest"
    if (location / "config.json").is_file():
        return "huggingface"
    if (location / "index.json").is_file():
        return "shards"
    names = [path.name for path in location.iterdir()] if location.is_dir() else []
    if "latest" in names or any(name.endswith(("_optim_states.pt", "_model_states.pt")) for name in names):
        return "deepspeed"
    named: dict[To | None, Kind] = {
        "megatron": "shards",
        "shards": "megatron",
        "dcp": "palimpsest",
        "universal": "palimpsest",
    }
    if to in named:  # its reader says what is wrong
        return named[to]
    what = "holds nothing that can be converted" if location.is_dir() else "is not there"
    raise ConfigError(
        f"{source} {what}",
        "a run folder or a checkpoint, a Hugging Face folder, a checkpoint of DeepSpeed's, shards, or a .bin/.idx",
        "check the path, or train first",
    )


def _formats(source: str, to: To | None) -> tuple[Kind, To]:
    """Return the kind of a source and the format to write: the named one, else the usual one for this kind.

    Raises:
        ConfigError: it cannot be converted, or not to the named format.
    """
    kind = _kind_of(source, to)
    to = to or _USUAL[kind]
    if (kind, to) not in CARRIED:
        raise ConfigError(
            f"--to {to} of {source}, which is {KINDS[kind]}",
            " or ".join(f"--to {target}" for one, target in CARRIED if one == kind),
            "name another format, or another source",
        )
    return kind, to


def _check_options(to: To, given: dict[str, Any]) -> None:
    """Raise `ConfigError` where an option was given (its value is not None) that means nothing for this format."""
    for option, value in given.items():
        if value is not None and to not in _ONLY_WITH[option]:
            allowed = " or ".join(f"{option} with --to {one}" for one in _ONLY_WITH[option])
            raise ConfigError(f"{option} {value} with --to {to}", allowed, "leave it out")


def _local(source: str) -> Path:
    """Return the path of a source that is read from a disk. Raises `ConfigError` where it is a URL."""
    return Path(expand(disk_path(source, "SOURCE"), "SOURCE"))


def _bytes(text: str) -> int:
    """Return the bytes of a size such as 5GB or 512MiB. Raises `ConfigError` where it is none."""
    number = text.strip().upper()
    unit = next((unit for unit in ("KIB", "MIB", "GIB", "KB", "MB", "GB") if number.endswith(unit)), "")
    try:
        found = int(float(number.removesuffix(unit)) * _UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        found = 0
    if found < 1:
        raise ConfigError(f"--shard-size {text}", "a size such as 5GB, 500MB or 2GiB", "mend it")
    return found


def _to_huggingface(
    source: Path,
    output: Path,
    tokenizer: Path | None,
    averaged: bool,
    options: dict[str, Any],
) -> None:
    from engine.logs import configure
    from engine.serve.card import parse_license
    from engine.serve.export import ExportOptions, export
    from engine.serve.quiet import quiet
    from engine.serve.read_back import LARGEST_DIFFERENCE
    from engine.serve.source import open_trained

    configure()
    quiet()
    if options["license_id"] is not None:
        options["license_id"] = parse_license(options["license_id"])
    print(f"reading and verifying {source}", flush=True)
    trained = open_trained(source, tokenizer, averaged)
    print(f"writing {output} from {trained.checkpoint.name} and reading it back", flush=True)
    exported = export(
        trained, output, ExportOptions(**options), _progress("writing", 4 * trained.num_parameters, "bytes")
    )
    resumed = f", {exported.num_resumed} of them from a conversion that was cut short" if exported.num_resumed else ""
    files = f"{exported.num_files} file{'s' if exported.num_files > 1 else ''} of weights"
    print(
        f"wrote {exported.folder}: {exported.num_parameters:,} {'averaged ' if averaged else ''}parameters of step "
        f"{trained.step} (huggingface, {exported.dtype}), {files}{resumed}"
    )
    if (found := exported.agreement) is None:
        print("nothing was compared (--verify none)")
        return
    of = "" if found.num_layers == trained.config.num_layers else f" through the first {found.num_layers} layers"
    part = "every weight" if options["verify"] == "full" else "the first and last rows of every weight"
    print(
        f"transformers agrees on {found.num_tokens} tokens{of}: largest logit difference "
        f"{found.largest_difference:.2e} (allowed {LARGEST_DIFFERENCE:.0e}, largest logit "
        f"{found.largest_logit:.2f}); {part} is bitwise equal"
    )
    if exported.num_shard_tokens:
        print(f"its tokenizer gives {exported.num_shard_tokens:,} tokens of the run's shards again")


def _from_huggingface(source: str, output: Path, shard_bytes: int, verify: Literal["full", "sample", "none"]) -> None:
    from engine.checkpoint.storage import location_of
    from engine.logs import configure
    from engine.redact import redact
    from engine.serve.import_model import import_folder
    from engine.serve.quiet import quiet

    configure()
    quiet()
    print(f"reading {redact(source)}", flush=True)
    progress = _progress("writing", None, "bytes")
    found = import_folder(location_of(source), output, shard_bytes, verify, progress)
    model, dtypes = found.opened.model, {found.opened.source.dtype(name) for name in found.opened.map.tensors}
    stored = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    print(
        f"wrote {found.checkpoint}: {found.num_parameters:,} parameters in {found.opened.form.name} form, {stored} in "
        f"the source; {_compared(verify)}"
    )
    print(f"model: family {model.family}, {model.num_layers} layers of width {model.hidden_size}")
    print("no tokenizer is there, so none was written" if not found.tokenizer else f"tokenizer: {output / 'tokenizer'}")
    if found.added_tokens:
        print(f"tokens that {model.family} needs and the tokenizer lacked: {', '.join(found.added_tokens)}")
    print("`generate`, `diff` and `convert` read it; start a run from it with `init_from`")


def _compared(verify: str) -> str:
    parts = {"full": "every weight", "sample": "the first and last rows of every weight"}
    return f"{parts[verify]} read back bitwise equal" if verify in parts else "nothing was compared (--verify none)"


def _to_dcp(source: Path, output: Path) -> None:
    from engine.checkpoint.interchange.dcp import write_dcp
    from engine.serve.new_folder import new_folder
    from engine.serve.source import find_checkpoint

    with new_folder(output) as partial:
        checkpoint = find_checkpoint(source)
        count = write_dcp(checkpoint, partial)
    print(f"wrote {output}: {count:,} tensors of {checkpoint.name}, as torch's DCP reads them")


def _to_universal(source: Path, output: Path, names: str, tokenizer: Path | None) -> None:
    from engine.checkpoint.interchange.universal import logical, write_universal
    from engine.serve.language_model import their_names_of
    from engine.serve.new_folder import new_folder
    from engine.serve.source import find_checkpoint

    with new_folder(output) as partial:
        checkpoint = find_checkpoint(source)
        called = logical if names == "ours" else their_names_of(checkpoint, tokenizer)
        count, left_out = write_universal(checkpoint, partial, called)
    print(
        f"wrote {output}: {count:,} parameters of {checkpoint.name} with their moments; DeepSpeed loads them with "
        '{"checkpoint": {"load_universal": true}} in its configuration'
    )
    if left_out:
        print(f"left out: {', '.join(left_out)} of every parameter; DeepSpeed loads Adam's moments alone")


def _from_deepspeed(source: Path, output: Path, run: Path | None, shard_bytes: int) -> None:
    from engine.checkpoint.folder import CHECKPOINTS
    from engine.checkpoint.interchange.deepspeed import read_weights
    from engine.checkpoint.interchange.sinks.checkpoint import write_checkpoint
    from engine.checkpoint.manifest import CheckpointState
    from engine.checkpoint.mismatch import check_tensors
    from engine.config.load import load_run
    from engine.config.resume import meaning_hash
    from engine.config.save import save_run
    from engine.models.families import family
    from engine.redact import redacted
    from engine.serve.new_folder import new_folder

    if run is None:
        raise ConfigError(
            "a checkpoint of DeepSpeed's without a run file", "the model that the weights are of", "name it with --run"
        )
    config = load_run(run, [f"folder={output}"])
    weights, model = read_weights(source), family(config.model)
    ties = model.ties(config.model)
    # A tied weight is stored once, under the name of its first use.
    weights = {name: weight for name, weight in weights.items() if name not in ties}
    specs = model.specs(config.model)
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    check_tensors(found, {spec.name: spec.stored_shape for spec in specs}, "the source")
    state = CheckpointState(
        step=0,
        tokens=0,
        zero_stage=config.parallel.zero_stage,
        config_hash=meaning_hash(config),
        # Folders and URLs of the run file may hold credentials; a checkpoint is made to be passed on.
        config=redacted(config.model_dump(mode="json")),
    )
    with new_folder(output) as partial:
        values = lambda spec: (weights[spec.name].detach(),)  # noqa: E731
        path = write_checkpoint(partial / CHECKPOINTS, state, specs, values, shard_bytes)
        save_run(config, partial)
    print(
        f"wrote {output / path.relative_to(partial)}: {len(weights):,} parameters, weights alone; "
        "`generate`, `diff` and `convert` read it"
    )


def _to_megatron(source: Path, output: Path) -> None:
    from engine.data.shards.dataset import TokenDataset
    from engine.data.shards.megatron import file_of, prefix_of, sweep_unfinished, write_indexed_dataset

    prefix = prefix_of(output)
    # What a killed conversion has left goes first, so that only whole files count as there.
    sweep_unfinished(prefix)
    if found := [path.name for suffix in ("bin", "idx") if (path := file_of(prefix, suffix)).exists()]:
        raise DataError(f"{prefix.parent} holds {' and '.join(found)} already", "a new PREFIX", "name another --output")
    dataset = TokenDataset(source)
    sequences = write_indexed_dataset(dataset, prefix, _progress("writing", dataset.index.num_tokens))
    kind = "sentences" if dataset.index.has_sentences else "documents"
    print(
        f"wrote {prefix}.bin and .idx: {dataset.index.num_tokens:,} tokens ({sequences.dtype}), "
        f"{sequences.lengths.size:,} sequences ({kind}), {dataset.index.num_documents:,} documents"
    )


def _from_megatron(source: Path, output: Path, tokenizer: Path | None) -> None:
    from engine.corpus.megatron_import import import_megatron
    from engine.data.shards.megatron import prefix_of, read_sequences
    from engine.data.tokenizer.folder import load_tokenizer
    from engine.serve.new_folder import new_folder

    if tokenizer is None:
        raise ConfigError("--to shards without a tokenizer", "the one that the set was made with", "name --tokenizer")
    with new_folder(output) as partial:
        prefix, loaded = prefix_of(source), load_tokenizer(tokenizer)
        total = int(read_sequences(prefix).lengths.sum(dtype="int64"))
        index = import_megatron(prefix, loaded, partial, progress=_progress("hashing", total))
    print(
        f"{output} is an index of {prefix}.bin, which stays where it is: {index.num_tokens:,} tokens ({index.dtype}), "
        f"{index.num_documents:,} documents, {len(index.shards):,} shards, hashed"
    )


def _progress(verb: str, total: int | None, unit: str = "tokens"):
    """Return a function that counts tokens or bytes and shows their number and rate on one line of a terminal."""
    import time

    from rich.console import Console

    console, done, began = Console(stderr=True), 0, time.monotonic()

    def show(count: int) -> None:
        nonlocal done
        done += count
        if console.is_terminal:
            rate = done / max(time.monotonic() - began, 1e-3)
            of = "" if total is None else f" of {total:,}"
            end = "\n" if total is not None and done >= total else "\r"
            console.print(f"{verb}: {done:,}{of} {unit} ({rate:,.0f} a second)", end=end)

    return show
