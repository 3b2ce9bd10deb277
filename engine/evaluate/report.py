"""An evaluation from start to end: what was asked for, measured part by part, as one report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from engine import __version__
from engine.config.load import parse_section
from engine.config.schema.data import ColumnsConfig
from engine.data.visible import visible
from engine.errors import ConfigError
from engine.evaluate.bias import PROBES, bias_of
from engine.evaluate.calibration import calibration_of
from engine.evaluate.domains import named
from engine.evaluate.explain import explain, require_captum
from engine.evaluate.harness import require_harness, run_harness
from engine.evaluate.labelled import Evaluated, evaluate_set
from engine.evaluate.perplexity import perplexity_of
from engine.evaluate.robustness import robustness_of
from engine.evaluate.subject import Subject, open_subject
from engine.evaluate.tables import Report
from engine.tasks.kinds.classification import LabelPredictions


@dataclass(frozen=True)
class Request:
    """Everything that an evaluation is to measure of one model."""

    source: Path
    tokenizer: Path | None = None
    texts: list[str] = field(default_factory=list)
    """`NAME=SOURCE` of text or token shards, for perplexity."""
    text_key: str = "text"
    """Key of the text in JSON lines."""
    harness: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness."""
    sets: list[str] = field(default_factory=list)
    """`NAME=FILE` of labelled examples."""
    columns: list[str] = field(default_factory=list)
    """`KEY=NAME` of `data.columns`."""
    faults: bool = False
    bias: list[str] = field(default_factory=list)
    """Languages of the probes."""
    explained: list[str] = field(default_factory=list)
    """Texts whose predictions are explained."""
    num_explained: int = 0
    """Number of each set's examples that are explained: the surest errors first."""
    limit: int | None = None
    seed: int = 0


class Progress(Protocol):
    """Told of the parts of an evaluation as they go on."""

    def __call__(self, part: str) -> AbstractContextManager[Callable[[int], None]]:
        """Begin a part; the function within is told how many more documents are done."""
        ...


def evaluate(request: Request, progress: Progress) -> Report:
    """Measure a model. Every mistake that can be seen without the model is told before it is opened.

    Raises:
        ConfigError: the request is not what it has to be, or the model cannot serve it.
        DataError: a source of text or examples is not.
        EnvironmentProblem: a package that it needs is missing.
    """
    domains, sets = named(request.texts, "--text"), named(request.sets, "--set")
    columns = _columns(request.columns)
    _check(request)
    subject = open_subject(request.source, request.tokenizer)
    report = _head(request, subject)
    if domains:
        report["domains"] = []
    for domain in domains:
        with progress(f"text {domain.name}") as done:
            found = perplexity_of(subject, domain, request.text_key, request.limit, done)
        report["domains"].append(found)
    if request.harness:
        with progress("lm-evaluation-harness"):
            report["harness"] = run_harness(subject, request.harness, request.limit)
    evaluated = []
    for given in sets:
        with progress(f"set {given.name}"):
            evaluated.append(evaluate_set(subject, given, columns, request.limit))
    if evaluated:
        report |= _of_sets(request, subject, evaluated, progress)
    if request.bias:
        with progress("bias probes"):
            report["bias"] = [bias_of(subject, language) for language in request.bias]
    if request.explained or request.num_explained:
        with progress("explanations"):
            report["explanations"] = _explained(request, subject, evaluated)
    return report


def _columns(given: list[str]) -> ColumnsConfig:
    pairs = [each.partition("=") for each in given]
    if wrong := next((each for each, (_, sign, name) in zip(given, pairs, strict=True) if not sign or not name), None):
        raise ConfigError(f"--column {wrong}", "KEY=NAME, as in data.columns", "write --column text=sentence, say")
    return parse_section(ColumnsConfig, {key: name for key, _, name in pairs}, ("--column",), "the command line")


def _check(request: Request) -> None:
    """Raise where the request asks for nothing, or for what is not there."""
    if not any((request.texts, request.harness, request.sets, request.bias, request.explained, request.num_explained)):
        raise ConfigError(
            f"nothing is asked of {request.source}",
            "--text, --harness, --set, --bias or --explain",
            "write what to measure; palimpsest evaluate --help shows it all",
        )
    for option, is_given in (("--faults", request.faults), ("--explain-examples", request.num_explained)):
        if is_given and not request.sets:
            raise ConfigError(f"{option} without --set", "one labelled set or more", "name it with --set NAME=FILE")
    for language in request.bias:
        if language not in PROBES:
            raise ConfigError(f"--bias {language}", " or ".join(PROBES), "name one of them")
    if request.harness:
        require_harness()
    if request.explained or request.num_explained:
        require_captum()


def _head(request: Request, subject: Subject) -> Report:
    return {
        "palimpsest": __version__,
        "model": str(request.source),
        "origin": subject.origin,
        "class": type(subject.model).__name__,
        "parameters": subject.model.num_parameters(),
        "limit": request.limit,
    }


def _of_sets(request: Request, subject: Subject, evaluated: list[Evaluated], progress: Progress) -> Report:
    """Return measures, calibration and robustness of the sets."""
    found: Report = {"sets": [one.table() for one in evaluated], "main_measure": evaluated[0].kind.main_measure.name}
    found["calibration"] = {
        one.name: calibration_of(one.predictions.logits_NC, one.predictions.expected_N)
        for one in evaluated
        if isinstance(one.predictions, LabelPredictions)
    }
    if request.faults:
        found["robustness"] = []
        for one in evaluated:
            with progress(f"faults in {one.name}"):
                found["robustness"].append(robustness_of(subject, one, request.seed))
    return found


def _explained(request: Request, subject: Subject, evaluated: list[Evaluated]) -> list[dict[str, Any]]:
    explanations = [found for text in request.explained for found in explain(subject, text)]
    for one in evaluated:
        for number in _surest_errors(one)[: request.num_explained]:
            pairs = getattr(one.examples, "pairs", None)
            pair = None if pairs is None else pairs[number]
            explanations += explain(subject, one.examples.texts[number], pair)
    return [found.table() for found in explanations]


def _surest_errors(one: Evaluated) -> list[int]:
    """Return the numbers of a set's examples: errors first, those of the surest predictions before the others."""
    rows = list(one.predictions.rows())

    def key(number: int) -> tuple[bool, float]:
        row = rows[number]
        sureness = row["probabilities"][row["predicted"]] if "probabilities" in row else 0.0
        return row["predicted"] == row["expected"], -sureness

    return sorted(range(len(rows)), key=key)


def told(report: Report) -> str:
    """Return the line that opens a report in the terminal."""
    return visible(f"{report['origin']}: {report['class']}, {report['parameters']:,} parameters")
