"""Make `oracle_*.npz`: what llama.cpp says about `prose.txt`, as the reference for `tests/test_real_models.py`.

    pip install llama-cpp-python==0.3.36 numpy
    python tests/data/make_oracle.py smollm2:135m path/to/model.gguf

For each position: the 128 most likely next tokens and their log-probabilities (the rest is one lump of probability,
so the divergence computed from the file is a lower bound that misses what happens inside the tail).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama

TOP, POSITIONS = 128, 260


def main(name: str, path: str) -> None:
    here = Path(__file__).parent
    model = Llama(path, n_ctx=512, n_batch=512, logits_all=True, verbose=False, n_threads=2)
    tokens = model.tokenize((here / "prose.txt").read_text().encode(), add_bos=True, special=False)[:POSITIONS]
    if len(tokens) < POSITIONS:
        raise SystemExit(f"the text has only {len(tokens)} tokens")
    model.eval(tokens)
    logits = np.asarray(model.scores[: len(tokens)], dtype=np.float64)
    top_logit = logits.max(axis=1, keepdims=True)
    logprobs = logits - top_logit - np.log(np.exp(logits - top_logit).sum(axis=1, keepdims=True))
    ids = np.argsort(-logprobs, axis=1)[:, :TOP].astype(np.int32)
    np.savez_compressed(
        here / f"oracle_{name.replace(':', '-')}.npz",
        tokens=np.asarray(tokens, np.int32),
        ids=ids,
        logprobs=np.take_along_axis(logprobs, ids, axis=1).astype(np.float32),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
