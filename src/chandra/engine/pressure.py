"""Giving way when memory vanishes at run time, step by step, and coming back when it returns."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

from chandra.engine.engine import Engine
from chandra.errors import ChandraError
from chandra.kvcache import KVPool
from chandra.kvcache.allocator import BlockAllocator
from chandra.memory.device import format_size
from chandra.memory.host import memory_available, resident_bytes, trim_heap
from chandra.memory.ledger import Ledger
from chandra.memory.plan import Placement, spread
from chandra.models import Decoder

Action = Literal["swap", "cache", "spill", "chunk", "layers", "context"]

HOST = "cpu"
PERIOD = 0.5  # seconds between two readings of the system's memory
PATIENCE = 2.0  # seconds without pressure before anything is taken back
KEPT = 20  # steps that are remembered
GAIN = 0.1  # share of a cache below which it is not worth growing

_Pool = tuple[KVPool, Sequence[BlockAllocator], Sequence[int]]  # its memory, its books, the least it is to have


@dataclass(frozen=True)
class Step:
    """One step: `nbytes` given back on a device, or, if negative, taken again."""

    action: Action
    device: str
    nbytes: int
    detail: str

    def __str__(self) -> str:
        verb = "gave back" if self.nbytes > 0 else "took again"
        return f"{self.device}: {verb} {format_size(abs(self.nbytes))}: {self.detail}"


class Pressure:
    """Watches the ledger and the host's memory between steps of an engine.

    `available` reads the bytes of host memory that can be taken; below `margin` there is pressure, which ends when
    twice as much is free. `steps` are the last ones taken.
    """

    def __init__(
        self,
        engine: Engine,
        decoder: Decoder,
        ledger: Ledger,
        margin: int,
        available: Callable[[], int] = memory_available,
        patience: float = PATIENCE,
    ) -> None:
        self.engine, self.decoder, self.ledger = engine, decoder, ledger
        self.margin, self.available, self.patience = margin, available, patience
        self.steps: deque[Step] = deque(maxlen=KEPT)
        self._chunk = engine.config.chunk
        self._next = self._last = 0.0
        self._short: dict[str, int] = {}
        self._moved: dict[str, list[tuple[int, Placement]]] = {}  # for each device layers, and where they were

    def poll(self) -> None:
        """To be called between steps. Reads the system's memory every so often; the ledger's caps always."""
        for device in self.ledger.names:
            if (short := -self.ledger.free(device)) > 0:
                self.relieve(device, short, last_resort=True)
                self._complain(device, -self.ledger.free(device))
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + PERIOD
        free = self.available()
        if free < self.margin:
            self._relieve_host(2 * self.margin)
            self._complain("the system", self.margin - self.available())
        elif now - self._last >= self.patience and self.reduced:
            self._recover()

    @property
    def reduced(self) -> bool:
        """Whether something has been given back that could be taken again."""
        pools = [a for _, allocators, _ in self._pools() for a in allocators]
        smaller = any(self._moved.values()) or self.engine.scheduler.chunk < self._chunk
        return bool(smaller) or any(a.limit < a.num_blocks for a in pools)

    def relieve(self, device: str, nbytes: int, last_resort: bool = False, single: bool = False) -> list[Step]:
        """Give at least `nbytes` of a device back, if that can be done, by the first of these that do: unused swap
        space, unused blocks and the prefix cache; blocks of the latest sequences; smaller prefill chunks; layers, which
        move to host memory, or into the file where that is the host or has no room, and come from there for each use.
        The cache stays large enough for one sequence of the full context, unless it is the last resort. `single`: no
        more than one step.

        Returns the steps taken. Their bytes are those of the ledger.
        """
        self._last = time.monotonic()
        measures: dict[Action, Callable[[str, int], str]] = {
            "swap": self._shrink_swap,
            "cache": self._shrink_cache,
            "spill": self._spill,
            "chunk": self._shrink_chunk,
            "layers": self._move_away,
        }
        if last_resort:
            measures["context"] = self._shorten
        goal, taken = self.ledger.free(device) + nbytes, []
        for action, measure in measures.items():
            before = self.ledger.free(device)
            if before >= goal:
                break
            detail = measure(device, goal - before)
            if gained := self.ledger.free(device) - before:
                taken.append(self._note(action, device, gained, detail))
                if single:
                    break
        if device == HOST:  # also where the CPU computes nothing
            trim_heap()
        for backend in self.decoder.backends.distinct():
            if backend.device.name == device:
                backend.release_unused()
        return taken

    def _complain(self, where: str, short: int) -> None:
        """Say that giving way was not enough; again only when it has become worse."""
        if short > max(0, self._short.get(where, 0)):
            _log("error", "%s is short of %s, and nothing is left to give back", where, format_size(short))
        self._short[where] = short

    def _note(self, action: Action, device: str, nbytes: int, detail: str) -> Step:
        step = Step(action, device, nbytes, detail)
        self.steps.append(step)
        if nbytes > 0:
            self.engine.pressure_steps[action] += 1
        _log("warning" if nbytes > 0 else "info", "%s", step)
        return step

    def _relieve_host(self, wanted: int) -> None:
        """Until so much is available: what is given back may never have been in use, and then it helps nobody."""
        ask = 0
        while (short := wanted - self.available()) > 0:
            ask = max(ask, short)
            steps = self.relieve(HOST, ask, single=True)
            if not steps:
                break
            ask = 2 * ask if steps[0].action in ("swap", "cache") else 0

    # smaller

    def _pools(self) -> list[_Pool]:
        """The cache and the swap space."""
        engine = self.engine
        context, chunk, size = engine.context_len, engine.scheduler.chunk, engine.pool.block_size
        floors = [group.max_blocks(context, chunk, size) for group in engine.pool.groups]
        pools: list[_Pool] = [(engine.pool, engine.blocks.allocators, floors)]
        if (swap := engine.blocks.swap) is not None:
            pools.append((swap.pool, swap.allocators, [0] * len(floors)))
        return pools

    def _loose(self, cache: _Pool, device: str) -> dict[int, int]:
        """Blocks of each of the device's groups that could be let go of now."""
        pool, allocators, floors = cache
        return {
            index: max(0, allocator.limit - max(allocator.in_use, floors[index]))
            for index, allocator in enumerate(allocators)
            if pool.groups[index].device == device
        }

    def _shrink(self, cache: _Pool, device: str, nbytes: int) -> str:
        """Let go of blocks that nobody holds, in all the device's groups alike; what remains, in words."""
        pool, allocators, _ = cache
        loose = self._loose(cache, device)
        share = nbytes / max(1, pool.bytes_of(loose))
        for index, count in loose.items():
            if count:
                self.engine.blocks.set_limit(pool, index, allocators[index].limit - min(count, ceil(share * count)))
        return " and ".join(f"{allocators[i].limit} of {allocators[i].num_blocks} blocks" for i in loose)

    def _shrink_swap(self, device: str, nbytes: int) -> str:
        pools = self._pools()
        return f"swap space has {self._shrink(pools[1], device, nbytes)}" if len(pools) > 1 else ""

    def _shrink_cache(self, device: str, nbytes: int) -> str:
        return f"unused cache dropped, {self._shrink(self._pools()[0], device, nbytes)} left"

    def _spill(self, device: str, nbytes: int) -> str:
        return self._preempt(self._pools()[0], device, nbytes)

    def _shorten(self, device: str, nbytes: int) -> str:
        pool, allocators, floors = self._pools()[0]
        left = self._preempt((pool, allocators, [1] * len(floors)), device, nbytes, earliest=True)
        return f"less than a full context, {left}"

    def _preempt(self, cache: _Pool, device: str, nbytes: int, earliest: bool = False) -> str:
        pool, allocators, floors = cache
        most = {i: max(0, allocators[i].limit - floors[i]) for i in self._loose(cache, device)}
        wanted, count = min(nbytes, pool.bytes_of(most)), 0
        while pool.bytes_of(self._loose(cache, device)) < wanted:
            if not self.engine.scheduler.give_way(device != HOST, earliest):
                break
            count += 1
        return f"{count} sequences preempted, {self._shrink(cache, device, nbytes)} left"

    def _shrink_chunk(self, device: str, nbytes: int) -> str:
        config, scheduler = self.engine.config, self.engine.scheduler
        goal = self.ledger.free(device) + nbytes
        least = max(config.max_num_seqs, self.engine.pool.block_size)
        while self.ledger.free(device) < goal and scheduler.chunk > least:
            scheduler.chunk = max(least, scheduler.chunk // 2)
            self.decoder.resize(scheduler.chunk)
        return f"steps of at most {scheduler.chunk} tokens"

    def _move_away(self, device: str, nbytes: int) -> str:
        mover, goal = self.decoder.mover, self.ledger.free(device) + nbytes
        ways: list[tuple[Placement, Placement]] = [("resident", "disk"), ("stream", "disk")]
        if device != HOST:  # where all that it streams is read instead, it needs less memory in two places
            ways = [("resident", "stream"), *ways, ("resident", "disk")]
        for origin, target in ways:
            own = device != HOST or origin == "resident"
            here = [i for i, place in mover.places.items() if place == origin and (mover.device(i) == device) == own]
            self._move([i for i in here if mover.can(i, target)], target, device, goal)
        count = Counter(mover.places.values())
        return f"{count['stream']} of {count.total()} layers copied from the host for each use, {count['disk']} read"

    def _move(self, layers: Sequence[int], target: Placement, device: str, goal: int) -> None:
        """Move as few of the layers as will do, so that they lie evenly among the others, if other devices have room
        for what that takes there."""
        mover, best = self.decoder.mover, dict[int, Placement]()
        free, gained, host_room = self.ledger.free(device), 0, self._host_room() if layers else 0
        for count in range(1, len(layers) + 1):
            places = dict.fromkeys((layers[i] for i in spread(count, len(layers))), target)
            change = self._change(places)
            if free + gained >= goal:
                break
            if -change[device] > gained and self._fits(change, host_room, device):
                best, gained = places, -change[device]
        before = [(index, mover.places[index]) for index in best]
        if self._rearrange(best):
            self._moved.setdefault(device, []).extend(before)

    def _rearrange(self, places: Mapping[int, Placement]) -> bool:
        try:
            if places:
                self.decoder.move(places)
        except ChandraError as error:
            _log("error", "layers cannot be moved: %s", error)
            return False
        return bool(places)

    def _fits(self, change: Mapping[str, int], host_room: int, without: str = "") -> bool:
        """Whether all devices but one have room for it."""
        room = {name: self.ledger.free(name) for name in change}
        room[HOST] = min(self.ledger.free(HOST), host_room)
        return all(more <= max(0, room[name]) for name, more in change.items() if name != without)

    def _change(self, places: Mapping[int, Placement]) -> Counter[str]:
        """Bytes that each device would have to give, or would gain, if layers moved."""
        mover, change = self.decoder.mover, Counter[str]()
        for sign, at in ((1, {**mover.places, **places}), (-1, mover.places)):
            for (device, _), nbytes in mover.needed(at).items():
                change[device] += sign * nbytes
        return change

    # larger again

    def _host_room(self) -> int:
        """Bytes that can be taken of the host. What is reserved and not in use yet counts as taken."""
        reserved = sum(row.reserved for row in self.ledger.rows() if row.device == HOST)
        return self.available() - 2 * self.margin - max(0, reserved - sum(resident_bytes()))

    def _recover(self) -> None:
        """Take back what was given last first."""
        host_room, start = self._host_room(), self.ledger.free(HOST)

        def room(device: str) -> int:
            free = self.ledger.free(device)
            return min(free, host_room - (start - free)) if device == HOST else free

        if self._move_back(host_room):
            return
        self._grow_chunk(room)
        actions: tuple[Action, ...] = ("cache", "swap")
        for cache, action in zip(self._pools(), actions, strict=False):
            for device in self.ledger.names:
                self._grow(cache, action, device, room(device))

    def _move_back(self, host_room: int) -> bool:
        """The layers that moved last, as few at once as can be, as it takes time. False if there is no room for any."""
        for device, moved in self._moved.items():
            best, least = dict[int, Placement](), 0
            for count in range(1, len(moved) + 1):
                places = dict(reversed(moved[-count:]))  # a layer may have moved twice
                change = self._change(places)
                if best and change[device] > least:  # the last ones give the slots back, and cost no more than one
                    break
                if self._fits(change, host_room):
                    best, least = places, change[device]
            if self._rearrange(best):
                back = [index for index, place in best.items() if place == "resident"]
                for name, records in self._moved.items():
                    kept = records[: -len(best)] if name == device else records
                    self._moved[name] = [record for record in kept if record[0] not in back]
                self._note("layers", device, -least, f"layers {', '.join(map(str, sorted(best)))} moved back")
                return True
        return False

    def _grow_chunk(self, room: Callable[[str], int]) -> None:
        scheduler = self.engine.scheduler
        chunk = min(self._chunk, 2 * scheduler.chunk)
        now, then = self.decoder.workspace(scheduler.chunk), self.decoder.workspace(chunk)
        if chunk > scheduler.chunk and all(then[name] - now[name] <= room(name) for name in now):
            self.decoder.resize(chunk)
            scheduler.chunk = chunk
            for name in now:
                self._note("chunk", name, now[name] - then[name], f"steps of at most {chunk} tokens")

    def _grow(self, cache: _Pool, action: Action, device: str, room: int) -> None:
        pool, allocators, _ = cache
        here = [i for i, group in enumerate(pool.groups) if group.device == device]
        missing = {i: allocators[i].num_blocks - allocators[i].limit for i in here}
        share = min(1.0, room / max(1, pool.bytes_of(missing)))
        more = {i: int(share * count) for i, count in missing.items()}
        least = 1.0 if share == 1 else GAIN * sum(allocators[i].num_blocks for i in here)
        if sum(more.values()) < least:
            return
        for index, count in more.items():
            self.engine.blocks.set_limit(pool, index, allocators[index].limit + count)
        left = " and ".join(f"{allocators[i].limit} of {allocators[i].num_blocks} blocks" for i in here)
        self._note(action, device, -pool.bytes_of(more), left)


def _log(level: str, message: str, *values: object) -> None:
    import logging  # here: with what it imports it takes half a megabyte, and this is rare

    getattr(logging.getLogger("chandra"), level)(message, *values)
