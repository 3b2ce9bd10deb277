"""Questions are ranked by likelihood where a model has one, and their accuracy is a metric to stop by."""

from engine.config.metrics import evaluated_metrics, lower_is_better
from engine.config.resolve import check
from tests.engine.config.run_config import config

TASKS = "evaluation.tasks={numbers: questions.jsonl}"


def test_questions_need_the_next_token():
    assert not check(config(TASKS))
    assert not check(config(TASKS, "stages.0.objective=fill_in_the_middle"))
    (problem,) = [one for one in check(config(TASKS, "stages.0.objective=masked")) if "evaluation" in one.wrong]
    assert problem.wrong == "evaluation.tasks with stages.0.objective = masked"
    assert hash(config(TASKS)) == hash(config(TASKS))


def test_an_accuracy_of_questions_stops_a_run():
    accuracy = "validation_accuracy_by_length/numbers"
    run = config(TASKS, "stages.0.data.validation=held-out", "evaluation.every_steps=2")
    assert accuracy in evaluated_metrics(run)
    assert not lower_is_better(accuracy)
    stopping = f"evaluation.early_stopping={{patience: 2, metric: {accuracy}}}"
    assert not check(config(TASKS, "stages.0.data.validation=held-out", "evaluation.every_steps=2", stopping))
