"""Kinds of tasks, each in a module of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.config.schema.objective import ObjectiveName
from engine.tasks.kind import Kind
from engine.tasks.kinds.answer import Answer
from engine.tasks.kinds.classification import Classification
from engine.tasks.kinds.question_answering import QuestionAnswering
from engine.tasks.kinds.regression import Regression
from engine.tasks.kinds.token_classification import TokenClassification

KINDS: Mapping[ObjectiveName, Kind[Any]] = {
    kind.name: kind for kind in (Classification(), Regression(), TokenClassification(), QuestionAnswering(), Answer())
}
"""Every kind by the name of its objective."""
