"""`palimpsest continue`: append a run stage with new data to a run file, and show what it will do."""

from __future__ import annotations

import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.atomic import replacing
from engine.errors import ConfigError

if TYPE_CHECKING:  # pydantic and numpy would make --help slow
    from engine.config.schema.run import RunConfig
    from tools.continue_text import NewStage

KEPT = ("objective", "sequence_length", "global_batch_size")
"""Keys of the last stage that the new one takes over."""
KEPT_OF_DATA = ("cache", "window_shards", "attention", "packing", "on_damage")
"""The same in its `data`: how shards are read."""


def main(
    run: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="Run file that the stage is appended to.")],
    name: Annotated[str, typer.Option(help="Name of the new stage.")],
    data: Annotated[str, typer.Option(metavar="DIR|URL", help="Token shards of the new data.")],
    ratio: Annotated[float, typer.Option(metavar="R", help="Share of the samples that replay earlier data.")] = 0.0,
    tokens: Annotated[int | None, typer.Option(metavar="N", help="Length (default: the new data once).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the stage; write nothing.")] = False,
) -> None:
    """Append a run stage with new data to RUN.yaml, and show what it will do before anything is trained.

    The stage goes on from where the run in `folder` stands. Everything else in the file stays as it is; `palimpsest
    train RUN.yaml` then trains the stage.
    """
    from engine.redact import redact
    from tools.continue_text import plan_text, stage_text

    _check_options(name, ratio, tokens)
    file = RunFile.open(run)
    if not dry_run:
        file.refuse_read_only()
    planned = _plan(file, name, data, ratio, tokens)
    print(redact(plan_text(planned)))
    if dry_run:
        print(f"\nto be appended to `stages` in {run} (nothing is written):\n{redact(stage_text(planned.tree))}")
    # In a dry run as well: who has to write the stage by hand hears of it, with the stage in sight.
    text = file.appended(planned.tree)
    if not dry_run:
        file.replace(text)
        print(f"\n{run}: stage {name} is appended. Next: palimpsest train {run}")


@dataclass(frozen=True)
class RunFile:
    """A run file as it was read: nothing is written over what somebody else has written since."""

    path: Path
    """The file itself, behind any symbolic links, so that a link stays one."""
    content: bytes

    @classmethod
    def open(cls, path: Path) -> RunFile:
        """Read a run file. Raises `ConfigError` where it is missing, or no run file."""
        from engine.config.load import read_tree

        read_tree(path)  # says what is wrong with a file that is missing, too large, or no mapping
        real = path.resolve()
        return cls(real, real.read_bytes())

    def refuse_read_only(self) -> None:
        """Raise `ConfigError` where the file must not be written."""
        folder = self.path.parent
        # The superuser may write everywhere: the mode, which tells what the owner wants, is looked at as well.
        is_open = all(os.access(path, os.W_OK) for path in (self.path, folder))
        if not (is_open and self.path.stat().st_mode & stat.S_IWUSR):
            raise ConfigError(
                f"{self.path} must not be written: it, or its folder, is read-only",
                "a run file that may be changed",
                f"chmod u+w {self.path}, or write the stage there by hand (--dry-run shows it)",
            )

    def appended(self, stage: dict[str, Any]) -> str:
        """Return the text of the file with one more stage. Raises `ConfigError` as `engine.config.append_stage`."""
        from engine.config.append_stage import appended

        return appended(self.content.decode("utf-8"), stage, self.path)

    def replace(self, text: str) -> None:
        """Put a text in the file's place in one move; owner and mode stay.

        Raises:
            ConfigError: the file has changed since it was read.
        """
        with self.path.open("rb") as old:
            # Two of these commands at once: the second one waits here, and then finds another content.
            fcntl.flock(old, fcntl.LOCK_EX)
            if self.path.read_bytes() != self.content:
                raise ConfigError(
                    f"{self.path} has changed since this command read it; nothing was written",
                    "one writer at a time",
                    "look at the file, and call the command again",
                )
            was = os.fstat(old.fileno())
            with replacing(self.path) as file:
                os.fchmod(file.fileno(), stat.S_IMODE(was.st_mode))
                if (os.fstat(file.fileno()).st_uid, os.fstat(file.fileno()).st_gid) != (was.st_uid, was.st_gid):
                    os.fchown(file.fileno(), was.st_uid, was.st_gid)
                file.write(text.encode())


def _check_options(name: str, ratio: float, tokens: int | None) -> None:
    """Raise `ConfigError` for values that no run could have."""
    from engine.config.rules.data import LONGEST_NAME

    if not (name.isprintable() and name == name.strip() and len(name) <= LONGEST_NAME):
        raise ConfigError(
            f"--name {name!r} is no name",
            f"1 to {LONGEST_NAME} printable characters, no space at either end: metrics use it",
            "choose another one",
        )
    if not 0 <= ratio < 1:
        raise ConfigError(f"--ratio {ratio:g}", "0 (no replay) or more, and less than 1", "0.05 to 0.25 are usual")
    if tokens is not None and tokens < 1:
        raise ConfigError(f"--tokens {tokens}", "1 or more", "leave it out for one pass over the new data")


def _plan(file: RunFile, name: str, data: str, ratio: float, tokens: int | None) -> NewStage:
    """Return the new stage, checked as a part of the whole run file."""
    from engine.config.load import parse_run, read_tree
    from engine.data.shards.tombstones import read_tombstones
    from engine.data.stage import open_parts, open_validation, run_stage_seed, stage_stream, with_reservoir
    from engine.data.tokenizer.folder import tokenizer_hash
    from engine.train.continuation import choose_schedule, standing
    from engine.train.continuation_data import find_data
    from engine.train.saved_reservoir import frozen_generation, keeps_rows
    from tools.continue_text import NewStage

    tree = read_tree(file.path)
    config = parse_run(tree, str(file.path))
    names = [stage.name for stage in config.stages]
    if name in names:
        raise ConfigError(
            f"--name {name}: the run has a stage of this name", "a different name for each stage", "choose another"
        )
    stands = standing(config)
    last, tree = config.stages[-1], read_tree(file.path)
    found = find_data(data, name, _validation_names(config), last.data.cache)
    stage: dict[str, Any] = {"name": name}
    written = tree["stages"][-1]
    stage["data"] = found.keys() | {key: written["data"][key] for key in KEPT_OF_DATA if key in written["data"]}
    stage |= {key: written[key] for key in KEPT if key in written}
    if ratio:
        stage["replay"] = {"ratio": ratio} | ({} if keeps_rows(config) else {"source": _replayed(config)})
    step_tokens = last.sequence_length * last.global_batch_size
    # Without a length first, to see what the data holds.
    trial = _checked(tree, stage | {"duration": {"tokens": step_tokens}}, file.path)
    checked = (tokenizer_hash(config.tokenizer), config.model.vocab_size, read_tombstones(config.folder))
    parts = open_parts(trial.stages[-1], *checked)
    new_parts = [part for part in parts if not part.is_replay]
    held_out = open_validation(trial.stages[-1], *checked)
    num_tokens = sum(part.dataset.index.num_tokens for part in new_parts)
    length = tokens or max(1, round(num_tokens / (1 - ratio) / step_tokens)) * step_tokens
    choice = choose_schedule(config.optimizer, last, stands.rate, length, step_tokens)
    stage |= {"duration": {"tokens": length}, "schedule": choice.schedule}
    whole = _checked(tree, stage, file.path)
    run_stage = whole.stages[-1]
    if run_stage.replays_reservoir and (generation := frozen_generation(whole, len(names))) is not None:
        parts = with_reservoir(whole.stages, len(names), parts, generation, *checked)
    replayed = parts[-1].dataset if parts[-1].is_replay else None
    if replayed is not None or not ratio:  # what a reservoir holds is known once the last stage has ended
        stage_stream(run_stage, parts, run_stage_seed(config.seed, len(names)))  # the data serves the objective
    return NewStage(whole, stage, stands, choice.why, new_parts, [key for key, _ in held_out or []], ratio, replayed)


def _replayed(config: RunConfig) -> str:
    """Return the folder of the run's earlier data, which the new stage replays.

    Raises:
        ConfigError: there are several.
    """
    locations = dict.fromkeys(location for stage in config.stages for location in stage.data.training_locations)
    if len(locations) > 1:
        raise ConfigError(
            f"--ratio: the run's stages have {len(locations)} data sets, and a stage replays from one",
            f"one of {', '.join(locations)}",
            "call this without --ratio, then write `replay: {ratio: R, source: DIR}` into the new stage",
        )
    return next(iter(locations))


def _checked(tree: dict[str, Any], stage: dict[str, Any], path: Path) -> RunConfig:
    """Return the configuration with one more stage, as `train` would take it. Raises `ConfigError`."""
    from engine.config.load import parse_run
    from engine.config.resolve import resolve

    config = parse_run(tree | {"stages": [*tree["stages"], stage]}, f"{path} with stage {stage['name']}")
    parallel = config.parallel
    resolve(config, parallel.pipe * parallel.tensor * parallel.sequence * (parallel.data or 1))
    return config


def _validation_names(config: RunConfig) -> set[str]:
    """Return the names of the run's held-out sets; one without a name has that of its stage."""
    names = set()
    for stage in config.stages:
        sets = stage.data.validation
        names |= {stage.name} if isinstance(sets, str) else set(sets or {})
    return names
