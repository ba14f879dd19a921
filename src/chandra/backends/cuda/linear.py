"""Products with packed weights on a GPU: which kernel, in which tiles."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

from chandra.backends.cuda.layouts import DeviceWeight
from chandra.backends.cuda.linear_kernels import product_kernel
from chandra.backends.cuda.unpack_kernels import unpack_kernel
from chandra.lazy import torch

DECODE = 16  # up to so many rows are computed alike, bit for bit
_FINE = 32  # weight rows of a decode tile: one thread block of two warps
_BLOCKS = 6  # decode thread blocks for each multiprocessor: enough loads under way to hide the memory's latency


@dataclass(frozen=True)
class Chip:
    """What the choice of tiles depends on. `shared`: bytes of shared memory a thread block may have."""

    capability: int  # major * 10 + minor
    multiprocessors: int
    shared: int


@functools.cache
def chip_of(device: torch.device) -> Chip:
    """The chip of a CUDA device; for tensors on the CPU (Triton's interpreter) a small one."""
    if device.type != "cuda":
        return Chip(80, 2, 160 << 10)
    properties = torch.cuda.get_device_properties(device)
    shared: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Chip(properties.major * 10 + properties.minor, properties.multi_processor_count, shared)


@dataclass(frozen=True)
class Tiles:
    """How a product is cut: BM activation rows, BN weight rows, splits of the columns; warps and pipeline stages."""

    bm: int
    bn: int
    warps: int
    stages: int
    splits: int = 1

    @property
    def exact(self) -> bool:
        return self.bn == _FINE


def tiles_for(chip: Chip, n: int, rows: int, spans: int) -> Tiles:
    """Tiles for n activation rows and a weight of `rows` rows and `spans` spans of columns.

    Up to 16 rows the order of the sums depends on the weight alone; so it does above.
    """
    if n <= DECODE:
        blocks = -(-rows // _FINE)
        splits = max(1, min(-(-_BLOCKS * chip.multiprocessors // blocks), spans // 2))
        per = -(-spans // splits)
        return Tiles(8 if n <= 8 else 16, _FINE, 2, 3, -(-spans // per))
    if chip.capability >= 90:  # a warp group needs 64 rows; two of them share the activations
        return Tiles(32 if n <= 32 else 64 if n <= 64 else 128, 128, 8, 2)
    return Tiles(32 if n <= 32 else 64, 64, 4, 2)


def scratch_bytes(chip: Chip) -> int:
    """Bytes of zeroed scratch that lets all decode products on one stream split their columns."""
    tiles = 2 * _BLOCKS * chip.multiprocessors
    return tiles * 4 + tiles * _FINE * DECODE * 4 * 2


def _constants(weight: DeviceWeight) -> dict[str, Any]:
    layout = weight.arrangement.layout
    return {
        **{"BITS": layout.bits, "HIGH": layout.high, "WIDTH": weight.arrangement.width, "GROUP": layout.group},
        **{"KIND": layout.kind, "TABLE": bool(layout.levels), "OFFSET": layout.offset, "SMALL": layout.small},
    }


def _arrays(weight: DeviceWeight) -> tuple[torch.Tensor, ...]:
    return weight.codes, weight.high, weight.scales, weight.small, weight.levels


@dataclass(frozen=True)
class Routes:
    """Which rows meet which expert: `order` int32 slots, BM a tile, -1 for none; `tiles` int32 expert of each tile."""

    order: torch.Tensor
    tiles: torch.Tensor
    top: int  # slots of a row of x
    bm: int


def product(
    x: torch.Tensor,
    weight: DeviceWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    gate: DeviceWeight | None = None,
    gate_bias: torch.Tensor | None = None,
    activation: str = "",
    into: Literal["", "add", "multiply"] = "",
    scratch: torch.Tensor | None = None,
    routes: Routes | None = None,
) -> None:
    """Launch the product kernel: see `linear`, `gate_up` and `moe`. `into` says what becomes of the values of out."""
    arrangement, chip, n = weight.arrangement, chip_of(x.device), len(x)
    _, outputs, inputs = arrangement.shape
    _, rows, columns = arrangement.stored
    spans = columns // (arrangement.width * arrangement.layout.planes)
    tiles = tiles_for(chip, n if routes is None else routes.bm, rows, spans)
    splits = tiles.splits if scratch is not None and routes is None else 1
    per = -(-spans // splits)
    count = -(-n // tiles.bm) if routes is None else len(routes.tiles)
    locks = partials = out
    if scratch is not None and splits > 1:
        tickets = 2 * _BLOCKS * chip.multiprocessors * 4
        locks, partials = scratch[:tickets].view(torch.int32), scratch[tickets:].view(torch.float32)
    grid = count, -(-rows // tiles.bn), splits
    product_kernel[grid](
        x,
        x if routes is None else routes.order,
        x if routes is None else routes.tiles,
        *_arrays(weight),
        *_arrays(gate or weight)[:4],
        bias if bias is not None else out,
        gate_bias if gate_bias is not None else out,
        out,
        locks,
        partials,
        n,
        inputs,
        outputs,
        rows,
        columns,
        spans,
        per,
        1 if routes is None else routes.top,
        **_constants(weight),
        PADDED=inputs != columns,
        EXACT=tiles.exact,
        BN=tiles.bn,
        BM=tiles.bm,
        EXPERTS=routes is not None,
        GATED=gate is not None,
        BIAS=bias is not None,
        ACTIVATION=activation,
        INTO=into,
        SPLIT=splits > 1,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def linear(
    x: torch.Tensor,
    weight: DeviceWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    accumulate: bool = False,
    scratch: torch.Tensor | None = None,
) -> None:
    """out float32 `(n, rows)` (+)= x `(n, columns)` @ weight.T + bias; x float16 or bfloat16, bias float32."""
    product(x, weight, bias, out, into="add" if accumulate else "", scratch=scratch)


def gate_up(
    x: torch.Tensor,
    gate: DeviceWeight | None,
    up: DeviceWeight,
    activation: str,
    out: torch.Tensor,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    scratch: torch.Tensor | None = None,
    routes: Routes | None = None,
) -> None:
    """out `(n, rows)` of x's dtype = activation(x @ gate.T + gate_bias) * (x @ up.T + up_bias), without a gate
    activation(x @ up.T + up_bias). One kernel, unless the formats of gate and up differ."""
    if gate is None:
        product(x, up, up_bias, out, activation=activation, scratch=scratch, routes=routes)
    elif gate.arrangement == up.arrangement and (gate_bias is None) == (up_bias is None):
        product(x, up, up_bias, out, gate, gate_bias, activation, scratch=scratch, routes=routes)
    else:
        product(x, gate, gate_bias, out, activation=activation, scratch=scratch, routes=routes)
        product(x, up, up_bias, out, into="multiply", scratch=scratch, routes=routes)


def embed(ids: torch.Tensor, weight: DeviceWeight, scale: float, out: torch.Tensor) -> None:
    """out `(n, columns)` of any float dtype = rows `ids` (int32) of the weight, times scale."""
    _unpack(ids, 0, len(ids), weight, scale, out)


def unpack(weight: DeviceWeight, start: int, stop: int, out: torch.Tensor) -> None:
    """out `(stop - start, columns)` of any float dtype = rows start to stop of a weight without experts."""
    _unpack(None, start, stop - start, weight, 1.0, out)


def _unpack(
    ids: torch.Tensor | None, start: int, n: int, weight: DeviceWeight, factor: float, out: torch.Tensor
) -> None:
    arrangement, layout = weight.arrangement, weight.arrangement.layout
    (_, outputs, inputs), (_, rows, columns) = arrangement.shape, arrangement.stored
    bn = 1 if n == 1 else 8
    grid = -(-n // bn), columns // (arrangement.width * layout.planes)
    unpack_kernel[grid](
        *(out if ids is None else ids, start, n),
        *_arrays(weight),
        *(out, factor, inputs, outputs, rows, columns),
        **_constants(weight),
        BN=bn,
        IDS=ids is not None,
        num_warps=1,
    )
