"""What other engines reach on the same device, with random weights of the same shapes."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

from chandra.bench.synthetic import CONFIGS
from chandra.errors import UnsupportedError, UsageError
from chandra.lazy import torch

TOKENS, WARM = 32, 8


def transformers_rates(name: str, four_bit: bool, device: str) -> dict[str, Any]:
    """Decode at batch 1 and prefill of 512 of transformers in bfloat16, or with bitsandbytes' NF4 weights."""
    transformers = _installed("transformers")
    if four_bit:
        _installed("bitsandbytes")

    values = dict(CONFIGS[name])
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if four_bit:
        _to_nf4(model, device)
    ids = torch.randint(3, config.vocab_size, (1, 512 if name != "tiny" else 16), device=device)
    with torch.inference_mode():
        times = []
        for _ in range(2):
            start = time.perf_counter()
            state = model(ids, use_cache=True)
            state.logits[0, -1, 0].item()
            times.append(time.perf_counter() - start)
        cache, token = state.past_key_values, ids[:, :1]
        for step in range(WARM + TOKENS):
            if step == WARM:
                start = time.perf_counter()
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
            token.item()
    rate = TOKENS / (time.perf_counter() - start)
    return {"decode 1": {"tokens/s": rate}, "prefill": {"tokens/s": ids.shape[1] / times[-1]}}


def _to_nf4(model: Any, device: str) -> None:
    bnb: Any = importlib.import_module("bitsandbytes")

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            quantized = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            quantized.weight = bnb.nn.Params4bit(module.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantized.to(device))


def llama_cpp_rates(path: Path | None) -> dict[str, Any]:
    """Decode of llama.cpp for a model file, with all layers on the GPU."""
    llama_cpp = _installed("llama_cpp")
    if path is None:
        raise UsageError("llama.cpp needs a model file", "name one with --model")
    model = llama_cpp.Llama(str(path), n_gpu_layers=-1, n_ctx=1024, verbose=False)
    model.create_completion([5] * 16, max_tokens=WARM, temperature=0)
    start = time.perf_counter()
    made = model.create_completion([7] * 16, max_tokens=128, temperature=0)["usage"]["completion_tokens"]
    return {"decode 1": {"tokens/s": made / (time.perf_counter() - start)}}


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnsupportedError(f"{name} is not installed") from error
