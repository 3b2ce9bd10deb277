"""Sources of weights: checkpoints of ours and folders of other formats, told apart by their files, opened alike.

Imports nothing heavy by itself: commands that run without torch take `model_of` from here, which imports where it is
called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from engine.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from engine.checkpoint.interchange.source_model import SourceModel, SourceWeights
    from engine.checkpoint.interchange.sources.unnamed import Unnamed
    from engine.checkpoint.storage import Location
    from engine.config.schema.model import ModelConfig

Format = Literal["palimpsest", "huggingface", "deepspeed", "universal", "dcp", "megatron-lm"]
"""Formats of models that are read."""


def format_of(location: Location) -> Format | None:
    """Return the format of a folder by its files; None where it is none.

    Raises:
        CheckpointError: what is behind a URL cannot be reached.
    """
    try:
        return _format_of(location)
    except OSError as error:
        raise unreachable(location, error) from error


def unreachable(location: Location, error: OSError) -> CheckpointError:
    """Return the error for a place that does not answer."""
    from engine.redact import redact

    return CheckpointError(
        f"{redact(str(location))} cannot be reached: {error.strerror or error}",
        "a path or a URL that answers",
        "check it, and the network",
    )


def _format_of(location: Location) -> Format | None:
    from engine.checkpoint.folder import CHECKPOINTS
    from engine.checkpoint.storage import MANIFEST

    if (location / MANIFEST).is_file() or (location / CHECKPOINTS).is_dir():
        return "palimpsest"
    if (location / "config.json").is_file():
        return "huggingface"
    if (location / "latest_checkpointed_iteration.txt").is_file():
        return "megatron-lm"
    if (location / "latest").is_file():
        return "deepspeed"
    if (location / "latest_universal").is_file():
        return "universal"
    if (location / ".metadata").is_file():
        return "megatron-lm" if (location / "common.pt").is_file() else "dcp"
    if not location.is_dir():
        return None
    names = [path.name for path in location.iterdir()]
    if any(name.startswith("step-") and (location / name / MANIFEST).is_file() for name in names):
        return "palimpsest"  # a folder `checkpoints/`
    if any(name.startswith("mp_rank_") and (location / name).is_dir() for name in names):
        return "megatron-lm"
    # a universal checkpoint has files of model states, too
    if "zero" in names and (location / "zero").is_dir():
        return "universal"
    return "deepspeed" if any(name.endswith(("_optim_states.pt", "_model_states.pt")) for name in names) else None


def model_of(source: str) -> dict[str, Any]:
    """Return the keys of the model in a source, for a run file that leaves them out.

    Raises:
        ConfigError, CheckpointError: there is no model that can be read, or its files do not say which one it is.
    """
    from engine.checkpoint.storage import location_of

    location = location_of(source)
    found = format_of(location)
    if found == "huggingface":
        from engine.checkpoint.interchange.forms import require_form
        from engine.checkpoint.interchange.huggingface import VOCAB_MULTIPLE, read_configuration

        theirs = read_configuration(location)
        return require_form(theirs).our_config(theirs, VOCAB_MULTIPLE).model_dump(mode="json")
    if found in ("deepspeed", "universal", "dcp", "megatron-lm"):
        return _described(open_unnamed(location, found)).model_dump(mode="json")
    from engine.checkpoint import manifest_json
    from engine.checkpoint.folder import find

    # Whoever starts from a model with an adapter starts from what the two are together.
    return _own_model(find(location)[0], manifest_json.read(find(location)[0]).state.config) | {"adapter": None}


def open_source(source: str, vocab_multiple: int | None = None, model: ModelConfig | None = None) -> SourceModel:
    """Open a source of weights. Of a run folder its newest checkpoint is taken.

    `model` is that of files which do not say which model they are of; those that do say it are believed. Theirs have no
    `vocab_multiple`, which is the default one without a value.

    Raises:
        ConfigError, CheckpointError: it cannot be read, or its model is none that ours computes.
    """
    from engine.checkpoint.folder import find
    from engine.checkpoint.interchange.huggingface import VOCAB_MULTIPLE, open_folder
    from engine.checkpoint.interchange.mapping import unchanged
    from engine.checkpoint.interchange.source_model import SourceModel
    from engine.checkpoint.interchange.sources.merged import merged
    from engine.checkpoint.storage import location_of
    from engine.config.schema.model import make_model
    from engine.models.families import family

    location = location_of(source)
    found = format_of(location)
    if found == "huggingface":
        return open_folder(location, vocab_multiple or VOCAB_MULTIPLE)
    if found in ("deepspeed", "universal", "dcp", "megatron-lm"):
        from engine.checkpoint.interchange.naming import named

        unnamed = open_unnamed(location, found)
        return named(unnamed, _described(unnamed) if unnamed.facts or model is None else model)
    path = find(location)[0]
    weights = own_weights(path)
    config = make_model(**_own_model(path, weights.source.manifest.state.config))  # type: ignore[attr-defined]
    values, plain = merged(weights.source, config)
    if plain is not config:
        # moments are those of the adapter, and not of the weights that it was merged into
        return SourceModel(
            model=plain,
            **vars(weights) | {"map": unchanged(family(plain).specs(plain)), "source": values, "moments": {}},
        )
    return SourceModel(model=config, **vars(weights))


def own_weights(path: Location) -> SourceWeights:
    """Open a checkpoint of ours by its own parameters, whatever model they are of.

    Raises:
        CheckpointError: it is damaged.
    """
    from engine.checkpoint.interchange.mapping import unchanged
    from engine.checkpoint.interchange.source_model import SourceWeights
    from engine.checkpoint.interchange.sources import CheckpointSource

    opened = CheckpointSource(path)
    state = opened.manifest.state
    progress = state.sections.get("progress")
    updates = progress.get("updates") if isinstance(progress, dict) else None
    return SourceWeights(
        map=unchanged(opened.manifest.specs.values()),
        source=opened,
        moments={moment: CheckpointSource(path, moment, or_weights=False) for moment in opened.manifest.moments},
        step=state.step if updates is None else updates,
        kind="a checkpoint of ours",
        described_by="the model",
    )


def open_unnamed(location: Location, found: Format | None) -> Unnamed:
    """Open a folder of tensors whose names are to be found out.

    Raises:
        CheckpointError: it cannot be read.
    """
    if found == "deepspeed":
        from engine.checkpoint.interchange.sources.deepspeed import open_deepspeed

        return open_deepspeed(location)
    if found == "universal":
        from engine.checkpoint.interchange.sources.universal import open_universal

        return open_universal(location)
    if found == "megatron-lm":
        from engine.checkpoint.interchange.sources.megatron import open_megatron

        return open_megatron(location)
    from engine.checkpoint.interchange.sources.dcp import open_dcp

    return open_dcp(location)


def _described(found: Unnamed) -> ModelConfig:
    """Return the model that a folder's files describe. Raises `ConfigError` where they do not."""
    from engine.config.schema.model import make_model

    if isinstance(model := found.facts.get("model"), dict):
        return make_model(**model)
    raise ConfigError(
        f"{found.origin} is {found.kind}, which does not say which model it is of",
        "a run file with `model`",
        "name it with --run, or write `model` out beside init_from",
    )


def _own_model(path: Path | Location, config: dict[str, Any]) -> dict[str, Any]:
    if "model" not in config:
        raise CheckpointError(
            f"{path} does not say which model it is of",
            "a checkpoint that a run or `palimpsest convert` wrote",
            "name another one",
        )
    return config["model"]
