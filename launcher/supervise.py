"""Supervision of one attempt: start the ranks, pass signals on, end what is left, and report what was seen.

The decisions are `launcher.decisions`, the ranks are behind `launcher.ranks.Ranks`. What the ranks cannot say
themselves, because they were killed or hang, is in the `NodeReport`; what the run concludes from it, and what is
written to `outcome.json`, is up to `launcher.attempts`. Nothing here knows torch.
"""

from __future__ import annotations

import time
from pathlib import Path

from engine import logs
from engine.config.schema.run import LaunchConfig
from engine.errors import EnvironmentProblem
from engine.run_folder import RunFolder
from launcher import diagnosis
from launcher.decisions import Decisions, View
from launcher.ranks import Ranks
from launcher.signals import Signals
from launcher.verdict import NodeReport
from launcher.watchdog import Watchdog

POLL_SECONDS = 0.1
"""Seconds between two looks at the processes."""

_log = logs.logger(__name__)


def supervise(ranks: Ranks, owned: RunFolder, signals: Signals, limits: LaunchConfig | None = None) -> NodeReport:
    """Start the ranks of one attempt, wait for the end of their processes, and return what was seen of them.

    `owned` is the run folder, taken for the attempt.

    Raises:
        EnvironmentProblem: they cannot be started, or the folder of the logs cannot be written.
    """
    try:
        (owned.path / "logs").mkdir(exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(
            f"run folder {owned.path} cannot be used: {error.strerror}",
            "a folder that can be written",
            "change `folder`",
        ) from error
    watchdog = Watchdog(limits or LaunchConfig())
    decisions = Decisions(ranks.num_ranks, watchdog, time.monotonic())
    try:
        ranks.start()
        while (view := ranks.view()).alive:
            decision = decisions.look(view, signals.take(), time.monotonic())
            if decision.hung:
                _name_hung(ranks, owned, decisions, view)
            if decision.send is not None:
                ranks.send(decision.send)
            if decision.end:
                break
            time.sleep(POLL_SECONDS)
        decisions.finish(ranks.view())
    finally:
        ends, aside = ranks.end()
    return decisions.report(ends, aside)


def _name_hung(ranks: Ranks, owned: RunFolder, decisions: Decisions, view: View) -> None:
    """Name the rank that holds up the others, and keep everybody's stack in the run folder."""
    seen = ranks.take_stacks(view, decisions.silent_seconds())
    if not seen:
        return
    report = diagnosis.stacks_file(owned.path, owned.start)
    try:
        report.write_text(diagnosis.as_text(seen), encoding="utf-8")
    except OSError as error:
        _log.warning("%s cannot be written (%s):\n%s", report, error.strerror, diagnosis.as_text(seen))
    decisions.name_hung(seen, str(report))


def last_lines(folder: Path, name: str, count: int = 15) -> str:
    """Return the end of one process's log, for a user who would open it next; empty where it cannot be read."""
    try:
        text = (folder / "logs" / f"{name}.log").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-count:])
