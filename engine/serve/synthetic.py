"""Token shards that a run's model writes itself, for replay where the old data is gone.

Marek et al. 2026 (Forgetting in Language Models: Capacity, Optimization, and Self-Generated Replay, arXiv 2605.26097):
samples of the model replace the data with nearly no forgetting, unless the model is saturated. The index of the shards
says that they are synthetic (`Synthetic`).

Several processes may work side by side, with no word between them but the files of finished units in `units/`: process
r of n makes the units r, r + n, ..., and the first one makes what is missing at the end. A unit is needed if those
before it hold less than the wanted number of tokens, so all processes stop by themselves. Whoever goes on after a kill
finds the finished units there.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from engine.atomic import write_atomically
from engine.checkpoint.load import read_state
from engine.checkpoint.storage import MANIFEST
from engine.config.schema.run import RunConfig
from engine.data.shards.index import FILE, Synthetic
from engine.data.shards.writer import DEFAULT_SHARD_BYTES, ShardWriter
from engine.data.tokenizer.folder import TextTokenizer, load_tokenizer
from engine.errors import ConfigError, EnvironmentProblem
from engine.logs import logger
from engine.plan.parameters import num_parameters
from engine.serve.language_model import from_trained
from engine.serve.sampler import Sampler
from engine.serve.source import Trained, open_trained, run_of
from engine.serve.units import Units

RECIPE, UNITS, STARTS = "generate.json", "units", "starts.npy"
SATURATED = 200
"""Training tokens per parameter from which on a model may be saturated: ten times what is compute-optimal (Hoffmann et
al. 2022). There is no sharp limit."""
log = logger(__name__)
Show = Callable[[int], None]
"""Called with the number of tokens that are there."""


@dataclass(frozen=True)
class Request:
    """Number of tokens that are wanted, and how they are drawn."""

    num_tokens: int
    seed: int = 0
    temperature: float = 1.0
    shard_bytes: int = DEFAULT_SHARD_BYTES


def generate_replay(
    source: Path, output: Path, request: Request, position: int = 0, processes: int = 1, show: Show = lambda _: None
) -> None:
    """Sample token shards from a run's model into `output`; process `position` of several calls it in each.

    The first process returns when the shards are whole, the others when there is nothing left for them to begin.

    Raises:
        ConfigError: the model continues no text, or `output` holds something else, or was begun in another way.
        CheckpointError: no checkpoint is whole.
        EnvironmentProblem: `output` cannot be written.
    """
    trained = open_trained(source)
    config = run_of(trained.checkpoint, read_state(trained.checkpoint))
    _refuse_no_decoder(trained, source)
    synthetic = Synthetic(config.name, trained.step, request.seed, request.temperature)
    try:
        if _begin(output, trained, request):
            log.info("%s is complete already", output)
            return
        _warn_saturated(trained)
        assert trained.tokenizer is not None  # a run has one
        tokenizer = load_tokenizer(trained.tokenizer)
        units = Units(output / UNITS)
        sampler = _sampler(trained, config, tokenizer, request, units.folder)
        _work(sampler, units, request.num_tokens, position, processes, show)
        if position == 0:
            _assemble(output, tokenizer, request, synthetic, units)
    except OSError as error:
        if position and (output / FILE).exists():
            return  # the first process has completed the folder, and removed the units, meanwhile
        raise EnvironmentProblem(
            f"{output} cannot be written: {error.strerror or error}",
            "a folder that can be written, with room for two to four bytes per token",
            "make room; the same command goes on where this one stopped",
        ) from error


def _refuse_no_decoder(trained: Trained, source: Path) -> None:
    if trained.config.family != "gpt":
        raise ConfigError(
            f"the model in {source} is of family {trained.config.family}, which fills gaps and continues no text",
            "a GPT",
            "replay old data with this model; where it will vanish, let reservoir.pin keep copies of it",
        )


def _begin(output: Path, trained: Trained, request: Request) -> bool:
    """Make the folder and its recipe, or go on with one of the same recipe; return True if it is complete.

    Raises:
        ConfigError: it holds something else, or has another recipe.
    """
    manifest = json.loads((trained.checkpoint / MANIFEST).read_bytes())
    # the shards' content follows from this alone; the number of processes does not matter
    recipe = asdict(request) | {"step": trained.step, "manifest": _hash(manifest)}
    path = output / RECIPE
    if path.exists():
        before = json.loads(path.read_bytes())
        different = [key for key, value in recipe.items() if before.get(key) != value]
        if different:
            key = different[0]
            raise ConfigError(
                f"{output} was begun with {key} = {before.get(key)}, now it is {recipe[key]}",
                "the same model and options for one folder",
                f"name step {before.get('step')} of the run and the same options, or another --output",
            )
        return (output / FILE).exists()
    # hidden files are those that another process is writing at this moment
    others = (path.name for path in output.iterdir() if not path.name.startswith(".")) if output.is_dir() else ()
    if (output.exists() and not output.is_dir()) or any(name not in (UNITS, RECIPE) for name in others):
        raise ConfigError(f"--output {output} holds something else", "a new or empty folder", "name another one")
    (output / UNITS).mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(recipe, indent=1) + "\n")
    return False


def _hash(manifest: object) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:32]


def _warn_saturated(trained: Trained) -> None:
    ratio = trained.tokens / num_parameters(trained.config)
    if ratio > SATURATED:
        log.warning(
            "the model was trained on %.0f tokens per parameter: one that is close to saturation forgets whatever is "
            "replayed (from about %d on, without a sharp limit); look at the ledger",
            ratio,
            SATURATED,
        )


def _sampler(trained: Trained, config: RunConfig, tokenizer: TextTokenizer, request: Request, units: Path) -> Sampler:
    run_stage = config.stages[int(read_state(trained.checkpoint).sections.get("progress", {}).get("run_stage", 0))]
    model = from_trained(trained).model
    if torch.cuda.is_available():
        model = model.to(torch.device("cuda", torch.cuda.current_device()))  # pyright: ignore[reportArgumentType]
    # ids without a token, and tokens that no text becomes, have logits, too
    text = set(tokenizer.model.get_vocab().values()) - tokenizer.special_ids - {tokenizer.unknown_id}
    sampler = Sampler(
        model=model,
        text_ids=np.array(sorted(text | {tokenizer.eos_id}), np.int64),
        eos_id=tokenizer.eos_id,
        length=run_stage.sequence_length,
        temperature=request.temperature,
        seed=request.seed,
    )
    if run_stage.data.attention == "row":
        return sampler
    path = units / STARTS
    if not path.exists():
        content = io.BytesIO()
        np.save(content, sampler.sampled_starts())
        write_atomically(path, content.getvalue())
    return replace(sampler, starts=np.load(path))


def _work(sampler: Sampler, units: Units, wanted: int, position: int, processes: int, show: Show) -> None:
    """Make the units of one process, and as the first one those that are missing then. Raises `OSError`."""
    number = position
    while units.needed(number, wanted):
        if number not in units.found():
            units.save(number, sampler.unit(number))
            show(sum(units.found().values()))
        number += processes
    # Another process may have been killed: nobody waits for it.
    while position == 0 and (missing := units.first_missing(wanted)) is not None:
        units.save(missing, sampler.unit(missing))
        show(sum(units.found().values()))


def _assemble(output: Path, tokenizer: TextTokenizer, request: Request, synthetic: Synthetic, units: Units) -> None:
    """Write the documents as shards; the index, last, makes the folder complete."""
    written = (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.hash, request.shard_bytes, tokenizer.vocabulary)
    with ShardWriter(output, *written, synthetic=synthetic) as writer:
        for document in units.documents(request.num_tokens):
            writer.add(document)
    shutil.rmtree(units.folder, ignore_errors=True)
