"""The Triton kernels of products with packed weights. The layouts are those of `layouts.py`.

A weight is the left operand, a tile of rows by `WIDTH` words, and the activations are the right one, transposed. So
unpacking is a shift and a mask in the registers that feed the tensor cores, and only codes pass through shared memory.

Decode multiplies the codes as `v`, exact in 16 bits, by the activations, and scales the sums of a group: by `a`, and
adds `c` times the sum of the activations, which comes from a product with a tile of ones. Prefill has too many sums for
that, and scales the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from chandra.backends.cuda.unpack_kernels import affine, planes, value, words


@triton.jit
def _scaled(
    acc, p0, p1, s0, s1, scales, small, r, rows, inputs, span, I: tl.constexpr, J: tl.constexpr, SPAN: tl.constexpr,
    GROUP: tl.constexpr, KIND: tl.constexpr, OFFSET: tl.constexpr, CODE: tl.constexpr
):  # fmt: skip
    """acc and the sums of two groups, scaled."""
    a, c = affine(scales, small, r, rows, inputs, span, I, SPAN, GROUP, KIND, OFFSET, CODE)
    acc += p0 * a[:, None]
    if CODE > 0:
        acc += s0 * c[:, None]
    a, c = affine(scales, small, r, rows, inputs, span, J, SPAN, GROUP, KIND, OFFSET, CODE)
    acc += p1 * a[:, None]
    if CODE > 0:
        acc += s1 * c[:, None]
    return acc


@triton.jit
def _activations(xs, k, live, inputs, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Columns k to k + WIDTH of the activations, transposed; zeros outside."""
    mask = live[None, :]
    if PADDED:
        mask = mask & (tl.arange(0, WIDTH)[:, None] < inputs - k)
    return tl.load(xs + k, mask=mask, other=0.0)


@triton.jit
def _plain(
    x, m, live, inputs, codes, r, pitch, first, last, WIDTH: tl.constexpr, PADDED: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """The sums `(rows, n)` of rows r of a weight of floats with activation rows m."""
    c = tl.arange(0, WIDTH)
    acc = tl.zeros((r.shape[0], m.shape[0]), tl.float32)
    ws = codes + r.to(tl.int64)[:, None] * pitch + c[None, :]
    xs = x + m.to(tl.int64)[None, :] * inputs + c[:, None]
    for span in range(first, last):
        k = span * WIDTH
        v = _activations(xs, k, live, inputs, WIDTH, PADDED)
        if codes.dtype.element_ty == tl.float32:  # as a router: rounding it would change who is chosen
            acc = tl.dot(tl.load(ws + k), v.to(tl.float32), acc, input_precision="tf32x3")
        else:
            acc = tl.dot(tl.load(ws + k).to(DTYPE), v, acc)
    return acc


@triton.jit
def _packed(
    x, m, live, inputs, codes, high, scales, small, levels, r, rows, pitch, first, last, BITS: tl.constexpr,
    HIGH: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, TABLE: tl.constexpr,
    BYTES: tl.constexpr, OFFSET: tl.constexpr, PADDED: tl.constexpr, EXACT: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """The sums `(rows, n)` of weight rows r with activation rows m over spans first to last."""
    HALF: tl.constexpr = 16 // BITS
    SPAN: tl.constexpr = 2 * HALF * WIDTH
    PER: tl.constexpr = min(GROUP // WIDTH, HALF) if GROUP > 0 else 1
    CODE: tl.constexpr = 0 if TABLE or BITS == 8 else BITS + HIGH
    c = tl.arange(0, WIDTH)
    ones = tl.full((r.shape[0], WIDTH), 1.0, tl.float32).to(DTYPE)
    acc = tl.zeros((r.shape[0], m.shape[0]), tl.float32)
    at = r.to(tl.int64)[:, None] * pitch + c[None, :]
    xs = x + m.to(tl.int64)[None, :] * inputs + c[:, None]
    for span in range(first, last):
        w, h = words(codes, high, at + span * WIDTH, BITS, HIGH)
        for i in tl.static_range(HALF):
            k = span * SPAN + i * WIDTH
            x0 = _activations(xs, k, live, inputs, WIDTH, PADDED)
            x1 = _activations(xs, k + HALF * WIDTH, live, inputs, WIDTH, PADDED)
            if EXACT:
                v0, v1 = planes(w, h, i, BITS, HIGH, TABLE, BYTES, DTYPE)
                if GROUP == 0:
                    acc = tl.dot(v1, x1, tl.dot(v0, x0, acc))
                else:
                    if i % PER == 0:
                        p0, p1, s0, s1 = tl.dot(v0, x0), tl.dot(v1, x1), tl.dot(ones, x0), tl.dot(ones, x1)
                    else:
                        p0, p1 = tl.dot(v0, x0, p0), tl.dot(v1, x1, p1)
                        s0, s1 = tl.dot(ones, x0, s0), tl.dot(ones, x1, s1)
                    if i % PER == PER - 1:
                        acc = _scaled(acc, p0, p1, s0, s1, scales, small, r, rows, inputs, span, i * WIDTH // GROUP,
                                      (i + HALF) * WIDTH // GROUP, SPAN, GROUP, KIND, OFFSET, CODE)  # fmt: skip
            else:
                v0 = value(
                    w, h, levels, scales, small, r, rows, inputs, span, i, BITS, HIGH, WIDTH, GROUP, KIND, TABLE, OFFSET
                )
                v1 = value(w, h, levels, scales, small, r, rows, inputs, span, i + HALF, BITS, HIGH, WIDTH, GROUP, KIND,
                           TABLE, OFFSET)  # fmt: skip
                acc = tl.dot(v1.to(DTYPE), x1, tl.dot(v0.to(DTYPE), x0, acc))
    return acc


@triton.jit
def _activated(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACTIVATION == "relu":
        y = tl.maximum(y, 0.0)
    elif ACTIVATION == "sigmoid":
        y = tl.sigmoid(y)
    return y


@triton.jit
def _sums(
    x, m, live, inputs, codes, high, scales, small, levels, expert, r, rows, outputs, pitch, first, last,
    BITS: tl.constexpr, HIGH: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
    TABLE: tl.constexpr, BYTES: tl.constexpr, OFFSET: tl.constexpr, SMALL: tl.constexpr, PADDED: tl.constexpr,
    EXACT: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """The sums of an expert's rows r over spans first to last."""
    if KIND == "plain":
        codes += expert * rows * pitch
        acc = _plain(x, m, live, inputs, codes, r, pitch, first, last, WIDTH, PADDED, DTYPE)
    else:
        skip = expert * rows
        if KIND == "nested":  # its blocks are counted through the experts
            skip -= expert * outputs
            r += expert * outputs
        groups = 1 if GROUP == 0 else pitch * (32 // BITS) // GROUP
        if SMALL > 0:
            groups = pitch * (32 // BITS) // 256
            small += skip * groups * SMALL
        scales += expert * rows * groups - expert * rows + skip
        acc = _packed(
            x, m, live, inputs, codes + skip * pitch, high + skip * pitch, scales, small, levels, r, rows, pitch,
            first, last, BITS, HIGH, WIDTH, GROUP, KIND, TABLE, BYTES, OFFSET, PADDED, EXACT, DTYPE
        )  # fmt: skip
        if GROUP == 0:
            acc *= tl.load(scales + r)[:, None]
    return acc


@triton.jit
def _together(partials, count, BN: tl.constexpr, BM: tl.constexpr):
    """The sum of some partial sums, in their order; four are loaded at once, as each load takes its time."""
    at = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for i in range(0, count, 4):
        part0 = tl.load(partials + i * BN * BM + at, cache_modifier=".cg")
        part1 = tl.load(partials + (i + 1) * BN * BM + at, mask=i + 1 < count, other=0.0, cache_modifier=".cg")
        part2 = tl.load(partials + (i + 2) * BN * BM + at, mask=i + 2 < count, other=0.0, cache_modifier=".cg")
        part3 = tl.load(partials + (i + 3) * BN * BM + at, mask=i + 3 < count, other=0.0, cache_modifier=".cg")
        acc = acc + part0 + part1 + part2 + part3
    return acc


@triton.jit
def _joined(acc, partials, lock, split, splits, BN: tl.constexpr, BM: tl.constexpr, GATED: tl.constexpr):
    """Store a piece; for the one that finishes last, the sums of all pieces (GATED: and of the gate's)."""
    tl.store(partials + split * BN * BM + tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :], acc)
    tl.debug_barrier()
    last = tl.atomic_add(lock, 1, sem="acq_rel") == tl.num_programs(2) - 1
    gate = acc
    if last:
        tl.store(lock, 0)
        acc = _together(partials, splits, BN, BM)
        gate = acc
        if GATED:
            gate = _together(partials + splits * BN * BM, splits, BN, BM)
    return acc, gate, last


@triton.jit
def _write(
    acc, gate, bias, bias2, out, stride, m, live, r, outputs, GATED: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, INTO: tl.constexpr
):  # fmt: skip
    """Biases, activation, gate; then to out, or into what is there."""
    if BIAS:
        acc += tl.load(bias + r, mask=r < outputs, other=0.0)[:, None]
    if GATED:
        if BIAS:
            gate += tl.load(bias2 + r, mask=r < outputs, other=0.0)[:, None]
        acc *= _activated(gate, ACTIVATION)
    else:
        acc = _activated(acc, ACTIVATION)
    places = out + m.to(tl.int64)[None, :] * stride + r[:, None]
    mask = live[None, :] & (r[:, None] < outputs)
    if INTO == "add":
        acc += tl.load(places, mask=mask, other=0.0)
    elif INTO == "multiply":
        acc *= tl.load(places, mask=mask, other=0.0).to(tl.float32)
    tl.store(places, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n", "spans", "per", "splits", "top"])
def product_kernel(
    x, order, tiles, levels, locks, partials,
    codes, high, scales, small, bias, out, stride, rows, outputs,
    codes1, high1, scales1, small1, bias1, out1, stride1, rows1, outputs1,
    codes2, high2, scales2, small2, bias2, out2, stride2, rows2, outputs2,
    n, inputs, pitch, spans, per, splits, top,
    BITS: tl.constexpr, HIGH: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
    TABLE: tl.constexpr, BYTES: tl.constexpr, OFFSET: tl.constexpr, SMALL: tl.constexpr, PADDED: tl.constexpr,
    EXACT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, EXPERTS: tl.constexpr, WEIGHTS: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, INTO: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """out `(n, outputs)` = x `(n, inputs)` @ weight.T, in tiles of BM activation rows, BN weight rows and, with SPLIT,
    pieces of `per` spans; the piece of a tile that finishes last adds them all up in their order.

    Of several WEIGHTS each has its out; GATED, the second is the gate of the first: `ACTIVATION(x @ weight1.T) * (x @
    weight.T)`, as if further pieces. EXPERTS: `tiles[i]` is the expert of tile i (-1: none), `order` its slots (-1:
    none); slot s reads row s // top of x and writes row s of out.
    """
    tile, block, split, bias_gate = tl.program_id(0), tl.program_id(1), tl.program_id(2), bias1
    place = block * tl.num_programs(0) + tile
    if GATED:
        if split >= splits:
            codes, high, scales, small = codes1, high1, scales1, small1
    elif WEIGHTS > 1:
        skip = tl.cdiv(rows, BN)
        if block >= skip:
            block -= skip
            codes, high, scales, small, bias, out = codes1, high1, scales1, small1, bias1, out1
            stride, rows, outputs = stride1, rows1, outputs1
            if WEIGHTS > 2:
                skip = tl.cdiv(rows, BN)
                if block >= skip:
                    block -= skip
                    codes, high, scales, small, bias, out = codes2, high2, scales2, small2, bias2, out2
                    stride, rows, outputs = stride2, rows2, outputs2
    m = tile * BM + tl.arange(0, BM)
    row = block * BN + tl.arange(0, BN)
    r = tl.max_contiguous(tl.multiple_of(tl.where(row < rows, row, row % 32), 32), 32)
    live, source, expert = m < n, m, 0
    if EXPERTS:
        expert = tl.load(tiles + tile).to(tl.int64)
        if expert < 0:
            return
        m = tl.load(order + m)
        live = m >= 0
        source = m // top
    first = split % splits * per
    acc = _sums(
        x, source, live, inputs, codes, high, scales, small, levels, expert, r, rows, outputs, pitch, first,
        min(first + per, spans), BITS, HIGH, WIDTH, GROUP, KIND, TABLE, BYTES, OFFSET, SMALL, PADDED, EXACT,
        x.dtype.element_ty
    )  # fmt: skip
    gate, last = acc, True
    if SPLIT:
        partials += place * tl.num_programs(2) * BN * BM
        acc, gate, last = _joined(acc, partials, locks + place, split, splits, BN, BM, GATED)
    if last:
        _write(acc, gate, bias, bias_gate, out, stride, m, live, row, outputs, GATED, BIAS, ACTIVATION, INTO)
