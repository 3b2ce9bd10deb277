"""Sources of a run's first weights: a Hugging Face folder, or a checkpoint of ours, opened alike.

Imports nothing heavy by itself: commands that run without torch take `model_of` from here, which imports where it is
called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.checkpoint.interchange.huggingface import SourceModel
    from engine.checkpoint.storage import Location


def model_of(source: str) -> dict[str, Any]:
    """Return the keys of the model in a source, for a run file that leaves them out.

    Raises:
        ConfigError, CheckpointError: there is no model that can be read.
    """
    from engine.checkpoint.storage import location_of

    location = location_of(source)
    if is_folder_of_theirs(location):
        from engine.checkpoint.interchange.forms import require_form
        from engine.checkpoint.interchange.huggingface import VOCAB_MULTIPLE, read_configuration

        theirs = read_configuration(location)
        model = require_form(theirs).our_config(theirs, VOCAB_MULTIPLE)
        return model.model_dump(mode="json")
    from engine.checkpoint import manifest_json
    from engine.checkpoint.folder import find

    return _own_model(find(location)[0], manifest_json.read(find(location)[0]).state.config)


def open_source(source: str, vocab_multiple: int) -> SourceModel:
    """Open a source of weights. Of a run folder its newest checkpoint is taken.

    Raises:
        ConfigError, CheckpointError: it cannot be read, or its model is none that ours computes.
    """
    from engine.checkpoint.folder import find
    from engine.checkpoint.interchange.huggingface import SourceModel, open_folder
    from engine.checkpoint.interchange.mapping import unchanged
    from engine.checkpoint.interchange.sources import CheckpointSource
    from engine.checkpoint.storage import location_of
    from engine.config.schema.model import make_model

    location = location_of(source)
    if is_folder_of_theirs(location):
        return open_folder(location, vocab_multiple)
    opened = CheckpointSource(find(location)[0])
    model = make_model(**_own_model(opened.path, opened.manifest.state.config))
    return SourceModel(model=model, map=unchanged(opened.manifest.specs.values()), source=opened)


def is_folder_of_theirs(location: Location) -> bool:
    """Return True if a source is a Hugging Face folder, and no run or checkpoint of ours."""
    return (location / "config.json").is_file()


def _own_model(path: Location, config: dict[str, Any]) -> dict[str, Any]:
    from engine.errors import CheckpointError

    if "model" not in config:
        raise CheckpointError(
            f"{path} does not say which model it is of",
            "a checkpoint that a run or `palimpsest convert` wrote",
            "name another one",
        )
    return config["model"]
