"""The search for block scales: weighted least squares over several roundings, for many blocks at once.

For a given rounding of the values to levels, the best scale (and minimum) has a closed form. So a few inverse scales
around the plain one are tried, each gives levels, these give the best scale, and the one with the least error stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from chandra.lazy import torch
from chandra.quant.bits import reciprocal, signed_max, to_half


def importance(values: torch.Tensor) -> torch.Tensor:
    """Weights of the squared errors, `rms + |x|` relative to the largest value of each row: large values count more."""
    weights = values.abs()
    weights = weights + values.square().mean(1, keepdim=True).sqrt()
    return weights * reciprocal(weights.amax(1, keepdim=True))


def fit_affine(values: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset, both `(n, 1)` and not negative, of `values = scale * q - offset` with `0 <= q <= top`."""
    low, high = values.aminmax(dim=1, keepdim=True)
    low = low.clamp(max=0)
    weights, above = importance(values), values - low  # sums over what is above the least value cancel less
    weighted = weights * above
    w, x = weights.sum(1, keepdim=True), weighted.sum(1, keepdim=True)
    scale, offset, best = (high - low) / top, -low, torch.full_like(high, -torch.inf)
    for step in (0, *range(-10, 11)):
        q = ((values + offset) * ((top + 0.1 * step) * reciprocal(high + offset))).round_().clamp_(0, top)
        wq = weights * q
        q1, q2, xq = wq.sum(1, keepdim=True), (wq * q).sum(1, keepdim=True), (weighted * q).sum(1, keepdim=True)
        determinant = w * q2 - q1 * q1
        base = torch.minimum((q2 * x - q1 * xq) / determinant, -low)
        base = torch.where(determinant > 1e-6 * w * q2, base, 0.0)  # all q are equal
        slope = (xq - base * q1) / q2
        gain = slope * (2 * xq - slope * q2) + base * (2 * x - base * w - 2 * slope * q1)  # what the error falls by
        better = (slope > 0) & (gain > best)
        scale, offset = torch.where(better, slope, scale), torch.where(better, -low - base, offset)
        best = torch.where(better, gain, best)
    return scale, offset


def fit_scale(
    values: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor], extreme: float, steps: Iterable[float]
) -> torch.Tensor:
    """Scale `(n, 1)` of `values = scale * level`; `rounding` gives the nearest level of each value.

    `extreme`, the level of the largest magnitude, plus each of `steps` is tried as the level of the largest magnitude
    among the values, so scales may be negative.
    """
    weights = importance(values)
    weighted, largest = weights * values, signed_max(values)
    scale, best = largest / extreme, torch.zeros_like(largest)
    for step in steps:
        level = rounding(values * ((extreme + step) * reciprocal(largest)))
        xl, l2 = (weighted * level).sum(1, keepdim=True), (weights * level * level).sum(1, keepdim=True)
        gain = xl * xl / l2
        better = (l2 > 0) & (gain > best)
        scale, best = torch.where(better, xl / l2, scale), torch.where(better, gain, best)
    return scale


def whole_scales(name: str, scales: torch.Tensor, extreme: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of groups `(n, k)` as a float16 scale `(n, 1)` (in float32) times whole numbers `(n, k)`.

    Whole numbers run from 0 to `extreme`, or from `extreme` to `-extreme - 1` where that is negative.
    """
    d = signed_max(scales) / extreme
    # where float16 is coarse, a larger scale costs whole numbers little, a smaller one would clip the largest
    d = torch.where(d.abs() < 2**-14, d.sign() * (d.abs() * 2**24).ceil() / 2**24, d)
    d = to_half(name, d).to(torch.float32)
    low, high = (extreme, -extreme - 1) if extreme < 0 else (0, extreme)
    return d, (scales * reciprocal(d)).round().clamp(low, high)


def affine_super_block(
    name: str, blocks: torch.Tensor, group: int, top: int, scale_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`x = d * sc * q - dmin * m` (Q2_K, Q4_K, Q5_K): d and dmin `(n, 1)`, sc and m `(n, groups)`, q `(n, 256)`."""
    n, groups = len(blocks), blocks.reshape(-1, group)
    scale, offset = fit_affine(groups, top)
    d, sc = whole_scales(name, scale.reshape(n, -1), scale_top)
    scale, weights = (d * sc).reshape(-1, 1), importance(groups)
    q = ((groups + offset) * reciprocal(scale)).round_().clamp_(0, top)  # refit the offsets to the rounded scales
    offset = (weights * (scale * q - groups)).sum(1, keepdim=True) * reciprocal(weights.sum(1, keepdim=True))
    dmin, m = whole_scales(name, offset.clamp(min=0).reshape(n, -1), scale_top)
    q = ((groups + (dmin * m).reshape(-1, 1)) * reciprocal(scale)).round_().clamp_(0, top)
    return d, dmin, sc, m, q.reshape(n, -1)


def symmetric_super_block(
    name: str,
    blocks: torch.Tensor,
    group: int,
    rounding: Callable[[torch.Tensor], torch.Tensor],
    extreme: float,
    scale_extreme: int,
    steps: Iterable[float],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`x = d * sc * level` (Q3_K, Q6_K, IQ4_XS): d `(n, 1)`, sc `(n, groups)` and `x / (d * sc)` `(n, 256)`."""
    n, groups = len(blocks), blocks.reshape(-1, group)
    scale = fit_scale(groups, rounding, extreme, steps)
    d, sc = whole_scales(name, scale.reshape(n, -1), scale_extreme)
    return d, sc, (groups * reciprocal(d * sc).reshape(-1, 1)).reshape(n, -1)
