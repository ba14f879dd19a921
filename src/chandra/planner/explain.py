"""What would be different: neighbours of a plan that are worth knowing, found by planning them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from chandra.memory.device import Device, format_size
from chandra.memory.plan import Plan
from chandra.planner.assemble import assemble
from chandra.planner.cost import Machine, machine_with
from chandra.planner.planner import KV_TYPES, Constraints, Found, packs, search
from chandra.planner.refuse import lacking, largest
from chandra.planner.sizes import PlannableModel

MATTERS = 1.1  # a change of speed below this is not worth a line
SCALES = (0.75, 0.5, 0.25)  # of the context


def counterfactuals(
    model: PlannableModel, devices: Sequence[Device], machine: Machine, c: Constraints, made: Plan
) -> tuple[str, ...]:
    """Sentences about plans nearby: what a shorter context, another cache, another format or more memory would change.

    `c` and `made` are the constraints and the plan they led to.
    """
    return tuple(_Neighbours(model, devices, machine_with(machine, devices), c, made).sentences())


def offloaded(made: Plan) -> int:
    """Layers that do not lie on a GPU as a whole. Without GPUs: those on disk."""
    gpus = len(made.devices) > 1
    apart = {part.name.removesuffix(".experts") for part in made.experts}
    kept = "resident" if gpus else "host"
    return sum(part.placement != kept or part.name in apart for part in made.layers)


class _Neighbours:
    """A plan and the ways to plan something close to it."""

    def __init__(
        self, model: PlannableModel, devices: Sequence[Device], machine: Machine, c: Constraints, made: Plan
    ) -> None:
        self.model, self.devices, self.machine, self.made = model, devices, machine, made
        self.c = c
        # The neighbours differ in one thing: the rest stays what this plan has chosen.
        w = made.workload
        self.same = replace(c, context=w.context, parallel=w.parallel, kv_type=made.kv_type, format=made.format)

    def sentences(self) -> Iterator[str]:
        if offloaded(self.made):
            yield from self.shorter()
            yield from self.other_cache()
            yield from self.smaller_format()
            yield from self.more_memory(self.same, "everything")
        else:
            yield from self.longer()
            yield from self.better_format()
        yield from self.more_sequences()

    def plan(self, c: Constraints, devices: Sequence[Device] | None = None) -> Plan | None:
        found = search(self.model, devices or self.devices, self.machine, c)
        return assemble(found, devices or self.devices, c.reserve) if found else None

    def gain(self, other: Plan) -> str:
        """What a plan gains over this one, in words; empty if that is not worth a line."""
        now, then = self.made.speed.decode, other.speed.decode
        layers = offloaded(self.made) - offloaded(other)
        if then < MATTERS * now or layers <= 0:
            return ""
        home = "the GPU" if len(self.devices) == 2 else "the GPUs" if len(self.devices) > 2 else "memory"
        which = f"the last {layers} layers" if not offloaded(other) else f"{layers} more layers"
        return f"{which} onto {home}: {now:.3g} -> {then:.3g} tokens/s"

    def shorter(self) -> Iterator[str]:
        """The longest of a few shorter contexts that brings everything home, or else the first that helps."""
        now = self.made.workload.context
        contexts = [n for n in (int(now * scale) // 256 * 256 for scale in SCALES) if n]
        yield from self.best(
            (f"context {n} instead of {now} brings", replace(self.same, context=n), "") for n in contexts
        )

    def other_cache(self) -> Iterator[str]:
        at = KV_TYPES.index(self.made.kv_type) + 1 if self.made.kv_type in KV_TYPES else len(KV_TYPES)
        for kv_type in (kind for kind in KV_TYPES[at:] if packs(kind, self.model.spec)):
            yield from self.best([(f"a {kv_type} cache brings", replace(self.same, kv_type=kv_type), "")])

    def smaller_format(self) -> Iterator[str]:
        """The best format that brings everything home, or else the one that helps most."""
        at, loss = [v.label for v in self.model.variants].index(self.made.format), ", at a loss of quality that shows"
        yield from self.best(
            (f"{v.label} weights bring", replace(self.same, format=v.label), loss if v.low_quality else "")
            for v in self.model.variants[at + 1 :]
        )

    def best(self, changes: Iterable[tuple[str, Constraints, str]]) -> Iterator[str]:
        """The first change, of those worth knowing, that leaves least offloaded."""
        found: tuple[int, str] | None = None
        for words, c, loss in changes:
            other = self.plan(c)
            if other is not None and (gain := self.gain(other)) and (not found or offloaded(other) < found[0]):
                found = offloaded(other), f"{words} {gain}{loss}"
                if not found[0]:
                    break
        if found:
            yield found[1]

    def better_format(self) -> Iterator[str]:
        """How much more memory lets the next better format in."""
        labels = [v.label for v in self.model.variants]
        at = labels.index(self.made.format)
        if at:
            yield from self.more_memory(replace(self.same, format=labels[at - 1]), f"{labels[at - 1]} weights")

    def more_memory(self, c: Constraints, what: str) -> Iterator[str]:
        """The device that lacks least for `what` to lie on the GPUs (or, without any, in host memory) as a whole."""
        c = replace(c, objective="quality")
        lacks = [*lacking(self.devices, max(1, len(self.devices) - 1), lambda devices: self.whole(c, devices))]
        if lacks:
            more, device, devices = min(lacks, key=lambda lack: lack[0])
            other = self.plan(c, devices)
            if other is not None and more < sum(device.cap for device in self.devices):
                speed = f"{self.made.speed.decode:.3g} -> {other.speed.decode:.3g} tokens/s"
                yield f"{format_size(more)} more on {device.name} lets {what} in: {speed}"

    def whole(self, c: Constraints, devices: Sequence[Device]) -> bool:
        found: Found | None = search(self.model, devices, self.machine, c)
        return found is not None and found.whole

    def longer(self) -> Iterator[str]:
        """The longest context that fits in the same way, if the user did not name one."""
        now, most = self.made.workload.context, self.model.spec.max_position
        if self.c.context is None and now < most:
            steps = largest(
                lambda n: self.whole(replace(self.same, context=min(most, now + 1024 * n)), self.devices),
                -(-(most - now) // 1024) + 1,
            )
            if steps:
                yield f"a context of up to {min(most, now + 1024 * steps)} fits as well"

    def more_sequences(self) -> Iterator[str]:
        """Whether several sequences at once would fit in the same way, and what they gain together."""
        if self.c.parallel is not None:
            return
        now = self.made
        for parallel in (n for n in (8, 4, 2) if now.workload.parallel < n <= (self.c.chunk or n)):
            other = self.plan(replace(self.same, parallel=parallel))
            if other and offloaded(other) == offloaded(now) and other.head.device == now.head.device:
                if other.speed.total > MATTERS * now.speed.total:
                    total = f"{now.speed.total:.3g} -> {other.speed.total:.3g} tokens/s in all"
                    yield f"{parallel} sequences of this context fit at once: {total}"
                return
