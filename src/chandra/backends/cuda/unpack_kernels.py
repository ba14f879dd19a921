"""The Triton functions that unpack weights in the layouts of `layouts.py`.

Bit field `i` of the words is plane `i`: `WIDTH` consecutive columns of one scale group. A weight of `B`-bit code `q`
is `a * v + c`, where `v = 1 + q / 2**B` is the code or-ed into the fraction of a 1.0: made without a conversion, and
exact in 16 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice


@triton.jit
def field(w, AT: tl.constexpr, TO: tl.constexpr, MASK: tl.constexpr):
    """The bits MASK of w from bit AT on, moved to bit TO."""
    if AT > TO:
        moved = w >> (AT - TO)
    else:
        moved = w << (TO - AT)
    return moved & (MASK << TO)


@triton.jit
def _pair(w, h, I: tl.constexpr, BITS: tl.constexpr, HIGH: tl.constexpr, DTYPE: tl.constexpr):
    """Planes I and I + half of all as `v`, both halves of a word at once."""
    FRACTION: tl.constexpr = 7 if DTYPE == tl.bfloat16 else 10
    ONE: tl.constexpr = 0x3F803F80 if DTYPE == tl.bfloat16 else 0x3C003C00
    PLACE: tl.constexpr = FRACTION - BITS - HIGH
    v = field(w, BITS * I, PLACE, ((1 << BITS) - 1) * 0x10001) | ONE
    if HIGH > 0:
        v |= field(h, HIGH * I, PLACE + BITS, ((1 << HIGH) - 1) * 0x10001)
    return v.to(tl.int16).to(DTYPE, bitcast=True), (v >> 16).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def _wide(w, h, table, I: tl.constexpr, BITS: tl.constexpr, HIGH: tl.constexpr, TABLE: tl.constexpr):
    """Plane I as `v` (of 8 bits or a table: as the level itself) in float32."""
    q = (w >> (BITS * I)) & ((1 << BITS) - 1)
    UPPER: tl.constexpr = HIGH * I if I < 16 // BITS else HIGH * (I - 16 // BITS) + 16
    if HIGH > 0:
        q |= field(h, UPPER, BITS, (1 << HIGH) - 1)
    if TABLE:
        v = tl.load(table + q).to(tl.float32)
    elif BITS == 8:  # an integer around 128 at the end of the fraction
        v = (q | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    else:
        v = (q << (23 - BITS - HIGH) | 0x3F800000).to(tl.float32, bitcast=True)
    return v


@triton.jit
def _picked(select, pick, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr):
    """Four bytes of a table of 16, at once."""
    return libdevice.byte_perm(libdevice.byte_perm(T0, T1, select), libdevice.byte_perm(T2, T3, select), pick)


@triton.jit
def _looked_up(w, I: tl.constexpr, BYTES: tl.constexpr, DTYPE: tl.constexpr):
    """Plane I of the lower half of words of 4-bit codes, looked up: BYTES are the lower and the upper of 16 levels."""
    select = w & 0x7777  # codes without their upper bit, which picks a half of the table
    pick = ((w >> 1) & 0x4444) | 0x3210
    lower = _picked(select, pick, BYTES[0], BYTES[1], BYTES[2], BYTES[3])
    upper = _picked(select, pick, BYTES[4], BYTES[5], BYTES[6], BYTES[7])
    pair = libdevice.byte_perm(lower, upper, 0x5140 if I < 2 else 0x7362)
    return (pair >> (16 * (I % 2))).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def planes(
    w, h, I: tl.constexpr, BITS: tl.constexpr, HIGH: tl.constexpr, TABLE: tl.constexpr, BYTES: tl.constexpr,
    DTYPE: tl.constexpr
):  # fmt: skip
    """Planes I and I + half of all, exact in DTYPE (levels of a table are rounded)."""
    if TABLE:
        result = _looked_up(w, I, BYTES, DTYPE), _looked_up(w >> 16, I, BYTES, DTYPE)
    elif BITS == 8:
        result = _wide(w, h, w, I, 8, 0, False).to(DTYPE), _wide(w, h, w, I + 2, 8, 0, False).to(DTYPE)
    else:
        result = _pair(w, h, I, BITS, HIGH, DTYPE)
    return result


@triton.jit
def _halves(pair):
    """Two float16 in one word, as float32."""
    low = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _six(words, upper, rows, J: tl.constexpr, AT: tl.constexpr):
    """6-bit number J: a nibble of the words from `words` on, and 2 bits of `upper` from bit AT on."""
    nibble = (tl.load(words + J // 8 * rows) >> (4 * (J % 8))) & 15
    return (nibble | field(upper, 2 * J + AT, 4, 3)).to(tl.float32)


@triton.jit
def affine(
    scales, small, r, rows, inputs, span, I: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
    OFFSET: tl.constexpr, CODE: tl.constexpr
):  # fmt: skip
    """`a` and `c` of rows r, for group I of a span (`c` only for codes of CODE bits that are read as `v`)."""
    GROUPS: tl.constexpr = SPAN // GROUP
    at = scales + (span * GROUPS + I) * rows + r
    above = scales + span * SPAN // 256 * rows + r
    if KIND == "half" or KIND == "float":
        s = tl.load(at).to(tl.float32)
        m = -OFFSET * s
    elif KIND == "affine":
        s, m = _halves(tl.load(at))
    elif KIND == "zero":
        s, m = _halves(tl.load(at))
        m *= -s
    elif KIND == "power":
        e = tl.load(at).to(tl.int32)
        s = tl.where(e < 2, (e + 1) << 21, (e - 1) << 23).to(tl.float32, bitcast=True)
        m = s
    elif KIND == "nested":
        block = (r * (inputs // GROUP) + span * GROUPS + I) // 256
        s = tl.load(small + 1 + tl.load(at)) * tl.load(small + 257 + block) + tl.load(small)
        m = s
    elif KIND == "k6":
        d, dmin = _halves(tl.load(above))
        words = small + span * 3 * rows + r
        upper = tl.load(words + 2 * rows)
        s, m = d * _six(words, upper, rows, I, 0), -dmin * _six(words + rows, upper, rows, I, 16)
    elif KIND == "k4":
        d, dmin = _halves(tl.load(above))
        words = small + (span * 4 + I // 8) * rows + r
        s = d * ((tl.load(words) >> (4 * (I % 8))) & 15).to(tl.float32)
        m = -dmin * ((tl.load(words + 2 * rows) >> (4 * (I % 8))) & 15).to(tl.float32)
    elif KIND == "s6":
        words = small + span * (GROUPS // 8 + 1) * rows + r
        s = tl.load(above).to(tl.float32) * (_six(words, tl.load(words + GROUPS // 8 * rows), rows, I, 0) - 32.0)
        m = -OFFSET * s
    else:  # s8
        word = tl.load(small + (span * (GROUPS // 4) + I // 4) * rows + r)
        s = tl.load(above).to(tl.float32) * ((word << (24 - 8 * (I % 4))) >> 24).to(tl.float32)
        m = -OFFSET * s
    if CODE > 0:
        s *= 1 << CODE
        m -= s
    return s, m


@triton.jit
def value(
    w, h, levels, scales, small, r, rows, inputs, span, I: tl.constexpr, BITS: tl.constexpr, HIGH: tl.constexpr,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, TABLE: tl.constexpr, OFFSET: tl.constexpr
):  # fmt: skip
    """Plane I of rows r, scaled (but for the scale of a whole row), in float32."""
    v = _wide(w, h, levels, I, BITS, HIGH, TABLE)
    CODE: tl.constexpr = 0 if TABLE or BITS == 8 else BITS + HIGH
    if GROUP > 0:
        a, c = affine(
            scales, small, r, rows, inputs, span, I * WIDTH // GROUP, 32 // BITS * WIDTH, GROUP, KIND, OFFSET, CODE
        )
        v = v * a[:, None]
        if CODE > 0:
            v += c[:, None]
    return v


@triton.jit
def words(codes, high, at, BITS: tl.constexpr, HIGH: tl.constexpr):
    """Words of codes, and the further bits with those of the upper planes moved to the upper half of a word."""
    w = tl.load(codes + at)
    h = w
    if HIGH > 0:
        h = tl.load(high + at).to(tl.int32) & ((1 << (32 // BITS * HIGH)) - 1)
        h |= h << (16 - 16 // BITS * HIGH)
    return w, h


@triton.jit(do_not_specialize=["n", "start", "factor"])
def unpack_kernel(
    ids, start, n, codes, high, scales, small, levels, out, factor, inputs, outputs, rows, pitch, BITS: tl.constexpr,
    HIGH: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, TABLE: tl.constexpr,
    OFFSET: tl.constexpr, SMALL: tl.constexpr, BN: tl.constexpr, IDS: tl.constexpr
):  # fmt: skip
    """out `(n, inputs)` = factor * the rows `ids`, or those from `start` on, of a weight; a span a program."""
    i, span = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1)
    live = i < n
    r = start + i
    if IDS:
        r = tl.load(ids + i, mask=live, other=0)
    r = tl.where(live, r, 0).to(tl.int64)
    c = tl.arange(0, WIDTH)
    out += i.to(tl.int64)[:, None] * inputs + c[None, :]
    if KIND == "plain":
        k = span * WIDTH
        v = tl.load(codes + r[:, None] * pitch + k + c[None, :]).to(tl.float32) * factor
        tl.store(out + k, v.to(out.dtype.element_ty), mask=live[:, None] & (c[None, :] < inputs - k))
    else:
        PLANES: tl.constexpr = 32 // BITS
        w, h = words(codes, high, r[:, None] * pitch + span * WIDTH + c[None, :], BITS, HIGH)
        scale = factor
        if GROUP == 0:
            scale = factor * tl.load(scales + r)[:, None]
        for p in tl.static_range(PLANES):
            k = (span * PLANES + p) * WIDTH
            v = value(
                w, h, levels, scales, small, r, rows, inputs, span, p, BITS, HIGH, WIDTH, GROUP, KIND, TABLE, OFFSET
            )
            v = (v * scale).to(out.dtype.element_ty)
            tl.store(out + k, v, mask=live[:, None] & (c[None, :] < inputs - k))
