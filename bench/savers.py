"""The sides of `bench.checkpoint`: each trains the same size of model and saves it in its own way, when it is told to.

Ours and DeepSpeed's native save share one engine (ZeRO-1); torch's DCP, synchronous and asynchronous, saves the same
model and AdamW as plain torch holds them. A turn is some ordinary steps, a save at the end of the last one, and the
steps after it until the checkpoint is on the disk.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from bench.ours import Ours, Shape

ORDINARY_STEPS = 3


@dataclass(frozen=True)
class Turn:
    """Wall seconds of one turn."""

    ordinary: list[float]
    """Each step before the save."""
    stall: float
    """The call that saves and, where its copies go on beside the next step, what the update there waits for them."""
    after: list[float]
    """Each step after it, while the checkpoint was still being written."""
    durable: float
    """From the call that saves until the checkpoint stands."""


class Side(Protocol):
    """One way of training and saving."""

    held: float
    """Seconds that updates of weights have waited for a save; set to 0 by whoever reads it."""

    def step(self) -> None: ...

    def save(self, folder: Path) -> None:
        """Begins a save, or does all of it."""
        ...

    def is_saved(self) -> bool:
        """Whether the last save stands."""
        ...


def serve(connection: Connection, make: Callable[..., Side], folder: str, *arguments: Any) -> None:
    """A contestant: a turn for each message, until the parent ends it."""
    torch.set_num_threads(1)
    side, number = make(*arguments), 0
    side.step()  # optimizer state exists from here on
    target = Path(folder) / "warm-up"  # buffers are taken and pages touched, on every side alike
    side.save(target)
    while not side.is_saved():
        side.step()
    shutil.rmtree(target, ignore_errors=True)
    connection.send("ready")
    while True:
        connection.recv()
        number += 1
        target = Path(folder) / str(number)
        connection.send(turn(side, target))
        shutil.rmtree(target, ignore_errors=True)


def turn(side: Side, target: Path) -> Turn:
    """Ordinary steps, a save, and the steps after it until the checkpoint stands."""
    ordinary = [timed(side.step) for _ in range(ORDINARY_STEPS)]
    side.held = 0.0
    called, after = time.perf_counter(), []
    stall = timed(lambda: side.save(target))
    while not side.is_saved():
        after.append(timed(side.step))
    stall += side.held
    return Turn(ordinary, stall, after, time.perf_counter() - called)


def timed(action: Callable[[], None]) -> float:
    """Wall seconds that an action takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


class OurSide:
    """Our engine and our saver, as `engine.train` uses them."""

    store: Any
    """Where it saves; None for the disk."""

    def __init__(self, shape: Shape, asynchronous: bool) -> None:
        from engine.checkpoint.saver import Saver

        self.ours, self.asynchronous = Ours(shape, 1, "fp32"), asynchronous
        self.batch, self.steps, self.held = self.ours.inputs(0), 0, 0.0
        self.saver, self.store = Saver(Path(), self.ours.groups), None
        self.saver.reserve(*self._state())

    def step(self) -> None:
        told = self.saver.save_flags()
        self.ours.step(self.batch, self.ours.shape.num_targets, self._hold_update)
        self.steps += 1
        self.saver.advance(*told)

    def save(self, folder: Path) -> None:
        from engine.checkpoint.manifest import CheckpointState

        self.saver.disk.folder = folder
        state = CheckpointState(step=self.steps, tokens=0, zero_stage=1, config_hash="bench")
        self.saver.begin(*self._state(), state, str(folder), 0, self.store)
        if not self.asynchronous:
            self.saver.settle()

    def is_saved(self) -> bool:
        return self.saver.in_flight is None

    def _hold_update(self, norm: float) -> bool:
        begin = time.perf_counter()
        self.saver.hold_update()
        self.held += time.perf_counter() - begin
        return True

    def _state(self) -> tuple[Any, Any]:
        return self.ours.pipeline.engine.parameter_shards(), self.ours.pipeline.engine.placements()


class MemorySide(OurSide):
    """The same, saving into the memory of its node; a rank alone has no other node to send a copy to."""

    def __init__(self, shape: Shape, memory: str, folder: str) -> None:
        from engine.checkpoint.node_memory.node_store import NodeStore
        from engine.config.rank_environment import RankEnvironment

        super().__init__(shape, True)
        self.store: Any = NodeStore(Path(memory), Path(folder), self.ours.groups, RankEnvironment())
        self.store.acquire()


class DeepSpeedSide:
    """The same engine, saved by DeepSpeed itself. It does not flush to the disk."""

    held = 0.0

    def __init__(self, shape: Shape) -> None:
        self.ours = Ours(shape, 1, "fp32")
        self.batch = self.ours.inputs(0)

    def step(self) -> None:
        self.ours.step(self.batch, self.ours.shape.num_targets)

    def save(self, folder: Path) -> None:
        engine: Any = self.ours.pipeline.engine._engine  # DeepSpeed's own, under our adapter
        engine.save_checkpoint(str(folder))

    def is_saved(self) -> bool:
        return True


class DcpSide:
    """torch's distributed checkpoint of a plain model of the same size, which it flushes to the disk as we do."""

    held = 0.0

    def __init__(self, shape: Shape, asynchronous: bool) -> None:
        from bench.ours import OPTIMIZER, tokens_of_step
        from bench.plain import PlainGPT
        from engine.config.rank_environment import RankEnvironment
        from engine.parallel.groups import connect

        connect(RankEnvironment(), torch.device("cpu"))  # its asynchronous save wants a process group
        self.asynchronous, self.written = asynchronous, None
        self.model = PlainGPT(shape.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=OPTIMIZER.learning_rate, fused=True)
        self.tokens_BT = tokens_of_step(shape, 0, 0)
        self.stager: Any = None

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.tokens_BT).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def save(self, folder: Path) -> None:
        from torch.distributed.checkpoint import state_dict_saver
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if not self.asynchronous:
            state_dict_saver.save(state, checkpoint_id=folder)
            return
        if self.stager is None:  # keeps its buffers from save to save, as ours does; pinned memory wants a GPU
            self.stager = DefaultStager(StagingOptions(False, False, False, False))
        self.written = state_dict_saver.async_save(state, checkpoint_id=folder, async_stager=self.stager)

    def is_saved(self) -> bool:
        future: Any = self.written
        if future is None:
            return True
        if not future.done():
            return False
        future.result()
        return True
