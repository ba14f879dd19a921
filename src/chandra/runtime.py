"""The composition root: store -> plan -> load -> engine."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from threading import Event, RLock, Thread
from typing import TYPE_CHECKING

from chandra.backends import make_backend
from chandra.backends.cpu import _cpu
from chandra.checkpoint import Checkpoint, MappedCheckpoint, open_checkpoint
from chandra.config import Settings
from chandra.engine import Engine, EngineConfig, Output, Pressure
from chandra.errors import BudgetExceeded, ChandraError, CheckpointError
from chandra.kvcache import KVPool, SwapSpace, group_layers, swap_slots
from chandra.memory.device import Device
from chandra.memory.host import memory_available, peak_resident, resident_bytes
from chandra.memory.ledger import Kind, Ledger, Reservation
from chandra.memory.plan import Plan
from chandra.memory.running import MemoryRow, Running, StateFile, began
from chandra.models import Backends, Decoder, ModelSpec, load_decoder, read_spec
from chandra.ops.contracts import Backend
from chandra.planner import PlanRequest, cached_rate, discover, observe, plan, plannable, tensor_formats
from chandra.planner.kernels import (
    BuiltKernels,
    Limits,
    check_scratch,
    host_workspace,
    packing,
    promise_scratch,
    repacking,
)
from chandra.planner.request import HOST_MARGIN
from chandra.store import Progress, Store, StoredModel
from chandra.text import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from chandra.text.template import ChatTemplate

# Share of the host's free memory below which there is pressure. A plan leaves three times as much alone.
PRESSURE_MARGIN = HOST_MARGIN / 3
IDLE_PERIOD = 1.0  # seconds between two looks at the memory while no step is computed


@dataclass(eq=False)
class Runtime:
    """A loaded model: everything that answers need. Close it to give all memory back."""

    stored: StoredModel
    spec: ModelSpec
    plan: Plan
    ledger: Ledger
    tokenizer: Tokenizer
    engine: Engine
    decoder: Decoder
    pool: KVPool
    pressure: Pressure
    load_seconds: float
    resources: ExitStack
    state: StateFile
    check_files: Callable[[], None]
    loaded: float = field(default_factory=time.time)
    lock: RLock = field(default_factory=RLock)  # to be held while the engine is used

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def base_model(self) -> bool:
        """Whether it has no chat template of its own, and so most likely continues text."""
        return not self.tokenizer.chat_template

    @cached_property
    def template(self) -> ChatTemplate:
        """What makes prompts of chats, compiled when first needed. Raises TemplateError."""
        from chandra.text.template import ChatTemplate  # here: jinja2 takes time to import

        return ChatTemplate.of(self.tokenizer, self.spec.arch)

    def memory(self) -> tuple[MemoryRow, ...]:
        """Predicted against actual, per device and kind; the host's resident set as the system counts it comes last."""
        rows = {(row.device, row.kind): row for row in self.ledger.rows()}
        predicted = {(p.device, p.kind): p.nbytes for p in self.plan.predictions}
        out = []
        for key in sorted(rows.keys() | predicted.keys()):
            row = rows.get(key)
            actual, peak = (row.reserved, row.peak) if row else (0, 0)
            out.append(MemoryRow(key[0], str(key[1]), predicted.get(key, 0), actual, peak))
        for device in self.plan.devices:
            used = sum(row.reserved for row in rows.values() if row.device == device.name)
            out.append(
                MemoryRow(device.name, "all", self.plan.predicted(device.name), used, self.ledger.highest(device.name))
            )
        resident = sum(resident_bytes())
        out.append(MemoryRow("cpu", "resident", self.plan.predicted("cpu"), resident, peak_resident()))
        return tuple(out)

    def tell(self, now: bool = False) -> None:
        """Let `chandra ps` know how it stands, at most once a second unless it is to be `now`. Raises BudgetExceeded if
        the CPU's kernels have taken more than any plan of this process said."""
        if self.state.tell(self._describe, now):
            check_scratch()

    def _describe(self) -> Running:
        counters, workload = self.engine.counters(), self.plan.workload
        return Running(
            pid=os.getpid(),
            began=began(os.getpid()) or 0,
            model=self.name,
            format=self.plan.format,
            context=workload.context,
            parallel=workload.parallel,
            loaded=self.loaded,
            updated=time.time(),
            sequences=counters.running + counters.waiting,
            tokens=counters.generated_tokens,
            rows=self.memory(),
            pressure=tuple(map(str, self.pressure.steps)),
        )

    def step(self) -> list[Output]:
        """Compute one batch, after giving way where memory has become short. A device that runs out of memory in the
        middle gets what it asked for, and the batch is computed again. Raises CheckpointError if it has
        needed what a file has lost meanwhile."""
        with self.lock:
            self.poll()
            self.tell()
            outputs = self._step()
            self.check_files()
            return outputs

    def _step(self) -> list[Output]:
        try:
            return self.engine.step()
        except BudgetExceeded as error:
            short = error.device, error.nbytes  # not the error: it holds the layers that may have to move
            if error.device not in self.ledger.names:
                raise
        self.pressure.relieve(*short, last_resort=True)
        return self.engine.step()

    def poll(self) -> None:
        """Give way where memory has become short, or take back what was given; a thread does so while no step is."""
        with self.lock:
            before = tuple(self.pressure.steps)
            self.pressure.poll()
            if before != tuple(self.pressure.steps):
                self.tell(now=True)

    def close(self) -> None:
        """Give everything back; doing so twice is harmless."""
        self.resources.close()


def load(
    model: str | Path | StoredModel,
    request: PlanRequest,
    settings: Settings,
    progress: Progress | None = None,
    prefix_caching: bool = True,
) -> Runtime:
    """Find, plan and load a model. Raises what these steps raise; nothing stays reserved then."""
    started = time.monotonic()
    margin = int(PRESSURE_MARGIN * memory_available())
    store = Store(settings.home, settings.registry)
    stored = model if isinstance(model, StoredModel) else store.get(str(model), progress=progress)
    with ExitStack() as resources:
        at_last = resources.enter_context(ExitStack())  # when all else is given back
        resources.enter_context(store.hold(stored))
        checkpoint = open_checkpoint(stored.path)
        resources.callback(checkpoint.close)
        check_files = _guard(checkpoint, resources)
        spec = read_spec(checkpoint)
        tokenizer = load_tokenizer(checkpoint)
        tokenizer.check_rows(spec.vocab_size)
        checkpoint.release_header()
        request = request.with_defaults(settings)
        constraints = request.constraints()
        devices, machine = discover(request, settings)
        ended = observe(settings.home, spec.vocab_size)
        if constraints.disk:
            machine = replace(machine, cached=cached_rate(checkpoint))
        made = plan(plannable(stored.name, spec, checkpoint, constraints.format), devices, machine, constraints)
        ledger = Ledger(made.devices)
        at_last.callback(ended, made, ledger)
        make = partial(make_backend, threads=settings.threads, isa=settings.cpu)
        _, decoder, pool, engine = assemble(
            checkpoint, spec, made, ledger, resources, make, tokenizer.eos_ids, progress, prefix_caching
        )
        state = StateFile(settings.home)
        resources.callback(state.remove)
        check_files()
        runtime = Runtime(
            stored=stored,
            spec=spec,
            plan=made,
            ledger=ledger,
            tokenizer=tokenizer,
            engine=engine,
            decoder=decoder,
            pool=pool,
            pressure=Pressure(engine, decoder, ledger, margin),
            load_seconds=time.monotonic() - started,
            resources=resources.pop_all(),
            state=state,
            check_files=check_files,
        )
        promise_scratch(spec, _limits(made))
        runtime.tell(now=True)
        _begin_watch(runtime)
        return runtime


def _guard(checkpoint: MappedCheckpoint, resources: ExitStack) -> Callable[[], None]:
    """What raises CheckpointError if something was read from a file that had become shorter than it was when it was
    opened, which ends no process then."""
    guards = [_cpu.Guard(view) for view in checkpoint.views()]
    resources.callback(guards.clear)

    def check() -> None:
        if any(guard.lost for guard in guards):
            raise CheckpointError(
                f"{checkpoint.path} was cut short while it was in use",
                "load the model again; replace files by renaming",
            )

    return check


def _begin_watch(runtime: Runtime) -> None:
    closed = Event()
    watch = Thread(target=_watch, args=(weakref.ref(runtime), closed), name="chandra-watch", daemon=True)
    watch.start()
    runtime.resources.callback(watch.join)
    runtime.resources.callback(closed.set)


def _watch(runtime: weakref.ref[Runtime], closed: Event) -> None:
    """Poll until the runtime is closed or gone."""
    while not closed.wait(IDLE_PERIOD) and (watched := runtime()) is not None:
        if watched.lock.acquire(blocking=False):  # else a step is computed, which polls as well
            try:
                with suppress(ChandraError):  # which the next step raises again
                    watched.poll()
            finally:
                watched.lock.release()
        del watched


def assemble(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    made: Plan,
    ledger: Ledger,
    resources: ExitStack,
    make: Callable[..., Backend],
    eos_ids: Iterable[int] = (),
    progress: Progress | None = None,
    prefix_caching: bool = True,
) -> tuple[Mapping[str, Backend], Decoder, KVPool, Engine]:
    """Do what a plan says: open the devices, load the weights, allocate the cache. `make` is like `make_backend`;
    `resources` gets what gives everything back. Raises DeviceError, CheckpointError, BudgetExceeded."""
    contexts = {d.name: ledger.reserve(d.name, Kind.RUNTIME, 0) for d in made.devices if d.kind != "virtual"}
    backends = {d.name: _open_device(d, spec, made, make, ledger) for d in made.devices if _used(made, d.name)}
    _count_contexts(made, backends, contexts)
    decoder = _load_weights(checkpoint, spec, made, backends, ledger, progress)
    resources.callback(decoder.close)
    ledger.reserve("cpu", Kind.WORKSPACE, _host_workspace(spec, made))
    ledger.reserve("cpu", Kind.STAGING, repacking(made.parts()))
    pool = _make_pool(spec, made, backends, ledger)
    resources.callback(pool.close)
    swap = _make_swap(pool, made, backends, ledger, resources)
    told = partial(progress, "compiling kernels") if progress else lambda done, total: None  # noqa: ARG005
    decoder.rehearse(pool.layer, -(-made.workload.context // made.block_size), told)
    _count_contexts(made, backends, contexts)
    limits = made.workload.context, made.max_num_seqs, made.chunk, made.max_logit_rows
    config = EngineConfig(*limits, prefix_caching)
    return backends, decoder, pool, Engine(decoder, pool, config, spec.vocab_size, eos_ids, swap)


def _count_contexts(made: Plan, backends: Mapping[str, Backend], contexts: Mapping[str, Reservation]) -> None:
    """Reserve what merely using the devices takes: as measured, where it can be, or as planned. What is cut from one
    GPU shares its context, which the first has. Raises BudgetExceeded if a device has no room for what is measured."""
    planned = {p.device: p.nbytes for p in made.predictions if p.kind is Kind.RUNTIME}
    for name, context in contexts.items():
        taken = backends[name].context_bytes() if name in backends else 0
        context.resize(taken * ("/" not in name) or planned.get(name, 0))


def _open_device(device: Device, spec: ModelSpec, made: Plan, make: Callable[..., Backend], ledger: Ledger) -> Backend:
    """The backend of a device, with what it takes for itself reserved."""
    if device.kind != "cuda":
        return make(device)
    ledger.reserve("cpu", Kind.STAGING, packing([device.name]))
    scratch = BuiltKernels().gpu_scratch(spec, _limits(made), made.block_size)
    ledger.reserve(device.name, Kind.WORKSPACE, scratch.nbytes)
    graphs = sum(p.nbytes for p in made.predictions if (p.device, p.kind) == (device.name, Kind.GRAPHS))
    ledger.reserve(device.name, Kind.GRAPHS, graphs)
    return make(device, scratch=scratch, graphs=graphs)


def _limits(made: Plan) -> Limits:
    return Limits(made.chunk, made.max_num_seqs, made.workload.context, made.max_logit_rows, made.multiplies_floats)


def _host_workspace(spec: ModelSpec, made: Plan) -> int:
    """Bytes of the host that steps take besides the decoder's buffers."""
    devices = [made.device(part.device) for part in made.parts()]
    computes = any(device.kind in ("cpu", "virtual") for device in devices)
    away = any(device.kind != "cpu" for device in devices)
    return host_workspace(BuiltKernels(), spec, _limits(made), len(made.num_blocks), made.block_size, computes, away)


def _used(made: Plan, device: str) -> bool:
    return device == "cpu" or any(part.device == device for part in made.parts())


def _load_weights(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    made: Plan,
    backends: Mapping[str, Backend],
    ledger: Ledger,
    progress: Progress | None,
) -> Decoder:
    places = Backends(
        backends[made.embedding.device],
        tuple(backends[part.device] for part in made.layers),
        backends[made.head.device],
        {int(part.name.split(".")[1]): backends[part.device] for part in made.experts},
        {part.name: part.placement for part in made.parts()},
    )
    return load_decoder(
        checkpoint,
        spec,
        places,
        ledger,
        context_length=made.workload.context,
        max_rows=made.chunk,
        max_logit_rows=made.max_logit_rows,
        micro_rows=made.micro_rows,
        formats=tensor_formats(spec, made.format) if made.convert else None,
        progress=(lambda done, total: progress("loading", done, total)) if progress else None,
    )


def _make_pool(spec: ModelSpec, made: Plan, backends: Mapping[str, Backend], ledger: Ledger) -> KVPool:
    groups = group_layers([layer.attention for layer in spec.layers], [part.device for part in made.layers])
    return KVPool(groups, made.num_blocks, made.block_size, made.kv_type, backends, ledger)


def _make_swap(
    pool: KVPool, made: Plan, backends: Mapping[str, Backend], ledger: Ledger, resources: ExitStack
) -> SwapSpace | None:
    slots = swap_slots(pool.groups, made.num_blocks, made.kv_type, made.block_size, made.swap_bytes)
    if not all(slots):
        return None
    swap = SwapSpace(pool, slots, backends, ledger)
    resources.callback(swap.close)
    return swap
