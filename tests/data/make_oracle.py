"""Make `oracle_*.npz`: what llama.cpp says about `prose.txt`, as the reference for `tests/test_real_models.py`.

    pip install llama-cpp-python==0.3.36 numpy
    python tests/data/make_oracle.py smollm2:135m path/to/model.gguf

llama.cpp rounds activations to 8 bits, so what it says depends on the path it takes: for gemma3:270m two of its own
runs (prompt in one batch or token by token, KV cache in f16 or f32) are a mean KL of 0.0055 apart and agree on the
likeliest token at 96 % of the positions. The oracle is therefore the mean of the log-probabilities of six such runs,
normalized; `decided` says at which positions all six have the same likeliest token.

For each position: the 128 most likely next tokens and their log-probabilities (the rest is one lump of probability,
so the divergence computed from the file is a lower bound that misses what happens inside the tail).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama

TOP, POSITIONS = 128, 260
GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16 = 0, 1, 30
RUNS = [(n_batch, kv) for kv in (GGML_TYPE_F16, GGML_TYPE_F32, GGML_TYPE_BF16) for n_batch in (512, 1)]


def normalized(logits: np.ndarray) -> np.ndarray:
    top = logits.max(axis=1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))


def run(path: str, n_batch: int, kv: int, text: bytes) -> tuple[list[int], np.ndarray]:
    model = Llama(path, n_ctx=512, n_batch=n_batch, type_k=kv, type_v=kv, logits_all=True, verbose=False, n_threads=2)
    tokens = model.tokenize(text, add_bos=True, special=False)[:POSITIONS]
    model.eval(tokens)
    return tokens, normalized(np.asarray(model.scores[: len(tokens)], dtype=np.float64))


def main(name: str, path: str) -> None:
    here = Path(__file__).parent
    text = (here / "prose.txt").read_bytes()
    total: np.ndarray | float = 0.0
    best = []
    for n_batch, kv in RUNS:
        tokens, logprobs = run(path, n_batch, kv, text)
        total = total + logprobs
        best.append(logprobs.argmax(axis=1))
    if len(tokens) < POSITIONS:
        raise SystemExit(f"the text has only {len(tokens)} tokens")
    logprobs = normalized(np.asarray(total) / len(RUNS))
    ids = np.argsort(-logprobs, axis=1)[:, :TOP].astype(np.int32)
    np.savez_compressed(
        here / f"oracle_{name.replace(':', '-')}.npz",
        tokens=np.asarray(tokens, np.int32),
        ids=ids,
        decided=(np.array(best) == best[0]).all(axis=0),
        logprobs=np.take_along_axis(logprobs, ids, axis=1).astype(np.float32),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
