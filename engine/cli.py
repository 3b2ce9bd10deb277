"""The command `palimpsest`: picks the sub-command, imports that one alone, and turns errors into exit codes.

Nothing heavy is imported before a sub-command is known, so `--help` and every usage error answer at once. A launcher
may put `--local_rank=N` before the sub-command (deepspeed does); it is accepted and ignored, because the environment
says the same. Sub-commands are functions with typer annotations, or typer applications; they hold no logic of their
own. What a sub-command raises as `PalimpsestError` is printed on standard error and ends in the exit code of its class;
so does what the machine refuses (output that cannot be written, files, memory, a locale that cannot spell a name).
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import itertools
import os
import sys
from dataclasses import dataclass
from typing import Any

from engine import __version__
from engine.config.paths import with_homes
from engine.errors import EXIT_DONE, EXIT_FAILURE, ConfigError, EnvironmentProblem, PalimpsestError
from engine.output import failed_stream, lenient, spell_everything, watched
from engine.redact import redact_process

EXIT_INTERRUPTED = 130
"""Exit code of a command that ended by Ctrl-C, as in shells: 128 + SIGINT."""


@dataclass(frozen=True)
class Command:
    """A sub-command: the address of its function or typer application, and its line in the overview."""

    target: str
    summary: str
    interrupted: str = ""
    """Words for a user after Ctrl-C."""


COMMANDS = {
    "init": Command("tools.init:main", "Write a first run file, by options or questions.", "nothing was written"),
    "schema": Command("tools.schema:main", "Print the JSON schema of run files, for editors."),
    "tokenizer": Command("tools.tokenizer:main", "Train a tokenizer on text.", "no tokenizer was written"),
    "prepare": Command("tools.prepare:main", "Write text as token shards.", "the same command goes on from here"),
    "inspect-data": Command("tools.inspect_data:main", "Show counts and decoded samples of token shards."),
    "forget": Command("tools.forget:main", "Train on some documents no more.", "the same command goes on"),
    "plan": Command("tools.plan:main", "Show what a run costs on a world, and what would be refused."),
    "continue": Command("tools.continue_run:main", "Append a stage with new data to a run.", "nothing was written"),
    "fit-replay": Command("tools.fit_replay:main", "Find the replay ratio of a stage from short runs."),
    "preflight": Command("tools.preflight:main", "Check the nodes of a job before a run starts there."),
    "launch": Command("tools.launch:main", "Start the ranks of a run and watch over them."),
    "job": Command("tools.job:app", "Follow, show and cancel jobs that launch has submitted to Slurm."),
    "train": Command("tools.train:main", "Train: what each rank runs, under any launcher or alone."),
    "finetune": Command("tools.finetune:main", "Fine-tune a model on labelled examples, and measure it."),
    "evaluate": Command("tools.evaluate:main", "Measure a model on text, benchmarks and labelled sets."),
    "tasks": Command("tools.tasks:main", "Show what runs of tasks are worth together, and what each new one has cost."),
    "status": Command("tools.status:main", "Show where runs stand, also while they go on."),
    "compare": Command("tools.compare:main", "Compare the metrics of runs, and say where they part."),
    "ledger": Command("tools.ledger:main", "Show what a run of several stages has learned and forgotten."),
    "checkpoint": Command("tools.checkpoint:app", "List, verify, compare and merge checkpoints."),
    "replay-generate": Command(
        "tools.replay_generate:main", "Sample token shards from a model, to replay.", "the same command goes on"
    ),
    "convert": Command("tools.convert:main", "Convert models and token files between formats.", "nothing was written"),
    "generate": Command("tools.generate:main", "Continue a prompt."),
}

MAY_BE_EMPTY = ("--prompt",)
"""Options whose empty value means something."""
OUTLIVE_TERMINAL = ("train", "finetune", "launch")
"""Commands that go on, or save and stop, where their output cannot be written."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code; never raise SystemExit."""
    arguments = _skip_local_rank(list(sys.argv[1:] if arguments is None else arguments))
    # Before anything is printed: a locale that cannot spell a name must not end in a traceback, and no traceback may
    # show a credential.
    spell_everything()
    redact_process()
    with lenient() if set(arguments[:1]) & set(OUTLIVE_TERMINAL) else watched():
        return _main(arguments)


def _main(arguments: list[str]) -> int:
    name = ""
    try:
        if not arguments or arguments[0] in ("--help", "-h"):
            print(overview())
        elif arguments[0] == "--version":
            print(f"palimpsest {__version__}")
        else:
            name, *rest = arguments
            target = load(name)
            _refuse_empty(rest)
            return run(target, name, rest)
        sys.stdout.flush()
        return EXIT_DONE
    except KeyboardInterrupt:
        hint = COMMANDS[name].interrupted if name in COMMANDS else ""
        _say(f"palimpsest {name}: interrupted" + (f"; {hint}" if hint else ""))
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `| head` has read enough
        return EXIT_FAILURE
    # ImportError and SystemError are here for memory alone (`out_of_memory`); any other is a defect, and raised again.
    except (PalimpsestError, OSError, MemoryError, ImportError, SystemError, UnicodeEncodeError) as error:
        problem = error if isinstance(error, PalimpsestError) else _refused_by_the_machine(error)
        if problem is None:
            raise
        _say(f"palimpsest {name}".rstrip() + f": {problem}")
        return problem.exit_code


def _refused_by_the_machine(error: Exception) -> EnvironmentProblem | None:
    """Return an error of the machine in three parts; None where it names nothing that a user could mend."""
    if out_of_memory(error):
        return EnvironmentProblem(
            "out of memory on this machine", "", "free some of it, or raise the limit (ulimit -v)"
        )
    if isinstance(error, UnicodeEncodeError):
        return EnvironmentProblem(
            f"{error.object[error.start : error.end]!a} cannot be spelled in the encoding {error.encoding}",
            "a UTF-8 locale",
            "export PYTHONUTF8=1, or LC_ALL=C.UTF-8",
        )
    if not isinstance(error, OSError):
        return None
    reason = error.strerror or str(error) or type(error).__name__
    if (stream := failed_stream(error)) is not None:
        return EnvironmentProblem(
            f"{stream} cannot be written: {reason}",
            "a terminal, a pipe that is read, or a file with room",
            "make room there, or send the output elsewhere",
        )
    if error.filename is None:
        return None
    return EnvironmentProblem(
        f"{os.fsdecode(error.filename)!r} cannot be used: {reason}",
        "a file or folder that can be read and written, on a disk with room",
        "mend that, or name another one",
    )


def _say(text: str) -> None:
    """Print on standard error, if that can be written: the exit code tells the rest."""
    with contextlib.suppress(OSError, AttributeError):
        print(text, file=sys.stderr, flush=True)


def out_of_memory(error: BaseException) -> bool:
    """Return True if an error says that this machine has no memory left: for a library, or for an object."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, ImportError) and ("failed to map segment" in text or "allocate memory" in text))
        or (isinstance(error, SystemError) and "error return without exception set" in text)  # an import that failed so
    )


def load(name: str) -> Any:
    """Return the function or typer application of a sub-command.

    Raises:
        ConfigError: no sub-command has this name.
    """
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        kind = "option" if name.startswith("-") else "command"
        raise ConfigError(
            f"unknown {kind} {name!r}",
            ", ".join(COMMANDS),
            f"did you mean {near[0]}?" if near else "see palimpsest --help",
        )
    module, _, attribute = COMMANDS[name].target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def run(target: Any, name: str, arguments: list[str]) -> int:
    """Parse the arguments of a sub-command and call it; return the exit code."""
    # Here: the overview and unknown commands answer without it.
    import typer

    app = target
    if not isinstance(target, typer.Typer):
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(with_homes(target))
    for registered in app.registered_commands:
        if registered.callback is not None:
            registered.callback = with_homes(registered.callback)
    command = typer.main.get_command(app)
    flags = _flags(command)
    # `--overwrite false` would switch it on, and take "false" for the next argument.
    for given, value in itertools.pairwise(arguments):
        if given in flags and value.lower() in ("true", "false"):
            raise ConfigError(f"{given} {value}", f"{given} without a value, or no {given}", f"leave {value} out")
    code: int | str | None = EXIT_DONE
    try:
        command(arguments, prog_name=f"palimpsest {name}")
    except SystemExit as exit_:
        code = exit_.code
    if code == EXIT_INTERRUPTED:  # typer's, which says nothing
        raise KeyboardInterrupt
    if sys.stdout is not None:
        sys.stdout.flush()  # here and not when the interpreter ends, so that an error has its words
    return code if isinstance(code, int) else EXIT_DONE if code is None else EXIT_FAILURE


def _flags(command: Any) -> set[str]:
    """Return the options of a command and its sub-commands that take no value, and make their help show none."""
    names = set()
    for option in command.params:
        if getattr(option, "is_flag", False):
            # typer would show a BOOLEAN that they do not take.
            option.metavar = ""
            names.update(option.opts)
    return names.union(*map(_flags, getattr(command, "commands", {}).values()))


def overview() -> str:
    """Return the text of `palimpsest --help`."""
    width = max(map(len, COMMANDS)) + 2
    rows = "\n".join(f"  {name:<{width}}{command.summary}" for name, command in COMMANDS.items())
    return (
        "Pretrains language models in any layout of ZeRO, pipeline, tensor and data parallelism.\n\n"
        "usage: palimpsest COMMAND ...\n"
        "       palimpsest COMMAND --help\n"
        "       palimpsest --version\n\n"
        f"commands:\n{rows}"
    )


def _skip_local_rank(arguments: list[str]) -> list[str]:
    """Return the arguments without a leading `--local_rank=N`."""
    if arguments and arguments[0].startswith(("--local_rank=", "--local-rank=")):
        return arguments[1:]
    return arguments


def _refuse_empty(arguments: list[str]) -> None:
    """Raise `ConfigError` for an empty argument: as a path it would mean the current folder.

    It is what a shell makes of a variable that is not set.
    """
    for before, argument in itertools.pairwise(["", *arguments]):
        option, sign, value = argument.partition("=")
        if not argument and before not in MAY_BE_EMPTY:
            raise ConfigError(
                f"{before} is empty" if before.startswith("--") else "an argument is empty",
                "a value",
                "name one (a variable of the shell that is not set leaves an empty argument)",
            )
        if sign and not value and option.startswith("--") and option not in MAY_BE_EMPTY:
            raise ConfigError(f"{option} is empty", "a value", "name one")


if __name__ == "__main__":
    sys.exit(main())
