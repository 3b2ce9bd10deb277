"""The manifest as JSON: canonical, with a hash of its own, and used only after every field has been checked.

The hash is the xxh3 of the canonical JSON (sorted keys, no spaces) of all fields but `xxh3` itself, so that
layout on the page is free: one line per parameter and per file, for human readers. The fields are
checked by `engine.checkpoint.manifest_checks`.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from engine.atomic import write_atomically
from engine.checkpoint import manifest_checks
from engine.checkpoint.container import FileRecord, damaged, disk_errors, plain_size
from engine.checkpoint.folder import step_of, step_path
from engine.checkpoint.manifest import Manifest
from engine.checkpoint.storage import MANIFEST, Location
from engine.errors import CheckpointError
from engine.parallel.state import Placement

FILE = MANIFEST
FORMAT = "palimpsest-checkpoint"
VERSION = 2
MAX_BYTES = 1 << 28
"""Bytes of the longest manifest that is read; some hundred thousand files and parameters take a tenth of it."""
_LONG = ("parameters", "files", "hyperparameters")
"""Fields with one line per entry."""


class OtherVersion(CheckpointError):
    """The checkpoint is of a version of the format that is not read here."""

    def __init__(self, path: Location, version: object) -> None:
        is_older = isinstance(version, int) and version < VERSION
        super().__init__(
            f"{path}: it is of version {version!r} of the checkpoint format",
            f"version {VERSION}",
            "go on with the palimpsest that saved it, or start afresh" if is_older else "update palimpsest",
        )

    # Errors travel between ranks as pickles, and unpickling would call this `__init__` with three texts.
    def __reduce__(self):
        return CheckpointError, (self.wrong, self.allowed, self.remedy)


def write(manifest: Manifest, folder: Path) -> None:
    """Write `manifest.json` into a folder; return when it is on the disk.

    Raises:
        CheckpointError: a section is not JSON, or the file system refuses.
    """
    text = render(manifest)
    path = folder / FILE
    with disk_errors(path):
        write_atomically(path, text)


def read(folder: Location) -> Manifest:
    """Return the manifest of a checkpoint folder, checked against itself and against the sizes of the files.

    Raises:
        CheckpointError: it is absent, damaged, of another version, or describes what cannot be.
    """
    path = folder / FILE
    try:
        if plain_size(path) > MAX_BYTES:
            raise damaged(path, f"more than {MAX_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise damaged(path, "there is none: the save was not finished, or this is no checkpoint") from problem
    except OSError as problem:
        raise damaged(path, f"cannot be read ({problem.strerror})") from problem
    except (ValueError, RecursionError) as problem:
        raise damaged(path, "it is not JSON") from problem
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise damaged(path, f"it is no {FORMAT} manifest")
    if content.get("version") != VERSION:
        raise OtherVersion(path, content.get("version"))
    # after the version, which another format may hash differently
    if not _is_whole(content):
        raise damaged(path, "its content is not what its own hash says")
    try:
        manifest = manifest_checks.parse(content)
        manifest_checks.check(manifest)
    except (KeyError, TypeError, ValueError) as problem:
        raise damaged(path, f"a field is missing or impossible ({problem})") from problem
    _check_name(folder, manifest)
    return manifest


def _check_name(folder: Location, manifest: Manifest) -> None:
    """Raise `CheckpointError` where the folder's name gives the step of another checkpoint."""
    step = manifest.state.step
    if step_of(folder) not in (-1, step):
        raise CheckpointError(
            f"{folder / FILE}: it is of step {step}, and the folder's name says step {step_of(folder)}",
            f"{step_path(Path(), step)}, or a name that gives no step",
            "rename the folder",
        )


def _is_whole(content: dict[str, Any]) -> bool:
    try:
        return content.pop("xxh3", None) == content_hash(content)
    except ValueError:  # NaN, which no manifest holds
        return False


def check_sizes(manifest: Manifest, folder: Location) -> None:
    """Compare every file's real size with the manifest; raises `CheckpointError` for the first that differs."""
    for record in manifest.files.values():
        check_size(record, folder / record.name)


def check_size(record: FileRecord, path: Location) -> None:
    """Raise `CheckpointError` where a file is absent or of another size than its record says."""
    try:
        num_bytes = plain_size(path)
    except OSError as problem:
        raise damaged(path, f"cannot be read ({problem.strerror})") from problem
    if num_bytes != record.num_bytes:
        raise damaged(path, f"{num_bytes} bytes, the manifest says {record.num_bytes}")


def content_hash(content: dict[str, Any]) -> str:
    """xxh3 (64 bit, hex) of the manifest's canonical JSON."""
    # surrogatepass: a path that is not UTF-8 has lone surrogates in Python, which plain UTF-8 refuses.
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return xxhash.xxh3_64(text.encode("utf-8", "surrogatepass")).hexdigest()


def render(manifest: Manifest) -> str:
    """Return the manifest's text, its hash included."""
    for name, section in manifest.state.sections.items():
        check_json(section, f"section {name}")
    check_json(manifest.state.config, "config")
    check_json(manifest.state.hyperparameters, "hyperparameters")
    content = _content(manifest)
    # of what a reader will see once it has parsed the text
    content["xxh3"] = content_hash(json.loads(json.dumps(content)))
    fields = [f"{json.dumps(name)}: {_entries(name, value)}" for name, value in content.items()]
    return "{\n" + ",\n".join(fields) + "\n}\n"


def check_json(value: Any, where: str) -> None:
    """Raise `CheckpointError` where a value would not come back from JSON as it is (tuples come back as lists)."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise _not_json(f"{where}: the key {key!r}")
            check_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_json(item, f"{where}.{index}")
    elif not (
        value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))
    ):
        raise _not_json(f"{where}: {value!r} ({type(value).__name__})")


def _not_json(what: str) -> CheckpointError:
    return CheckpointError(
        f"{what} cannot go into a checkpoint",
        "JSON: text, finite numbers, true, false, null, lists, and objects with text keys",
        "write it as numbers or text; tensors belong into parameter shards",
    )


def _entries(name: str, value: Any) -> str:
    if name not in _LONG or not value:
        return json.dumps(value)
    if isinstance(value, dict):
        return "{\n " + ",\n ".join(f"{json.dumps(key)}: {json.dumps(item)}" for key, item in value.items()) + "\n}"
    return "[\n " + ",\n ".join(json.dumps(item) for item in value) + "\n]"


def _content(manifest: Manifest) -> dict[str, Any]:
    state, layout = manifest.state, manifest.layout
    return {
        "format": FORMAT,
        "version": VERSION,
        "step": state.step,
        "tokens": state.tokens,
        "job": manifest.job,
        "attempt": manifest.attempt,
        "topology": {**asdict(layout), "zero_stage": state.zero_stage},
        "config_hash": state.config_hash,
        "config": state.config,
        "versions": state.versions,
        "sections": state.sections,
        "moments": list(manifest.moments),
        "parameters": {name: _parameter(manifest, placement) for name, placement in manifest.placements.items()},
        "hyperparameters": state.hyperparameters,
        "files": [[record.name, record.num_bytes, record.xxh3] for record in manifest.files.values()],
    }


def _parameter(manifest: Manifest, placement: Placement) -> dict[str, Any]:
    spec = placement.spec
    described: dict[str, Any] = {"shape": list(spec.stored_shape), "dtype": "F32", "role": spec.sharding.role}
    if spec.real_rows is not None:
        described["padded_rows"] = spec.shape[0]
    if spec.sharding.dim is not None:
        described |= {"dim": spec.sharding.dim, "blocks": list(spec.blocks())}
    moments = [moment for moment in manifest.moments if moment in placement.moments]
    # Left out where a parameter has all of them: most have, and the manifest is read by people, too.
    if moments != list(manifest.moments):
        described["moments"] = moments
    return {
        **described,
        "stages": sorted(set(placement.stages)),
        "offset": placement.offset,
        "partition": placement.partition,
    }
