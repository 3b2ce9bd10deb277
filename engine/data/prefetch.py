"""Reads the next steps in a thread while the current one trains.

Invariant: the loader that was handed in describes what was consumed, never what was read ahead; the thread works
on a clone of it. An error of the thread is raised by the call that would have returned its batches, and again by
every later one. The thread ends with `close` (or the context), even where nobody consumes.
"""

from __future__ import annotations

from collections import deque
from threading import Condition, Thread

import torch

from engine.data.ahead import FetchAhead
from engine.data.batch import Batch
from engine.data.loader import Loader, State
from engine.data.stream import SampleId

DEPTH = 2
"""Steps that may lie ready."""


class Prefetcher:
    """A `Loader` for one data rank, some steps ahead; `state` and the sample ids are the consumer's."""

    def __init__(
        self,
        loader: Loader,
        data_rank: int,
        data_size: int,
        micro_batch_size: int,
        depth: int = DEPTH,
        gpu: torch.device | None = None,
    ) -> None:
        """With a `gpu`, inputs lie in page-locked memory, from where it copies them while it computes."""
        self._loader = loader
        self._gpu = gpu
        self._shape = (data_rank, data_size, micro_batch_size)
        self._depth = depth
        self._start()

    def step(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch; waits until they are read. Raises what reading did."""
        with self._changed:
            assert not self._closed, "the prefetcher is closed"
            self._changed.wait_for(lambda: self._ready or self._error)
            if not self._ready:
                assert self._error is not None
                raise self._error
            batches = self._ready.popleft()
            self._changed.notify_all()
        self._loader.skip()
        return batches

    def wait(self, seconds: float) -> bool:
        """Whether `step` would return (or raise) at once; waits for that for so long at most."""
        with self._changed:
            return bool(self._changed.wait_for(lambda: self._ready or self._error, seconds))

    def state(self) -> State:
        """State after the last step that was consumed."""
        return self._loader.state()

    def restore(self, state: State) -> None:
        """Goes on at a saved state; what was read ahead is dropped. Raises `DataError` as `Loader.restore` does."""
        self.close()
        self._loader.restore(state)
        self._start()

    def next_sample_ids(self, count: int) -> list[SampleId]:
        """Addresses of the next samples that `step` will return (over all ranks)."""
        return self._loader.next_sample_ids(count)

    def sample_hash(self, count: int) -> str:
        """`Loader.sample_hash` of the next samples that `step` will return (over all ranks)."""
        return self._loader.sample_hash(count)

    def close(self) -> None:
        """Ends the thread and waits for it; safe to call twice."""
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
        self._ready: deque[list[Batch]] = deque()
        self._error: BaseException | None = None
        self._closed = False
        # a daemon, so that a process which forgets to close can still end
        self._thread = Thread(target=self._read_ahead, args=(self._loader.clone(),), name="prefetch", daemon=True)
        self._thread.start()

    def _read_ahead(self, loader: Loader) -> None:
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)  # a thread begins on GPU 0, and page-locking would make a context there
        ahead = FetchAhead()
        try:
            self._read_steps(loader, ahead)
        finally:
            ahead.close()

    def _read_steps(self, loader: Loader, ahead: FetchAhead) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
                if self._closed:
                    return
            try:
                ahead.want(loader.coming())
                batches = loader.step(*self._shape)
                if self._gpu is not None:
                    batches = [batch.pinned() for batch in batches]
            except BaseException as error:  # whatever it is, the consumer must hear of it
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._ready.append(batches)
                self._changed.notify_all()
