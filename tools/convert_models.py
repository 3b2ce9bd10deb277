"""`palimpsest convert` of models: what each conversion calls and says."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from engine.errors import CheckpointError
from tools.conversions import Request
from tools.convert_progress import local, progress

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from engine.checkpoint.interchange.initial import Format
    from engine.checkpoint.interchange.mapping import ModelMap
    from engine.checkpoint.interchange.sinks.outgoing import Outgoing
    from engine.checkpoint.interchange.source_model import SourceModel, SourceWeights

Written = TypeVar("Written")


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
    from engine.checkpoint.interchange.forms import form_of
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
        f"wrote {found.checkpoint}: {found.num_parameters:,} parameters in {form_of(model).name} form, {stored} in "
        f"the source; {_compared(verify)}"
    )
    print(f"model: family {model.family}, {model.num_layers} layers of width {model.hidden_size}")
    print("no tokenizer is there, so none was written" if not found.tokenizer else f"tokenizer: {output / 'tokenizer'}")
    if found.added_tokens:
        print(f"tokens that {model.family} needs and the tokenizer lacked: {', '.join(found.added_tokens)}")
    print("`generate`, `diff` and `convert` read it; start a run from it with `init_from`")


def from_other(request: Request) -> None:
    """Write a checkpoint of DeepSpeed's, a universal one or torch's DCP as one of ours."""
    from engine.checkpoint.interchange.sources.source import listed
    from engine.checkpoint.storage import location_of
    from engine.redact import redact
    from engine.serve.import_model import ImportOptions, import_weights

    opened, kind, tokenizer = _opened(request)
    print(f"reading {redact(request.source)}", flush=True)
    if request.with_optimizer:
        _check_moments(request.source, opened)
    options = ImportOptions(request.shard_bytes, request.verify, request.with_optimizer)
    shown = progress("writing", None, "bytes")
    location = location_of(request.source)
    found = import_weights(opened, kind, location, request.output, options, tokenizer, shown)
    if found.moments and (without := [name for name in opened.map.parameters if not opened.moments_of(name)]):
        print(f"without moments, as in the source: {listed(without)}")
    carried = f"weights and {', '.join(found.moments)} of step {opened.step}" if found.moments else "weights alone"
    print(
        f"wrote {found.checkpoint}: {found.num_parameters:,} parameters, {carried}; {_compared(request.verify)}; "
        "`generate`, `diff` and `convert` read it; start a run from it with `init_from`"
    )


def to_dcp(request: Request) -> None:
    """Write torch's distributed checkpoint."""
    from engine.checkpoint.interchange.sinks.dcp import write_dcp

    count, origin = _write(request, "dcp", write_dcp)
    print(
        f"wrote {request.output}: {count:,} tensors of {origin}, as torch's DCP reads them; {_compared(request.verify)}"
    )


def to_universal(request: Request) -> None:
    """Write DeepSpeed's universal checkpoint."""
    from engine.checkpoint.interchange.sinks.universal import write_universal

    (count, left_out), origin = _write(request, "universal", write_universal)
    print(
        f"wrote {request.output}: {count:,} parameters of {origin} with their moments; {_compared(request.verify)}; "
        'DeepSpeed loads them with {"checkpoint": {"load_universal": true}} in its configuration'
    )
    if left_out:
        print(f"left out: {', '.join(left_out)} of every parameter; DeepSpeed loads Adam's moments alone")


def to_deepspeed(request: Request) -> None:
    """Write a checkpoint as DeepSpeed's ZeRO-1 does from one rank."""
    from engine.checkpoint.interchange.sinks.deepspeed import write_deepspeed

    count, origin = _write(request, "deepspeed", write_deepspeed)
    print(
        f"wrote {request.output}: {count:,} tensors of {origin}, as ZeRO-1 writes them from one rank; "
        f"{_compared(request.verify)}"
    )


def _write(request: Request, kind: Format, write: Callable[[Outgoing, Path], Written]) -> tuple[Written, str]:
    """Write a new folder in the format of a training library, and compare it; return what `write` does, and the path
    of the source."""
    from engine.checkpoint.interchange.sinks.outgoing import Outgoing
    from engine.checkpoint.interchange.written import check_written
    from engine.serve.new_folder import new_folder

    opened, target = _to_write(request)
    outgoing = Outgoing(opened, target, request.with_optimizer, progress("writing", None, "bytes"))
    with new_folder(request.output) as partial:
        found = write(outgoing, partial)
        _write_facts(request, opened, partial)
        check_written(kind, partial, opened, target, request.verify)
    return found, opened.source.origin


def _opened(request: Request) -> tuple[SourceModel, str, Path | None]:
    """Open a source that may need a run file to say which model it is of; return it, its format and our tokenizer."""
    from engine.checkpoint.interchange.initial import format_of, open_source
    from engine.checkpoint.storage import location_of
    from engine.config.load import load_run
    from engine.data.tokenizer.files import MODEL_FILE

    tokenizer, model = request.tokenizer, None
    if request.run is not None:
        run = load_run(request.run, [])
        model = run.model
        # a run file may name a tokenizer that is still to be made
        tokenizer = tokenizer or (run.tokenizer if (run.tokenizer / MODEL_FILE).is_file() else None)
    kind = format_of(location_of(request.source))
    assert kind is not None, "convert has seen the kind of the source"
    return open_source(request.source, model=model), kind, tokenizer


def _to_write(request: Request) -> tuple[SourceWeights, ModelMap]:
    """Return an open source, and where each of its parameters goes by the names that were asked for."""
    from engine.checkpoint.interchange.huggingface import their_map
    from engine.checkpoint.interchange.initial import format_of, own_weights
    from engine.checkpoint.storage import location_of
    from engine.serve.language_model import their_map_of
    from engine.serve.source import find_checkpoint

    if format_of(location_of(request.source)) not in (None, "palimpsest"):
        opened, _, _ = _opened(request)
        opened.check()
        target = their_map(opened.model) if request.names == "huggingface" else opened.own_map
    else:
        checkpoint = find_checkpoint(local(request.source))
        opened = own_weights(checkpoint)
        target = their_map_of(checkpoint, request.tokenizer) if request.names == "huggingface" else opened.own_map
    if request.with_optimizer:
        _check_moments(request.source, opened)
    return opened, target


def _compared(verify: str) -> str:
    parts = {"full": "every weight", "sample": "the first and last rows of every weight"}
    return f"{parts[verify]} read back bitwise equal" if verify in parts else "nothing was compared (--verify none)"


def _check_moments(source: str, opened: SourceWeights) -> None:
    """Raise `CheckpointError` where moments are asked for and the source has none of every parameter."""
    without = [name for name in opened.map.parameters if not opened.moments_of(name)]
    if len(without) == len(opened.map.parameters):
        raise CheckpointError(
            f"--with-optimizer of {source}, which holds no moments that belong to named parameters",
            "a checkpoint with the optimizer's state",
            "leave --with-optimizer out",
        )


def _write_facts(request: Request, opened: SourceWeights, folder: Path) -> None:
    """Note the model beside the files, so that the way back needs no run file."""
    from engine.checkpoint.interchange.sinks.facts import write_facts
    from engine.checkpoint.interchange.source_model import SourceModel
    from engine.checkpoint.interchange.sources import CheckpointSource
    from engine.redact import redact

    model = None
    if isinstance(opened, SourceModel):
        model = opened.model.model_dump(mode="json")
    elif isinstance(opened.source, CheckpointSource):
        model = opened.source.manifest.state.config.get("model")
    write_facts(folder, {"model": model, "step": opened.step, "source": redact(request.source)})
