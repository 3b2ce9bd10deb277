"""Runs a function on several ranks: real processes, gloo, a fresh fork of a server with torch and deepspeed loaded.

Importing torch and deepspeed takes seconds, so a fork server does it once; DeepSpeed keeps process globals, so every
rank of every case is a process of its own.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from launcher.ports import free_port

TIMEOUT_SECONDS = 240.0

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.distributed.preload"])


class RankFailed(AssertionError):
    """A rank raised or died; carries its traceback."""


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(environment, *arguments)` on every rank of a new world, after `connect`; the results in rank order.

    The first failure ends the other ranks and is raised here.
    """
    return _run(world_size, _in_connected_world, (function, arguments))


def run_commands(world_size: int, *arguments: str) -> list[tuple[int, str]]:
    """`palimpsest ARGUMENTS` as every rank of a new world; exit code and standard error of each, in rank order.

    The environment is the one that torchrun sets. A rank's process ends with its command, as it would alone.
    """
    return run_different([list(arguments)] * world_size)


def run_different(commands: list[list[str]]) -> list[tuple[int, str]]:
    """The same for a world whose ranks are given different arguments."""
    return _run(len(commands), _command, (free_port(), commands))


def _run(world_size: int, body: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        processes, receivers = [], []
        for global_rank in range(world_size):
            receiver, sender = _server.Pipe(duplex=False)
            process = _server.Process(
                target=_rank, args=(sender, Path(folder), global_rank, world_size, body, arguments), daemon=True
            )
            process.start()
            sender.close()
            processes.append(process)
            receivers.append(receiver)
        try:
            return _collect(receivers)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _collect(receivers: list[Connection]) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = dict(enumerate(receivers))
    while waiting:
        ready = wait(list(waiting.values()), timeout=TIMEOUT_SECONDS)
        if not ready:
            raise RankFailed(f"ranks {sorted(waiting)} did not answer within {TIMEOUT_SECONDS} seconds")
        for global_rank, receiver in list(waiting.items()):
            if receiver not in ready:
                continue
            try:
                ok, value = pickle.loads(receiver.recv_bytes())
            except EOFError:
                ok, value = False, "died without a word"
            if not ok:
                raise RankFailed(f"rank {global_rank} of {len(receivers)}:\n{value}")
            results[global_rank] = value
            del waiting[global_rank]
    return [results[global_rank] for global_rank in sorted(results)]


def _rank(
    sender: Connection, folder: Path, global_rank: int, world_size: int, body: Callable[..., Any], arguments: Any
) -> None:
    os.environ.update(LOCAL_RANK=str(global_rank), RANK=str(global_rank), WORLD_SIZE=str(world_size))
    try:
        result = (True, body(folder, global_rank, world_size, *arguments))
    except BaseException:
        result = (False, traceback.format_exc())
    sender.send_bytes(pickle.dumps(result))  # plain pickle: multiprocessing's own would share tensors by file handle
    sender.close()
    os._exit(0)  # no teardown: other ranks may still be in a collective with this one's sockets


def _in_connected_world(
    folder: Path, global_rank: int, world_size: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    import torch
    import torch.distributed as dist

    from engine.config.rank_environment import RankEnvironment
    from engine.parallel import zero
    from engine.parallel.groups import connect

    torch.set_num_threads(1)
    environment = RankEnvironment(global_rank=global_rank, world_size=world_size, local_rank=global_rank)
    store = dist.FileStore(str(folder / "store"), world_size)  # pyright: ignore[reportPrivateImportUsage]
    connect(environment, torch.device("cpu"), store)
    zero.start(torch.device("cpu"))
    return function(environment, *arguments)


def _command(folder: Path, global_rank: int, world_size: int, port: int, commands: list[list[str]]) -> tuple[int, str]:
    from engine import cli

    os.environ.update(LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = cli.main(commands[global_rank])
    return code, stderr.getvalue()
