"""The paged KV cache: block memory, block tables, prefix cache."""

from __future__ import annotations

from chandra.kvcache.block_manager import BlockManager, BlockTable
from chandra.kvcache.layout import KV_TYPES, KVShape, LayerGroup, group_layers, kv_bytes, kv_row, kv_row_bytes
from chandra.kvcache.pool import KVPool
from chandra.kvcache.swap import SwapSpace, swap_slots
from chandra.kvcache.view import BatchView, index_bytes

__all__ = [
    "KV_TYPES",
    "BatchView",
    "BlockManager",
    "BlockTable",
    "KVPool",
    "KVShape",
    "LayerGroup",
    "SwapSpace",
    "group_layers",
    "index_bytes",
    "kv_bytes",
    "kv_row",
    "kv_row_bytes",
    "swap_slots",
]
