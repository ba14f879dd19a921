"""The memory options, the same for every command that plans."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from chandra.kvcache.layout import KV_TYPES
from chandra.memory.plan import Objective


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """--device, --host, --disk, --budget, --ctx and so on. Sizes: 6GiB is 2^30 based, 6GB 10^9 based."""
    group = parser.add_argument_group("memory", "sizes are written 6GiB (2^30) or 6GB (10^9)")
    group.add_argument(
        "--device",
        action="append",
        default=[],
        metavar="NAME=SIZE",
        help="a device and its cap: cuda:0=6GiB, 16GiB, rtx2060, virtual:6GiB,link=12GB/s,bw=336GB/s (repeatable)",
    )
    group.add_argument("--host", metavar="SIZE", help="host memory to use at most")
    group.add_argument("--disk", metavar="SIZE", help="weights that may stay on disk and be read for each step")
    group.add_argument("--swap", metavar="SIZE", help="host memory for the cache of sequences that have to wait")
    group.add_argument("--budget", metavar="SIZE", help="cap of the only device")
    group.add_argument("--ctx", type=int, metavar="TOKENS", help="context length of one sequence")
    group.add_argument("--parallel", type=int, metavar="N", help="sequences at once, each with that context")
    group.add_argument("--objective", choices=get_args(Objective), help="what to optimize for (default: quality)")
    group.add_argument("--kv-type", choices=KV_TYPES, help="type of the KV cache")
    group.add_argument("--layers", action="append", default=[], metavar="DEVICE=A-B", help="put layers A to B there")
    group.add_argument("--quant", metavar="FORMAT", help="format of the weights, for example Q4_K_M")
    group.add_argument("--reserve", metavar="SIZE", help="leave this much of every device alone")
    group.add_argument("--chunk", type=int, metavar="TOKENS", help="tokens of one step at most")


def memory_request(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keywords for `LLM` and `PlanRequest`."""
    names = ("host", "disk", "swap", "budget", "ctx", "parallel", "objective", "kv_type", "quant", "reserve", "chunk")
    return {
        "device": tuple(arguments.device),
        "layers": tuple(arguments.layers),
        **{name: getattr(arguments, name) for name in names},
    }
