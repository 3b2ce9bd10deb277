"""Hashes of exported folders, one per form: `python -m tests.engine.serve.golden` writes them anew.

Weights are drawn by numpy, whose streams are equal on every machine; fields that name a version are left out.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from engine.checkpoint.manifest import CheckpointState
from engine.checkpoint.saver import Saver
from engine.config.resume import meaning_hash
from engine.config.schema.model import ModelConfig
from engine.corpus.tokenizer_training import train_tokenizer
from engine.models.families import family
from engine.parallel.state import ParameterShard, Placement
from tests.engine.models.tiny import BERT_FORMS, FORMS, T5_FORMS
from tests.engine.serve.runs import one_process, run_config

HASHES = Path(__file__).parents[2] / "golden" / "huggingface_exports.json"
ALL = FORMS | BERT_FORMS | T5_FORMS
_TOKENIZERS = {
    "gpt": ("bpe", "causal", 400),
    "bert": ("wordpiece", "masked", 400),
    "t5": ("bpe", "span_corruption", 450),
}
_TEXT = "a page whose first writing was scraped away so that it could be used again " * 3


def numbers(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Weights in which every element differs from its neighbours."""
    draw = np.random.Generator(np.random.PCG64(7))
    specs = family(config).specs(config)
    return {spec.name: torch.from_numpy(draw.standard_normal(spec.stored_shape, np.float32)) * 0.25 for spec in specs}


def save_run(folder: Path, form: str) -> Path:
    """Save a run of a form with these weights and a tokenizer of its own; return the run folder."""
    model, purpose, size = _TOKENIZERS[ALL[form].family]
    train_tokenizer([_TEXT], folder / "tokenizer", model, size, purpose=purpose)  # pyright: ignore[reportArgumentType]
    config = run_config(folder / "run", form, folder / "tokenizer")
    shards, placements, values = [], [], numbers(config.model)
    for spec in family(config.model).specs(config.model):
        padded = torch.zeros(spec.shape)
        padded[: len(values[spec.name])] = values[spec.name]
        shards.append(ParameterShard(spec, 0, padded.flatten()))
        placements.append(Placement(spec, (0,), 0, padded.numel()))
    state = CheckpointState(1, 32, 0, meaning_hash(config), config.model_dump(mode="json"))
    Saver(config.folder / "checkpoints", one_process()).save(shards, placements, state, "test", 0)
    return config.folder


def hashes(folder: Path) -> dict[str, str]:
    """Return a hash per file of an exported folder: of the weights' bytes, of a configuration without versions."""
    found = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        if path.name in ("config.json", "generation_config.json"):
            tree = json.loads(content)
            tree.pop("transformers_version", None)
            content = json.dumps(tree, sort_keys=True).encode()
        if path.suffix == ".safetensors" or path.name.endswith("config.json"):
            found[path.name] = hashlib.sha256(content).hexdigest()[:16]
    return found


def main() -> None:
    from engine.serve.export import export
    from engine.serve.source import open_trained

    found = {}
    for form in ALL:
        with tempfile.TemporaryDirectory() as scratch:
            run = save_run(Path(scratch), form)
            export(open_trained(run), Path(scratch) / "out")
            found[form] = hashes(Path(scratch) / "out")
        print(form, file=sys.stderr)
    HASHES.parent.mkdir(exist_ok=True)
    HASHES.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
