"""Names and directions of the measures that a configuration knows are those of the kinds of tasks."""

import math

import pytest

from engine.config.metrics import MEASURE, lower_is_better
from engine.config.objectives import OBJECTIVES
from engine.tasks.in_training import numbers
from engine.tasks.kinds import KINDS


@pytest.mark.parametrize("name", KINDS)
def test_the_main_measure_of_a_kind_is_the_first_of_its_objective(name):
    kind, measures = KINDS[name], OBJECTIVES[name].measures
    if not measures:  # measured at the end alone
        return
    assert measures[0] == kind.main_measure.name
    assert lower_is_better(f"{MEASURE}{measures[0]}") != kind.main_measure.higher_is_better


def test_finite_numbers_are_recorded():
    measures = {"examples": 3, "a": 0.5, "f1": {"x": 1.0, "y/z": 0.0}, "none": None, "nan": math.nan, "table": [[1]]}
    assert numbers(measures) == {"a": 0.5, "f1/x": 1.0, "f1/y/z": 0.0}
