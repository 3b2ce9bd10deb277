"""Steps of `bench.convert`, each in a process of its own: make a model, convert it, convert it in memory, and back."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch


def make(folder: Path, sizes: str) -> None:
    """Write a checkpoint of random weights, streamed, and print the model's figures."""
    from engine.checkpoint.folder import CHECKPOINTS
    from engine.checkpoint.interchange.sinks.checkpoint import write_checkpoint
    from engine.checkpoint.manifest import CheckpointState
    from engine.config.schema.model import make_model
    from engine.models.families import family
    from engine.serve.source import CONVERTED

    model = make_model(**{"family": "gpt", "max_positions": 1024} | json.loads(sizes))
    specs = family(model).specs(model)
    config = {"model": model.model_dump(mode="json")}
    state = CheckpointState(0, 0, 0, "0" * 16, config, {CONVERTED: {"kind": "random", "source": "bench.convert"}})
    generator = torch.Generator().manual_seed(0)

    def values(spec: Any, held: str) -> Any:
        del held  # weights alone
        yield torch.randn(spec.stored_shape, generator=generator) * 0.02

    write_checkpoint(folder / "run" / CHECKPOINTS, state, specs, values, 5 * 10**9)
    sizes_bytes = sorted((4 * torch.Size(spec.stored_shape).numel() for spec in specs), reverse=True)
    total = sum(sizes_bytes)
    print(json.dumps({"num_parameters": total // 4, "num_bytes": total, "largest_tensors_bytes": sizes_bytes[:2]}))


def imports(folder: Path, *arguments: str) -> None:
    """Import what a conversion to Hugging Face imports: ours, torch, transformers and the class of the model."""
    import transformers

    import engine.serve.export  # noqa: F401

    for name in ("GPT2LMHeadModel", "AutoTokenizer"):
        getattr(transformers, name)


def convert(folder: Path, *arguments: str) -> None:
    """Run the command."""
    from engine.cli import main

    assert main(["convert", str(folder / "run"), "--output", str(_new(folder / "theirs"))]) == 0


def back(folder: Path) -> None:
    """Run the command the other way."""
    from engine.cli import main

    assert main(["convert", str(folder / "theirs"), "--output", str(_new(folder / "ours"))]) == 0
    shutil.rmtree(folder / "ours")


def in_memory(folder: Path, *arguments: str) -> None:
    """Convert through transformers with whole models in memory, and compare what it loads again."""
    import transformers

    from engine.checkpoint.interchange.huggingface import from_huggingface, to_huggingface
    from engine.models.materialize import whole_model
    from engine.serve.source import open_trained

    trained = open_trained(folder / "run")
    weights = trained.weights
    config, state = to_huggingface(trained.config, weights)
    kind = getattr(transformers, (config.architectures or [])[0])
    output = _new(folder / "in-memory")
    kind.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32).save_pretrained(output)
    del state
    again = kind.from_pretrained(output, dtype=torch.float32).eval()
    _, found = from_huggingface(again)
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    tokens_BT = torch.arange(64)[None]
    with torch.no_grad():
        ours = whole_model(trained.config, weights)(tokens_BT=tokens_BT)["logits_BTV"]
        assert (again(tokens_BT).logits - ours).abs().max() < 1e-4
    shutil.rmtree(output)


def _new(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


if __name__ == "__main__":
    step, where, *rest = sys.argv[1:]
    {"make": make, "imports": imports, "convert": convert, "back": back, "in memory": in_memory}[step](
        Path(where), *rest
    )
