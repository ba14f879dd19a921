"""A plan in the words of other engines, for those who stay with one. Their own memory may differ from ours."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping

from chandra.errors import UnsupportedError
from chandra.memory.plan import Plan


def llama_cpp(plan: Plan, source: str) -> str:
    """Flags of `llama-server`. It puts the last layers on the GPUs, as Chandra does, and counts the head as one."""
    w = plan.workload
    gpus = [device.name for device in plan.devices if device.name != "cpu"]
    on_gpu = [part for part in plan.layers if part.placement == "resident"]
    layers = len(on_gpu) + (plan.head.placement == "resident" and len(on_gpu) == len(plan.layers))
    flags = ["llama-server", "-m", source, "-c", str(w.context * w.parallel), "-np", str(w.parallel)]
    flags += ["-ngl", str(layers), "-ctk", plan.kv_type, "-ctv", plan.kv_type, "-ub", str(plan.chunk)]
    if plan.kv_type not in ("f16", "f32", "bf16"):
        flags += ["-fa", "on"]  # a quantized cache of values needs it
    if len(gpus) > 1:
        shares = [sum(part.device == gpu for part in on_gpu) for gpu in gpus]
        flags += ["-ts", ",".join(map(str, shares))]
    if plan.experts:
        flags += ["--n-cpu-moe", str(len(plan.experts))]
    return shlex.join(flags)


def ollama(plan: Plan, source: str) -> str:
    """A Modelfile. The type of the cache and the number of sequences are settings of its server."""
    on_gpu = sum(part.placement == "resident" for part in plan.layers)
    on_gpu += plan.head.placement == "resident" and on_gpu == len(plan.layers)
    return (
        f"# OLLAMA_FLASH_ATTENTION=1 OLLAMA_KV_CACHE_TYPE={plan.kv_type} OLLAMA_NUM_PARALLEL={plan.workload.parallel}\n"
        f"FROM {source}\n"
        f"PARAMETER num_ctx {plan.workload.context}\n"
        f"PARAMETER num_gpu {on_gpu}\n"
        f"PARAMETER num_batch {plan.chunk}"
    )


def vllm(plan: Plan, source: str) -> str:
    """A `vllm serve` command. It has no layers on the CPU; what is offloaded there becomes `--cpu-offload-gb`."""
    if any(part.placement in ("disk", "stream") for part in plan.layers):
        raise UnsupportedError("vLLM has nothing like layers that are streamed or on disk", "plan with more memory")
    gpus = [device for device in plan.devices if device.name != "cpu" and plan.predicted(device.name)]
    if not gpus:
        raise UnsupportedError("this plan uses no GPU", "plan with --device")
    share = max(plan.predicted(gpu.name) / gpu.cap for gpu in gpus)
    w = plan.workload
    flags = ["vllm", "serve", source, "--max-model-len", str(w.context), "--max-num-seqs", str(plan.max_num_seqs)]
    flags += ["--gpu-memory-utilization", f"{min(0.98, share + 0.01):.2f}"]
    flags += ["--max-num-batched-tokens", str(max(plan.chunk, plan.max_num_seqs))]
    offloaded = sum(part.nbytes for part in (*plan.layers, *plan.experts) if part.placement == "host")
    if offloaded:
        flags += ["--cpu-offload-gb", f"{offloaded / len(gpus) / 2**30:.1f}"]
    if plan.kv_type in ("q8_0", "q4_0"):
        flags += ["--kv-cache-dtype", "fp8"]
    if len(gpus) > 1:
        flags += ["--pipeline-parallel-size", str(len(gpus))]
        partition = ",".join(str(sum(part.device == gpu.name for part in plan.layers)) for gpu in gpus)
        return f"VLLM_PP_LAYER_PARTITION={partition} " + shlex.join(flags)
    return shlex.join(flags)


def accelerate(plan: Plan, source: str) -> str:
    """`max_memory` and `device_map` for `AutoModelForCausalLM.from_pretrained`, as JSON."""
    gpus = [device.name for device in plan.devices if device.name != "cpu"]

    def place(placement: str, device: str) -> int | str:
        return gpus.index(device) if placement == "resident" else "disk" if placement == "disk" else "cpu"

    device_map = {"model.embed_tokens": place(plan.embedding.placement, plan.embedding.device)}
    device_map |= {f"model.{part.name}": place(part.placement, part.device) for part in plan.layers}
    device_map |= {name: place(plan.head.placement, plan.head.device) for name in ("model.norm", "lm_head")}
    memory = {("cpu" if d.name == "cpu" else gpus.index(d.name)): f"{d.cap // 2**20}MiB" for d in plan.devices}
    document = {"pretrained_model_name_or_path": source, "max_memory": memory, "device_map": device_map}
    return json.dumps(document, indent=1)


EXPORTS: Mapping[str, Callable[[Plan, str], str]] = {
    "llama.cpp": llama_cpp,
    "ollama": ollama,
    "vllm": vllm,
    "accelerate": accelerate,
}
