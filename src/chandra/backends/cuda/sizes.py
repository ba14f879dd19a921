"""How many bytes the backend keeps for itself, known without a GPU, torch or Triton."""

from __future__ import annotations

from typing import NamedTuple

from chandra.backends.cuda.layouts import ALIGNMENT

HALF, FLOAT, INT = 2, 4, 4
PLACES = 2048  # partial sums of tiles of products that are kept at once, on any GPU of up to 256 multiprocessors
TILE = 32 * 16  # values of a tile of a decode
UNPACKED = (
    32 << 20
)  # bytes of a piece of a weight that is unpacked for long prefills: the cache of large chips has room
SPLITS = PLACES * (INT + TILE * FLOAT) + UNPACKED  # scratch of products: counters, zero at first, partial sums, a piece
SHORT, LONG, SHORT_SPLITS = 128, 512, 32  # tokens of a split of attention, near the start and after it
EXPERT_ROWS = 128  # of a tile of one expert, at most


def context_bucket(context: int) -> int:
    """The context that grids are made for: there are few, so that few recordings serve all steps."""
    return max(256, 1 << (context - 1).bit_length())


class Scratch(NamedTuple):
    """What a backend keeps for itself: `ops`, bytes that its ops use in turn; `ints`, int32 values of a step."""

    ops: int = 0
    ints: int = 1 << 12

    @property
    def nbytes(self) -> int:
        """With what products keep."""
        return self.ops + INT * self.ints + SPLITS


def step_ints(rows: int, sequences: int, blocks: int, groups: int, logit_rows: int) -> int:
    """int32 values that describe a step, each array padded to 4. `blocks`: of the longest sequence; `groups`: of
    layers."""
    sizes = [rows, rows, sequences + 1, sequences, logit_rows, *[sequences * blocks, rows] * groups]
    return sum(-(-size // 4) * 4 for size in sizes)


def linear_bytes(rows: int, width: int, out: int) -> int:
    """A product's input in 16 bits and, if `out`, its output before a norm."""
    return _aligned(HALF * rows * width) + _aligned(FLOAT * rows * out)


def attention_bytes(rows: int, heads: int, head_dim: int, sequences: int, context: int) -> int:
    """Queries as the cache's type wants them, and what the splits of decodes found."""
    found = split_bytes(heads, head_dim, sequences, context_bucket(context))
    return _aligned(FLOAT * rows * heads * head_dim) + _aligned(found)


def num_splits(context: int) -> int:
    """The splits of decode at this context."""
    short = SHORT * SHORT_SPLITS
    return -(-context // SHORT) if context <= short else SHORT_SPLITS - (short - context) // LONG


def split_bytes(heads: int, head_dim: int, sequences: int, context: int) -> int:
    """What the splits of so many decodes find: outputs, maxima and totals."""
    return FLOAT * sequences * num_splits(context) * heads * (head_dim + 2)


def moe_bytes(rows: int, experts: int, top_k: int, hidden: int, ff: int) -> int:
    """The input in 16 bits, the router's logits, the output, and what `moe` keeps."""
    router = _aligned(FLOAT * rows * experts)
    return linear_bytes(rows, hidden, hidden) + router + moe_scratch(rows, experts, top_k, hidden, ff)


def moe_scratch(rows: int, experts: int, top_k: int, hidden: int, ff: int) -> int:
    """What `moe` keeps: choices and shares, slots by expert, inner state, parts."""
    slots = rows * top_k
    tiles = INT * (min(slots, experts) * (EXPERT_ROWS + 1) + 2 * slots)
    return slots * (2 * INT + HALF * ff + FLOAT * hidden) + tiles + 6 * ALIGNMENT


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
