"""What would be different: neighbours of a plan that are worth knowing, found by planning them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from chandra.memory.device import Device, format_size
from chandra.memory.plan import Plan
from chandra.planner.assemble import assemble
from chandra.planner.candidate import HOST
from chandra.planner.cost import Machine, machine_with
from chandra.planner.planner import KV_TYPES, Constraints, Found, search
from chandra.planner.refuse import largest, same_kind, smallest_cap, with_cap
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

    def gain(self, other: Plan | None) -> str:
        """What a plan gains over this one, in words; empty if that is not worth a line."""
        if other is None:
            return ""
        now, then = self.made.speed.decode, other.speed.decode
        layers = offloaded(self.made) - offloaded(other)
        if then < MATTERS * now or layers <= 0:
            return ""
        home = "the GPU" if len(self.devices) == 2 else "the GPUs" if len(self.devices) > 2 else "memory"
        which = f"the last {layers} layers" if not offloaded(other) else f"{layers} more layers"
        return f"{which} onto {home}: {now:.3g} -> {then:.3g} tokens/s"

    def shorter(self) -> Iterator[str]:
        """The longest of a few shorter contexts that brings everything home, or else the first that helps."""
        helps = []
        for scale in SCALES:
            context = int(self.made.workload.context * scale) // 256 * 256
            other = self.plan(replace(self.same, context=context)) if context else None
            if other is not None and (gain := self.gain(other)):
                helps.append((offloaded(other), -context, gain))
        if helps:
            _, context, gain = min(helps)
            yield f"context {-context} instead of {self.made.workload.context} brings {gain}"

    def other_cache(self) -> Iterator[str]:
        for kv_type in KV_TYPES[1:]:
            richer = self.made.kv_type in KV_TYPES[: KV_TYPES.index(kv_type)]
            if richer and self.packs(kv_type) and (gain := self.gain(self.plan(replace(self.same, kv_type=kv_type)))):
                yield f"a {kv_type} cache brings {gain}"

    def packs(self, kv_type: str) -> bool:
        return kv_type != "q8_0" or not any(x.attention.head_dim % 32 for x in self.model.spec.layers)

    def smaller_format(self) -> Iterator[str]:
        """The best format that brings everything home, or else the smallest."""
        at = [v.label for v in self.model.variants].index(self.made.format)
        last = ""
        for sizes in self.model.variants[at + 1 :]:
            other = self.plan(replace(self.same, format=sizes.label))
            if other is not None and (gain := self.gain(other)):
                loss = ", at a loss of quality that shows" if sizes.low_quality else ""
                last = f"{sizes.label} weights bring {gain}{loss}"
                if not offloaded(other):
                    break
        if last:
            yield last

    def better_format(self) -> Iterator[str]:
        """How much more memory lets the next better format in."""
        labels = [v.label for v in self.model.variants]
        at = labels.index(self.made.format)
        if at:
            yield from self.more_memory(replace(self.same, format=labels[at - 1]), f"{labels[at - 1]} weights")

    def more_memory(self, c: Constraints, what: str) -> Iterator[str]:
        """The device that lacks least for `what` to lie on the GPUs (or, without any, in host memory) as a whole."""
        lacks = []
        for index, device in enumerate(self.devices):
            alone = len(self.devices) == 1
            if (device.name == HOST and not alone) or any(same_kind(device, d) for d in self.devices[:index]):
                continue

            def whole(cap: int, index: int = index) -> bool:
                return self.whole(replace(c, objective="quality"), with_cap(self.devices, index, cap))

            cap = smallest_cap(whole, device.cap)
            if cap is not None:
                lacks.append((cap - device.cap, device.name, with_cap(self.devices, index, cap)))
        if lacks:
            more, name, devices = min(lacks, key=lambda lack: lack[0])
            other = self.plan(replace(c, objective="quality"), devices)
            if other is not None and more < sum(device.cap for device in self.devices):
                speed = f"{self.made.speed.decode:.3g} -> {other.speed.decode:.3g} tokens/s"
                yield f"{format_size(more)} more on {name} lets {what} in: {speed}"

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
