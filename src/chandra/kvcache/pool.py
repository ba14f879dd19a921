"""The memory of the KV cache: one pair of block arrays per layer, reserved before it exists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from chandra.kvcache.layout import LayerGroup, kv_row
from chandra.memory.ledger import Kind, Ledger, Reservation
from chandra.ops.contracts import Array, Backend, KVLayer


class KVPool:
    """The cache arrays of all layers. Group i has `num_blocks[i]` blocks of `block_size` tokens.

    `backends` maps device names; `kind` is what the bytes are booked as. Raises BudgetExceeded, before anything is
    allocated, if a device has no room.
    """

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        num_blocks: Sequence[int],
        block_size: int,
        kv_type: str,
        backends: Mapping[str, Backend],
        ledger: Ledger,
        kind: Kind = Kind.KV,
    ) -> None:
        self.groups = tuple(groups)
        self.num_blocks = list(num_blocks)
        self.block_size = block_size
        self.kv_type = kv_type
        self.group_of = {layer: i for i, group in enumerate(groups) for layer in group.layers}
        self.block_bytes = [block_size * group.token_bytes(kv_type) for group in groups]
        self._backends = backends
        self._reservations: list[Reservation] = []
        self._layers: dict[int, KVLayer] = {}
        try:
            for group, blocks, nbytes in zip(groups, num_blocks, self.block_bytes, strict=True):
                self._reservations.append(ledger.reserve(group.device, kind, blocks * nbytes))
        except Exception:
            self.close()
            raise
        for group, blocks in zip(groups, num_blocks, strict=True):
            for layer in group.layers:
                self._layers[layer] = self._allocate(group, blocks)

    def layer(self, index: int) -> KVLayer:
        return self._layers[index]

    @property
    def nbytes(self) -> int:
        """Bytes that are reserved."""
        return sum(reservation.nbytes for reservation in self._reservations)

    def bytes_of(self, blocks: Mapping[int, int]) -> int:
        """Bytes of so many blocks of each group."""
        return sum(count * self.block_bytes[index] for index, count in blocks.items())

    def resize(self, index: int, blocks: int, moves: Mapping[int, int] = MappingProxyType({})) -> None:
        """Let group `index` have `blocks` blocks, after `moves` from those beyond them, which are lost.

        Raises BudgetExceeded, and changes nothing, if the device has no room for more of them.
        """
        group, backend = self.groups[index], self._backends[self.groups[index].device]
        grows = blocks > self.num_blocks[index]
        if grows:
            self._reservations[index].resize(blocks * self.block_bytes[index])
        for layer in group.layers:
            old = self._layers[layer]
            for array in (old.k, old.v):
                for source, target in moves.items():
                    array[target] = array[source]
            if self._trim(group, old, blocks):
                continue
            backend.forget_steps()
            kept = min(blocks, self.num_blocks[index])
            contents = [backend.download(array[:kept]) for array in (old.k, old.v)]
            del self._layers[layer], old, array  # the memory must be free before new memory is asked for
            new = self._layers[layer] = self._allocate(group, blocks)
            for host, out in zip(contents, (new.k, new.v), strict=True):
                backend.write(host, out[:kept])
        self.num_blocks[index] = blocks
        if not grows:
            self._reservations[index].resize(blocks * self.block_bytes[index])

    def _allocate(self, group: LayerGroup, blocks: int) -> KVLayer:
        row, dtype = kv_row(self.kv_type, group.head_dim)
        shape = (blocks, group.num_kv_heads, self.block_size, row)
        k, v = (self._empty(group, shape, dtype) for _ in range(2))
        return KVLayer(k, v, self.kv_type, self.block_size)

    def _empty(self, group: LayerGroup, shape: tuple[int, ...], dtype: str) -> Array:
        return self._backends[group.device].empty(shape, dtype)

    def _trim(self, group: LayerGroup, layer: KVLayer, blocks: int) -> bool:
        backend = self._backends[group.device]
        return backend.trim(layer.k, blocks) and backend.trim(layer.v, blocks)

    def close(self) -> None:
        """Drop the arrays and give the reservations back."""
        self._layers.clear()
        for reservation in self._reservations:
            reservation.release()
