"""`palimpsest replay-generate`: token shards that a run's model samples, to be replayed where old data is gone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def main(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or one of its checkpoints.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the shards: `replay.source` of a stage.")],
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to sample, in whole documents.")],
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Equal seeds give equal shards.")] = 0,
    temperature: Annotated[float, typer.Option(min=0.01, help="1 samples what the model has learned.")] = 1.0,
) -> None:
    """Sample documents from a run's newest checkpoint into token shards, for a stage that replays them.

    The index says that they are synthetic. The same command goes on where one was killed. Under a launcher (`torchrun
    --no-python palimpsest replay-generate ...`, srun, mpirun) every rank samples a part, with the same result.
    """
    from engine.logs import configure
    from engine.serve.quiet import quiet
    from engine.serve.synthetic import Request, generate_replay
    from launcher.environment import rank_environment

    environment = rank_environment(os.environ)
    configure(environment.global_rank, environment.world_size)
    quiet()
    if environment.local_world_size > 1:
        _take_gpu(environment.local_rank)

    def show(done: int) -> None:
        print(f"{min(done, tokens):,} of {tokens:,} tokens", flush=True)

    request = Request(tokens, seed, temperature)
    generate_replay(run, output, request, environment.global_rank, environment.world_size, show)
    if environment.global_rank == 0:
        from engine.data.shards.index import read_index

        index = read_index(output)
        print(f"{index.num_tokens:,} tokens in {index.num_documents:,} documents, {index.synthetic}, in {output}")
        print(f"to replay them: replay: {{ratio: 0.1, source: {output}}} in the stage")


def _take_gpu(local_rank: int) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
