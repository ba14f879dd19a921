"""One process of `compare_cpu.py`: loads a model in one engine, runs the tasks given on stdin, prints JSON lines.

    python cpu_worker.py chandra|llama.cpp|float32 < task.json

A task is {path, ctx, threads, sequences, runs: [{prompt, sequences, tokens, names}, …]}, or, to compare logits,
{path, threads, score: token ids, out: file for their float32 log-probabilities}. float32 is transformers with the
dequantized weights: it can only score.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

Times = tuple[float, float]  # seconds to read all prompts, seconds to generate after that
Logits = np.ndarray[Any, np.dtype[np.float32]]


class Chandra:
    """Through the library, greedy, as a user would run it."""

    def __init__(self, task: dict[str, Any]) -> None:
        from chandra import LLM

        options = {"ctx": task["ctx"], "parallel": task["sequences"], "kv_type": "f16", "chunk": 512}
        # llama.cpp's cache is cleared before each run as well
        self.llm = LLM(task["path"], prefix_caching=False, **options)
        self.vocab = self.llm.runtime.spec.vocab_size

    def run(self, prompts: list[list[int]], tokens: int) -> Times:
        from chandra import SamplingParams

        engine = self.llm.engine
        params = SamplingParams(temperature=0, max_tokens=tokens + 1, ignore_eos=True)
        started = time.perf_counter()
        waiting = {engine.add(prompt, params)[0] for prompt in prompts}
        early = 0  # tokens that came while other prompts were still being read
        while waiting:
            for output in engine.step():
                early += len(output.token_ids)
                waiting.discard(output.seq_id)
        first = time.perf_counter()
        while engine.has_work():
            engine.step()
        rest = len(prompts) * (tokens + 1) - early
        return first - started, (time.perf_counter() - first) * len(prompts) * tokens / max(rest, 1)

    def score(self, ids: list[int]) -> Logits:
        """Logits after each token, by the same decoder and cache: one token a step, as when generating."""
        from chandra.kvcache import BatchView, BlockManager
        from chandra.ops.contracts import ForwardBatch

        runtime = self.llm.runtime
        pool, config = runtime.pool, runtime.engine.config
        tokens = np.array(ids, np.int32)
        blocks = BlockManager(pool.groups, pool.num_blocks, pool.block_size, -(-len(ids) // pool.block_size), False)
        view = BatchView(pool, 1, blocks.max_blocks, config.chunk)
        blocks.allocate(0, tokens)
        rows = []
        for at in range(len(ids)):
            blocks.append(0, at + 1)
            position = np.array([at], np.int32)
            start, context, row = np.array([0, 1], np.int32), np.array([at + 1], np.int32), np.zeros(1, np.int32)
            view.prepare([blocks.tables[0]], position, start)
            batch = ForwardBatch(tokens[at : at + 1], position, start, context, row)
            rows.append(runtime.decoder.forward(batch, view)[0].copy())
            blocks.commit(0, tokens, at + 1)
        return np.stack(rows)


class LlamaCpp:
    """Through the C API of llama-cpp-python, greedy, one batch for all sequences."""

    def __init__(self, task: dict[str, Any]) -> None:
        import llama_cpp

        self.lib = llama_cpp
        llama_cpp.llama_log_set(_quiet(llama_cpp), None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(task["path"].encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = task["ctx"] * task["sequences"]
        params.n_batch, params.n_ubatch = 2048, 512
        params.n_seq_max = task["sequences"]
        params.n_threads = params.n_threads_batch = task["threads"]
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(2048, 0, task["sequences"])

    def run(self, prompts: list[list[int]], tokens: int) -> Times:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        started = time.perf_counter()
        last = []
        for seq, prompt in enumerate(prompts):
            for at in range(0, len(prompt), 512):
                piece = prompt[at : at + 512]
                final = at + 512 >= len(prompt)
                rows = [(t, at + i, seq, final and i == len(piece) - 1) for i, t in enumerate(piece)]
                self._decode(rows)
            last.append(int(self._logits(len(piece) - 1).argmax()))
        first = time.perf_counter()
        for step in range(tokens):
            self._decode([(t, len(prompts[s]) + step, s, True) for s, t in enumerate(last)])
            last = [int(self._logits(i).argmax()) for i in range(len(prompts))]
        return first - started, time.perf_counter() - first

    def score(self, ids: list[int]) -> Logits:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        rows = []
        for at, token in enumerate(ids):
            self._decode([(token, at, 0, True)])
            rows.append(self._logits(0).copy())
        return np.stack(rows)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        b = self.batch
        b.n_tokens = len(rows)
        for i, (token, position, seq, wanted) in enumerate(rows):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, position, 1, wanted
            b.seq_id[i][0] = seq
        if self.lib.llama_decode(self.context, b):
            raise RuntimeError("llama_decode failed")

    def _logits(self, row: int) -> Logits:
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, row), (self.vocab,))


class Float32:
    """transformers on the dequantized weights: what both engines approximate."""

    def __init__(self, task: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        path = Path(task["path"])
        self.model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)

    def score(self, ids: list[int]) -> Logits:
        with self.torch.no_grad():
            logits: Logits = self.model(self.torch.tensor([ids])).logits[0].numpy()
        return logits


def _quiet(llama_cpp: Any) -> Any:
    global keep  # the callback must outlive the call
    keep = llama_cpp.llama_log_callback(lambda *_: None)
    return keep


def peak_bytes() -> int:
    """Highest resident memory of this process so far."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024


def score(engine: Any, task: dict[str, Any]) -> None:
    """Write log-probabilities, a block of rows at a time."""
    logits = engine.score(task["score"])
    for start in range(0, len(logits), 32):
        rows = logits[start : start + 32].astype(np.float64)
        rows -= rows.max(1, keepdims=True)
        logits[start : start + 32] = rows - np.log(np.exp(rows).sum(1, keepdims=True))
    np.save(task["out"], logits)


def main() -> None:
    task = json.load(sys.stdin)
    started = time.perf_counter()
    engine: Any = {"chandra": Chandra, "llama.cpp": LlamaCpp, "float32": Float32}[sys.argv[1]](task)
    if "score" in task:
        score(engine, task)
        return
    engine.run([[1, 2, 3, 4]], 0)
    print(json.dumps({"load": time.perf_counter() - started}), flush=True)
    for run in task["runs"]:
        length, sequences, tokens = run["prompt"], run["sequences"], run["tokens"]
        draw = random.Random(length + sequences)
        prompts = [[draw.randrange(10, engine.vocab - 300) for _ in range(length)] for _ in range(sequences)]
        prefill, decode = engine.run(prompts, tokens)
        rates = {"prefill": sequences * length / prefill, "decode": sequences * tokens / decode if tokens else 0}
        print(json.dumps({name: rates[name.split()[0]] for name in run["names"]}), flush=True)
    print(json.dumps({"memory": peak_bytes()}), flush=True)


if __name__ == "__main__":
    main()
