"""`make demo`: text, tokens, plan, training, SIGKILL, another layout, a second run stage with replay and what it cost,
Hugging Face, a prompt; then a summary.

Everything is done by the public command; this file only says in which order, kills the run, and compares what it
sees with what it expects. It works in `.demo/` of the checkout and starts afresh each time.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from engine.errors import EXIT_DONE, PalimpsestError
from launcher.devices import multiplies_bf16
from tools.demo import proof, sizes
from tools.demo.commands import Commands
from tools.demo.text import collect

ROOT = Path(__file__).resolve().parents[2]
WORK = Path(".demo")
RUN = WORK / "run"
CONFIG = "configs/demo/run.yaml"
RUN_FILE = str(WORK / "run.yaml")
"""Copy of that file with the sizes for this machine; the second run stage is appended to it."""
OLD_TEXT, NEW_TEXT = ("source", "topics"), ("docstrings",)
"""Files of text of the first and of the second run stage."""
RATIO = "0.1"
PROCESSES = ("--launcher", "deepspeed", "--processes", "2")
LAUNCH = ("launch", RUN_FILE, *PROCESSES)
SECOND_LAYOUT = ("parallel.zero_stage=1", "parallel.pipe=1", "parallel.tensor=2")
TIMING_STEPS = 8
TIMING = (
    f"folder={WORK / 'timing'}",
    f"stages.0.duration.steps={TIMING_STEPS}",
    "stages.0.schedule.warmup=0",
    "evaluation.max_samples=8",
    "logging.every_steps=1",
    "logging.wandb=off",
    "logging.tensorboard=false",
    "logging.plot=false",
)
STEP_TOKENS = 16 * 256
"""Tokens of a step, as the run file has them."""
PROMPT = 'def read_lines(path):\n    """Return the'


class Demo:
    """Parts of the demonstration in order; each prints its heading, and its wall time goes into the summary."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.seconds: list[tuple[str, float]] = []
        self.commands = Commands(WORK / "logs")
        self.precision: tuple[str, ...] = ()

    def part(self, title: str, work: Callable[[], None]) -> None:
        print(f"\n== {len(self.seconds) + 1}. {title}", flush=True)
        begin = time.monotonic()
        work()
        self.seconds.append((title, time.monotonic() - begin))

    def run(self) -> None:
        self.part("text: what this Python installation carries", self.text)
        self.part("tokens: tokenizer, shards, a look at them", self.tokens)
        self.part("plan: what the run will cost, and what would be refused", self.plan)
        self.part("timing: how many steps fit on this machine", self.timing)
        self.part("training: ZeRO-3 x two pipeline stages, until SIGKILL", self.train)
        self.part("resuming: the same run as ZeRO-1 x tensor 2", self.resume)
        self.part("new data: a second run stage, which replays the old data", self.new_data)
        self.part("ledger: what was learned, forgotten and paid", self.ledger)
        self.part("export: a Hugging Face folder, compared with our model", self.export)
        self.part("generation: the model continues a prompt", self.generate)
        self.summary()

    def text(self) -> None:
        counts = collect(WORK / "text")
        for name, size in counts.items():
            print(f"{size / 1e6:6.2f} MB  {WORK / 'text' / name}")

    def tokens(self) -> None:
        tokenizer = str(WORK / "tokenizer")
        self.commands.run("tokenizer", str(WORK / "text"), "--vocab-size", "4096", "--output", tokenizer)
        self._prepare(OLD_TEXT, "tokens")
        self.commands.run("inspect-data", str(WORK / "tokens"), "--samples", "1", "--sequence-length", "128")

    def _prepare(self, names: tuple[str, ...], output: str) -> None:
        files = [str(path) for name in names if (path := WORK / "text" / f"{name}.jsonl").stat().st_size]
        target = ("--tokenizer", str(WORK / "tokenizer"), "--output", str(WORK / output))
        self.commands.run("prepare", *files, *target, "--shard-megabytes", "0.5")

    def plan(self) -> None:
        self.kind = "bf16" if multiplies_bf16() else "fp32"
        if self.kind == "fp32":
            print("this processor has no bf16 of its own: the run uses fp32")
            self.precision = ("precision.dtype=fp32",)
        self.commands.run("plan", CONFIG, *self.precision, "--world", "2")

    def timing(self) -> None:
        begin = time.monotonic()
        self.commands.run("launch", CONFIG, *PROCESSES, *TIMING, *self.precision)
        whole = time.monotonic() - begin
        # Records of evaluations have no loss.
        seconds = [float(record["step_seconds"]) for record in proof.records(WORK / "timing") if "loss" in record]
        gone = time.monotonic() - self.started
        self.sizes = sizes.sizes(seconds, whole - sum(seconds), gone)
        print(f"{self.sizes.steps} steps, a checkpoint every {self.sizes.checkpoint_every}: written to {RUN_FILE}")
        write_run_file(self.sizes, self.precision)

    def train(self) -> None:
        self.commands.run(*LAUNCH, watch=self._kill_when_due)
        self.killed = proof.losses(RUN)
        self.expected = proof.expect(RUN)
        print(
            f"killed with SIGKILL after step {max(self.killed)}: launcher and ranks are gone; "
            f"newest checkpoint {self.expected.checkpoint}"
        )

    def _kill_when_due(self, process: subprocess.Popen[bytes]) -> bool:
        """End every process of the launch at once when the run is far enough; return True if it did."""
        done = proof.losses(RUN)
        if not done or max(done) < self.sizes.kill_at:
            return False
        kill(process)
        return True

    def resume(self) -> None:
        output = self.commands.run(*LAUNCH, *SECOND_LAYOUT)
        said = proof.reported(output)
        compared = proof.compare(self.killed, proof.losses(RUN), self.expected.step)
        print("\n" + proof.as_text(self.expected, said, compared))
        proof.check(self.expected, said, compared, proof.TOLERANCES[self.kind])
        print(
            "the resumed run is the same run: it takes the same samples next, and its losses differ by rounding alone"
        )

    def new_data(self) -> None:
        self._prepare(NEW_TEXT, "new-tokens")
        data = ("--name", "docstrings", "--data", str(WORK / "new-tokens"), "--ratio", RATIO)
        self.commands.run("continue", RUN_FILE, *data, "--tokens", str(self.sizes.new_steps * STEP_TOKENS))
        self.commands.run(*LAUNCH, *SECOND_LAYOUT)

    def ledger(self) -> None:
        self.commands.run("ledger", RUN_FILE)

    def export(self) -> None:
        self.commands.run("convert", str(RUN), "--output", str(WORK / "huggingface"))

    def generate(self) -> None:
        self.commands.run(
            "generate", str(WORK / "huggingface"), "--prompt", PROMPT, "--max-new-tokens", "80", "--temperature", "0.7"
        )

    def summary(self) -> None:
        print("\n== summary")
        for title, seconds in self.seconds:
            print(f"{seconds:6.0f} s  {title}")
        print(f"{time.monotonic() - self.started:6.0f} s  in all\n")
        for what, where in ARTEFACTS:
            print(f"{what:<22} {where}")


ARTEFACTS = (
    ("run folder", RUN),
    ("run file", WORK / "run.yaml"),
    ("loss curve", RUN / "loss.png"),
    ("ledger", RUN / "ledger.png"),
    ("metrics", RUN / "metrics.jsonl"),
    ("TensorBoard", f"tensorboard --logdir {RUN / 'tensorboard'}"),
    ("wandb, offline", RUN / "wandb"),
    ("checkpoints", RUN / "checkpoints"),
    ("Hugging Face folder", WORK / "huggingface"),
    ("logs of the commands", WORK / "logs"),
)


def write_run_file(found: sizes.Sizes, precision: tuple[str, ...]) -> None:
    """Write the run file with the sizes for this machine."""
    from engine.config.load import apply_override, read_tree
    from engine.config.save import save_tree

    every, tree = found.checkpoint_every, read_tree(Path(CONFIG))
    lengths = (
        f"stages.0.duration.steps={found.steps}",
        f"checkpoint.every_steps={every}",
        f"evaluation.every_steps={every}",
    )
    for override in (*lengths, *precision):
        apply_override(tree, override)
    save_tree(tree, Path(RUN_FILE))


def kill(process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to a launch and to all that it has started, as if the machine had died."""
    from launcher.processes import of_run, send

    process.kill()
    # More than once: a launcher that is about to start a rank may do so between two looks.
    while left := of_run(RUN):
        send(left, signal.SIGKILL)
        time.sleep(0.05)


def main() -> int:
    """Run the demonstration in the checkout; return its exit code."""
    os.chdir(ROOT)
    shutil.rmtree(WORK, ignore_errors=True)
    (WORK / "logs").mkdir(parents=True)
    try:
        Demo().run()
    except PalimpsestError as error:
        print(f"\nmake demo: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nmake demo: interrupted", file=sys.stderr)
        return 130
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
