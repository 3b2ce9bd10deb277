"""A GPU that is played: memory is the host's, copies are done at once, and what waits for what is noted.

Every stream counts what is put on it; what a thread or another stream has waited for is all that it may rely on. So a
wait that is missing is found each time, and not only when a real copy would have been too late.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

GPU = torch.device("cuda", 3)


class PlayedGpu:
    """`log` has (what, thread) of the calls that are told apart by who makes them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, str]] = []
        self.locked_writes: list[torch.Size] = []
        """Shapes of what was written into page-locked memory."""
        self.computing = Stream(self)
        self.copied_to: dict[int, tuple[Stream, int]] = {}
        self.copied_from: dict[int, tuple[Stream, int]] = {}
        self.recorded: set[tuple[int, Stream]] = set()
        self.seen_by_thread: dict[str, dict[Stream, int]] = {}
        # a class for each of both: views have it, and attributes of a tensor they have not
        self._page_locked = type("PageLocked", (PageLocked,), {"gpu": self})
        self._on_gpu = type("OnGpu", (OnGpu,), {"gpu": self})
        self._kept: list[torch.Tensor] = []  # no address comes twice
        self._current = threading.local()
        self._plain_empty = torch.empty
        monkeypatch.setattr(torch, "empty", self.empty)
        for name in ("set_device", "current_stream", "stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(self))
        monkeypatch.setattr(torch.cuda, "Event", lambda blocking: Event(self))

    def use(self, inputs: dict[str, torch.Tensor]) -> None:
        """Computes with inputs on the computing stream; asserts that it may."""
        for name, tensor in inputs.items():
            memory = address(tensor)
            stream, place = self.copied_to[memory]
            assert self.computing.seen.get(stream, 0) >= place, f"{name} is used before its copy is known to be done"
            assert (memory, self.computing) in self.recorded, f"{name} may be overwritten while it is in use"

    def note(self, what: str) -> None:
        self.log.append((what, threading.current_thread().name))

    def set_device(self, device: torch.device) -> None:
        self.note(f"set_device {device}")

    def current_stream(self, device: torch.device | None = None) -> Stream:
        return getattr(self._current, "stream", self.computing)

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._current.stream = stream
        yield
        del self._current.stream

    def empty(self, *shape: Any, device: Any = None, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made = self._plain_empty(*shape, **options)
        if not pin_memory and device != GPU:
            return made
        made = made.as_subclass(self._page_locked if pin_memory else self._on_gpu)
        self._kept.append(made)
        return made


class Stream:
    def __init__(self, gpu: PlayedGpu) -> None:
        self.gpu = gpu
        self.count = 0
        self.seen: dict[Stream, int] = {}
        """Of other streams, how far they are known to be when this one goes on."""

    def wait_event(self, event: Event) -> None:
        if event.stream is not None:
            self.seen[event.stream] = max(self.seen.get(event.stream, 0), event.place)


class Event:
    def __init__(self, gpu: PlayedGpu) -> None:
        self.gpu, self.stream, self.place = gpu, None, 0

    def record(self, stream: Stream) -> None:
        self.stream, self.place = stream, stream.count

    def synchronize(self) -> None:
        self.gpu.note("wait")
        if self.stream is not None:
            seen = self.gpu.seen_by_thread.setdefault(threading.current_thread().name, {})
            seen[self.stream] = max(seen.get(self.stream, 0), self.place)


class PageLocked(torch.Tensor):
    gpu: PlayedGpu

    def copy_(self, source: torch.Tensor) -> torch.Tensor:
        gpu = self.gpu
        gpu.note("write page-locked memory")
        gpu.locked_writes.append(source.shape)
        if address(self) in gpu.copied_from:
            stream, place = gpu.copied_from[address(self)]
            seen = gpu.seen_by_thread.get(threading.current_thread().name, {})
            assert seen.get(stream, 0) >= place, "page-locked memory is written while a copy from it may be under way"
        plain(self).copy_(source)
        return self


class OnGpu(torch.Tensor):
    gpu: PlayedGpu

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        gpu = self.gpu
        gpu.note("copy")
        stream = gpu.current_stream()
        assert isinstance(source, PageLocked), "the copy goes through other memory, and the host waits"
        assert source.is_contiguous()
        assert non_blocking, "the host waits for the copy"
        assert stream is not gpu.computing, "the copy waits for what is computed"
        stream.count += 1
        gpu.copied_to[address(self)] = gpu.copied_from[address(source)] = (stream, stream.count)
        plain(self).copy_(plain(source))
        return self

    def record_stream(self, stream: Any) -> None:
        self.gpu.recorded.add((address(self), stream))


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(torch.Tensor)
