"""The ledger of a run, read from its folder: what was recorded at the ends of stages, and along the way.

Only `metrics.jsonl` and the configuration are read here; the data need not be there any more.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config.metrics import MEASURE
from engine.config.objectives import OBJECTIVES
from engine.config.rules.tables import REPLAY
from engine.config.schema.objective import ObjectiveName
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import RunStage
from engine.data.stage import validation_locations
from engine.errors import DataError
from engine.train.ledger import Loss, LossMatrix
from engine.train.records import INITIAL, INITIAL_LOSS, METRICS, VALIDATION_LOSS, read_metrics, records_of

Points = list[tuple[int, float]]
"""(tokens, value)."""


@dataclass(frozen=True)
class Domain:
    """A held-out set: its name in the ledger, the stage that brought it, and where it lies."""

    name: str
    home: int
    location: str
    objective: ObjectiveName = "causal"
    """Objective that its loss is of."""


@dataclass
class Ledger:
    """Everything that the records of a run say about its stages and domains."""

    config: RunConfig
    matrix: LossMatrix
    domains: list[Domain]
    ends: list[int]
    """Step at which each stage that has begun ends, or up to which the last one has come."""
    is_complete: bool
    """True if the last stage that has begun is done."""
    tokens: list[dict[str, int]]
    """Tokens trained on by domain (source), of each stage."""
    validation: dict[str, Points] = field(default_factory=dict)
    """Held-out loss of each domain."""
    training: Points = field(default_factory=list)
    rates: Points = field(default_factory=list)
    shares: list[tuple[int, dict[str, int]]] = field(default_factory=list)
    """(tokens of the run, tokens of each domain so far)."""
    measures: dict[str, list[Loss]] = field(default_factory=dict)
    """Measures of a task's predictions before the first step and at the end of each stage; empty without a task."""

    @property
    def borders(self) -> list[tuple[int, str]]:
        """(tokens of the run at its beginning, name) of each stage that has begun."""
        return [(self.config.tokens(end), name) for end, name in zip([0, *self.ends], self.matrix.stages, strict=False)]


def read_ledger(folder: Path, config: RunConfig) -> Ledger:
    """Return the ledger of a run.

    Raises:
        DataError: nothing has been trained, or nothing has been evaluated.
    """
    records = read_metrics(folder)
    last = max((int(record["step"]) for record in records), default=0)
    if not last:
        raise DataError(
            f"{folder} has no records in {METRICS}", "a run that has trained", "train it first, or check the path"
        )
    all_ends = list(itertools.accumulate(run_stage.num_steps for run_stage in config.stages))
    begun = [number for number, end in enumerate(all_ends) if end - config.stages[number].num_steps < last]
    ends = [min(all_ends[number], last) for number in begun]
    stages = [config.stages[number] for number in begun]
    domains = find_domains(stages)
    if not domains:
        raise DataError(
            f"no stage of {folder} has held-out data",
            "`data.validation` in its stages",
            "name held-out data in the run file (palimpsest prepare writes it); `train` then evaluates it",
        )
    ledger = Ledger(
        config=config,
        matrix=_matrix(records, stages, domains, ends),
        domains=domains,
        ends=ends,
        is_complete=last == all_ends[begun[-1]],
        tokens=[
            _tokens(records, stage, begin, end) for stage, begin, end in zip(stages, [0, *ends], ends, strict=False)
        ],
    )
    _fill_curves(ledger, records)
    ledger.measures = _measures(records, stages, ends)
    return ledger


def find_domains(stages: list[RunStage]) -> list[Domain]:
    """Return the held-out sets of stages, each with the first stage that has it; a set without a name has its
    stage's."""
    found: dict[str, Domain] = {}
    for number, run_stage in enumerate(stages):
        sets = [(*one, run_stage.objective) for one in locations_of(run_stage).items()]
        if (replayed := run_stage.replayed_objective) is not None:
            sets += [(*one, replayed) for one in replayed_locations(run_stage).items()]
        for name, location, objective in sets:
            known = {domain.location for domain in found.values()}
            if name not in found and location not in known:
                found[name] = Domain(name, number, location, objective.name)
    return list(found.values())


def locations_of(run_stage: RunStage) -> dict[str, str]:
    """Return the held-out sets of a stage by name."""
    return _locations(run_stage, run_stage.data.validation, run_stage.name)


def replayed_locations(run_stage: RunStage) -> dict[str, str]:
    """Return the sets of held-out text for the objective of what a stage replays, by name."""
    return _locations(run_stage, None if run_stage.replay is None else run_stage.replay.validation, REPLAY)


def _locations(run_stage: RunStage, given: str | dict[str, str] | None, unnamed: str) -> dict[str, str]:
    """Return sets by name; one without a name is called `unnamed`."""
    if given is None:
        return {}
    if isinstance(given, dict):
        return given
    try:
        found = validation_locations(given, run_stage.data)
    except DataError:  # gone, or a store that does not answer: then it counts as one set
        found = {"": given}
    return {name or unnamed: location for name, location in found.items()}


def losses_risen(folder: Path, stages: list[RunStage], number: int, record: dict[str, Any]) -> dict[str, float]:
    """Return the rise of the loss of each earlier stage's set since the end of that stage, as an evaluation in stage
    `number` finds it; without the sets that were not evaluated then, or are not now."""
    ends = list(itertools.accumulate(run_stage.num_steps for run_stage in stages))
    found = {}
    for domain in find_domains(stages[:number]):
        at_home = _loss(records_of(folder, ends[domain.home]), stages, domain.home, domain)
        now = _loss([record], stages, number, domain)
        if at_home is not None and now is not None:
            found[domain.name] = now - at_home
    return found


def _matrix(
    records: list[dict[str, Any]], stages: list[RunStage], domains: list[Domain], ends: list[int]
) -> LossMatrix:
    """Return the losses at the ends of stages; of a stage that goes on, those of its newest evaluation."""
    rows = []
    for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        of_stage = [record for record in records if begin < record["step"] <= end]
        rows.append(tuple(_loss(of_stage, stages, number, domain) for domain in domains))
    # Before a stage that was appended its own sets were not known at the end of the stage before it.
    for number, domain in enumerate(domains):
        if domain.home and rows[domain.home - 1][number] is None:
            row = list(rows[domain.home - 1])
            row[number] = _initial(records, domain, ends[domain.home - 1])
            rows[domain.home - 1] = tuple(row)
    first = tuple(_initial(records, domain, 0) for domain in domains)
    return LossMatrix(
        stages=tuple(run_stage.name for run_stage in stages),
        domains=tuple(domain.name for domain in domains),
        homes=tuple(domain.home for domain in domains),
        losses=tuple(rows),
        first=first if any(loss is not None for loss in first) else (),
    )


def _loss(records: list[dict[str, Any]], stages: list[RunStage], number: int, domain: Domain) -> Loss:
    """Return the newest loss of a domain among the records of a stage."""
    keys = loss_keys(stages, number, domain)
    return next((record[key] for record in reversed(records) for key in keys if key in record), None)


def loss_keys(stages: list[RunStage], number: int, domain: Domain) -> list[str]:
    """Return the metrics that hold a domain's loss in a stage: its own, and the whole where it is the only set."""
    own = locations_of(stages[number])
    names = [
        domain.name,
        *(name for name, location in own.items() if location == domain.location and name != domain.name),
    ]
    alone = [VALIDATION_LOSS] if [*own.values()] == [domain.location] else []
    return [*(f"{VALIDATION_LOSS}/{name}" for name in names), *alone]


def _measures(records: list[dict[str, Any]], stages: list[RunStage], ends: list[int]) -> dict[str, list[Loss]]:
    """Return the measures of a task's predictions by name: before the first step, and the newest ones of each stage."""
    found: dict[str, list[Loss]] = {}
    for name in OBJECTIVES[stages[-1].objective.name].measures:
        values: list[Loss] = [next((record[key] for record in records if (key := f"{INITIAL}{name}") in record), None)]
        for begin, end in zip([0, *ends], ends, strict=False):
            of_stage = [record for record in records if begin < record["step"] <= end and f"{MEASURE}{name}" in record]
            values.append(of_stage[-1][f"{MEASURE}{name}"] if of_stage else None)
        if any(value is not None for value in values):
            found[name] = values
    return found


def _initial(records: list[dict[str, Any]], domain: Domain, step: int) -> Loss:
    key = f"{INITIAL_LOSS}/{domain.name}"
    return next((record[key] for record in records if record["step"] == step and key in record), None)


def _tokens(records: list[dict[str, Any]], run_stage: RunStage, begin: int, end: int) -> dict[str, int]:
    """Return the tokens of each source of a stage until its newest record; one source has the stage's name."""
    of_stage = [record for record in records if begin < record["step"] <= end and "tokens" in record]
    if not of_stage:
        return {}
    newest = of_stage[-1]
    before = max((record["tokens"] for record in records if record["step"] <= begin and "tokens" in record), default=0)
    return _by_source(newest, run_stage, int(newest["tokens"] - before))


def _by_source(record: dict[str, Any], run_stage: RunStage, total: int) -> dict[str, int]:
    names = [source.name for source in run_stage.data.sources]
    found = {name: int(record[f"tokens/{name}"]) for name in names if f"tokens/{name}" in record}
    replayed = int(record.get("replay_samples", 0)) * run_stage.sequence_length
    found = found or {run_stage.name: total - replayed}
    return found | ({"replay": replayed} if replayed else {})


def _fill_curves(ledger: Ledger, records: list[dict[str, Any]]) -> None:
    stages, ends = list(ledger.config.stages[: len(ledger.ends)]), ledger.ends
    keys = [{domain.name: loss_keys(stages, n, domain) for domain in ledger.domains} for n in range(len(stages))]
    number, begin_tokens, tokens = 0, 0, 0
    before: dict[str, int] = {}
    so_far: dict[str, int] = {}
    for record in records:
        while number + 1 < len(ends) and record["step"] > ends[number]:
            number, before, begin_tokens = number + 1, so_far, tokens
        if "tokens" in record and "learning_rate" in record:
            tokens = int(record["tokens"])
            own = _by_source(record, stages[number], tokens - begin_tokens)
            so_far = before | {name: before.get(name, 0) + count for name, count in own.items()}
            ledger.rates.append((tokens, record["learning_rate"]))
            ledger.shares.append((tokens, so_far))
            if "loss" in record:
                ledger.training.append((tokens, record["loss"]))
        for name, names in keys[number].items():
            loss = next((record[key] for key in names if key in record), record.get(f"{INITIAL_LOSS}/{name}"))
            if loss is not None:
                ledger.validation.setdefault(name, []).append((tokens, loss))
