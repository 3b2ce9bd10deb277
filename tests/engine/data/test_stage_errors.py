"""Errors about a stage's data name the stage and the key, whichever of its data sets is missing or of another kind."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config.schema.stage import RunStage
from engine.data.shards.writer import ShardWriter
from engine.data.stage import open_parts, open_validation
from engine.errors import DataError

OURS, OTHER = "0" * 32, "1" * 32


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Folders `ours` and `other`, of two tokenizers."""
    for name, tokenizer in (("ours", OURS), ("other", OTHER)):
        with ShardWriter(tmp_path / name, 300, 0, tokenizer) as writer:
            writer.add(np.arange(40))
    return tmp_path


def stage(data: dict[str, Any], **keys: Any) -> RunStage:
    length = {"sequence_length": 8, "global_batch_size": 2, "duration": {"steps": 2}}
    return RunStage.model_validate({"name": "more", "data": data, **length, **keys})


@pytest.mark.parametrize(("folder", "says"), [("gone", "no folder of token shards"), ("other", "with tokenizer 111")])
def test_the_key_is_named(data, folder, says):
    ours, wrong = str(data / "ours"), str(data / folder)
    pair = ({"name": "a", "path": ours}, {"name": "b", "path": wrong})
    stages = {
        "data.train": stage({"train": wrong}),
        "data.sources.1.path": stage({"sources": pair}),
        "replay.source": stage({"train": ours}, replay={"ratio": 0.1, "source": wrong}),
    }
    for key, found in stages.items():
        with pytest.raises(DataError) as error:
            open_parts(found, OURS, 300)
        assert f"stage more, {key}: " in error.value.wrong
        assert says in error.value.wrong
        assert error.value.allowed
        assert error.value.remedy
    with pytest.raises(DataError, match=f"stage more, data.validation: .*{says}"):
        open_validation(stage({"train": ours, "validation": wrong}), OURS, 300)
