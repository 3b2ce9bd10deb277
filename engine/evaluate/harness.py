"""Tasks of lm-evaluation-harness (the package lm_eval) on a model, through the package's own API, without network.

The model is handed over as an object of the package's own class for transformers' models, so that requests are
tokenised, batched and scored by its rules and the numbers are those that anybody gets from the exported folder.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch

from engine.errors import ConfigError
from engine.evaluate.likelihood import ROWS
from engine.evaluate.subject import Subject, require_kind
from engine.extras import need

EXTRA = "evaluate"
_SEED = 1234
"""Seed by which few-shot examples are drawn: the package's own default."""
_BOOTSTRAPS = 1000
"""Samples of a bootstrap, for measures whose standard error has no formula."""


def require_harness() -> None:
    """Raise `EnvironmentProblem` where the package is missing."""
    need("lm_eval", "--harness", EXTRA)


def require_continuing(subject: Subject) -> None:
    """Raise `ConfigError` where a model continues no text."""
    require_kind(subject, ("causal", "spans"), "--harness", "a model that continues text (GPT or T5)")


def harness_model(subject: Subject) -> Any:
    """Return a model as one of the package's (`lm_eval.api.model.LM`).

    Raises:
        ConfigError: it continues no text.
        EnvironmentProblem: the package is missing.
    """
    require_continuing(subject)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every object that it is handed
    # a copy: the package may add a padding token
    tokenizer = copy.deepcopy(subject.tokenizer)
    theirs = need("lm_eval.models.huggingface", "--harness", EXTRA).HFLM

    class Silent(theirs):
        """Their class without bars of progress, which it draws wherever it runs."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, **others: Any) -> Any:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, **others)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

    return Silent(pretrained=subject.model, tokenizer=tokenizer, batch_size=ROWS, max_length=subject.longest)


def run_harness(subject: Subject, tasks: list[str], limit: int | None = None) -> list[dict[str, Any]]:
    """Return the measures of each task; a task is a file of the package's configuration, or a name that it knows.

    `limit` is the number of each task's examples that are used (None: all).

    Raises:
        ConfigError: a task cannot be loaded, or the model cannot serve it.
        EnvironmentProblem: the package is missing.
    """
    model = harness_model(subject)
    api, evaluator = need("lm_eval.tasks", "--harness", EXTRA), need("lm_eval.evaluator", "--harness", EXTRA)
    files = {task: str(Path(task).resolve()) for task in tasks if Path(task).suffix in (".yaml", ".yml")}
    for task, path in files.items():
        if not Path(path).is_file():
            raise ConfigError(f"--harness {task} is not there", "a task's YAML file", "check the path")
    try:
        # the package's own list, which takes seconds to read, is needed for names alone
        manager = api.TaskManager(include_defaults=len(files) < len(tasks))
        loaded = manager.load([files.get(task, task) for task in tasks])
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_SEED)
        with torch.random.fork_rng():
            found = evaluator.evaluate(
                model, task_dict=loaded, limit=limit, bootstrap_iters=_BOOTSTRAPS, log_samples=False
            )
    except Exception as error:  # the package and datasets raise whatever they meet
        raise ConfigError(
            f"--harness {', '.join(tasks)}: {(str(error).splitlines() or [''])[0] or type(error).__name__}",
            "YAML files of tasks, or names of lm_eval's, whose data lie on this machine (nothing is fetched)",
            "name local files in the task (dataset_path: json, dataset_kwargs: {data_files: ...})",
        ) from error
    samples = found.get("n-samples", {})
    return [
        {"task": name, "examples": samples.get(name, {}).get("effective"), "measures": _measures(entry)}
        for name, entry in found["results"].items()
    ]


def _measures(entry: dict[str, Any]) -> dict[str, float]:
    """Return the measures of a task: the package calls them `acc,none` and `acc_stderr,none`, by filter."""
    told = {}
    for key, value in entry.items():
        name, _, chosen = key.partition(",")
        if chosen and isinstance(value, int | float) and not isinstance(value, bool):
            told[name if chosen == "none" else f"{name} ({chosen})"] = float(value)
    return told
