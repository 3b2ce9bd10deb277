"""Reads the next steps in a thread while the current one trains: what the rank needs of them, on its way to its device.

Invariant: the stream that was handed in stands behind what was consumed, never behind what was read ahead; the thread
works on a clone of it, and each step that it reads says how far the stream has come behind it. An error of the thread
is raised by the call that would have returned its batches, and again by every later one. The thread ends with `close`
(or the context), even where nobody consumes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from threading import Condition, Thread
from typing import NamedTuple

import torch

from engine.data.batch import Batch
from engine.data.loader import ReadStep, StepReader
from engine.data.shard_fetcher import ShardFetcher
from engine.data.stream import Stream
from engine.data.stream_state import State
from engine.data.upload import Inputs, Upload, Uploader

DEPTH = 2
"""Steps that wait for the consumer while no more are read. Short steps are read some at a time, and then wait all."""

Cut = Callable[[Batch, int], Inputs]
"""Makes a rank's inputs of a micro-batch and the number of its step, on the CPU; the reading thread calls it."""


def whole(batch: Batch, step: int) -> Inputs:
    """Return all inputs of a batch."""
    return batch.inputs


class _Ready(NamedTuple):
    """A step that was read, and its inputs on their way to the GPU."""

    step: ReadStep
    upload: Upload | None


class Prefetcher:
    """Reads a stream for one data rank, some steps ahead of its consumer."""

    def __init__(
        self,
        stream: Stream,
        data_rank: int,
        data_size: int,
        micro_batch_size: int,
        depth: int = DEPTH,
        cut: Cut = whole,
        gpu: torch.device | None = None,
    ) -> None:
        """Start reading; `cut` makes the batches' inputs, which are copied to the `gpu` (if any) while it computes."""
        self._stream = stream
        self._cut, self._gpu = cut, gpu
        self._ranks = (data_rank, data_size, micro_batch_size)
        self._depth = depth
        self._start()

    def step(self) -> list[Batch]:
        """Return this rank's micro-batches of the next global batch once they are read. Raises what reading did.

        On a GPU its current stream, and not the host, waits until they have arrived.
        """
        with self._changed:
            assert not self._closed, "the prefetcher is closed"
            self._changed.wait_for(lambda: self._ready or self._error)
            if not self._ready:
                assert self._error is not None
                # kept, not cleared: every later call raises it again
                raise self._error
            ready = self._ready.popleft()
            self._changed.notify_all()
        batches = ready.step.batches
        # only now: a checkpoint that is saved before this call must not count steps that were merely read
        self._stream.advance_to(ready.step.after)
        return batches if ready.upload is None else _with_inputs(batches, ready.upload.arrive())

    def wait(self, seconds: float) -> bool:
        """Return True once `step` would return (or raise) at once, False if that takes longer than `seconds`."""
        with self._changed:
            return bool(self._changed.wait_for(lambda: self._ready or self._error, seconds))

    def restore(self, state: State) -> None:
        """Go on at a saved state; what was read ahead is dropped. Raises `DataError` as `Stream.restore` does."""
        self.close()
        # the thread has ended: it works on a clone from before, whose steps must not be handed out after this
        self._stream.restore(state)
        self._start()

    def close(self) -> None:
        """End the thread and wait for it; safe to call twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        self._changed = Condition()
        self._ready: deque[_Ready] = deque()
        self._error: BaseException | None = None
        self._closed = False
        # a daemon, so that a process which forgets to close can still end
        self._thread = Thread(target=self._read_ahead, args=(self._stream.clone(),), name="prefetch", daemon=True)
        self._thread.start()

    def _read_ahead(self, stream: Stream) -> None:
        fetcher = ShardFetcher()
        try:
            self._read_steps(stream, fetcher)
        except BaseException as error:  # whatever it is, the consumer must hear of it
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            fetcher.close()

    def _read_steps(self, stream: Stream, fetcher: ShardFetcher) -> None:
        reader, uploader = StepReader(), None
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)  # a thread begins on GPU 0, and page-locking would make a context there
            uploader = Uploader(self._gpu)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
                if self._closed:
                    return
            # before the step is read: these shards are fetched while it is
            fetcher.want(stream.coming_shards())
            for read in reader.read(stream, self._ranks):
                # the clone advances step by step, so that `cut` is told the step that each batch is for
                step = stream.steps_done
                batches = _with_inputs(read.batches, [self._cut(batch, step) for batch in read.batches])
                upload = uploader.send([batch.inputs for batch in batches]) if uploader is not None else None
                stream.advance_to(read.after)
                with self._changed:
                    self._ready.append(_Ready(read._replace(batches=batches), upload))
                    self._changed.notify_all()


def _with_inputs(batches: list[Batch], inputs: list[Inputs]) -> list[Batch]:
    return [replace(batch, inputs=own) for batch, own in zip(batches, inputs, strict=True)]
