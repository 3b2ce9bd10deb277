"""Errors that a user can meet, each in three parts: what is wrong, what is allowed, what to do next.

Every error a user can meet is one of these classes; programmer invariants are `assert`. The class carries the
exit code of the command (`EXIT_*`), so that no command decides it again.
"""

from __future__ import annotations

from engine.redact import redact

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
# None of the codes of shells (1, 2, from 126 on) or of sysexits.h (64 to 78).
EXIT_REQUEUE = 85
"""Exit code of a run that is saved and wants to be started again (pre-emption, time limit)."""


class PalimpsestError(Exception):
    """Base of every error that is meant for a user.

    `wrong` names the value and where it was found, `allowed` the values that would have been accepted, and
    `remedy` what to do next; the last two may be empty where the first says it all.
    """

    exit_code = EXIT_FAILURE

    def __init__(self, wrong: str, allowed: str = "", remedy: str = "") -> None:
        # Here, since every message passes through: a URL in it may carry a password.
        wrong, allowed, remedy = redact(wrong), redact(allowed), redact(remedy)
        self.wrong, self.allowed, self.remedy = wrong, allowed, remedy
        parts = [wrong]
        if allowed:
            parts.append(f"  allowed: {allowed}")
        if remedy:
            parts.append(f"  to do: {remedy}")
        super().__init__("\n".join(parts))

    def __reduce__(self):  # exceptions with several arguments do not pickle by themselves
        return type(self), (self.wrong, self.allowed, self.remedy)


class ConfigError(PalimpsestError):
    """The configuration, the command line or the layout cannot be run as written."""

    exit_code = EXIT_USAGE


class DataError(PalimpsestError):
    """Text, tokens or their index are missing, damaged or do not belong together."""


class CheckpointError(PalimpsestError):
    """A checkpoint cannot be written, found, verified or loaded."""


class EnvironmentProblem(PalimpsestError):
    """The machine, a library or the launcher is not in a state in which a run can start or go on."""


def report(problems: list[PalimpsestError], heading: str) -> ConfigError:
    """Return one error that holds every problem of a list, numbered, so that a user fixes them in one pass."""
    if len(problems) == 1:
        only = problems[0]
        return ConfigError(f"{heading}: {only.wrong}", only.allowed, only.remedy)
    lines = [f"{heading}: {len(problems)} problems"]
    for number, problem in enumerate(problems, start=1):
        lines += [f"{number}. {line}" if i == 0 else f"   {line}" for i, line in enumerate(str(problem).splitlines())]
    return ConfigError("\n".join(lines))
