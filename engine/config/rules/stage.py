"""Rules of a run's course: its batch sizes, its learning rate, and its reaction to a step that goes wrong.

Part of `engine.config.resolve`, which calls them all and reports every problem at once.
"""

from __future__ import annotations

from engine.config.schema.optimizer import OptimizerConfig
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import RunStage, ScheduleConfig
from engine.errors import ConfigError, PalimpsestError

OPTIONS = {
    "constant": (),
    "linear": ("decay", "final_factor"),
    "cosine": ("decay", "final_factor"),
    "wsd": ("decay", "final_factor"),
    "infinite": ("cooldown", "constant_factor", "decay", "final_factor"),
    "rewarm": ("initial_factor", "decay", "final_factor"),
}
"""Keys of `schedule` that a shape uses, beside those that all do."""


def check_run_stages(config: RunConfig, problems: list[PalimpsestError]) -> None:
    """Require a name of its own of each run stage, and something before a stage that resets the optimizer."""
    names = [run_stage.name for run_stage in config.stages]
    problems += [
        ConfigError(f"stages: the name {name!r} is used twice", "a different name for each stage")
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    if next(iter(config.stages)).optimizer_state == "reset":
        problems.append(
            ConfigError(
                "stages.0.optimizer_state = reset: no run stage comes before it",
                "keep",
                "leave it out, or set it later",
            )
        )


def ramp_problems(key: str, stage: RunStage) -> list[PalimpsestError]:
    """Return what is wrong with a batch-size ramp: each size has one end, after the end of the one before."""
    problems: list[PalimpsestError] = []
    first_steps = stage.batches.first_steps
    for index, entry in enumerate(stage.batch_ramp):
        where = f"{key}.batch_ramp.{index}"
        given = [name for name in ("until_step", "until_tokens") if getattr(entry, name) is not None]
        if len(given) != 1:
            problems.append(ConfigError(f"{where}: {len(given)} ends", "exactly one of until_step and until_tokens"))
        elif first_steps[index + 1] <= first_steps[index]:
            problems.append(
                ConfigError(
                    f"{where} begins and ends at step {first_steps[index]}",
                    "sizes in order, each for one step or more",
                    f"put its {given[0]} later, or remove it",
                )
            )
    return problems


def check_schedule(key: str, stage: RunStage, problems: list[PalimpsestError]) -> None:
    """Add the keys that the schedule's shape has no use for, and phases that do not fit into the run stage."""
    schedule, fields = stage.schedule, ScheduleConfig.model_fields
    options = OPTIONS[schedule.shape]
    for name in ("decay", "cooldown", "initial_factor", "constant_factor", "final_factor"):
        value = getattr(schedule, name)
        if name not in options and value != fields[name].default:
            problems.append(
                ConfigError(
                    f"{key}.schedule.{name} = {value} with {key}.schedule.shape = {schedule.shape}, "
                    "which has no use for it",
                    f"warmup{''.join(f', {option}' for option in options)}",
                    f"remove it, or choose another shape (of {', '.join(s for s in OPTIONS if name in OPTIONS[s])})",
                )
            )
    _check_lengths(key, stage, problems)


def _check_lengths(key: str, stage: RunStage, problems: list[PalimpsestError]) -> None:
    schedule = stage.schedule
    at_end = schedule.shape in ("wsd", "infinite")
    if at_end and schedule.decay is None:
        problems.append(
            ConfigError(
                f"{key}.schedule.decay = None with {key}.schedule.shape = {schedule.shape}",
                f"a length in {schedule.unit}",
            )
        )
    # The anneal multiplies by (final / constant) to the power of its progress.
    if schedule.shape == "infinite" and min(schedule.constant_factor, schedule.final_factor) == 0:
        name = "constant_factor" if schedule.constant_factor == 0 else "final_factor"
        problems.append(
            ConfigError(
                f"{key}.schedule.{name} = 0: an exponential anneal does not reach it", "more than 0, for example 0.01"
            )
        )
    if schedule.shape == "constant":
        return
    length = stage.num_steps
    if schedule.unit == "tokens":
        length = stage.batches.samples(length) * stage.sequence_length
    phases = {"warmup": schedule.warmup} | (
        {"cooldown": schedule.cooldown, "decay": schedule.decay or 0} if at_end else {}
    )
    if sum(phases.values()) > length and (at_end or schedule.decay is None):
        named = " + ".join(f"{name} {value}" for name, value in phases.items() if value)
        problems.append(
            ConfigError(
                f"{key}.schedule: {named} is more than the stage's {length} {schedule.unit}",
                f"0 to {length} {schedule.unit} together",
                "shorten them or lengthen the stage",
            )
        )


def check_optimizer(config: RunConfig, problems: list[PalimpsestError]) -> None:
    """Add the keys of one optimizer that are set under the other, where they do nothing."""
    optimizer, default = config.optimizer, OptimizerConfig.model_fields["momentum"].default
    if optimizer.name == "adamw" and optimizer.momentum != default:
        problems.append(
            ConfigError(
                f"optimizer.momentum = {optimizer.momentum} with optimizer.name = adamw, which has no use for it",
                "beta1 and beta2",
                "remove it, or set optimizer.name to muon",
            )
        )


def check_stability(config: RunConfig, problems: list[PalimpsestError]) -> None:
    """Add the rules of a rollback: it needs spikes to count and checkpoints to go back to."""
    stability = config.stability
    if stability.rollback_spikes is None:
        return
    spikes = f"stability.rollback_spikes = {stability.rollback_spikes}"
    if stability.spike_sigma is None:
        problems.append(
            ConfigError(
                f"{spikes} without stability.spike_sigma",
                "both, or neither",
                "set stability.spike_sigma, for example 6",
            )
        )
    if config.checkpoint.every_steps is None:
        problems.append(
            ConfigError(
                f"{spikes} without checkpoint.every_steps: there is nothing to go back to",
                "both, or neither",
                "set checkpoint.every_steps",
            )
        )
    most = min(stability.rollback_steps, stability.max_skips)
    if stability.rollback_spikes > most:
        problems.append(
            ConfigError(
                f"{spikes} is never reached with stability.rollback_steps = {stability.rollback_steps} and "
                f"stability.max_skips = {stability.max_skips}",
                f"1 to {most}",
            )
        )
