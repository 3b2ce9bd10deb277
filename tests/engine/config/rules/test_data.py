"""What is refused of a mixture, all of it at once, and what a source's keys mean on resume."""

from pathlib import Path
from typing import Any

import pytest

from engine.config.load import parse_run
from engine.config.resolve import check
from engine.config.resume import compare, flatten
from engine.config.schema.run import RunConfig


def config(**data: Any) -> RunConfig:
    tree = {
        "folder": "run",
        "tokenizer": "tokenizer",
        "model": {"vocab_size": 300, "num_layers": 1, "hidden_size": 16, "num_heads": 4},
        "stages": [{"data": data, "sequence_length": 16, "global_batch_size": 4, "duration": {"steps": 3}}],
    }
    return parse_run(tree, "test")


def source(name: str, **keys: Any) -> dict[str, Any]:
    return {"name": name, "path": str(Path("data") / name), **keys}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, "neither train and sources; allowed: exactly one"),
        ({"train": "a", "sources": [source("b")]}, "both train and sources"),
        ({"sources": [source("b"), source("b")]}, "the name 'b' is used twice"),
        ({"sources": [source("b", weight=1), source("c")]}, "no weight for c"),
        ({"sources": [source("b", weight=1), source("c", weight=1e-9)]}, "less than 1/65,536 of the sum"),
        ({"sources": [source(str(n)) for n in range(17)]}, "17 sources; allowed: 16 at most"),
        ({"sources": [source("b", weight=1)], "temperature": 2}, "temperature = 2.0 with weights"),
        ({"sources": [source("b", weight=1), source("c", weight=1e-12)]}, "of the sum (b: 1, c: 1e-12)"),
        ({"sources": [source("b\n")]}, "data.sources: 'b\\n' is no name; allowed: 1 to 64 printable"),
        ({"train": "a", "validation": {"en": "x", " zh": "y"}}, "data.validation: ' zh' is no name"),
        ({"train": "a", "validation": {}}, "data.validation is empty"),
        ({"train": "a", "validation": {"b": "s3://b"}}, "data.cache is missing, and s3://b is a URL"),
        ({"train": "s3://bucket/a"}, "data.cache is missing, and s3://bucket/a is a URL"),
        ({"sources": [source("a"), {"name": "b", "path": "gs://b"}]}, "data.cache is missing, and gs://b is a URL"),
        ({"train": "a", "temperature": 2}, "temperature = 2.0 without sources"),
    ],
)
def test_what_cannot_be_mixed_is_refused(data, says):
    [problem] = check(config(**data))
    assert says in str(problem).replace("\n  ", "; ")


def test_held_out_data_is_a_folder_or_folders_by_name_and_free_to_change():
    one, several = config(train="a", validation="b"), config(train="a", validation={"en": "b", "zh": "c"})
    assert several.stages[0].data.validation == {"en": "b", "zh": "c"}
    assert several.stages[0].data.validation_locations == ("b", "c")
    [change] = compare(one, several)
    assert (change.key, change.kind) == ("stages.0.data.validation", "execution")


def test_folders_may_move_weights_follow_the_schedule_and_limits_may_not_change():
    kinds = {key: kind for key, (kind, _) in flatten(config(sources=[source("b", weight=2, epochs=1.5)])).items()}
    prefix = "stages.0.data.sources.0."
    assert {key.removeprefix(prefix): kind for key, kind in kinds.items() if key.startswith(prefix)} == {
        "name": "meaning",
        "path": "execution",
        "weight": "schedule",
        "loss_weight": "schedule",
        "epochs": "meaning",
        "max_tokens": "meaning",
    }
