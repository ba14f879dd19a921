"""How many bytes a model's pieces take, from real tensors: as a file stores them, or as a label would pack them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from chandra.checkpoint import Checkpoint
from chandra.models import find_sources, spec_from_config, tensor_table
from chandra.models.spec import ModelSpec, TensorSpec
from chandra.models.tensors import part_of
from chandra.models.transforms import loading_bytes
from chandra.models.weights import EMBEDDING
from chandra.planner.kernels import PLAIN, Kernels, built_kernels, packed_bytes
from chandra.planner.mixes import LABELS, LOW_QUALITY, format_for, known_label
from chandra.planner.placement import Ends, Floats, spread_sums
from chandra.quant import get_format

Read = Mapping[str, tuple[str, bool]]  # by tensor: the format it is read in, and whether from several places

# general.file_type of GGUF files: the label they were made with
FILE_TYPES = {
    **{"0": "F32", "1": "F16", "2": "Q4_0", "3": "Q4_1", "7": "Q8_0", "8": "Q5_0", "9": "Q5_1", "10": "Q2_K"},
    **{"11": "Q3_K_S", "12": "Q3_K_M", "13": "Q3_K_L", "14": "Q4_K_S", "15": "Q4_K_M", "16": "Q5_K_S"},
    **{"17": "Q5_K_M", "18": "Q6_K", "25": "IQ4_NL", "30": "IQ4_XS", "32": "BF16"},
}


@dataclass(eq=False)
class Pieces:
    """Bytes of each piece of a model with so many layers. `dense[i]`: weights of layer i that every token reads;
    `experts[i]`: all its experts, with their router and norms. A tied head reads the embedding and adds nothing to
    `head` but the final norm.

    `small_dense[i]`, `small_experts[i]`, `small_head`: those of norms, biases and the router, which stay where they are
    used even if the others are streamed.
    """

    num_layers: int
    embedding: int = 0
    head: int = 0
    small_head: int = 0

    def __post_init__(self) -> None:
        self.dense, self.experts, self.small_dense, self.small_experts = np.zeros((4, self.num_layers))

    def add(self, tensor: TensorSpec, part: str, nbytes: int) -> None:
        """Count a tensor."""
        small = 0 if tensor.packable else nbytes
        if part == "embedding":
            self.embedding += nbytes
        elif tensor.layer is None:
            self.head, self.small_head = self.head + nbytes, self.small_head + small
        elif part.endswith(".experts"):
            self.experts[tensor.layer] += nbytes
            self.small_experts[tensor.layer] += small
        else:
            self.dense[tensor.layer] += nbytes
            self.small_dense[tensor.layer] += small

    @property
    def total(self) -> int:
        return self.embedding + self.head + int(self.layers.sum())

    @cached_property
    def layers(self) -> Floats:
        """Bytes of each layer."""
        return self.dense + self.experts

    @cached_property
    def small(self) -> Floats:
        """Bytes of each layer that are not streamed."""
        return self.small_dense + self.small_experts

    @cached_property
    def streamed(self) -> Floats:
        """Bytes of each layer that are streamed, if it is."""
        return self.layers - self.small

    @cached_property
    def spread(self) -> Floats:
        """[off, end]: bytes of `off` layers, spread through the first `end`, that are streamed."""
        return spread_sums(self.streamed)

    @cached_property
    def streamed_experts(self) -> Floats:
        """Bytes of the experts of each layer that are read from disk, if they are."""
        return self.experts - self.small_experts


class Passing(NamedTuple):
    """A tensor on its way into memory: the part it belongs to, the bytes it will have on the host if that is its place,
    and those it takes there on its way. `mapped`: none if the host is its place; it is repacked from the file later."""

    part: str
    host: int
    nbytes: int
    mapped: bool


@dataclass(frozen=True, eq=False)
class ModelSizes:
    """A model under one choice of formats.

    `packed`: bytes on disk; `gpu`, `host`: bytes in the layout of a GPU's and of the CPU's kernels. `stored`: bytes to
    read from disk to load it. `dense_macs[i]`, `expert_macs[i]`: multiply-adds of one token in layer i; `idle[i]`: the
    share of its experts that it leaves alone.
    """

    label: str
    convert: bool
    tied: bool
    packed: Pieces
    gpu: Pieces
    host: Pieces
    stored: int
    tensors: tuple[Passing, ...]
    dense_macs: Floats
    expert_macs: Floats
    idle: Floats
    head_macs: float
    bits_per_weight: float
    mix: tuple[tuple[str, int], ...]  # bytes in each format
    mapped: bool  # whether a host looks the rows of the embedding up in the file
    on_disk: bool  # whether the CPU can compute from the file
    multiplies_floats: bool  # whether the CPU does so with some weights

    @property
    def low_quality(self) -> bool:
        return self.label in LOW_QUALITY

    @cached_property
    def passing(self) -> int:
        """The most bytes that a tensor takes on its way, wherever it goes."""
        return max(tensor.nbytes for tensor in self.tensors)

    @cached_property
    def passing_layers(self) -> int:
        """The same where embedding and head stay in the file."""
        return max(tensor.nbytes for tensor in self.tensors if tensor.part not in ("embedding", "head"))

    def loading(self, places: Mapping[str, str]) -> tuple[int, int]:
        """With these placements of parts: the most bytes of the host that a tensor takes on its way; and those of all
        weights there and that tensor, at the highest while loading."""
        steps = []
        for tensor in self.tensors:
            placement = places.get(tensor.part) or places.get(tensor.part.removesuffix(".experts"))
            in_file = tensor.mapped and placement in ("host", "disk")
            steps.append((0 if in_file else tensor.nbytes, tensor.host if placement in ("host", "stream") else 0))
        held = peak = 0
        for passing, kept in sorted(steps, key=lambda step: -step[0]):  # as the loader does it
            held += kept
            peak = max(peak, held + passing)
        return max(passing for passing, _ in steps), peak

    @cached_property
    def loading_whole(self) -> int:
        """Bytes of a host that holds all, at the highest while loading, over those it has then."""
        return self.loading({tensor.part: "host" for tensor in self.tensors})[1] - self.host.total


@dataclass(frozen=True)
class PlannableModel:
    """A model as the planner sees it. `variants`: the formats the user has or can make, best quality first."""

    name: str
    spec: ModelSpec
    variants: tuple[ModelSizes, ...]
    kernels: Kernels = PLAIN
    known: dict[Any, int] = field(
        default_factory=dict, repr=False, compare=False
    )  # what does not change while planning

    @cached_property
    def attention(self) -> tuple[list[tuple[int, int, int | None]], Ends, Floats, Floats]:
        """The kinds of attention (key/value heads, head_dim, window) and, over the layers: which of them it has, the
        tokens that a query sees at most, the width of all query heads."""
        attention = [layer.attention for layer in self.spec.layers]
        shapes = [(a.num_kv_heads, a.head_dim, a.window) for a in attention]
        kinds = list(dict.fromkeys(shapes))
        windows = np.array([a.window or np.inf for a in attention])
        heads = np.array([float(a.num_heads * a.head_dim) for a in attention])
        return kinds, np.array([kinds.index(shape) for shape in shapes]), windows, heads


def plannable_config(
    name: str, config: Mapping[str, Any], label: str | None = None, kernels: Kernels | None = None
) -> PlannableModel:
    """A model known by its `config.json` alone: in all usual formats, or only in the one the user names.

    Raises UnsupportedError for an architecture Chandra does not have, UsageError for an unknown format.
    """
    spec, kernels = spec_from_config(config), kernels or built_kernels()
    labels = (known_label(label),) if label else LABELS
    return PlannableModel(name, spec, tuple(sizes_as(spec, x, kernels) for x in labels), kernels)


def plannable(
    name: str, spec: ModelSpec, checkpoint: Checkpoint, label: str | None = None, kernels: Kernels | None = None
) -> PlannableModel:
    """A model on disk: in its own format, and in those it can be converted to while it is loaded.

    A file of 16 bits or more can become any usual format; what is quantized stays as it is, unless the user names
    another `label`. Raises CheckpointError if tensors are missing, UsageError for an unknown format.
    """
    kernels, sources = kernels or built_kernels(), find_sources(spec, checkpoint)
    read = {s.tensor.name: (checkpoint.tensors[s.names[0]].format, s.joined) for s in sources}
    stored = {s.tensor.name: read[s.tensor.name][0] if s.tensor.packable else "F32" for s in sources}
    label_of_file = FILE_TYPES.get(str(checkpoint.metadata.get("general.file_type")))
    own = _sizes(spec, label_of_file or _own_label(spec, stored), stored, kernels, read)
    labels: tuple[str, ...] = LABELS[1:] if own.bits_per_weight > 15 else ()
    if label:
        labels = (known_label(label),) if label.lower() != own.label.lower() else ()
    made = (sizes_as(spec, x, kernels, read, own.packed.total) for x in labels)
    return PlannableModel(name, spec, (own, *made), kernels)


def sizes_as(
    spec: ModelSpec, label: str, kernels: Kernels, read: Read | None = None, stored: int | None = None
) -> ModelSizes:
    """Sizes packed as a label says. `stored`: bytes of the file it is converted from; None: it is had in that form.

    Raises UnsupportedError for a shape that a format cannot hold.
    """
    formats = {tensor.name: format_for(label, tensor, spec) for tensor in tensor_table(spec)}
    return _sizes(spec, label, formats, kernels, read or {}, stored)


def tensor_formats(spec: ModelSpec, label: str) -> dict[str, str]:
    """For the loader: the format of every tensor that a label packs."""
    return {t.name: format_for(label, t, spec) for t in tensor_table(spec) if t.packable}


def _own_label(spec: ModelSpec, stored: Mapping[str, str]) -> str:
    """The label whose mix agrees best with a file, counting values; a single format names itself."""
    tensors = [t for t in tensor_table(spec) if t.packable]
    formats = {stored[t.name] for t in tensors}
    if len(formats) == 1:
        return formats.pop()

    def agreeing(label: str) -> int:
        return sum(math.prod(t.shape) for t in tensors if format_for(label, t, spec) == stored[t.name])

    return max(LABELS, key=agreeing)


def _sizes(
    spec: ModelSpec,
    label: str,
    formats: Mapping[str, str],
    kernels: Kernels,
    read: Read,
    stored: int | None = None,
) -> ModelSizes:
    packed, gpu, host = (Pieces(spec.num_layers) for _ in range(3))
    dense_macs, expert_macs = np.zeros((2, spec.num_layers))
    values, on_disk, floats = 0, stored is None, False
    tensors: list[Passing] = []
    mix: Counter[str] = Counter()
    for tensor in tensor_table(spec):
        name, part = formats[tensor.name], part_of(tensor, spec)
        nbytes = packed_bytes(name, tensor.shape)
        packed.add(tensor, part, nbytes)
        mix[name] += nbytes
        in_kernel = tensor.packable or tensor.role == "router"
        looked_up = tensor.name == EMBEDDING and not spec.tied_embeddings  # rows of it, as they are stored
        on_host = kernels.weight_bytes(name, tensor.shape) if in_kernel and not looked_up else nbytes
        host.add(tensor, part, on_host)
        gpu.add(tensor, part, kernels.gpu_weight_bytes(name, tensor.shape) if in_kernel else nbytes)
        format_read, joined = read.get(tensor.name, (name, False))
        passing = loading_bytes(get_format(format_read), get_format(name), tensor.shape, joined)
        mapped = tensor.packable and format_read == name and not joined
        tensors.append(Passing(part, on_host, passing, mapped))
        values += math.prod(tensor.shape)
        if tensor.packable:
            floats |= (spec.tied_embeddings or tensor.name != EMBEDDING) and kernels.floats(name, tensor.shape)
            on_disk &= format_read == name and not joined and kernels.in_place(name, tensor.shape)
        if tensor.layer is not None and tensor.role == "experts":
            used = spec.layers[tensor.layer].mlp.experts_per_token
            expert_macs[tensor.layer] += used * math.prod(tensor.shape[-2:])
        elif tensor.layer is not None and len(tensor.shape) > 1:
            dense_macs[tensor.layer] += math.prod(tensor.shape)
    mlps, table = [layer.mlp for layer in spec.layers], formats[EMBEDDING]
    return ModelSizes(
        label=label,
        convert=stored is not None,
        tied=spec.tied_embeddings,
        packed=packed,
        gpu=gpu,
        host=host,
        stored=stored or packed.total,
        tensors=tuple(tensors),
        dense_macs=dense_macs,
        expert_macs=expert_macs,
        idle=np.array([1 - mlp.experts_per_token / mlp.num_experts if mlp.num_experts else 0.0 for mlp in mlps]),
        head_macs=float(spec.vocab_size * spec.hidden_size),
        bits_per_weight=8 * packed.total / values,
        mix=tuple(mix.items()),
        mapped=not spec.tied_embeddings and read.get(EMBEDDING, (table, False)) == (table, False),
        on_disk=on_disk,
        multiplies_floats=floats,
    )
