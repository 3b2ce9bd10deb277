"""`palimpsest convert`: a trained model as a Hugging Face folder, token shards as Megatron's, and those as ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from engine.errors import ConfigError, DataError


def main(
    source: Annotated[
        Path,
        typer.Argument(help="A run folder, a checkpoint (DeepSpeed's, too), a folder of shards, or a .bin/.idx."),
    ],
    output: Annotated[Path, typer.Option(help="What to write (megatron: PREFIX of .bin and .idx); must be new.")],
    to: Annotated[
        Literal["huggingface", "dcp", "universal", "run", "megatron", "shards"],
        typer.Option(help="The format to write."),
    ] = "huggingface",
    run: Annotated[Path | None, typer.Option(help="Run file of the model, for --to run.")] = None,
    names: Annotated[
        Literal["ours", "huggingface"], typer.Option(help="Whose parameter names, for --to universal.")
    ] = "ours",
    tokenizer: Annotated[
        Path | None, typer.Option(help="The tokenizer's folder: needed for shards, else if it was moved.")
    ] = None,
    weights: Annotated[
        Literal["trained", "ema"],
        typer.Option(help="Which weights: as trained, or their average (a stage's `ema`), for --to huggingface."),
    ] = "trained",
    license_id: Annotated[
        str | None, typer.Option("--license", help="The model's license, for the card of --to huggingface.")
    ] = None,
) -> None:
    """Checkpoint -> Hugging Face (fp32, logits compared), torch's DCP or DeepSpeed's universal checkpoint; DeepSpeed's
    checkpoint -> run (weights); shards -> Megatron; Megatron -> shards, without a copy."""
    if names != "ours" and to != "universal":
        raise ConfigError(f"--names {names} with --to {to}", "--names with --to universal", "leave it out")
    if license_id is not None and to != "huggingface":
        raise ConfigError(f"--license with --to {to}", "--license with --to huggingface", "leave it out")
    if weights != "trained" and to != "huggingface":
        raise ConfigError(f"--weights {weights} with --to {to}", "--weights with --to huggingface", "leave it out")
    if to == "huggingface":
        _model(source, output, tokenizer, license_id, averaged=weights == "ema")
    elif to == "dcp":
        _to_dcp(source, output)
    elif to == "universal":
        _to_universal(source, output, names, tokenizer)
    elif to == "run":
        _from_deepspeed(source, output, run)
    elif to == "megatron":
        _to_megatron(source, output)
    else:
        _from_megatron(source, output, tokenizer)


def _model(source: Path, output: Path, tokenizer: Path | None, license_id: str | None, averaged: bool) -> None:
    from engine.logs import configure
    from engine.serve.card import parse_license
    from engine.serve.export import LARGEST_DIFFERENCE, export
    from engine.serve.quiet import quiet
    from engine.serve.source import open_trained

    configure()
    quiet()
    license_id = None if license_id is None else parse_license(license_id)
    print(f"reading and verifying {source}", flush=True)
    trained = open_trained(source, tokenizer, averaged)
    print(f"writing {output} from {trained.checkpoint.name} and reading it back", flush=True)
    exported = export(trained, output, license_id)
    kind = "averaged parameters" if averaged else "parameters"
    print(
        f"wrote {exported.folder}: {exported.num_parameters:,} {kind} of step {trained.step} (huggingface, fp32)\n"
        f"transformers agrees on {exported.num_tokens} tokens: largest logit difference "
        f"{exported.largest_difference:.2e} (allowed {LARGEST_DIFFERENCE:.0e}, largest logit "
        f"{exported.largest_logit:.2f}); every weight is bitwise equal"
    )
    if exported.num_shard_tokens:
        print(f"its tokenizer gives {exported.num_shard_tokens:,} tokens of the run's shards again")


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


def _from_deepspeed(source: Path, output: Path, run: Path | None) -> None:
    from engine.checkpoint.folder import CHECKPOINTS
    from engine.checkpoint.interchange.deepspeed import read_weights
    from engine.checkpoint.interchange.whole_weights import write_checkpoint
    from engine.checkpoint.manifest import CheckpointState
    from engine.config.load import load_run
    from engine.config.resume import meaning_hash
    from engine.config.save import save_run
    from engine.models.families import family
    from engine.redact import redacted
    from engine.serve.new_folder import new_folder

    if run is None:
        raise ConfigError("--to run without a run file", "the model that the weights are of", "name it with --run")
    config = load_run(run, [f"folder={output}"])
    weights, model = read_weights(source), family(config.model)
    ties = model.ties(config.model)
    # A tied weight is stored once, under the name of its first use.
    weights = {name: weight for name, weight in weights.items() if name not in ties}
    state = CheckpointState(
        step=0,
        tokens=0,
        zero_stage=config.parallel.zero_stage,
        config_hash=meaning_hash(config),
        # Folders and URLs of the run file may hold credentials; a checkpoint is made to be passed on.
        config=redacted(config.model_dump(mode="json")),
    )
    with new_folder(output) as partial:
        path = write_checkpoint(partial / CHECKPOINTS, state, model.specs(config.model), weights)
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


def _progress(verb: str, total: int):
    """Return a function that counts tokens and shows their number on one line of a terminal."""
    from rich.console import Console

    console, done = Console(stderr=True), 0

    def show(tokens: int) -> None:
        nonlocal done
        done += tokens
        if console.is_terminal:
            console.print(f"{verb}: {done:,} of {total:,} tokens", end="\r" if done < total else "\n")

    return show
