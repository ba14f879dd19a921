"""The memory of the KV cache: one pair of block arrays per layer, reserved before it exists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from chandra.kvcache.layout import LayerGroup, kv_row
from chandra.memory.ledger import Kind, Ledger
from chandra.ops.contracts import Backend, KVLayer


class KVPool:
    """The cache arrays of all layers. Group i has `num_blocks[i]` blocks of `block_size` tokens.

    `backends` maps device names. Raises BudgetExceeded, before anything is allocated, if a device has no room.
    """

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        num_blocks: Sequence[int],
        block_size: int,
        kv_type: str,
        backends: Mapping[str, Backend],
        ledger: Ledger,
    ) -> None:
        self.groups = tuple(groups)
        self.num_blocks = tuple(num_blocks)
        self.block_size = block_size
        self.kv_type = kv_type
        self.group_of = {layer: i for i, group in enumerate(groups) for layer in group.layers}
        self.nbytes = 0
        self._reservations = []
        self._layers: dict[int, KVLayer] = {}
        try:
            for group, blocks in zip(groups, num_blocks, strict=True):
                nbytes = blocks * block_size * group.token_bytes(kv_type)
                self._reservations.append(ledger.reserve(group.device, Kind.KV, nbytes))
                self.nbytes += nbytes
        except Exception:
            self.close()
            raise
        for group, blocks in zip(groups, num_blocks, strict=True):
            row, dtype = kv_row(kv_type, group.head_dim)
            shape = (blocks, group.num_kv_heads, block_size, row)
            backend = backends[group.device]
            for layer in group.layers:
                k, v = backend.empty(shape, dtype), backend.empty(shape, dtype)
                self._layers[layer] = KVLayer(k, v, kv_type, block_size)

    def layer(self, index: int) -> KVLayer:
        return self._layers[index]

    def close(self) -> None:
        """Drop the arrays and give the reservations back."""
        self._layers.clear()
        for reservation in self._reservations:
            reservation.release()
