"""Products with packed weights on a GPU: which kernel, in which tiles."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from chandra.backends.cuda.launch import launch
from chandra.backends.cuda.layouts import DeviceWeight, Layout, bind, level_bytes
from chandra.backends.cuda.linear_kernels import product_kernel
from chandra.backends.cuda.sizes import PLACES, UNPACKED
from chandra.backends.cuda.unpack_kernels import unpack_kernel
from chandra.lazy import torch
from chandra.quant import get_format
from chandra.quant.base import spans

DECODE = 16  # up to so many rows are computed alike, bit for bit
_FINE = 32  # weight rows of a decode tile, for a thread block of two warps
_BLOCKS = 8  # decode thread blocks of a multiprocessor: what their registers allow, and enough loads under way
_UNPACK_ROWS = 512  # from so many rows on, unpacking a weight once is cheaper than in every tile of rows


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
    """How a product is cut: BM activation rows, BN weight rows; warps and pipeline stages of a thread block."""

    bm: int
    bn: int
    warps: int
    stages: int
    exact: bool = False  # sums are scaled, not weights


def tiles_for(chip: Chip, n: int, layout: Layout) -> Tiles:
    """Tiles for n activation rows. Up to 16 rows, and above, the order of a row's sums does not depend on n."""
    if chip.capability < 80:  # Triton has no tensor cores there: products are lanes that multiply and add
        return Tiles(min(DECODE, 1 << (n - 1).bit_length()), _FINE, 2, 1, exact=True)
    if n <= DECODE:  # with two warps Hopper takes the same instructions for 8 and 16 rows
        return Tiles(8 if n <= 8 else 16, _FINE, 2, 4, exact=True)
    bm = 32 if n <= 32 else 64 if n <= 64 else 128
    large = chip.shared >= 160 << 10
    if layout.kind == "plain":
        if layout.bits == 32:  # three products for each, in as many registers
            bm = min(bm, 128 if chip.capability == 90 else 64)
        elif chip.capability == 90 and n > 128:
            bm = 256
        return Tiles(bm, 128, 8, 3 if large else 2)
    if chip.capability // 10 == 10:  # tiles for its tensor memory would not fit there: one for each plane
        return Tiles(min(bm, 64), 32, 4, 2)
    # a span of activations per stage, 64 KiB of 128 rows; two groups of four warps share it
    return Tiles(bm, 128, 8, 2) if large else Tiles(min(bm, 64), 64, 4, 2)


def splits_for(chip: Chip, blocks: int, spans: int) -> int:
    """Pieces into which `blocks` tiles of a decode are split, at least two spans each. The same for 1 to 16 rows."""
    splits = max(1, min(_BLOCKS * chip.multiprocessors // blocks, spans // 2))
    return -(-spans // -(-spans // splits))


@dataclass(frozen=True)
class Routes:
    """Which rows meet which expert: `order` int32 slots, BM a tile, -1 for none; `tiles` int32 expert of each tile."""

    order: torch.Tensor
    tiles: torch.Tensor
    top: int  # slots of a row of x
    bm: int


@dataclass(frozen=True)
class Product:
    """A weight, its bias float32 `(rows,)`, and out `(n, rows)` whose rows may lie apart."""

    weight: DeviceWeight
    bias: torch.Tensor | None
    out: torch.Tensor

    def alike(self, other: Product) -> bool:
        """Whether one launch can compute both."""
        one, two = self.weight.arrangement, other.weight.arrangement
        same = one.layout == two.layout and one.width == two.width and one.shape[2] == two.shape[2]
        return same and (self.bias is None) == (other.bias is None) and self.out.dtype == other.out.dtype

    def arguments(self) -> tuple[Any, ...]:
        w, rows, outputs = self.weight, self.weight.arrangement.stored[1], self.weight.arrangement.shape[1]
        bias = self.out if self.bias is None else self.bias
        return w.codes, w.high, w.scales, w.small, bias, self.out, self.out.stride(0), rows, outputs


def _constants(weight: DeviceWeight) -> dict[str, Any]:
    layout = weight.arrangement.layout
    return {
        **{"BITS": layout.bits, "HIGH": layout.high, "WIDTH": weight.arrangement.width, "GROUP": layout.group},
        **{"KIND": layout.kind, "TABLE": bool(layout.levels), "OFFSET": layout.offset, "SMALL": layout.small},
    }


def _launch(
    x: torch.Tensor,
    products: tuple[Product, ...],
    scratch: torch.Tensor | None = None,
    gated: bool = False,
    activation: str = "",
    into: Literal["", "add", "multiply"] = "",
    routes: Routes | None = None,
) -> None:
    """One launch for up to three weights that are `alike`. `into`: what becomes of the values of out."""
    first, chip = products[0], chip_of(x.device)
    arrangement = first.weight.arrangement
    inputs, length = arrangement.shape[2], arrangement.spans
    tiles = tiles_for(chip, len(x) if routes is None else routes.bm, arrangement.layout)
    tiles = tiles if routes is None else replace(tiles, bm=routes.bm)
    blocks = sum(-(-p.weight.arrangement.stored[1] // tiles.bn) for p in products[: 1 if gated else None])
    splits, locks, partials = 1, first.out, first.out
    if scratch is not None and len(x) <= DECODE and routes is None:
        splits = splits_for(chip, blocks * (2 if gated else 1), length)
        locks, partials = scratch[: 4 * PLACES].view(torch.int32), scratch[4 * PLACES :].view(torch.float32)
    grid = -(-len(x) // tiles.bm) if routes is None else len(routes.tiles), blocks, splits * (2 if gated else 1)
    launch(product_kernel, *grid)(
        *(x, x if routes is None else routes.order, x if routes is None else routes.tiles),
        *(first.weight.levels, locks, partials),
        *(argument for p in (*products, first, first)[:3] for argument in p.arguments()),
        *(len(x), inputs, arrangement.pitch, length, -(-length // splits), splits, 1 if routes is None else routes.top),
        **_constants(first.weight),
        BYTES=level_bytes(arrangement.layout.levels, x.dtype == torch.bfloat16),
        **{"PADDED": inputs != arrangement.stored[2], "EXACT": tiles.exact, "BN": tiles.bn, "BM": tiles.bm},
        **{"EXPERTS": routes is not None, "WEIGHTS": len(products), "GATED": gated, "BIAS": first.bias is not None},
        **{"ACTIVATION": activation, "INTO": into, "SPLIT": grid[2] > 1},
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def product(
    x: torch.Tensor,
    one: Product,
    scratch: torch.Tensor | None = None,
    activation: str = "",
    into: Literal["", "add", "multiply"] = "",
    routes: Routes | None = None,
) -> None:
    """out float32 `(n, rows)` = activation(x @ weight.T + bias), or that added to out or multiplied with it; x float16
    or bfloat16 `(n, columns)`. Many rows meet unpacked pieces of the weight.

    scratch: of `sizes.SPLITS` bytes, zeros before its first use, used by one stream. Without it decode is slower.
    """
    arrangement, chip = one.weight.arrangement, chip_of(x.device)
    _, outputs, inputs = arrangement.shape
    many = len(x) >= _UNPACK_ROWS and arrangement.layout.kind != "plain" and inputs % 64 == 0
    if scratch is None or not many or routes is not None or chip.capability < 80:
        _launch(x, (one,), scratch, activation=activation, into=into, routes=routes)
        return
    memory = scratch[-UNPACKED:]
    format = get_format("F16" if x.dtype == torch.float16 else "BF16")
    for start, stop in spans(outputs, UNPACKED // (2 * inputs) // 128 * 128):
        piece = memory[: (stop - start) * inputs * 2].view(x.dtype).view(-1, inputs)
        unpack(one.weight, piece, start)
        weight = bind(format, (stop - start, inputs), memory)
        bias = None if one.bias is None else one.bias[start:stop]
        _launch(x, (Product(weight, bias, one.out[:, start:stop]),), activation=activation, into=into)


def linears(x: torch.Tensor, products: Sequence[Product], scratch: torch.Tensor | None = None) -> None:
    """Several products of one x (query, key and value), in one launch where their layouts allow it."""
    alike = all(one.alike(products[0]) for one in products)
    if alike and len(products) <= 3 and len(x) < _UNPACK_ROWS:
        _launch(x, tuple(products), scratch)
    else:
        for one in products:
            product(x, one, scratch)


def gate_up(
    x: torch.Tensor,
    gate: Product | None,
    up: Product,
    activation: str,
    scratch: torch.Tensor | None = None,
    routes: Routes | None = None,
) -> None:
    """up's out (gate's as well) of any float dtype = activation(x @ gate.T + bias) * (x @ up.T + bias); without a gate
    activation(x @ up.T + bias). Decode takes one launch, prefill one for each weight."""
    if gate is None:
        product(x, up, scratch, activation, routes=routes)
        return
    fits = -(-up.weight.arrangement.stored[1] // _FINE) * 2 <= PLACES
    if scratch is not None and routes is None and len(x) <= DECODE and fits and up.alike(gate):
        _launch(x, (up, gate), scratch, gated=True, activation=activation)
    else:
        product(x, gate, scratch, activation, routes=routes)
        product(x, up, scratch, into="multiply", routes=routes)


def unpack(
    weight: DeviceWeight, out: torch.Tensor, start: int = 0, ids: torch.Tensor | None = None, factor: float = 1.0
) -> None:
    """out `(n, columns)` of any float dtype = the rows from `start` on, or `ids` (int32), of a weight without experts,
    times factor."""
    arrangement, n = weight.arrangement, len(out)
    _, outputs, inputs = arrangement.shape
    bn = 1 if n == 1 else 8
    launch(unpack_kernel, -(-n // bn), arrangement.spans)(
        *(out if ids is None else ids, start, n),
        *(weight.codes, weight.high, weight.scales, weight.small, weight.levels),
        *(out, factor, inputs, outputs, arrangement.stored[1], arrangement.pitch),
        **_constants(weight),
        BN=bn,
        IDS=ids is not None,
        num_warps=1,
    )
