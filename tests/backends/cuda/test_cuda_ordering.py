"""Copies beside computation, on streams that do their work as late or as early as chance has it.

What a GPU may do in any order that streams and events allow is done in one of them. The accelerator's own code and all
that relies on it run as they are; only torch's streams are played.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from chandra.backends.cuda import accelerator
from chandra.kvcache import BlockManager, KVPool, LayerGroup, SwapSpace
from chandra.memory.device import Device
from chandra.memory.ledger import Ledger
from chandra.models.weight_stream import ReadStream, SlotStream, Stream
from chandra.ops.contracts import Array, Copy
from chandra.ops.reference import ReferenceBackend

SEEDS = range(30)
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.over = gpu, False

    def synchronize(self) -> None:
        while not self.over:
            self.gpu.advance(1)


class Queue:
    """A stream: what is to be done in order. An event in it is waited for."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.work = gpu, deque[Callable[[], None] | Event]()
        gpu.queues.append(self)

    def push(self, work: Callable[[], None] | Event) -> None:
        with self.gpu.lock:
            self.work.append(work)
            self.gpu.advance(self.gpu.chance.choice((0, 0, 0, 1, 9)))

    def record_event(self) -> Event:
        event = Event(self.gpu)
        self.push(lambda: setattr(event, "over", True))
        return event

    def wait_event(self, event: Event) -> None:
        self.push(event)

    def wait_stream(self, other: Queue) -> None:
        self.wait_event(other.record_event())

    def ready(self) -> bool:
        return bool(self.work) and (not isinstance(self.work[0], Event) or self.work[0].over)


class Gpu:
    """Plays `torch.cuda`. `OutOfMemoryError` and the like are looked up when something is raised."""

    OutOfMemoryError = AcceleratorError = MemoryError

    def __init__(self, seed: int) -> None:
        self.chance, self.lock, self.cuda = random.Random(seed), threading.RLock(), self
        self.queues: list[Queue] = []
        self.computing, self.copies = Queue(self), Queue(self)
        self.now = self.computing

    def current_stream(self, _: object) -> Queue:
        return self.computing

    @contextmanager
    def stream(self, queue: Queue) -> Iterator[None]:
        self.now = queue
        yield
        self.now = self.computing

    def advance(self, count: int) -> None:
        with self.lock:
            for _ in range(count):
                ready = [queue for queue in self.queues if queue.ready()]
                if not ready:
                    return
                work = self.chance.choice(ready).work.popleft()
                if not isinstance(work, Event):
                    work()

    def settle(self) -> None:
        while any(queue.work for queue in self.queues):
            self.advance(1)


class Tensor:
    def __init__(self, gpu: Gpu, array: Array) -> None:
        self.gpu, self.array = gpu, array

    def copy_(self, source: Tensor, non_blocking: bool) -> None:
        assert non_blocking
        self.gpu.now.push(lambda: np.copyto(self.array, source.array))


class Device0(ReferenceBackend):
    """Copies as the accelerator of a GPU does it."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__(Device("cuda:0", "cuda", 1 << 30))
        self.gpu = gpu
        self.accelerator = object.__new__(accelerator.CudaAccelerator)
        self.accelerator.device, self.accelerator._copies = "cuda:0", gpu.copies  # type: ignore[assignment]

    def fetch(self, host: Array, out: Array) -> Copy:
        return self.accelerator.copy(Tensor(self.gpu, host), Tensor(self.gpu, out), beside=True)  # type: ignore[arg-type]

    def store(self, array: Array, host: Array) -> Copy:
        return self.fetch(array, host)

    def write(self, host: Array, out: Array) -> None:
        self.gpu.computing.push(lambda: np.copyto(out, host))
        self.gpu.settle()

    def download(self, array: Array) -> Array:
        self.gpu.settle()
        return array.copy()


@pytest.fixture(params=SEEDS)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    played = Gpu(request.param)
    monkeypatch.setattr(accelerator, "torch", played)
    return played


def steps(gpu: Gpu, stream: Stream[Any], count: int, seen: list[int]) -> list[int]:
    """Some steps, some of which are cut short; the layers that were used. `seen` gets what was read on the device."""
    used = []
    for _ in range(6):
        stop = gpu.chance.choice((count, count, gpu.chance.randrange(count)))
        for index in range(stop):
            slot = stream.acquire(index)
            used.append(index)
            gpu.computing.push(lambda slot=slot: seen.append(int(slot[0]) if (slot == slot[0]).all() else -1))
            stream.release(index)
    return used


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_slot_is_read_before_the_next_layer_comes_and_after_its_own(gpu: Gpu, count: int) -> None:
    images = {i: np.full(8, i + 1, np.uint8) for i in range(count)}
    slots = [np.zeros(8, np.uint8) for _ in range(2)]
    stream: Stream[Any] = SlotStream(Device0(gpu), images, slots, dict.fromkeys(images, slots))  # type: ignore[arg-type]
    seen: list[int] = []
    used = steps(gpu, stream, count, seen)
    stream.close()
    for image in images.values():
        image[:] = 99  # its memory is somebody else's now
    gpu.settle()
    assert seen == [i + 1 for i in used]


@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_buffer_is_filled_when_what_it_held_has_been_copied(gpu: Gpu, count: int) -> None:
    slot, buffers = np.zeros(8, np.uint8), [np.zeros(8, np.uint8) for _ in range(2)]

    def read(index: int, out: Bytes) -> None:
        with gpu.lock:
            out[:4] = index + 1
            gpu.advance(gpu.chance.randrange(3))
            out[4:] = index + 1

    sizes = dict.fromkeys(range(count), 8)
    stream: Stream[Any] = ReadStream(Device0(gpu), read, sizes, buffers, slot, dict.fromkeys(range(count), slot))  # type: ignore[arg-type]
    seen: list[int] = []
    used = steps(gpu, stream, count, seen)
    stream.close()
    for buffer in buffers:
        buffer[:] = 99
    gpu.settle()
    assert seen == [i + 1 for i in used]


class Cache:
    """Sequences whose keys are their numbers, written and read by ops on the device."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, devices = gpu, [Device("cpu", "cpu", 1 << 30), Device("cuda:0", "cuda", 1 << 30)]
        backends = {"cpu": ReferenceBackend(), "cuda:0": Device0(gpu)}
        groups, ledger = [LayerGroup((0, 1), 1, 2, None, "cuda:0")], Ledger(devices)
        self.pool = KVPool(groups, [6], 2, "f32", backends, ledger)
        self.swap = SwapSpace(self.pool, [8], backends, ledger)
        self.manager = BlockManager(groups, [6], 2, 8, False, self.swap)
        self.wrong: list[int] = []

    def _slots(self, seq: int, start: int, stop: int) -> list[tuple[Array, int, int]]:
        row = self.manager.tables[seq].rows[0]
        layers = [self.pool.layer(i) for i in range(2)]
        return [(a, int(row[p // 2]), p % 2) for x in layers for a in (x.k, x.v) for p in range(start, stop)]

    def grow(self, seq: int, tokens: int) -> bool:
        before = self.manager.tables[seq].num_tokens
        if not self.manager.append(seq, tokens):
            return False

        places = self._slots(seq, before, tokens)

        def op() -> None:
            for array, block, offset in places:
                array[block, 0, offset] = seq

        self.gpu.computing.push(op)
        self.manager.commit(seq, np.arange(tokens, dtype=np.int32), tokens)
        return True

    def read(self, seq: int) -> None:
        places = self._slots(seq, 0, self.manager.tables[seq].num_tokens)

        def op() -> None:
            self.wrong += [seq for array, block, offset in places if not (array[block, 0, offset] == seq).all()]

        self.gpu.computing.push(op)


def test_blocks_leave_and_come_back_beside_computation(gpu: Gpu) -> None:
    cache, tokens = Cache(gpu), dict.fromkeys(range(1, 5), 0)
    manager = cache.manager
    for seq in tokens:
        manager.allocate(seq, np.zeros(1, np.int32))
    moved = 0
    for _ in range(60):
        seq = gpu.chance.choice(list(tokens))
        if seq in manager.swapped:
            moved += manager.swap_in(seq)
        elif gpu.chance.random() < 0.4:
            manager.swap_out(seq, np.full(tokens[seq], seq, np.int32))
        elif tokens[seq] < 10 and cache.grow(seq, tokens[seq] + 1):
            tokens[seq] += 1
        for other in manager.tables:
            cache.read(other)
        if gpu.chance.random() < 0.1:
            pool, books = gpu.chance.choice([(cache.pool, manager), (cache.swap.pool, cache.swap)])
            (allocator,) = books.allocators
            while pool is cache.pool and gpu.computing.work:  # blocks are moved by computation: here, at once
                gpu.advance(1)
            manager.set_limit(pool, 0, gpu.chance.randint(max(1, allocator.in_use), allocator.num_blocks))
    assert moved
    cache.swap.close()
    gpu.settle()
    assert not cache.wrong
