"""Layers whose weights are not where they are computed: brought there for each use, while the layers before compute.

Every stream holds two layers at a time, and turns through its layers step after step. Its reader is one thread, which
ends with the stream; what goes wrong in it is raised in the step that needs the layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Generic, TypeVar

from chandra.models.layers import DecoderLayer
from chandra.ops.contracts import Array, Backend, Copied, Copy, HostBytes, IntArray, Linear, Norm

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

T = TypeVar("T")

PIECES = 32  # in which a head that stays in the file is computed
_AROUND = 64 << 10  # bytes that the system maps around one that is touched


def piece_rows(rows: int) -> int:
    """Rows of a piece of a head: whole panels."""
    return -(-rows // (16 * PIECES)) * 16


def lookup_bytes(rows: int, nbytes: int) -> int:
    """Bytes of a mapped table of `nbytes` that are in memory once so many rows have been looked up."""
    return min(nbytes, rows * _AROUND)


class Stream(ABC, Generic[T]):
    """Things that take turns in memory. Used by one thread at a time; a step may be cut short anywhere."""

    @cached_property
    def _reader(self) -> ThreadPoolExecutor:
        from concurrent.futures import ThreadPoolExecutor  # here: nothing is streamed in most processes

        return ThreadPoolExecutor(1)

    @abstractmethod
    def acquire(self, index: int) -> T:
        """One of them, good until `release`. Raises what reading or copying raised."""

    @abstractmethod
    def release(self, index: int) -> None:
        """It has been used; another one may take its memory."""

    @abstractmethod
    def close(self) -> None:
        """Wait for what is under way, and let go of all memory."""


class _Turns:
    """Counts through the layers of a stream, round and round."""

    def __init__(self, order: Collection[int]) -> None:
        self._order = sorted(order)
        self.now = 0

    def seek(self, index: int) -> None:
        """Go on to a layer; a step that was cut short leaves some out."""
        while self.at(self.now) != index:
            self.now += 1

    def at(self, turn: int) -> int:
        return self._order[turn % len(self._order)]


class SlotStream(Stream[DecoderLayer]):
    """Layers in host memory, copied to slots on the device.

    `images[i]`: the weights of layer i in the device's layout; `layers[i]`: the layer bound to each of the slots.
    """

    def __init__(
        self,
        backend: Backend,
        images: Mapping[int, HostBytes],
        slots: Sequence[Array],
        layers: Mapping[int, Sequence[DecoderLayer]],
    ) -> None:
        self._backend, self._images, self._slots, self._layers = backend, dict(images), list(slots), dict(layers)
        self._turns = _Turns(self._images)
        self._held: list[tuple[int, Copy] | None] = [None] * len(slots)

    def acquire(self, index: int) -> DecoderLayer:
        self._turns.seek(index)
        for ahead in range(len(self._slots)):
            self._fill(self._turns.now + ahead)
        slot = self._turns.now % len(self._slots)
        held = self._held[slot]
        assert held is not None
        try:
            held[1].wait()
        except BaseException:
            self._held[slot] = None
            raise
        return self._layers[index][slot]

    def release(self, index: int) -> None:  # noqa: ARG002
        self._turns.now += 1
        self._fill(self._turns.now + len(self._slots) - 1)

    def _fill(self, turn: int) -> None:
        slot, index = turn % len(self._slots), self._turns.at(turn)
        held = self._held[slot]
        if held is None or held[0] != index:
            image = self._images[index]
            self._held[slot] = None
            self._held[slot] = index, self._backend.fetch(image, self._slots[slot][: image.nbytes])

    def close(self) -> None:
        for held in self._held:
            if held is not None:
                with suppress(Exception):
                    held[1].done()
        self._held.clear()
        self._images.clear()
        self._slots.clear()
        self._layers.clear()


class ReadStream(Stream[DecoderLayer]):
    """Layers in a file, read into host buffers by a thread and copied from there to a slot on the device.

    `read(i, out)` writes the weights of layer i in the device's layout, `nbytes[i]` of them.
    """

    def __init__(
        self,
        backend: Backend,
        read: Callable[[int, HostBytes], None],
        nbytes: Mapping[int, int],
        buffers: Sequence[HostBytes],
        slot: Array,
        layers: Mapping[int, DecoderLayer],
    ) -> None:
        self._backend, self._read, self._nbytes = backend, read, nbytes
        self._buffers, self._slot, self._layers = list(buffers), slot, dict(layers)
        self._turns = _Turns(nbytes)
        self._held: list[tuple[int, Future[None]] | None] = [None] * len(buffers)
        self._copies: list[Copy] = [Copied() for _ in buffers]  # out of each

    def acquire(self, index: int) -> DecoderLayer:
        turns, count = self._turns, len(self._buffers)
        turns.seek(index)
        for ahead in range(count):
            self._begin(turns.now + ahead)
        buffer = turns.now % count
        held, nbytes = self._held[buffer], self._nbytes[index]
        assert held is not None
        try:
            held[1].result()
            self._copies[buffer] = self._backend.fetch(self._buffers[buffer][:nbytes], self._slot[:nbytes])
            self._copies[buffer].wait()
        except BaseException:
            self._held[buffer] = None
            raise
        self._begin(turns.now + count)
        return self._layers[index]

    def release(self, index: int) -> None:  # noqa: ARG002
        self._turns.now += 1

    def _begin(self, turn: int) -> None:
        buffer, index = turn % len(self._buffers), self._turns.at(turn)
        held = self._held[buffer]
        if held is None or held[0] != index:
            self._held[buffer] = index, self._reader.submit(self._fill, index, buffer, self._copies[buffer])

    def _fill(self, index: int, buffer: int, copy: Copy) -> None:
        with suppress(Exception):  # it was raised where it mattered
            copy.done()
        self._read(index, self._buffers[buffer][: self._nbytes[index]])

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)
        for copy in self._copies:
            with suppress(Exception):
                copy.done()
        self._held.clear()
        self._buffers.clear()
        self._layers.clear()
        self._slot = None


class MappedStream(Stream[T]):
    """Things computed straight from a mapped file: a thread brings the pages of one into memory while the one before is
    used, and they are dropped when it has been.

    `touch(i)` brings the pages, `drop(i)` drops them. `items` are filled before the first is acquired.
    """

    HELD = 2  # at a time: the one in use and the next

    def __init__(self, touch: Callable[[int], None], drop: Callable[[int], None]) -> None:
        self._touch, self._drop = touch, drop
        self.items: dict[int, T] = {}
        self._touched: dict[int, Future[None]] = {}

    def acquire(self, index: int) -> T:
        wanted = self._from(index)[: self.HELD]
        for other in [other for other in self._touched if other not in wanted]:
            self._forget(other)
        self._bring(wanted)
        try:
            self._touched[index].result()
        except BaseException:
            del self._touched[index]
            raise
        return self.items[index]

    def release(self, index: int) -> None:
        if len(self.items) > self.HELD:
            self._forget(index)
            self._bring(self._from(index)[1:])

    def _from(self, index: int) -> list[int]:
        """One of them, and those that follow it: one more than is held, or all."""
        order = sorted(self.items)
        at = order.index(index)
        return [order[(at + ahead) % len(order)] for ahead in range(min(self.HELD + 1, len(order)))]

    def _bring(self, indices: Sequence[int]) -> None:
        for each in indices:
            if each not in self._touched:
                self._touched[each] = self._reader.submit(self._touch, each)

    def _forget(self, index: int) -> None:
        with suppress(Exception):  # nobody waits for it any more
            self._touched.pop(index).result()
        self._drop(index)

    def close(self) -> None:
        if "_reader" in vars(self):
            self._reader.shutdown(cancel_futures=True)
        for index in list(self._touched):
            self._forget(index)
        self.items.clear()


class MappedHead:
    """A head computed straight from the mapped file, piece by piece.

    `pieces.items[i]` computes the `step` rows from `i * step` on; `buffer`: float32 for their logits, for as many rows
    as a batch wants.
    """

    def __init__(self, pieces: MappedStream[Linear], step: int, buffer: Array) -> None:
        self._pieces, self._step, self._buffer = pieces, step, buffer

    def logits(
        self, backend: Backend, x: Array, rows: IntArray, norm: Norm, scale: float, softcap: float | None, out: Array
    ) -> None:
        """As `Backend.logits`."""
        for index in sorted(self._pieces.items):
            linear = self._pieces.acquire(index)
            width, start = linear.weight.shape[0], index * self._step
            piece = self._buffer[: len(rows) * width].reshape(len(rows), width)
            backend.logits(x, rows, norm, linear, scale, softcap, piece)
            out[:, start : start + width] = piece
            self._pieces.release(index)

    def close(self) -> None:
        """Wait for what is under way, and let go of all pages."""
        self._pieces.close()
