"""The plan: what goes where, how large it will be and how fast it will run. Frozen; made by `planner`, kept by all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from chandra.memory.device import Device
from chandra.memory.ledger import Kind

Placement = Literal["resident", "host", "stream", "disk"]
Objective = Literal["quality", "latency", "throughput"]


def spread(count: int, among: int) -> tuple[int, ...]:
    """Which `count` of `among` layers are brought from elsewhere, so that the others lie evenly between them: what
    brings weights works while layers compute, and has little time to do so ahead. First and last are among them, for
    other work (the head, other devices) lies between the last layer and the first one of the next step.

    Used by the planner, and by who moves layers at run time.
    """
    gaps = max(count - 1, 1)
    return tuple((2 * i * (among - 1) + gaps) // (2 * gaps) for i in range(count))


@dataclass(frozen=True)
class Workload:
    """What the model will be asked to do. `context`: tokens of one sequence, prompt and answer; `parallel`: sequences
    at once, each with that context; `prompt`: the prompt length that the time to first token is predicted for."""

    context: int
    parallel: int = 1
    objective: Objective = "quality"
    prompt: int = 512


@dataclass(frozen=True)
class Part:
    """One piece of the model with a place of its own: the embedding, a layer, the experts of a layer, the head.

    `resident`: weights in the memory of `device`, computed there. `host`: weights in host memory, computed by the CPU.
    `stream`: weights in host memory, copied to `device` for each use. `disk`: read from the file for each use.
    `nbytes` are its weights, in the format they are kept in.
    """

    name: str
    placement: Placement
    device: str
    nbytes: int


@dataclass(frozen=True)
class Prediction:
    """Bytes that will be taken on a device for a kind, at the highest."""

    device: str
    kind: Kind
    nbytes: int


@dataclass(frozen=True)
class Speed:
    """Predicted times in seconds and rates in tokens per second."""

    load: float
    first_token: float  # for a prompt of `Workload.prompt` tokens
    decode: float  # tokens/s of one sequence alone
    total: float  # tokens/s summed over `Workload.parallel` sequences


@dataclass(frozen=True)
class Plan:
    """A promise: with these limits and places, no device goes over its cap."""

    model: str
    format: str  # label of the weights: the file's own, or what they are converted to
    convert: bool  # whether weights are converted while they are loaded
    workload: Workload
    devices: tuple[Device, ...]  # the host is the one named "cpu"
    embedding: Part
    layers: tuple[Part, ...]
    head: Part
    kv_type: str
    block_size: int
    num_blocks: tuple[int, ...]  # per layer group, in the order of `kvcache.group_layers`
    swap_bytes: int
    chunk: int  # tokens of one step at most
    micro_rows: int  # tokens of the parts, at least, in which a step passes through several devices; 0: as a whole
    max_num_seqs: int
    max_logit_rows: int
    multiplies_floats: bool  # whether the CPU does so with some weights, which takes more workspace
    predictions: tuple[Prediction, ...]
    loading: int  # bytes of the host at the highest before all is loaded and there is a cache
    speed: Speed
    experts: tuple[Part, ...] = ()  # experts placed apart from their layer
    decisions: tuple[str, ...] = ()
    counterfactuals: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())

    def device(self, name: str) -> Device:
        return next(device for device in self.devices if device.name == name)

    def predicted(self, device: str) -> int:
        """Bytes predicted on a device at the highest, all kinds together: while loading or after."""
        kept = sum(row.nbytes for row in self.predictions if row.device == device and row.kind != Kind.LOADING)
        return max(kept, self.loading) if device == "cpu" else kept

    def parts(self) -> tuple[Part, ...]:
        return (self.embedding, *self.layers, *self.experts, self.head)
