"""`palimpsest convert` of models: what each conversion calls and says."""

from __future__ import annotations

from engine.errors import ConfigError
from tools.conversions import Request
from tools.convert_progress import local, progress


def to_huggingface(request: Request) -> None:
    """Write a Hugging Face folder and read it back."""
    if request.dtype == "int8":
        from tools.convert_deployment import to_int8

        return to_int8(request)
    from engine.logs import configure
    from engine.serve.card import parse_license
    from engine.serve.export import ExportOptions, export
    from engine.serve.quiet import quiet
    from engine.serve.read_back import LARGEST_DIFFERENCE
    from engine.serve.source import open_trained

    configure()
    quiet()
    source, output = local(request.source), request.output
    averaged, license_id = request.weights == "ema", request.license_id
    if license_id is not None:
        license_id = parse_license(license_id)
    options = ExportOptions(request.dtype, request.shard_bytes, request.verify, license_id)
    print(f"reading and verifying {source}", flush=True)
    trained = open_trained(source, request.tokenizer, averaged)
    print(f"writing {output} from {trained.checkpoint.name} and reading it back", flush=True)
    exported = export(trained, output, options, progress("writing", 4 * trained.num_parameters, "bytes"))
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
    part = "every weight" if options.verify == "full" else "the first and last rows of every weight"
    print(
        f"transformers agrees on {found.num_tokens} tokens{of}: largest logit difference "
        f"{found.largest_difference:.2e} (allowed {LARGEST_DIFFERENCE:.0e}, largest logit "
        f"{found.largest_logit:.2f}); {part} is bitwise equal"
    )
    if exported.losses is not None:
        print(exported.losses)
    if exported.num_shard_tokens:
        print(f"its tokenizer gives {exported.num_shard_tokens:,} tokens of the run's shards again")


def from_huggingface(request: Request) -> None:
    """Write a Hugging Face folder as a checkpoint of ours."""
    from engine.checkpoint.storage import location_of
    from engine.logs import configure
    from engine.redact import redact
    from engine.serve.import_model import import_folder
    from engine.serve.quiet import quiet

    configure()
    quiet()
    output, verify = request.output, request.verify
    print(f"reading {redact(request.source)}", flush=True)
    shown = progress("writing", None, "bytes")
    found = import_folder(location_of(request.source), output, request.shard_bytes, verify, shown)
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


def to_dcp(request: Request) -> None:
    """Write torch's distributed checkpoint."""
    from engine.checkpoint.interchange.dcp import write_dcp
    from engine.serve.new_folder import new_folder
    from engine.serve.source import find_checkpoint

    output = request.output
    with new_folder(output) as partial:
        checkpoint = find_checkpoint(local(request.source))
        count = write_dcp(checkpoint, partial)
    print(f"wrote {output}: {count:,} tensors of {checkpoint.name}, as torch's DCP reads them")


def to_universal(request: Request) -> None:
    """Write DeepSpeed's universal checkpoint."""
    from engine.checkpoint.interchange.universal import logical, write_universal
    from engine.serve.language_model import their_names_of
    from engine.serve.new_folder import new_folder
    from engine.serve.source import find_checkpoint

    output = request.output
    with new_folder(output) as partial:
        checkpoint = find_checkpoint(local(request.source))
        called = their_names_of(checkpoint, request.tokenizer) if request.names == "huggingface" else logical
        count, left_out = write_universal(checkpoint, partial, called)
    print(
        f"wrote {output}: {count:,} parameters of {checkpoint.name} with their moments; DeepSpeed loads them with "
        '{"checkpoint": {"load_universal": true}} in its configuration'
    )
    if left_out:
        print(f"left out: {', '.join(left_out)} of every parameter; DeepSpeed loads Adam's moments alone")


def from_deepspeed(request: Request) -> None:
    """Write a checkpoint of DeepSpeed's as one of ours."""
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

    output, run = request.output, request.run
    if run is None:
        raise ConfigError(
            "a checkpoint of DeepSpeed's without a run file", "the model that the weights are of", "name it with --run"
        )
    config = load_run(run, [f"folder={output}"])
    weights, model = read_weights(local(request.source)), family(config.model)
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
        path = write_checkpoint(partial / CHECKPOINTS, state, specs, values, request.shard_bytes)
        save_run(config, partial)
    print(
        f"wrote {output / path.relative_to(partial)}: {len(weights):,} parameters, weights alone; "
        "`generate`, `diff` and `convert` read it"
    )
