"""A GGUF file with the shape of a catalog model and random weights, to measure sizes that cannot be had here.

    python benchmarks/random_model.py qwen2.5:1.5b --tokenizer any.gguf --quant Q4_K_M --out random-1.5b.gguf

Speed and memory do not depend on what the weights say. For llama, mistral and qwen2 shapes. The vocabulary is that of
`--tokenizer`. Needs the `gguf` package and torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from chandra.checkpoint import open_checkpoint
from chandra.models import spec_from_config, tensor_table
from chandra.planner.mixes import format_for
from chandra.quant import PackedWeight, get_format
from chandra.store.catalog import load_catalog

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "mistral": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
POOL = 1 << 20  # values packed once; the tensors of a format are random picks of their blocks


class Blocks:
    """Random weights in any format, by drawing blocks that were packed once."""

    def __init__(self, std: float) -> None:
        self.random = np.random.default_rng(0)
        self.std = std
        self.pools: dict[str, np.ndarray[Any, Any]] = {}

    def tensor(self, form: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """uint8 `(rows, row bytes)` of a block format."""
        fmt = get_format(form)
        if form not in self.pools:
            values = torch.from_numpy(self.random.normal(0, self.std, (POOL // 256, 256)).astype(np.float32))
            self.pools[form] = PackedWeight.pack(fmt, values).parts["data"]
        pool = self.pools[form]
        assert shape[-1] % 256 == 0, "columns in blocks of 256"
        picks = self.random.integers(0, len(pool), int(np.prod(shape)) // 256)
        return pool[picks].reshape(shape[0], -1)


def write_tokenizer(writer: gguf.GGUFWriter, metadata: Mapping[str, Any]) -> None:
    writer.add_tokenizer_model(metadata["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(metadata["tokenizer.ggml.pre"])
    writer.add_token_list(list(metadata["tokenizer.ggml.tokens"]))
    writer.add_token_types([int(x) for x in metadata["tokenizer.ggml.token_type"]])
    writer.add_token_merges(list(metadata["tokenizer.ggml.merges"]))
    writer.add_eos_token_id(int(metadata["tokenizer.ggml.eos_token_id"]))
    writer.add_add_bos_token(False)
    writer.add_chat_template(metadata["tokenizer.chat_template"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", help="a name of the catalog")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a GGUF file whose BPE vocabulary is taken")
    parser.add_argument("--quant", default="Q4_K_M")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    metadata = open_checkpoint(arguments.tokenizer).metadata
    config = dict(load_catalog().entries[arguments.shape].config)
    config["vocab_size"] = len(metadata["tokenizer.ggml.tokens"])
    spec = spec_from_config(config)
    arch = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(str(arguments.out), gguf.MODEL_ARCH_NAMES[arch])
    writer.add_name(f"random weights of the shape of {arguments.shape}")
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_Q4_K_M))
    writer.add_block_count(spec.num_layers)
    writer.add_context_length(spec.max_position)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    write_tokenizer(writer, metadata)
    names = gguf.get_tensor_name_map(arch, spec.num_layers)
    blocks = Blocks(spec.hidden_size**-0.5)
    for tensor in tensor_table(spec):
        name = names.get_name(tensor.name, (".weight", ".bias"))
        form = format_for(arguments.quant, tensor, spec) if tensor.packable else "F32"
        if not tensor.packable:
            fill = np.ones if tensor.role == "norm" else np.zeros
            writer.add_tensor(name, fill(tensor.shape, np.float32))
            continue
        kind = gguf.GGMLQuantizationType[form]
        writer.add_tensor(name, blocks.tensor(form, tensor.shape), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()


if __name__ == "__main__":
    main()
