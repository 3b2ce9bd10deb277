"""An evaluation from start to end: what was asked for, measured part by part, as one report.

The report of one model is a tree with a key for each part; that of several has theirs below `models`, each with the
`label` that it is told by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from engine import __version__
from engine.config.load import parse_section
from engine.config.schema.data import ColumnsConfig
from engine.corpus.sources.chunks import find_sources
from engine.errors import ConfigError
from engine.evaluate.bias import PROBES, bias_of, require_probed
from engine.evaluate.calibration import calibration_of
from engine.evaluate.domains import named
from engine.evaluate.explain import explain, require_captum, require_explained
from engine.evaluate.harness import require_continuing, require_harness, run_harness
from engine.evaluate.labelled import Evaluated, evaluate_set, task_of
from engine.evaluate.perplexity import perplexity_of, require_likelihood
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
    """Measure a model. Parts that it cannot serve and missing texts are refused before anything is measured.

    Rows of sets are read next, and tasks of lm-evaluation-harness when it is their turn.

    Raises:
        ConfigError: the request is not what it has to be, or the model cannot serve it.
        DataError: a source of text or examples is not.
        EnvironmentProblem: a package that it needs is missing.
    """
    _check(request)
    domains, sets = named(request.texts, "--text"), named(request.sets, "--set")
    columns = _columns(request.columns)
    subject = _opened(request)
    report, evaluated = _head(request, subject), []
    for given in sets:  # first, since their rows are the likeliest to be refused
        with progress(f"set {given.name}"):
            evaluated.append(evaluate_set(subject, given, columns, request.limit))
    if domains:
        report["domains"] = []
    for domain in domains:
        with progress(f"text {domain.name}") as done:
            found = perplexity_of(subject, domain, request.text_key, request.limit, done)
        report["domains"].append(found)
    if request.harness:
        with progress("lm-evaluation-harness"):
            report["harness"] = run_harness(subject, request.harness, request.limit)
    if evaluated:
        report |= _of_sets(request, subject, evaluated, progress)
    if request.bias:
        with progress("bias probes"):
            report["bias"] = [bias_of(subject, language) for language in request.bias]
    if request.explained or request.num_explained:
        with progress("explanations"):
            report["explanations"] = _explained(request, subject, evaluated)
    return report


def evaluate_each(request: Request, sources: Sequence[Path], labels: Sequence[str], progress: Progress) -> Report:
    """Measure several models, one after the other, as `request` says; its own source is not looked at.

    Raises:
        As `evaluate`. A model that cannot be measured so is refused before the first one is measured.
    """
    _check(request)
    requests = [replace(request, source=source) for source in sources]
    for each, label in zip(requests, labels, strict=True):
        with progress(f"opening {label}"):
            _opened(each)
    reports = [
        {"label": label} | evaluate(each, lambda part, label=label: progress(f"{label}: {part}"))
        for each, label in zip(requests, labels, strict=True)
    ]
    return {"palimpsest": __version__, "models": reports}


def _opened(request: Request) -> Subject:
    """Return the model. Raises `ConfigError` where it cannot serve a part of the request."""
    subject = open_subject(request.source, request.tokenizer)
    if request.texts:
        require_likelihood(subject)
    if request.harness:
        require_continuing(subject)
    if request.sets:
        task_of(subject)
    if request.bias:
        require_probed(subject)
    if request.explained or request.num_explained:
        require_explained(subject)
    return subject


def _columns(given: list[str]) -> ColumnsConfig:
    pairs = [each.partition("=") for each in given]
    if wrong := next((each for each, (_, sign, name) in zip(given, pairs, strict=True) if not sign or not name), None):
        raise ConfigError(f"--column {wrong}", "KEY=NAME, as in data.columns", "write --column text=sentence, say")
    return parse_section(ColumnsConfig, {key: name for key, _, name in pairs}, ("--column",), "the command line")


def _check(request: Request) -> None:
    """Raise where the request asks for nothing, or for what is not there, as far as that is seen without the model."""
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
    named(request.sets, "--set")
    find_sources(domain.source for domain in named(request.texts, "--text") if not domain.is_prepared)
    _columns(request.columns)
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
