"""Mutated headers either parse or are refused with a ChandraError, and take no more memory than the file's size."""

from __future__ import annotations

import json
import random
import resource
import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from chandra.checkpoint import Header, open_checkpoint
from chandra.checkpoint.gguf import read_header as read_gguf
from chandra.checkpoint.safetensors import read_header as read_safetensors
from chandra.errors import ChandraError

Reader = Callable[[bytes, int], Header]
INTERESTING = [0, 1, 2, 7, 8, 9, 31, 32, 33, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63]
INTERESTING += [2**64 - 1, 2**64 - 8, 2**64 - 32, 16 << 20, (64 << 20) + 1, 100_000, 100_000_001]


def gguf_file() -> bytes:
    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    words = ["a", "bc", "def", ""]
    keys = [
        string("general.architecture") + struct.pack("<I", 8) + string("llama"),
        string("general.alignment") + struct.pack("<II", 4, 32),
        string("llama.block_count") + struct.pack("<II", 4, 2),
        string("tokens") + struct.pack("<IIQ", 9, 8, len(words)) + b"".join(map(string, words)),
        string("scores") + struct.pack("<IIQ3f", 9, 6, 3, 0.5, 1, 2),
        string("flag") + struct.pack("<IB", 7, 1),
        string("big") + struct.pack("<Id", 12, 0.5),
    ]
    tensors, offset = [], 0
    for name, shape, kind, nbytes in [("a", (64, 2), 8, 136), ("b", (8,), 0, 32), ("c", (256, 2, 2), 12, 576)]:
        tensors.append(string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset))
        offset += -(-nbytes // 32) * 32
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys + tensors)
    return head + bytes(-len(head) % 32) + bytes(offset)


def safetensors_file() -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, nbytes in [("a", "F32", [2, 3], 24), ("b", "BF16", [4], 8), ("c", "I8", [], 1)]:
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    head = json.dumps(entries).encode()
    return struct.pack("<Q", len(head)) + head + bytes(offset)


def mutate(rng: random.Random, raw: bytes) -> bytes:
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(data))
        match rng.randrange(8):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.randrange(256)
            case 2 | 3:
                data[at : at + 8] = struct.pack("<Q", rng.choice(INTERESTING))
            case 4:
                data[at : at + 4] = struct.pack("<I", rng.choice(INTERESTING) & (2**32 - 1))
            case 5:
                del data[at : at + rng.randrange(1, 40)]
            case 6:
                data[at:at] = data[(start := rng.randrange(len(data))) : start + rng.randrange(1, 40)]
            case 7:
                data = data[: at + 1]
        if not data:
            return b""
    return bytes(data)


def mutate_text(rng: random.Random, raw: bytes) -> bytes:
    """Mutations that leave the header's length right, so that more of them get past the JSON parser."""
    length = int.from_bytes(raw[:8], "little")
    head, tail = bytearray(raw[8 : 8 + length]), raw[8 + length :]
    tokens = [
        b"0",
        b"-1",
        b"1e9",
        b"[]",
        b"{}",
        b"null",
        b'"F32"',
        b'"F4"',
        b"9" * 30,
        b"[[",
        b",",
        b'"',
        b"\xff",
        b"true",
    ]
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(head))
        head[at : at + rng.randrange(6)] = rng.choice(tokens)
    return struct.pack("<Q", len(head)) + bytes(head) + tail[: rng.choice((len(tail), rng.randrange(len(tail))))]


def check(read: Reader, raw: bytes) -> bool:
    """Whether the file parses; everything it then says must be true of its bytes."""
    try:
        header = read(raw, len(raw))
    except ChandraError:
        return False
    for value in header.metadata.values():
        if not isinstance(value, int | float | str):
            assert len(list(value)) == len(value)
    spans = sorted((header.offsets[name], info.nbytes) for name, info in header.tensors.items())
    ends = [header.nbytes] + [start + nbytes for start, nbytes in spans]
    assert ends[-1] <= len(raw) or not spans
    assert all(start >= end for (start, _), end in zip(spans, ends, strict=False))
    return True


@contextmanager
def memory_limit(nbytes: int) -> Iterator[None]:
    """Allocations of more than this over what the process has now fail."""
    if not sys.platform.startswith("linux"):
        yield
        return
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


CASES: dict[str, tuple[Reader, bytes, Callable[[random.Random, bytes], bytes]]] = {
    "gguf": (read_gguf, gguf_file(), mutate),
    "safetensors": (read_safetensors, safetensors_file(), mutate),
    "safetensors text": (read_safetensors, safetensors_file(), mutate_text),
}


def fuzz(case: str, seed: int, rounds: int) -> None:
    read, raw, change = CASES[case]
    assert check(read, raw)
    rng = random.Random(seed)
    with memory_limit(64 << 20):
        parsed = sum(check(read, change(rng, raw)) for _ in range(rounds))
    assert 0 < parsed < rounds


@pytest.mark.parametrize("case", CASES)
def test_mutations_parse_or_are_refused(case: str) -> None:
    fuzz(case, seed=1, rounds=8000)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
@pytest.mark.parametrize("case", CASES)
def test_many_mutations_parse_or_are_refused(case: str, seed: int) -> None:
    fuzz(case, seed, rounds=50_000)


@pytest.mark.parametrize("case", CASES)
def test_mutations_take_no_more_memory_than_a_small_multiple_of_the_file(case: str) -> None:
    read, raw, change = CASES[case]
    rng = random.Random(7)
    check(read, raw)  # caches of the modules
    tracemalloc.start()
    try:
        for _ in range(1500):
            changed = change(rng, raw)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            check(read, changed)
            assert tracemalloc.get_traced_memory()[1] - before < 20 * len(raw) + 16_384
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("case", ["gguf", "safetensors"])
def test_mutated_files_open_and_read_or_are_refused(case: str, tmp_path: Path) -> None:
    _, raw, change = CASES[case]
    (tmp_path / "config.json").write_text("{}")
    rng = random.Random(3)
    opened = 0
    for i in range(400):
        path = tmp_path / f"{i}.{case}"
        path.write_bytes(change(rng, raw))
        try:
            checkpoint = open_checkpoint(path)
            for name, info in checkpoint.tensors.items():
                if info.format != "I8":
                    assert checkpoint.read(name).nbytes == info.nbytes
                checkpoint.release(name)
            checkpoint.close()
            opened += 1
        except ChandraError:
            pass
        path.unlink()
    assert 0 < opened < 400
