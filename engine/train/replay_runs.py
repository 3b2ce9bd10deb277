"""Short runs of one checkpoint that differ in the replay ratio: their run files and folders, and what they measured.

A folder of short runs holds `runs.json`, and for each ratio a run file and a branch of the run (`engine.train.branch`)
at the end of the stage before the one that is to replay.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from engine.atomic import write_atomically
from engine.checkpoint.folder import CHECKPOINTS, committed, step_path
from engine.config.load import load_run, parse_run, read_tree
from engine.config.resolve import resolve
from engine.config.save import save_tree
from engine.config.schema.run import RunConfig
from engine.errors import CheckpointError, ConfigError, DataError
from engine.optim.schedules import learning_rate
from engine.train.branch import branch
from engine.train.continuation import standing
from engine.train.ledger_records import find_domains, loss_keys, read_ledger
from engine.train.records import metric_of, read_metrics
from engine.train.replay_fit import FEWEST_POINTS, FEWEST_RATIOS, NEW, OLD, Curve, Recommendation, ShortRun, recommend
from engine.train.replay_law import Areas, areas

PLAN = "runs.json"
EVALUATIONS = 16
"""Evaluations over a short run."""
Tree = dict[str, Any]


def prepare_runs(path: Path, ratios: Sequence[float], tokens: int, folder: Path) -> list[Path]:
    """Write the run files and folders of short runs of the last stage in a run file; return the run files.

    Raises:
        ConfigError: the stage, the ratios or the length do not serve, or the folder exists.
        CheckpointError: the run has no checkpoint of the end of the stage before.
        EnvironmentProblem: the run still goes on, or the folder cannot be written.
    """
    config, tree = load_run(path), read_tree(path)
    _check_stage(config, path)
    ratios = sorted(set(ratios))
    _check_ratios(ratios)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--prepare {folder} exists", "a folder that is not there yet", "choose another name")
    trees = [_short(tree, config, ratio, tokens, folder) for ratio in ratios]
    for one in trees:  # all of them before anything is written
        _checked(one)
    checkpoint = _border(config)
    files = []
    for one in trees:
        run = Path(one["folder"])
        branch(checkpoint, run)
        files.append(folder / f"{run.name}.yaml")
        save_tree(one, files[-1])
    write_atomically(folder / PLAN, json.dumps({"run_file": str(path), "files": [file.name for file in files]}))
    return files


def _check_stage(config: RunConfig, path: Path) -> None:
    """Raise `ConfigError` where the last stage is none whose replay ratio could be fitted."""
    last, number = config.stages[-1], len(config.stages) - 1
    if not number or last.replay is None:
        what = "has one stage only" if not number else f"has no stages.{number}.replay (stage {last.name})"
        raise ConfigError(
            f"{path} {what}: there is no replay whose ratio could be fitted",
            "a last stage with `replay`, whatever its ratio, that has not begun",
            f"append one: palimpsest continue {path} --name NAME --data DIR --ratio 0.1",
        )
    homes = {domain.home for domain in find_domains(list(config.stages))}
    if number not in homes or not homes - {number}:
        which = f"stages.{number}" if number not in homes else "the stages before"
        raise ConfigError(
            f"{path}: {which} has no held-out data", "`data.validation` of both the old and the new data", "name some"
        )


def _check_ratios(ratios: Sequence[float]) -> None:
    """Raise `ConfigError` for ratios that are none, or too few."""
    wrong = [ratio for ratio in ratios if not 0 <= ratio < 1]
    if wrong or len(ratios) < FEWEST_RATIOS:
        raise ConfigError(
            f"--ratios: {wrong[0]:g} is no ratio" if wrong else f"--ratios: {len(ratios)} different ones",
            f"{FEWEST_RATIOS} or more, each 0 or more and less than 1",
            "--ratios 0,0.05,0.25 is usual",
        )


def _short(tree: Tree, config: RunConfig, ratio: float, tokens: int, folder: Path) -> Tree:
    """Return the tree of one short run.

    Raises:
        ConfigError: the length does not serve.
    """
    last = config.stages[-1]
    step_tokens = last.sequence_length * last.global_batch_size
    steps, whole, fewest = tokens // step_tokens, last.num_steps, 2 * FEWEST_POINTS
    if not fewest <= steps <= whole:
        raise ConfigError(
            f"--tokens {tokens:,} are {steps:,} steps, for short runs of a stage of {whole:,} steps",
            f"{fewest} to {whole:,} steps: {fewest * step_tokens:,} to {whole * step_tokens:,} tokens",
            "a tenth of the stage is usual",
        )
    short, name = copy.deepcopy(tree), f"ratio-{ratio:g}"
    stage = short["stages"][-1]
    stage["duration"] = {"steps": steps}
    stage["replay"] = stage["replay"] | {"ratio": ratio}
    schedule = stage.get("schedule", {})
    unit = step_tokens if schedule.get("unit") == "tokens" else 1
    for key in ("warmup", "decay", "cooldown"):
        if schedule.get(key):  # the same shape, over fewer steps
            schedule[key] = max(1, round(schedule[key] / unit * steps / whole)) * unit
    every = max(1, steps // EVALUATIONS)
    kept = {key: value for key, value in short.get("evaluation", {}).items() if key == "max_samples"}
    saving = {key: value for key, value in short.get("checkpoint", {}).items() if not key.startswith(("every", "keep"))}
    return short | {
        "name": f"{config.name}, {name}",
        "folder": str(folder / name),
        "evaluation": kept | {"every_steps": every},
        "checkpoint": saving | {"keep_last": 1},
    }


def _checked(tree: Tree) -> None:
    """Raise `ConfigError` where `train` would refuse the tree."""
    config = parse_run(copy.deepcopy(tree), f"of the short run {tree['name']}")
    parallel = config.parallel
    resolve(config, parallel.pipe * parallel.tensor * parallel.sequence * (parallel.data or 1))


def _border(config: RunConfig) -> Path:
    """Return the checkpoint at the end of the stage before the last one.

    Raises:
        CheckpointError: it is not there.
        ConfigError, EnvironmentProblem: as `standing`.
    """
    stands, before = standing(config), config.stages[-2]
    border = sum(stage.num_steps for stage in config.stages[:-1])
    checkpoint = step_path(config.folder / CHECKPOINTS, border)
    if checkpoint not in committed(config.folder / CHECKPOINTS):
        early = stands.state.step < border
        raise CheckpointError(
            f"the run stands at step {stands.state.step:,}, and {checkpoint} is not there",
            f"the checkpoint at the end of stage {before.name}, from which the short runs go on",
            f"train up to there first: with `stages` of the file up to {before.name} alone"
            if early
            else "the stage has begun, and that checkpoint was removed (see checkpoint.keep_every)",
        )
    return checkpoint


@dataclass(frozen=True)
class Fitted:
    """Short runs of a folder, and what they recommend for a stage."""

    config: RunConfig
    """The run, as its file is now."""
    runs: list[ShortRun]
    unfinished: list[str]
    """Run files of short runs that have not come to their end."""
    found: Recommendation
    whole: Areas
    """Areas of the whole stage."""

    @property
    def short_steps(self) -> int:
        """Steps of a short run; 0 where none has ended."""
        return max((curve[-1][0] for run in self.runs for curve in run.losses.values()), default=0)


def fit_runs(folder: Path, old_weight: float) -> Fitted:
    """Return what the short runs in a folder recommend. Runs that have not ended are left out.

    Raises:
        ConfigError: the folder is none that `prepare_runs` wrote, or the run file has another last stage by now.
        DataError: nothing can be read from the runs' metrics.
    """
    try:
        plan = json.loads((folder / PLAN).read_bytes())
        path, files = Path(plan["run_file"]), [folder / name for name in plan["files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder} holds no {PLAN} that can be read",
            "a folder that --prepare wrote",
            "palimpsest fit-replay RUN.yaml --ratios 0,0.05,0.25 --tokens N --prepare DIR writes one",
        ) from error
    config = load_run(path)
    configs = {file: load_run(file) for file in files}
    short = configs[files[0]]
    if [stage.name for stage in config.stages] != [stage.name for stage in short.stages]:
        raise ConfigError(
            f"{path} has other stages than the short runs in {folder}",
            ", ".join(stage.name for stage in short.stages),
            "prepare and train the short runs again",
        )
    measured = {file: measured_run(one) for file, one in configs.items()}
    runs = [run for run in measured.values() if run is not None]
    before = config.stages[:-1]
    forward = sum(float(areas(config.optimizer, stage, 0.0).forward[-1]) for stage in before)
    rate = _rate_before(short)
    whole = areas(config.optimizer, config.stages[-1], rate)
    found = recommend(runs, areas(short.optimizer, short.stages[-1], rate), whole, forward, old_weight)
    return Fitted(config, runs, [str(file) for file, run in measured.items() if run is None], found, whole)


def _rate_before(config: RunConfig) -> float:
    """Return the learning rate of the last step before the last stage, as recorded or as the schedule says."""
    before, border = config.stages[-2], sum(stage.num_steps for stage in config.stages[:-1])
    formula = learning_rate(config.optimizer, before, before.num_steps - 1)
    return metric_of(config.folder, [border], "learning_rate").get(border, formula)


def measured_run(config: RunConfig) -> ShortRun | None:
    """Return the losses of a short run by step of its last stage; None where it has not come to its end."""
    stages, border = list(config.stages), sum(stage.num_steps for stage in config.stages[:-1])
    records = read_metrics(config.folder)
    if max((record["step"] for record in records), default=0) < config.num_steps:
        return None
    try:
        matrix = read_ledger(config.folder, config).matrix
    except DataError:
        return None
    last, losses = len(stages) - 1, {}
    for key in (OLD, NEW):
        domains = [domain for domain in find_domains(stages) if (domain.home == last) == (key == NEW)]
        start = [matrix.losses[last - 1][matrix.domains.index(domain.name)] for domain in domains]
        rows: dict[int, list[float | None]] = {0: start}
        for record in records:
            if record["step"] > border:
                found = [_value(record, loss_keys(stages, last, domain)) for domain in domains]
                if None not in found:
                    rows[record["step"] - border] = found
        losses[key] = _means(rows)
    replay = config.stages[-1].replay
    assert replay is not None
    assert isinstance(replay.ratio, float | int)
    return ShortRun(float(replay.ratio), losses)


def _value(record: Tree, keys: Sequence[str]) -> float | None:
    return next((record[key] for key in keys if key in record), None)


def _means(rows: dict[int, list[float | None]]) -> Curve:
    """Return the means over the domains of the steps at which all of them were evaluated."""
    known = ((step, [loss for loss in losses if loss is not None]) for step, losses in sorted(rows.items()))
    return [(step, fmean(losses)) for step, losses in known if losses and len(losses) == len(rows[step])]
