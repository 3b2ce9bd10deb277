"""A process of a benchmark becomes a rank on the CPU: children of a fork server, which meet at a file."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from engine.config.rank_environment import RankEnvironment
from engine.parallel import zero
from engine.parallel.groups import connect


def join(folder: str, global_rank: int, world_size: int) -> tuple[RankEnvironment, torch.device]:
    """This rank's place and device, with DeepSpeed ready; `folder` is the same for all ranks, and theirs alone."""
    torch.set_num_threads(1)
    # DeepSpeed asks for them; set here, for a child of the fork server has the server's environment
    os.environ.update(LOCAL_RANK=str(global_rank), RANK=str(global_rank), WORLD_SIZE=str(world_size))
    environment, device = RankEnvironment(global_rank, world_size, global_rank), torch.device("cpu")
    store = dist.FileStore(str(Path(folder) / "store"), world_size)  # pyright: ignore[reportPrivateImportUsage]
    connect(environment, device, store)
    zero.start(device)
    return environment, device
