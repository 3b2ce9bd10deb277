"""Rules of a run stage's objective: its model family, the keys that it uses, its requirements of rows."""

from __future__ import annotations

from engine.config.objectives import OBJECTIVES
from engine.config.rules.replayed_objective import check_replayed_objective
from engine.config.schema.model import BERTConfig, ModelConfig
from engine.config.schema.objective import ObjectiveConfig
from engine.config.schema.stage import RunStage
from engine.errors import ConfigError, PalimpsestError


def check_objective(key: str, stage: RunStage, model: ModelConfig, problems: list[PalimpsestError]) -> None:
    """Add every rule that the objective of the run stage at `key` breaks."""
    objective, name = stage.objective, f"{key}.objective"
    entry = OBJECTIVES[objective.name]
    if model.family not in entry.families:
        problems.append(
            ConfigError(
                f"{name}.name = {objective.name} with model.family = {model.family}",
                " or ".join(other for other, one in OBJECTIVES.items() if model.family in one.families),
                "change the objective or the model",
            )
        )
    _check_head(name, objective, model, problems)
    if stage.data.row_lengths:
        _check_row_lengths(key, stage, problems)
    left = [
        f"{key}.{one}"
        for one, value in (("data.columns", stage.data.columns), ("duration.epochs", stage.duration.epochs))
        if value is not None
    ]
    if left:
        problems.append(
            ConfigError(
                f"{' and '.join(left)}: files of examples have to be encoded before a run reads them",
                "a run file that `palimpsest finetune` has prepared",
                "start with `palimpsest finetune`, or let it write the run file (--prepare RUN.yaml)",
            )
        )
    check_keys(name, objective, problems)
    if isinstance(model, BERTConfig) and (objective.pairs != "none") != model.pair_head and "pairs" in entry.keys:
        problems.append(
            ConfigError(
                f"{name}.pairs = {objective.pairs} with model.pair_head = {model.pair_head}",
                "pairs with a pair head, or neither",
                "change the objective or the model: a head without a loss would stay as it is",
            )
        )
    _check_answers(key, stage, model, problems)
    check_replayed_objective(key, stage, model, problems)
    if stage.replayed_objective is not None:
        check_keys(f"{key}.replay.objective", stage.replayed_objective, problems)
    _check_rows(key, stage, problems)


def check_keys(name: str, objective: ObjectiveConfig, problems: list[PalimpsestError]) -> None:
    """Add the keys of the objective at `name` that it does not use, and shares that are too large together."""
    # Keys at their defaults are let pass: a run folder's `config.yaml` has all of them.
    used = OBJECTIVES[objective.name].keys + (("mean_span_length",) if objective.mask_unit == "span" else ())
    problems += [
        ConfigError(
            f"{name}.{field} = {getattr(objective, field)} with {name}.name = {objective.name}, which does not use it",
            ", ".join(used) or "no other key",
            "leave it out",
        )
        for field in ObjectiveConfig.model_fields
        if field not in ("name", *used) and getattr(objective, field) != ObjectiveConfig.model_fields[field].default
    ]
    if objective.mask_share + objective.random_share > 1:
        problems.append(
            ConfigError(
                f"{name}.mask_share = {objective.mask_share} and {name}.random_share = {objective.random_share}",
                "1 or less together",
            )
        )


def _check_row_lengths(key: str, stage: RunStage, problems: list[PalimpsestError]) -> None:
    """Add the rules of rows of several lengths: labelled examples of one data set, and lengths in order."""
    data, lengths = stage.data, stage.data.row_lengths
    beside = {"sources": bool(data.sources), "replay": stage.replay is not None}
    beside |= {"on_damage = quarantine": data.on_damage == "quarantine"}
    with_others = [name for name, is_set in beside.items() if is_set]
    of_tasks = [name for name, one in OBJECTIVES.items() if one.has_head]
    if stage.objective.name not in of_tasks or with_others:
        what = with_others or [f"objective {stage.objective.name}"]
        problems.append(
            ConfigError(
                f"{key}.data.row_lengths with {', '.join(what)}",
                f"objective {' or '.join(of_tasks)}, with examples from data.train alone",
                "leave row_lengths out (for finetune: row_lengths: [])",
            )
        )
    if list(lengths) != sorted({*lengths}) or lengths[-1] >= stage.sequence_length:
        problems.append(
            ConfigError(
                f"{key}.data.row_lengths = {list(lengths)} with sequence_length = {stage.sequence_length}",
                f"rising lengths below {stage.sequence_length}",
                "put them in order",
            )
        )


def _check_head(name: str, objective: ObjectiveConfig, model: ModelConfig, problems: list[PalimpsestError]) -> None:
    """Add what is wrong where an objective and the model's head do not belong together."""
    head = model.task_head
    wanted = objective.name if OBJECTIVES[objective.name].has_head else None
    if (None if head is None else head.task) != wanted:
        problems.append(
            ConfigError(
                f"{name}.name = {objective.name} with model.task_head = {'none' if head is None else head.task}",
                f"model.task_head.task = {wanted}" if wanted else "no model.task_head",
                "start with `palimpsest finetune`, which gives the model the head of its task"
                if wanted
                else "leave model.task_head out: this objective predicts tokens",
            )
        )
    elif head is not None and "labels" in OBJECTIVES[objective.name].keys and len(objective.labels) != head.num_labels:
        problems.append(
            ConfigError(
                f"{name}.labels has {len(objective.labels)} names with model.task_head.num_labels = {head.num_labels}",
                "a name for each label",
                "name all labels, in the order of their numbers",
            )
        )


def _check_answers(key: str, stage: RunStage, model: ModelConfig, problems: list[PalimpsestError]) -> None:
    """Add what is wrong with the rows of answers: T5 has them in its decoder, a GPT behind the prompt."""
    length, name = stage.objective.answer_length, f"{key}.objective.answer_length"
    if stage.objective.name != "answer":
        return
    if (length > 0) != (model.family == "t5"):
        problems.append(
            ConfigError(
                f"{name} = {length} with model.family = {model.family}",
                "the tokens of the decoder's row" if model.family == "t5" else "0: prompt and answer share a row",
                "start with `palimpsest finetune`, which finds it" if model.family == "t5" else "leave it out",
            )
        )
    elif length > model.longest_row:
        problems.append(
            ConfigError(
                f"{name} = {length} with model.max_positions = {model.longest_row}", f"1 to {model.longest_row}"
            )
        )


def _check_rows(key: str, stage: RunStage, problems: list[PalimpsestError]) -> None:
    objective, data = stage.objective, stage.data
    entry = OBJECTIVES[objective.name]
    shortest = entry.shortest + 2 if objective.pairs != "none" else entry.shortest  # a separator, a second segment
    if stage.sequence_length < shortest:
        problems.append(
            ConfigError(
                f"{key}.sequence_length = {stage.sequence_length} with objective {objective.name}",
                f"{shortest} or more",
                "special tokens need their places, too",
            )
        )
    if data.packing == "best_fit" and data.attention != "document":
        problems.append(
            ConfigError(
                f"{key}.data.packing = best_fit with {key}.data.attention = {data.attention}",
                "attention document",
                "documents that were packed whole do not belong together",
            )
        )
    if data.packing == "best_fit" and not (
        entry.packs_documents and objective.pairs == "none" and not objective.answer_length
    ):
        what = objective.name if objective.pairs == "none" else f"{objective.name} with pairs"
        problems.append(
            ConfigError(
                f"{key}.data.packing = best_fit with objective {what}",
                "causal, masked without pairs, or answer with a GPT",
                "set packing to concatenate: this objective lays out its rows itself",
            )
        )
