"""Measures of predictions, by the packages that define them (scikit-learn, scipy, seqeval)."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.extras import need

Measures = dict[str, Any]


def of_labels(expected: np.ndarray, predicted: np.ndarray, labels: tuple[str, ...]) -> Measures:
    """Return accuracy, F1 (micro, macro and of each label), Matthews' correlation and the confusion matrix, whose rows
    are the expected labels. Both arrays are (n,) numbers of labels."""
    metrics = need("sklearn.metrics", "measuring labels", "tasks")
    numbers = list(range(len(labels)))
    of_each = metrics.f1_score(expected, predicted, labels=numbers, average=None, zero_division=0)
    return {
        "examples": len(expected),
        "accuracy": float(metrics.accuracy_score(expected, predicted)),
        "f1_micro": float(metrics.f1_score(expected, predicted, labels=numbers, average="micro", zero_division=0)),
        "f1_macro": float(metrics.f1_score(expected, predicted, labels=numbers, average="macro", zero_division=0)),
        "f1": dict(zip(labels, map(float, of_each), strict=True)),
        "matthews": float(metrics.matthews_corrcoef(expected, predicted)),
        "confusion": metrics.confusion_matrix(expected, predicted, labels=numbers).tolist(),
    }


def of_numbers(expected: np.ndarray, predicted: np.ndarray) -> Measures:
    """Return the mean squared error and the correlations of Pearson and Spearman, None where one side is constant."""
    stats = need("scipy.stats", "measuring numbers", "tasks")
    constant = len({*expected.tolist()}) < 2 or len({*predicted.tolist()}) < 2
    return {
        "examples": len(expected),
        "mean_squared_error": float(np.mean((expected - predicted) ** 2)),
        "pearson": None if constant else float(stats.pearsonr(expected, predicted).statistic),
        "spearman": None if constant else float(stats.spearmanr(expected, predicted).statistic),
    }


def of_entities(expected: list[list[str]], predicted: list[list[str]]) -> Measures:
    """Return precision, recall and F1 of whole entities (all together, and F1 of each type), and the accuracy of the
    words' tags, as seqeval has them by default (that is as conlleval does: an I- behind something else begins one)."""
    metrics = need("seqeval.metrics", "measuring entities", "tasks")
    report = metrics.classification_report(expected, predicted, output_dict=True, zero_division=0)
    kinds = {name: values for name, values in report.items() if not name.endswith(" avg")}
    return {
        "examples": len(expected),
        "precision": float(metrics.precision_score(expected, predicted, zero_division=0)),
        "recall": float(metrics.recall_score(expected, predicted, zero_division=0)),
        "f1": float(metrics.f1_score(expected, predicted, zero_division=0)),
        "accuracy": float(metrics.accuracy_score(expected, predicted)),
        "f1_of": {name: float(values["f1-score"]) for name, values in kinds.items()},
        "entities": {name: int(values["support"]) for name, values in kinds.items()},
    }
