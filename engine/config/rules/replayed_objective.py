"""Rules of a task that is learned beside the objective of pretraining, on text that is replayed."""

from __future__ import annotations

from engine.config.objectives import OBJECTIVES, span_lengths
from engine.config.rules.data import LONGEST_NAME, is_url
from engine.config.schema.data import ReplayConfig
from engine.config.schema.model import ModelConfig
from engine.config.schema.objective import ObjectiveConfig
from engine.config.schema.stage import RunStage
from engine.errors import ConfigError, PalimpsestError


def check_replayed_objective(key: str, stage: RunStage, model: ModelConfig, problems: list[PalimpsestError]) -> None:
    """Add every rule that the objective of the replayed text of the run stage at `key` breaks."""
    objective, name = stage.replayed_objective, f"{key}.replay.objective"
    _check_head(key, stage, model, problems)
    if objective is None:
        if stage.replay is not None and stage.replay.validation is not None:
            problems.append(
                ConfigError(
                    f"{key}.replay.validation without {name}",
                    "held-out text for an objective of its own",
                    "name it in data.validation",
                )
            )
        return
    allowed = [other for other, one in OBJECTIVES.items() if model.family in one.families and not one.is_task]
    if not OBJECTIVES[stage.objective.name].is_task or objective.name not in allowed:
        problems.append(
            ConfigError(
                f"{name}.name = {objective.name} with {key}.objective.name = {stage.objective.name} and model.family = "
                f"{model.family}",
                f"{' or '.join(allowed)}, beside the objective of a task",
                "change it; without a task leave replay.objective out: what is replayed has the stage's own",
            )
        )
        return
    _check_rows(name, objective, stage, problems)
    assert stage.replay is not None
    _check_validation(key, stage, stage.replay, problems)


def _check_head(key: str, stage: RunStage, model: ModelConfig, problems: list[PalimpsestError]) -> None:
    """Add what is wrong where a head over the vocabulary is there without a loss, or a loss without such a head."""
    keeps = model.task_head is not None and model.task_head.keeps_vocabulary
    if keeps and stage.replayed_objective is None:
        problems.append(
            ConfigError(
                f"model.task_head.keeps_vocabulary = true without {key}.replay.objective",
                "text that is replayed in each run stage, or false",
                "leave it out: a head without a loss would stay as it is",
            )
        )
    if stage.replayed_objective is not None and not model.has_vocabulary_head:
        problems.append(
            ConfigError(
                f"{key}.replay.objective with model.task_head.keeps_vocabulary = false",
                "true",
                "start with `palimpsest finetune`, which keeps the head of the start",
            )
        )


def _check_rows(name: str, objective: ObjectiveConfig, stage: RunStage, problems: list[PalimpsestError]) -> None:
    if objective.pairs != "none":
        problems.append(
            ConfigError(
                f"{name}.pairs = {objective.pairs}",
                "none",
                "leave it out: beside a task the masked tokens alone are predicted",
            )
        )
    shortest = OBJECTIVES[objective.name].shortest
    if stage.sequence_length < shortest:
        problems.append(
            ConfigError(
                f"sequence_length = {stage.sequence_length} with {name}.name = {objective.name}",
                f"{shortest} or more",
                "special tokens need their places, too",
            )
        )
    elif objective.name == "span_corruption":
        decoder = span_lengths(stage.sequence_length, objective.rate, objective.mean_span_length).decoder
        if stage.objective.answer_length < decoder:
            problems.append(
                ConfigError(
                    f"objective.answer_length = {stage.objective.answer_length} with {name}.name = {objective.name}, "
                    f"whose decoder sees {decoder} tokens",
                    f"{decoder} or more: rows of both kinds have one length",
                    "raise it, or shorten sequence_length",
                )
            )


def _check_validation(key: str, stage: RunStage, replay: ReplayConfig, problems: list[PalimpsestError]) -> None:
    """Add what is wrong with the names and the places of the held-out text."""
    named = replay.validation if isinstance(replay.validation, dict) else {}
    taken = stage.data.validation if isinstance(stage.data.validation, dict) else {}
    problems += [
        ConfigError(
            f"{key}.replay.validation: {name!r} is no name, or one that data.validation has",
            "1 to 64 printable characters, no space at either end: metrics use it (validation_loss/NAME)",
            "give it another name",
        )
        for name in named
        if not (name.isprintable() and name == name.strip() and 0 < len(name) <= LONGEST_NAME) or name in taken
    ]
    if replay.validation == {}:
        problems.append(
            ConfigError(
                f"{key}.replay.validation = {{}} names no data set",
                "a folder of token shards, its URL, or several by name",
                "name one, or leave it out",
            )
        )
    locations = [*named.values()] if named else [replay.validation] if isinstance(replay.validation, str) else []
    urls = [location for location in locations if is_url(location)]
    if urls and stage.data.cache is None:
        problems.append(
            ConfigError(
                f"{key}.data.cache is missing, and {key}.replay.validation names {urls[0]}, a URL",
                "a folder on a disk of each node, and how many bytes it may hold",
                "for example data.cache: {folder: /scratch/shards, bytes: 50_000_000_000}",
            )
        )
