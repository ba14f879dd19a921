"""The GGUF reader against the gguf package, and against files made to hurt."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from chandra.checkpoint import NeedMoreBytes, open_checkpoint
from chandra.checkpoint.gguf import MAX_ITEMS, MAX_STRING, read_header
from chandra.errors import ChandraError, CheckpointError, ModelNotFound, UnsupportedError
from chandra.quant import format_of_ggml_type

RNG = np.random.default_rng(0)
SUPPORTED = [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q2_K, Type.Q3_K]
SUPPORTED += [Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_NL, Type.IQ4_XS, Type.MXFP4]
LISTED = [Type.IQ2_XXS, Type.IQ3_S, Type.IQ1_M, Type.TQ1_0, Type.NVFP4, Type.I8, Type.I32, Type.F64]


def random_tensor(kind: Type, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    return RNG.integers(0, 256, (*shape[:-1], shape[-1] // size * nbytes), dtype=np.uint8)


def write_model(path: Path, shards: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    """A file with a tensor of each type; returns their bytes."""
    writer = gguf.GGUFWriter(
        path, "llama", split_max_tensors=-(-(len(SUPPORTED + LISTED) + 1) // shards) * (shards > 1)
    )
    writer.add_uint32("llama.block_count", 2)
    writer.add_int8("i8", -5)
    writer.add_uint64("u64", 2**63)
    writer.add_float64("f64", 0.1)
    writer.add_float32("f32", 0.5)
    writer.add_bool("yes", True)
    writer.add_array("tokenizer.ggml.tokens", ["a", "ü", "来", "x" * 300])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0, 2.0])
    writer.add_array("flags", [True, False, True])
    writer.add_array("ints", [1, -2, 3])
    data = {f"{kind.name}.weight": (kind, random_tensor(kind, (3, 512))) for kind in SUPPORTED + LISTED}
    data["experts"] = (Type.Q8_0, random_tensor(Type.Q8_0, (2, 3, 64)))
    for name, (kind, raw) in data.items():
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: raw for name, (_, raw) in data.items()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


def test_metadata_is_what_the_gguf_package_reads(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    fields = gguf.GGUFReader(model).fields
    assert {key for key in fields if not key.startswith("GGUF.")} == set(checkpoint.metadata)
    for key, value in checkpoint.metadata.items():
        expected = fields[key].contents()
        assert (list(value) if isinstance(expected, list) else value) == expected, key
    assert checkpoint.kind == "gguf"
    assert checkpoint.metadata["ints"].dtype == np.int32
    assert checkpoint.metadata["flags"].dtype == np.bool_
    assert type(checkpoint.metadata["yes"]) is bool


def test_tensors_are_what_the_gguf_package_reads(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(model).tensors}
    assert list(checkpoint.tensors) == list(expected)
    for name, info in checkpoint.tensors.items():
        assert info.shape == tuple(expected[name].shape.tolist()[::-1])
        assert info.format == expected[name].tensor_type.name
        assert info.nbytes == expected[name].n_bytes
        if expected[name].tensor_type in SUPPORTED:
            weight = checkpoint.read(name)
            assert weight.parts["data"].tobytes() == expected[name].data.tobytes()
            assert weight.format is format_of_ggml_type(expected[name].tensor_type)
            assert weight.parts["data"].shape == weight.format.parts(info.shape)[0].shape
        else:
            with pytest.raises(UnsupportedError, match=rf"model.gguf.*{name}.*{info.format}"):
                checkpoint.read(name)


def test_version_2_reads_the_same(model: Path) -> None:
    raw = bytearray(model.read_bytes())
    before = open_checkpoint(model).tensors
    raw[4] = 2
    model.write_bytes(raw)
    assert open_checkpoint(model).tensors == before


def test_views_are_writable_and_never_reach_the_file(model: Path) -> None:
    before = model.read_bytes()
    data = open_checkpoint(model).read("Q4_0.weight").parts["data"]
    assert data.flags.writeable
    assert not data.flags.owndata
    data[:] = 0
    assert model.read_bytes() == before


def test_views_survive_release_and_close(tmp_path: Path) -> None:
    raw = write_big(tmp_path / "big.gguf")
    checkpoint = open_checkpoint(tmp_path / "big.gguf")
    data = checkpoint.read("w").parts["data"]
    assert data.tobytes() == raw
    checkpoint.release("w")
    assert data.tobytes() == raw
    checkpoint.close()
    assert data.tobytes() == raw
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.read("w")


def write_big(path: Path) -> bytes:
    raw = RNG.integers(0, 256, (64, 4096), dtype=np.uint8)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", raw, raw_dtype=Type.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return raw.tobytes()


def resident_file_pages() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssFile"].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_release_gives_the_pages_back(tmp_path: Path) -> None:
    with (tmp_path / "big.gguf").open("wb") as file:
        file.write(header(tensors=[("w", (4096, 4096), 0, 0)]))
        file.truncate(file.tell() + (64 << 20) + 64)
    checkpoint = open_checkpoint(tmp_path / "big.gguf")
    before = resident_file_pages()
    checkpoint.read("w").parts["data"].max()
    assert resident_file_pages() - before > 60 << 20
    checkpoint.release("w")
    assert resident_file_pages() - before < 4 << 20


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs /proc")
def test_a_file_larger_than_the_memory_opens(tmp_path: Path) -> None:
    memory = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    rows = memory // 4096
    with (tmp_path / "huge.gguf").open("wb") as file:
        file.write(header(tensors=[("w", (rows, 2048), 0, 0)]))
        file.truncate(file.tell() + rows * 8192 + 64)  # a hole: no disk is used
    checkpoint = open_checkpoint(tmp_path / "huge.gguf")
    assert checkpoint.read("w").parts["data"][-1, -1] == 0
    checkpoint.close()


def test_a_file_that_shrinks_is_not_touched(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    with model.open("r+b") as file:
        file.truncate(model.stat().st_size - 5000)
    with pytest.raises(CheckpointError, match="now has"):
        checkpoint.read("F32.weight")


def test_an_unknown_name_is_an_error(model: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor 'nothing'"):
        open_checkpoint(model).read("nothing")


# Files made by hand.


def string(text: bytes | str) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def key(name: bytes | str, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def strings(name: str, items: list[bytes]) -> bytes:
    return key(name, 9, struct.pack("<IQ", 8, len(items)) + b"".join(map(string, items)))


def header(
    keys: list[bytes] = [],  # noqa: B006
    tensors: list[tuple[str | bytes, tuple[int, ...], int, int]] = [],  # noqa: B006
    version: int = 3,
    counts: tuple[int, int] | None = None,
    order: str = "<",
) -> bytes:
    """`tensors`: name, shape, type, offset."""
    raw = b"GGUF" + struct.pack(order + "IQQ", version, *(counts or (len(tensors), len(keys)))) + b"".join(keys)
    for name, shape, kind, offset in tensors:
        raw += string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        raw += struct.pack("<IQ", kind, offset)
    return raw


def body(head: bytes, nbytes: int = 0, alignment: int = 32) -> bytes:
    return head + bytes(-len(head) % alignment + nbytes)


U64 = 2**64 - 1
MAX_U64 = struct.pack("<Q", U64)
ALIGNMENT = "general.alignment"
HOSTILE: dict[str, tuple[bytes, str]] = {
    "magic": (b"GGML" + header()[4:], "not a model file"),
    "version 0": (header(version=0), "has version 0"),
    "version 1": (header(version=1), "has version 1"),
    "version 4": (header(version=4), "has version 4"),
    "big-endian": (header(order=">"), "is big-endian"),
    "tensor count": (header(counts=(U64, 0)), f"{U64} tensors"),
    "key count": (header(counts=(0, U64)), f"{U64} metadata keys"),
    "count over the file": (header(counts=(0, 99_999)), "99999 metadata keys"),
    "long string": (header([key("k", 8, struct.pack("<Q", MAX_STRING + 1))]) + bytes(64), "16777216 are allowed"),
    "endless string": (header([key("k", 8, MAX_U64)]), "16777216 are allowed"),
    "string past the end": (header([key("k", 8, struct.pack("<Q", 1000))]), "takes 1000 bytes"),
    "long key": (header([string(b"k" * 70_000) + bytes(5)]), "65535 are allowed"),
    "key of bad UTF-8": (header([key(b"\xff\xfe", 4, bytes(4))]), "not UTF-8"),
    "name of bad UTF-8": (body(header(tensors=[(b"\xff", (1,), 0, 0)]), 32), "not UTF-8"),
    "array count": (header([key("k", 9, struct.pack("<IQ", 4, U64))]), f"{MAX_ITEMS} are allowed"),
    "array over the limit": (header([key("k", 9, struct.pack("<IQ", 0, MAX_ITEMS + 1))]), "are allowed"),
    "array past the end": (header([key("k", 9, struct.pack("<IQ", 10, MAX_ITEMS))]), "takes 536870912 bytes"),
    "string array past the end": (header([key("k", 9, struct.pack("<IQ", 8, MAX_ITEMS))]), "takes 536870912 bytes"),
    "string of an array past the end": (header([strings("k", [b"ab", b"c"])])[:-1], "a string of 'k'"),
    "endless string of an array": (header([key("k", 9, struct.pack("<IQ", 8, 1) + MAX_U64)]), "a string of 'k'"),
    "array of arrays": (header([key("k", 9, struct.pack("<IQIQ", 9, 1, 4, 0))]), "nested type 9"),
    "array of unknown": (header([key("k", 9, struct.pack("<IQ", 77, 1))]), "type 77"),
    "value type": (header([key("k", 13, bytes(8))]), "unknown value type 13"),
    "boolean": (header([key("k", 7, b"\x02")]), "boolean of value 2"),
    "duplicate key": (header([key("k", 4, bytes(4))] * 2), "duplicate metadata key 'k'"),
    "duplicate tensor": (body(header(tensors=[("w", (8,), 0, 0), ("w", (8,), 0, 32)]), 64), "duplicate tensor 'w'"),
    "alignment 0": (header([key(ALIGNMENT, 4, struct.pack("<I", 0))]), "power of two"),
    "alignment odd": (header([key(ALIGNMENT, 4, struct.pack("<I", 33))]), "power of two"),
    "alignment 48": (header([key(ALIGNMENT, 4, struct.pack("<I", 48))]), "power of two"),
    "alignment of 8 bytes": (header([key(ALIGNMENT, 10, struct.pack("<Q", 32))]), "uint32"),
    "alignment text": (header([key(ALIGNMENT, 8, string("32"))]), "uint32"),
    "alignment list": (header([key(ALIGNMENT, 9, struct.pack("<IQI", 4, 1, 32))]), "uint32"),
    "rank 0": (body(header(tensors=[("w", (), 0, 0)]), 64), "0 dimensions"),
    "rank 5": (body(header(tensors=[("w", (1,) * 5, 0, 0)]), 64), "5 dimensions"),
    "rank 2^32-1": (
        header(tensors=[("w", (1, 1), 0, 0)]).replace(struct.pack("<IQ", 2, 1), b"\xff" * 12),
        "dimensions",
    ),
    "zero dims": (body(header(tensors=[("w", (4, 0), 0, 0)]), 64), "zeros"),
    "shape overflow": (body(header(tensors=[("w", (2**32, 2**32), 0, 0)]), 64), "truncated"),
    "shape overflow to 0": (body(header(tensors=[("w", (2**62, 4), 0, 0)]), 64), "truncated"),
    "huge shape": (body(header(tensors=[("w", (U64, U64, U64, U64), 0, 0)]), 64), "truncated"),
    "broken blocks": (body(header(tensors=[("w", (33,), 8, 0)]), 64), "Q8_0.*33"),
    "tensor type": (body(header(tensors=[("w", (32,), 99, 0)]), 64), "'w'.*99"),
    "removed tensor type": (body(header(tensors=[("w", (32,), 4, 0)]), 64), "'w'.*4"),
    "offset overflow": (body(header(tensors=[("w", (8,), 0, 2**64 - 32)]), 64), "truncated"),
    "offset past the end": (body(header(tensors=[("w", (8,), 0, 64)]), 64), "truncated"),
    "offset unaligned": (body(header(tensors=[("w", (8,), 0, 4)]), 64), "not aligned to 32"),
    "overlap": (body(header(tensors=[("v", (16,), 0, 0), ("w", (8,), 0, 32)]), 64), "'w'.*overlaps 'v'"),
    "data cut": (body(header(tensors=[("w", (8,), 0, 0)]), 31), "truncated"),
    "no data": (header(tensors=[("w", (8,), 0, 0)]), "truncated"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_by_name(case: str, tmp_path: Path) -> None:
    raw, message = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(raw)
    with pytest.raises((CheckpointError, UnsupportedError), match=rf"(?s)hostile\.gguf.*{message}") as raised:
        open_checkpoint(path)
    assert raised.value.hint


def test_every_truncation_is_refused(model: Path) -> None:
    raw = model.read_bytes()
    size = len(raw)
    for length in [*range(0, 2000, 7), *range(2000, size, 997), size - 33]:
        with pytest.raises(ChandraError):
            read_header(raw[:length], length)


def test_more_bytes_are_asked_for_until_the_header_is_whole(model: Path) -> None:
    raw = model.read_bytes()
    whole = read_header(raw, len(raw))
    asked = [0]
    while True:
        try:
            partial = read_header(raw[: asked[-1]], len(raw))
            break
        except NeedMoreBytes as more:
            asked.append(more.nbytes)
    assert len(asked) > 10
    assert asked == sorted(set(asked))
    assert asked[-1] <= whole.nbytes
    assert partial.tensors == whole.tensors
    assert partial.offsets == whole.offsets


def test_strings_that_are_not_utf8_keep_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(header([strings("k", [b"ok", b"\xff\xfe", b"", "ü".encode()]), key("s", 8, string(b"\xc3"))]))
    metadata = open_checkpoint(path).metadata
    items = metadata["k"]
    assert [item.encode("utf-8", "surrogateescape") for item in items] == [b"ok", b"\xff\xfe", b"", "ü".encode()]
    assert len(items) == 4
    assert "ü" in items
    assert "u" not in items
    assert metadata["s"] == "\udcc3"


def test_empty_arrays_and_files_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(header([strings("s", []), key("n", 9, struct.pack("<IQ", 6, 0))]))
    checkpoint = open_checkpoint(path)
    assert list(checkpoint.metadata["s"]) == []
    assert checkpoint.metadata["n"].shape == (0,)
    assert not checkpoint.tensors


def test_another_alignment_is_kept(tmp_path: Path) -> None:
    head = header([key(ALIGNMENT, 4, struct.pack("<I", 8))], [("w", (2,), 0, 8)])
    path = tmp_path / "model.gguf"
    path.write_bytes(body(head, 8, alignment=8) + struct.pack("<2f", 1.5, -2))
    assert open_checkpoint(path).read("w").parts["data"].view("<f4").tolist() == [1.5, -2]


# Shards.


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    write_model(tmp_path / "model.gguf", shards=3)
    return sorted(tmp_path.iterdir())


@pytest.mark.parametrize("which", [0, 2, None])
def test_any_shard_and_the_folder_open_the_whole_model(shards: list[Path], which: int | None, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    expected = write_model(tmp_path / "one" / "model.gguf")
    whole = open_checkpoint(tmp_path / "one" / "model.gguf")
    assert [path.name for path in shards] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    checkpoint = open_checkpoint(tmp_path if which is None else shards[which])
    assert checkpoint.path == shards[0]
    assert checkpoint.tensors == whole.tensors
    assert checkpoint.metadata["llama.block_count"] == 2
    for kind in SUPPORTED:
        name = f"{kind.name}.weight"
        assert checkpoint.read(name).nbytes == expected[name].nbytes


def test_a_missing_shard_is_named(shards: list[Path]) -> None:
    shards[1].unlink()
    with pytest.raises(ModelNotFound, match=r"model-00002-of-00003\.gguf"):
        open_checkpoint(shards[0])


def rename(shards: list[Path]) -> Path:
    return shards[0].rename(shards[0].with_name("renamed.gguf"))


def swap(shards: list[Path]) -> Path:
    shards[1].rename(shards[1].with_name("x"))
    shards[2].rename(shards[1])
    shards[1].with_name("x").rename(shards[2])
    return shards[0]


def repeat(shards: list[Path]) -> Path:
    shards[1].write_bytes(shards[0].read_bytes())
    return shards[0]


@pytest.mark.parametrize(("spoil", "message"), [(rename, "does not say"), (swap, "split.no"), (repeat, "split.no")])
def test_mixed_up_shards_are_refused(spoil: Callable[[list[Path]], Path], message: str, shards: list[Path]) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(spoil(shards))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for number in (0, 1):
        keys = [key("split.no", 2, struct.pack("<H", number)), key("split.count", 2, struct.pack("<H", 2))]
        path = tmp_path / f"m-0000{number + 1}-of-00002.gguf"
        path.write_bytes(body(header(keys, [("w", (8,), 0, 0)]), 32))
    with pytest.raises(CheckpointError, match=r"'w' is also in m-00001-of-00002\.gguf"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("value", [(2, struct.pack("<H", 7)), (8, string("3")), (11, b"\xff" * 8), (10, b"\xff" * 8)])
def test_a_wrong_shard_count_is_refused(value: tuple[int, bytes], tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(header([key("split.count", *value)]))
    with pytest.raises(CheckpointError, match=r"split\.count|7 shards"):
        open_checkpoint(path)
