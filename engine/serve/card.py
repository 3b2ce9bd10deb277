"""The model card (`README.md`) of an exported folder: where the model comes from, in numbers that the run recorded.

Nothing is claimed that is not recorded: what a checkpoint that was moved out of its run no longer shows is said to be
missing.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ruamel.yaml import YAML

from engine import __version__
from engine.checkpoint.folder import CHECKPOINTS
from engine.checkpoint.interchange.forms import OLDEST
from engine.checkpoint.interchange.forms.tasks import ANSWERS, ENDINGS, SEQUENCES, TOKENS
from engine.checkpoint.manifest import CheckpointState
from engine.config.objectives import OBJECTIVES
from engine.config.rules.tables import REPLAY
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import RunStage
from engine.errors import ConfigError
from engine.redact import redacted
from engine.serve.source import Trained
from engine.train.metrics import METRICS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_PIPELINES = {"gpt": "text-generation", "bert": "fill-mask", "t5": "text2text-generation"}
_CLASSES = {"gpt": "AutoModelForCausalLM", "bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}
_TASK_PIPELINES = {SEQUENCES: "text-classification", TOKENS: "token-classification", ANSWERS: "question-answering"}
"""Pipelines of models with the head of a task, by the ending of their class."""
_UNTIED_T5 = (
    "Its output projection is not the embedding. transformers 5 takes every T5 for tied: `tie_weights()` and "
    "`resize_token_embeddings()` overwrite the projection there, so do not call them."
)


def parse_license(name: str) -> str:
    """Return a license's identifier as the hub writes it, in lower case.

    Raises:
        ConfigError: it cannot be one.
    """
    if _LICENSE.fullmatch(name.lower()) is None:
        raise ConfigError(
            f"--license {name!r}",
            "an identifier of letters, digits, '.', '+' and '-', such as apache-2.0, mit or cc-by-4.0",
            "use the SPDX identifier, or `other` for a license that has none",
        )
    return name.lower()


def model_card(trained: Trained, theirs: PretrainedConfig, license_id: str | None, dtype: torch.dtype) -> str:
    """Return the text of the card, with the metadata that the hub reads at its head."""
    family, head = trained.config.family, trained.config.task_head
    pipeline, kind = _PIPELINES[family], _CLASSES[family]
    if head is not None:
        pipeline, kind = _TASK_PIPELINES[ENDINGS[head.task]], f"AutoModel{ENDINGS[head.task]}"
    metadata: dict[str, Any] = {} if license_id is None else {"license": license_id}
    metadata |= {"library_name": "transformers", "pipeline_tag": pipeline, "tags": ["palimpsest"]}
    name = theirs.architectures[0]  # type: ignore[index]
    in_dtype = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    if trained.run is None:
        about = _converted(trained, name, in_dtype, license_id)
    else:
        about = _trained(trained, trained.run, name, in_dtype, license_id)
    title, first, *rest = about
    untied = [_UNTIED_T5] if family == "t5" and not trained.config.tie_embeddings else []
    return "\n\n".join([f"---\n{_yaml(metadata)}---", title, first, *untied, _usage(kind), *rest]) + "\n"


def _trained(trained: Trained, run: RunConfig, name: str, dtype: str, license_id: str | None) -> list[str]:
    """Return title, first paragraph and tables of a model that a run trained."""
    how = "fine-tuned" if OBJECTIVES[run.stages[-1].objective.name].is_task else "pretrained"
    return [
        f"# {' '.join(run.name.split())}",
        f"A {name} that was {how} with Palimpsest {__version__}; weights in {dtype}.",
        "## Source\n\n" + _table(("", ""), _source(trained, run, trained.state, license_id)),
        "## Training data\n\n" + _data(trained, run, trained.state),
        "## Held-out loss\n\n" + _losses(trained),
        f"## Configuration\n\n```yaml\n{_yaml(redacted(run.model_dump(mode='json', exclude_none=True)))}```",
    ]


def _converted(trained: Trained, name: str, dtype: str, license_id: str | None) -> list[str]:
    """Return title, first paragraph and tables of a model that was converted and not trained here."""
    facts = trained.converted
    rows = [
        ("converted from", f"{facts.get('kind')}: {facts.get('source')}"),
        ("fingerprint of its weights", str(facts.get("fingerprint"))),
        ("parameters", f"{trained.num_parameters:,}"),
        ("license", license_id or "not stated (`palimpsest convert --license`); that of the source holds"),
    ]
    return [
        f"# {Path(str(facts.get('source'))).name}",
        f"A {name} that was converted with Palimpsest {__version__}, and not trained; weights in {dtype}.",
        "## Source\n\n" + _table(("", ""), rows),
        f"## Configuration\n\n```yaml\n{_yaml(trained.config.model_dump(mode='json', exclude_none=True))}```",
    ]


def _usage(name: str) -> str:
    return (
        f"```python\nfrom transformers import AutoTokenizer, {name}\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained(FOLDER)\nmodel = {name}.from_pretrained(FOLDER)\n```\n\n"
        f"Reads alike under transformers {OLDEST} and newer. The tokenizer frames a text as training did and, with "
        "`truncation=True`, cuts it at the model's positions."
    )


def _source(
    trained: Trained, run: RunConfig, state: CheckpointState, license_id: str | None
) -> Iterator[tuple[str, str]]:
    yield "run", run.name
    yield "checkpoint", f"step {trained.step:,}"
    if trained.averaged and (ema := _stage_of(run, trained.step).ema) is not None:
        yield "weights", f"exponential moving average, decay {ema.decay:g} every {ema.every_steps} steps"
    yield "tokens", f"{trained.tokens:,}"
    yield "parameters", f"{trained.num_parameters:,}"
    yield "configuration hash", state.config_hash
    yield "tokenizer hash", state.sections.get("tokenizer", {}).get("hash", "not recorded")
    yield "seed", str(run.seed)
    yield "license", license_id or "not stated (`palimpsest convert --license`)"
    yield "versions", ", ".join(f"{name} {version}" for name, version in state.versions.items())


def _data(trained: Trained, run: RunConfig, state: CheckpointState) -> str:
    """Return tokens and fingerprints of each source, in the run stage of the checkpoint, as a table."""
    loader = state.sections.get("loader", {})
    stage = _stage_of(run, trained.step)
    folders = _folders(stage)
    if len(folders) == 1 and stage.data.train is not None:
        rows = [("train", stage.data.train, f"{trained.tokens:,}", loader.get("fingerprint", "not recorded"))]
    else:
        seen, prints = _tokens_by_source(trained, stage), str(loader.get("sources", "")).split()
        # A checkpoint may lack the fingerprints of its sources.
        prints += ["not recorded"] * (len(folders) - len(prints))
        rows = [
            (name, folder, seen.get(name, "not recorded"), fingerprint)
            for (name, folder), fingerprint in zip(folders.items(), prints, strict=True)
        ]
        rows.append(("all", "", f"{trained.tokens:,}", loader.get("fingerprint", "not recorded")))
    return _table(("source", "folder", "tokens seen", "fingerprint"), redacted(rows))


def _folders(stage: RunStage) -> dict[str, str]:
    """Return the folder or URL of each source of a run stage, by its name in metrics."""
    data, replay = stage.data, stage.replay
    found = {source.name: source.path for source in data.sources} if data.train is None else {"new": data.train}
    return found if replay is None else found | {REPLAY: replay.source or "the run's reservoir"}


def _stage_of(run: RunConfig, step: int) -> RunStage:
    """Return the run stage in which a step, counted over the whole run, was done."""
    for stage in run.stages:
        if step <= stage.num_steps:
            return stage
        step -= stage.num_steps
    return run.stages[-1]


def _tokens_by_source(trained: Trained, stage: RunStage) -> dict[str, str]:
    found: dict[str, str] = {}
    for record in _records(trained):
        for name in _folders(stage):
            samples = record.get(f"{name}_samples")
            if (tokens := record.get(f"tokens/{name}")) is not None:
                # Counts grow: the last record up to the checkpoint's step stands.
                found[name] = f"{tokens:,}"
            # a record without tokens by source: whole rows, padding included
            elif samples is not None:
                found[name] = f"{samples * stage.sequence_length:,}"
    return found


def _losses(trained: Trained) -> str:
    """Return the newest validation losses up to the checkpoint's step, as a table."""
    newest: dict[str, Any] = {}
    for record in _records(trained):
        if any(name.startswith("validation_loss") for name in record):
            newest = record
    rows = [(name, f"{newest['step']:,}", f"{value:.6f}") for name, value in newest.items() if "validation" in name]
    return _table(("metric", "step", "value"), rows) if rows else "None is recorded."


def _records(trained: Trained) -> Iterator[dict[str, Any]]:
    """Yield the run's records up to the checkpoint's step; none where the checkpoint lies outside of its run.

    Damaged lines are skipped.
    """
    checkpoint: Path = trained.checkpoint.resolve()
    path = checkpoint.parent.parent / METRICS
    if checkpoint.parent.name != CHECKPOINTS or not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            # A record without a step counts as too late.
            if isinstance(record, dict) and record.get("step", trained.step + 1) <= trained.step:
                yield record


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    # A name may hold a bar or a line break, either of which would end the cell.
    cells = [[" ".join(cell.replace("|", r"\|").split()) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _yaml(tree: dict[str, Any]) -> str:
    text, yaml = io.StringIO(), YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(tree, text)
    return text.getvalue()
