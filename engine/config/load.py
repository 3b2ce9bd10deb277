"""Reader of a run's configuration: defaults, then the file and its includes, then `section.key=value` overrides.

YAML 1.2 (`1e-4` is a number, `no` is a string), repeated keys are errors, and every unknown key is answered with
the nearest known one. A file may name others under `include` (paths relative to itself); later files win over
earlier ones and the including file wins over them all. Lists are replaced, never merged. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import Tag, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from engine.config.paths import expand, expand_keys
from engine.config.save import FILE
from engine.config.schema.run import RunConfig
from engine.config.schema.section import Section
from engine.errors import ConfigError, PalimpsestError, report
from engine.logs import logger

Tree = dict[str, Any]
S = TypeVar("S", bound=Section)
LARGEST_BYTES = 1 << 20
"""Largest size of a file; real ones have a few thousand bytes."""
DEEPEST = 64
"""Largest depth of sections within sections; the schema has less than ten."""
MOST_VALUES = 100_000
"""Largest number of values in a file, counting what its aliases repeat; the largest mixtures have a few thousand."""
_QUOTED = re.compile(r"'([^']*)'")


def load_run(
    path: Path, overrides: list[str] | None = None, model_of: Callable[[str], Tree] | None = None
) -> RunConfig:
    """Return the configuration in `path` with the command line's overrides, validated field by field.

    Rules that join fields are `engine.config.resolve.check`. `model_of` gives the keys of the model in the source that
    `init_from` names, for a file that leaves `model` out, or gives its dropout or adapter alone. A run that has begun
    goes on without its source.

    Raises:
        ConfigError: the file is missing or no YAML, or any key or value is wrong (all of them in one report).
    """
    tree = read_overridden(path, overrides)
    if model_of is not None and (source := _source_of_model(tree)) is not None:
        tree["model"] = _found_model(source, tree, model_of) | tree.get("model", {})
    return parse_run(tree, str(path))


def _found_model(source: str, tree: Tree, model_of: Callable[[str], Tree]) -> Tree:
    """Return the model in a source, or that in the run's folder where the source is gone: the run has begun from it."""
    try:
        return model_of(source)
    except PalimpsestError as error:
        noted = Path(str(tree.get("folder"))).expanduser() / FILE
        try:
            model = read_tree(noted).get("model") if noted.is_file() else None
        except ConfigError:  # the source's own error says more than that of a file which stands in for it
            model = None
        if not isinstance(model, dict):
            raise
        # not all that is wrong with a source is that it is gone: its name may be misspelt
        logger(__name__).warning("the model is that of %s, since init_from gives none: %s", noted, error.wrong)
        return model


def _source_of_model(tree: Tree) -> str | None:
    """Return the source of a file's model, where the file itself says none."""
    given, model = tree.get("init_from"), tree.get("model", {})
    path = given.get("path") if isinstance(given, dict) else given
    says_none = isinstance(model, dict) and not model.keys() - {"dropout", "attention_dropout", "adapter"}
    return path if says_none and isinstance(path, str) else None


def folder_of(path: Path, overrides: list[str] | None = None) -> Path | None:
    """Return the run folder of a configuration that `load_run` refuses; None where it cannot be read."""
    try:
        tree = read_overridden(path, overrides)
    except PalimpsestError:
        return None
    folder = tree.get("folder")
    try:
        return Path(expand(folder, "folder")) if isinstance(folder, str) and folder else None
    except ConfigError:
        return None


def read_overridden(path: Path, overrides: list[str] | None) -> Tree:
    """Return the tree of a file with the command line's overrides. Raises `ConfigError` as `read_tree`."""
    tree = read_tree(path)
    for override in overrides or []:
        apply_override(tree, override)
    return tree


def parse_run(tree: Tree, source: str) -> RunConfig:
    """Return the configuration that a parsed tree describes, whose paths are expanded in place; `source` names it in
    errors.

    Raises:
        ConfigError: any key or value is wrong (all of them in one report).
    """
    expand_keys(tree)
    try:
        # Strict, so that "8" is no number. Through JSON, where strict mode takes lists for tuples and text for paths.
        return RunConfig.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        problems: list[PalimpsestError] = [_explain(item) for item in _causes(error.errors())]
        # `from None`: pydantic's own report would stand above ours with the same problems in other words.
        raise report(problems, f"configuration {source}") from None
    except (TypeError, ValueError) as error:  # dates, keys that are no text, anchors that hold themselves
        raise ConfigError(
            f"configuration {source}: {error}", "numbers, text, lists and sections", "put text in quotes"
        ) from None


def parse_section(kind: type[S], tree: Any, at: tuple[str | int, ...], source: str) -> S:
    """Return a section at these keys that is read before the rest of its file, which is still to be completed.

    Raises:
        ConfigError: any key or value is wrong (all of them in one report).
    """
    try:
        return kind.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        items = [{**item, "loc": (*at, *item["loc"])} for item in error.errors()]
        problems: list[PalimpsestError] = [_explain(item) for item in _causes(items)]
        raise report(problems, f"configuration {source}") from None


def read_tree(path: Path, _above: tuple[Path, ...] = ()) -> Tree:
    """Return the YAML file as nested dictionaries, its includes merged below it."""
    # Only the chain above is looked at: two files may include a common third one.
    if path.resolve() in _above:
        raise ConfigError(f"configuration {path} includes itself", remedy="remove the include")
    try:
        with path.open("rb") as file:
            # One byte more than allowed is enough to know, and a device or a pipe cannot fill the memory.
            data = file.read(LARGEST_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"configuration {path} cannot be read: {_reason(error)}",
            "a YAML file",
            "name an existing file, for example configs/smoke/gpt2.yaml",
        ) from None
    if len(data) > LARGEST_BYTES:
        raise ConfigError(
            f"configuration {path} has more than {LARGEST_BYTES:,} bytes", "a run's configuration", "name another file"
        )
    own = _parse_yaml(text, f"configuration {path}", included=bool(_above))
    if not isinstance(own, dict):
        raise ConfigError(
            f"configuration {path} holds {type(own).__name__}",
            "sections of keys and values",
            "see configs/smoke/gpt2.yaml",
        )
    # A typing error in `include` may name any YAML file; its keys would be reported as unknown ones of the run file.
    if _above and own and not own.keys() & {"include", *RunConfig.model_fields}:
        raise ConfigError(
            f"{path}, included by {_above[-1]}, is no configuration: it has none of its sections",
            ", ".join(sorted(RunConfig.model_fields)),
            "include another file",
        )
    merged: Tree = {}
    includes = own.pop("include", [])
    if not isinstance(includes, (str, list)):
        raise ConfigError(f"{path}: include is {includes!r}", "a file or a list of files", "name files beside this one")
    for name in [includes] if isinstance(includes, str) else includes:
        merge(merged, read_tree(path.parent / expand(str(name), f"{path}: include"), (*_above, path.resolve())))
    return merge(merged, own)


def _parse_yaml(text: str, what: str, included: bool = False) -> Any:
    """Return the value of a YAML text; `what` names it in errors.

    They quote nothing of a file that was `included`: whoever wrote the run file need not have the right to read it.

    Raises:
        ConfigError: it is no YAML, or nested or repeated beyond any configuration.
    """
    try:
        # `safe` makes no Python objects of tags; `pure` is one parser everywhere, with or without the C library.
        value = YAML(typ="safe", pure=True).load(text)
    except RecursionError:
        raise _too_large(what, f"is nested more than {DEEPEST} deep") from None
    except YAMLError as error:
        where = _place(error) if included else _one_line(error)
        raise ConfigError(f"{what} is not valid YAML: {where}", "YAML 1.2, each key once", "mend that line") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # 2001-99-99, !!int x
        detail = "" if included else f" ({error})"
        raise ConfigError(
            f"{what} has a value that is none{detail}", "numbers, text, lists and sections", "put text in quotes"
        ) from None
    _check_size(value, what)
    return value


def _check_size(value: Any, what: str) -> None:
    """Raise `ConfigError` where a value is nested or, with what its aliases repeat, larger than any configuration."""
    # A stack and no recursion, which a deep file would exhaust. Aliases share one object, so a few hundred bytes can
    # stand for billions of values ("billion laughs"): each is counted as often as it is reached.
    num_values, open_values = 0, [(value, 0)]
    while open_values:
        value, depth = open_values.pop()
        num_values += 1
        if depth > DEEPEST:
            raise _too_large(what, f"is nested more than {DEEPEST} deep, or is circular")
        if num_values > MOST_VALUES:
            raise _too_large(what, f"has more than {MOST_VALUES:,} values with what its aliases (*name) repeat")
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
        open_values.extend((one, depth + 1) for one in inside)


def _too_large(what: str, how: str) -> ConfigError:
    return ConfigError(f"{what} {how}", "the sections of a run", "see configs/smoke/gpt2.yaml")


def _place(error: YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}, column {mark.column + 1}" if mark is not None else "its characters are no text"


def merge(below: Tree, above: Tree) -> Tree:
    """Merge `above` into `below`, in place and section by section; return `below`."""
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            merge(below[key], value)
        else:
            below[key] = value
    return below


def apply_override(tree: Tree, override: str) -> None:
    """Set `section.key=value` in the tree; the value is YAML, and numbers in the path index lists."""
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ConfigError(
            f"override {override!r} has no value", "section.key=value", "for example optimizer.learning_rate=1e-4"
        )
    value = _parse_yaml(text, f"override {override!r}")
    *parents, last = path.split(".")
    node: Any = tree
    for part in parents:
        node = _child(node, part, override)
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    else:
        node[last] = value


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, override)]
    # Sections that the file leaves out come to be here; a wrong name among them is pydantic's to report.
    child = node.setdefault(part, {})
    if not isinstance(child, (dict, list)):
        raise ConfigError(f"override {override!r}: {part} is the value {child!r}, not a section")
    return child


def _index(node: list[Any], part: str, override: str) -> int:
    # `isdecimal`: "²" is a digit, but no number.
    if not part.isdecimal() or int(part) >= len(node):
        allowed = f"0 to {len(node) - 1}" if node else "none: the list is empty"
        raise ConfigError(f"override {override!r}: no entry {part}", allowed)
    return int(part)


def _causes(items: list[Any]) -> list[Any]:
    """Return pydantic's errors without those that only follow from another.

    A list with wrong entries is not too short, and a default that is computed from a wrong value is not wrong."""
    # An error at ("stages", 0, "data") marks (), ("stages",) and ("stages", 0) as wrong inside.
    wrong_inside = {item["loc"][:depth] for item in items for depth in range(len(item["loc"]))}
    return [
        item
        for item in items
        if item["type"] != "default_factory_not_called"
        and (item["type"] != "too_short" or item["loc"] not in wrong_inside)
    ]


def _explain(item: Any) -> ConfigError:
    """Return one of pydantic's errors in the project's three parts."""
    keys, section = _walk(item["loc"])
    path = ".".join(keys) or "the whole file"
    if item["type"] == "extra_forbidden":
        return _unknown_key(keys, section)
    if item["type"] == "missing":
        return ConfigError(f"{path} is missing", remedy=f"write {path} in the file or on the command line")
    value, allowed = item.get("input"), item["msg"][0].lower() + item["msg"][1:]
    if item["type"] == "union_tag_invalid":  # the key that says which of several sections this is
        path, value, allowed = f"{path}.{section.told_apart_by}", item["ctx"]["tag"], item["ctx"]["expected_tags"]
    # A whole section would fill the screen.
    shown = "" if isinstance(value, dict) else f" = {value!r}"
    choices = _QUOTED.findall(allowed) if item["type"] in ("literal_error", "union_tag_invalid") else []
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]}?" if near else f"change {path} in the file or on the command line"
    return ConfigError(f"{path}{shown} is not allowed", allowed, remedy)


def _unknown_key(keys: list[str], section: type[Section]) -> ConfigError:
    """Return the error of an unknown key: the keys of its section, and the nearest one or the section that has it."""
    *above, name = keys
    key, names = section.told_apart_by, sorted(section.model_fields)
    # The cutoff finds slips of two or three letters: "learning_rat" but not "rate" for "learning_rate".
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    others = [other for other in _alternatives(above) if name in other.model_fields]
    if others:
        has_it = " or ".join(_tag(other) for other in others)
        hint = f"leave it out: {'.'.join([*above, key])} = {has_it} has it"
    else:
        hint = f"did you mean {near[0]}?" if near else "remove it"
    of = f" of {key} {_tag(section)}" if key else ""
    return ConfigError(f"unknown key {'.'.join(keys)}{of}", ", ".join(names), hint)


def _walk(location: Sequence[str | int]) -> tuple[list[str], type[Section]]:
    """Return the keys and list positions of one of pydantic's locations, and the section that the last one is in.

    Where several sections or types may stand in one place, pydantic puts into the location which of them it tried:
    ("model", "bert", "token_typs") is model.token_typs.
    """
    keys: list[str] = []
    section: type[Section] = RunConfig
    tried: list[type[Section]] = []
    skips = False
    for part in location:
        if skips:  # "str" or "dict[str,str]"
            skips = False
        elif part in [_tag(one) for one in tried]:
            section, tried = next(one for one in tried if _tag(one) == part), []
        else:
            keys.append(str(part))
            if part in section.model_fields:
                annotation = section.model_fields[str(part)].annotation
                found = list(_sections_in(annotation))
                section, tried = (found[0] if found else section), found if len(found) > 1 else []
                # Of `str | dict[str, str]` (data.validation) pydantic names the branch that it tried next.
                skips = not found and len({str, dict} & {get_origin(one) or one for one in get_args(annotation)}) > 1
                # Of a number or a table (replay.ratio) it names the tag of the one that was meant.
                tags = [one for inner in get_args(annotation) for one in _metadata(inner) if isinstance(one, Tag)]
                skips = skips or bool(len(found) == 1 and tags)
    return keys, section


def _metadata(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__metadata__", ())


def _alternatives(keys: list[str]) -> list[type[Section]]:
    """Return the sections of which one may stand at these keys."""
    found: list[type[Section]] = [RunConfig]
    for key in keys:
        if not key.isdecimal():
            inner = [one for section in found if key in section.model_fields for one in _in_field(section, key)]
            # A wrong key in between keeps the sections above it, which are still worth a hint.
            found = inner or found
    return found


def _in_field(section: type[Section], key: str) -> Iterator[type[Section]]:
    return _sections_in(section.model_fields[key].annotation)


def _tag(section: type[Section]) -> str:
    """Return the value of the key that tells a section from its alternatives: "bert" for `model`; else ""."""
    key = section.told_apart_by
    return get_args(section.model_fields[key].annotation)[0] if key else ""


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections_in(inner)


def _one_line(error: Exception) -> str:
    """Return a YAML error as one line, without its advice on turning the check off."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = []
    for line in lines:
        # ruamel ends its message about a repeated key with the way to allow it.
        if line.startswith(("To suppress", "Duplicate keys")):
            break
        kept.append(line)
    return " ".join(kept)


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
