"""The JSON schema of run files, for editors: keys, values and the meaning of each key.

Made from the sections themselves. A run file may include others, so no key is required; a key that no section has is
an error, as it is for `engine.config.load`. Rules that join several keys are not in it: `palimpsest plan` tells them.
"""

from __future__ import annotations

from typing import Any, get_args

from engine.config.schema.objective import ObjectiveName
from engine.config.schema.run import RunConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"
INCLUDE = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    "description": "Files that this one builds on, seen from its folder. Later ones win over earlier ones, and this "
    "file wins over them all.",
}


def run_schema() -> dict[str, Any]:
    """Return the JSON schema of run files, also of those that hold a part of a configuration."""
    schema = _of_parts(RunConfig.model_json_schema())
    objective = schema["$defs"]["ObjectiveConfig"]
    # `objective: causal` is short for `objective: {name: causal}`.
    names = {"enum": list(get_args(ObjectiveName)), "description": "Name of the objective, with its defaults."}
    schema["$defs"]["ObjectiveConfig"] = {"anyOf": [names, objective]}
    # `init_from: PATH` is short for `init_from: {path: PATH}`.
    path = {"type": "string", "description": "Source of the weights; the other keys have their defaults."}
    schema["$defs"]["InitFrom"] = {"anyOf": [path, schema["$defs"]["InitFrom"]]}
    # A task file has `adapter` at its top: `palimpsest finetune` makes `model.adapter` of it.
    adapter = {"adapter": schema["$defs"]["GPTConfig"]["properties"]["adapter"]}
    schema["properties"] = {"include": INCLUDE, **schema["properties"], **adapter}
    return {"$schema": DIALECT, **schema, "title": "Palimpsest run"}


def _of_parts(node: Any) -> Any:
    """Return a schema without required keys. Sections that a key tells apart then overlap where it is left out, so
    one or more of them may fit."""
    if isinstance(node, list):
        return [_of_parts(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {key: _of_parts(value) for key, value in node.items() if key != "required"}
    if isinstance(text := kept.get("description"), str):
        kept["description"] = " ".join(text.split())  # docstrings are wrapped
    if "oneOf" in kept:
        kept["anyOf"] = kept.pop("oneOf")
        kept.pop("discriminator", None)
    return kept
