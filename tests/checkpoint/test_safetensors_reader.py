"""The safetensors reader against the safetensors package, and against files made to hurt."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from chandra.checkpoint import NeedMoreBytes, open_checkpoint, open_safetensors
from chandra.checkpoint.safetensors import INDEX, MAX_HEADER, read_header
from chandra.errors import ChandraError, CheckpointError, ModelNotFound, UnsupportedError

CONFIG = {"model_type": "llama", "vocab_size": 32}
FORMATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = {f"model.{name}": torch.randn(3, 5).to(dtype) for name, dtype in FORMATS.items()}
    made["model.experts"] = torch.randn(2, 3, 4)
    made["model.norm"] = torch.randn(7).bfloat16()
    made["model.scale"] = torch.tensor(0.5)
    made["model.empty"] = torch.empty(0, 4)
    made["quantized.i8"] = torch.arange(6, dtype=torch.int8)
    made["quantized.f8"] = torch.ones(4).to(torch.float8_e4m3fn)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_tensors_are_what_the_safetensors_package_reads(folder: Path, name: str) -> None:
    checkpoint = open_checkpoint(folder / name)
    assert (checkpoint.kind, checkpoint.path, checkpoint.metadata) == ("hf", folder, CONFIG)
    expected = load_file(folder / "model.safetensors")
    assert set(checkpoint.tensors) == set(expected)
    for key, tensor in expected.items():
        info = checkpoint.tensors[key]
        assert info.shape == tuple(tensor.shape)
        assert info.nbytes == tensor.nbytes
        if key.startswith("model."):
            weight = checkpoint.read(key)
            assert torch.equal(weight.unpack().reshape(tensor.shape), tensor.float())
            assert weight.parts["data"].flags.writeable


@pytest.mark.parametrize(("name", "dtype"), [("quantized.i8", "I8"), ("quantized.f8", "F8_E4M3")])
def test_other_dtypes_are_listed_and_refused_by_name(folder: Path, name: str, dtype: str) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors[name].format == dtype
    with pytest.raises(UnsupportedError, match=f"{name}.*{dtype}"):
        checkpoint.read(name)


def test_more_bytes_are_asked_for_until_the_header_is_whole(folder: Path) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    whole = read_header(raw, len(raw))
    with pytest.raises(NeedMoreBytes) as first:
        read_header(b"", len(raw))
    assert first.value.nbytes == 8
    with pytest.raises(NeedMoreBytes) as second:
        read_header(raw[:8], len(raw))
    assert second.value.nbytes == whole.nbytes
    assert read_header(raw[: whole.nbytes], len(raw)) == whole


def test_every_truncation_is_refused(folder: Path) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    for length in range(len(raw)):
        with pytest.raises(ChandraError):
            read_header(raw[:length], length)


# Files made by hand.


def entry(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def packed(header: Any, nbytes: int = 0) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(nbytes)


WORD = entry("F32", [1], 0, 4)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "short": (b"\2\0\0", "truncated"),
    "header over the limit": (struct.pack("<Q", MAX_HEADER + 1) + b"{}" * 20, "100000001 bytes"),
    "header of 2^64-1 bytes": (struct.pack("<Q", 2**64 - 1) + b"{}", "18446744073709551615 bytes"),
    "header past the end": (struct.pack("<Q", 1000) + b"{}", "1000 bytes"),
    "header of 0 bytes": (struct.pack("<Q", 0) + b"{}", "0 bytes"),
    "no JSON": (packed(b"{nothing"), "JSON"),
    "no UTF-8": (packed(b'{"\xff": 1}'), "JSON"),
    "UTF-16": (packed("{}".encode("utf-16")), "JSON"),
    "no object": (packed(b"[]"), "object"),
    "deep": (packed(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), "JSON"),
    "deep list": (packed(b'{"a":' + b"[" * 100_000), "JSON"),
    "many items": (packed(b'{"a":[' + b"0," * 2_100_000 + b"0]}"), "more than 2000000"),
    "long number": (packed(b'{"a":' + b"9" * 5000 + b"}"), "JSON"),
    "many tensors": (packed({str(i): entry("U8", [], 0, 0) for i in range(100_001)}), "100001 tensors"),
    "duplicate tensor": (packed(b'{"w":%b,"w":%b}' % ((json.dumps(WORD).encode(),) * 2), 4), "duplicate key 'w'"),
    "metadata": (packed({"__metadata__": [1]}), "metadata"),
    "metadata value": (packed({"__metadata__": {"a": None}}), "metadata"),
    "entry": (packed({"w": 3}), "'w'"),
    "entry without dtype": (packed({"w": {"shape": [1], "data_offsets": [0, 4]}}, 4), "no proper dtype"),
    "dtype": (packed({"w": entry("Q9", [1], 0, 4)}, 4), "'w'.*'Q9'"),
    "dtype number": (packed({"w": entry(4, [1], 0, 4)}, 4), "no proper dtype"),
    "shape text": (packed({"w": entry("F32", "1", 0, 4)}, 4), "no proper dtype"),
    "shape float": (packed({"w": entry("F32", [1.0], 0, 4)}, 4), "no proper dtype"),
    "shape bool": (packed({"w": entry("F32", [True], 0, 4)}, 4), "no proper dtype"),
    "shape negative": (packed({"w": entry("F32", [-1], 0, 4)}, 4), "no proper dtype"),
    "shape NaN": (packed({"w": entry("F32", [float("nan")], 0, 4)}, 4), "no proper dtype"),
    "shape of many dimensions": (packed({"w": entry("F32", [1] * 9, 0, 4)}, 4), "no proper dtype"),
    "shape overflow": (packed({"w": entry("F32", [2**62, 4], 0, 4)}, 4), "disagree"),
    "shape against bytes": (packed({"w": entry("F32", [2], 0, 4)}, 4), "disagree"),
    "dtype against bytes": (packed({"w": entry("F16", [1], 0, 4)}, 4), "disagree"),
    "offsets reversed": (packed({"w": entry("F32", [1], 4, 0)}, 4), "bytes 4 to 0"),
    "offsets past the end": (packed({"w": entry("F32", [1], 4, 8)}, 4), "bytes 4 to 8"),
    "offset overflow": (packed({"w": entry("F32", [1], 2**63 - 4, 2**63)}, 4), "no proper dtype"),
    "one offset": (packed({"w": {**WORD, "data_offsets": [4]}}, 4), "no proper dtype"),
    "overlap": (packed({"v": entry("F32", [2], 0, 8), "w": entry("F32", [1], 4, 8)}, 8), "'w'.*overlaps 'v'"),
    "hole": (packed({"v": WORD, "w": entry("F32", [1], 8, 12)}, 12), "take 8 bytes and 12"),
    "hole at the beginning": (packed({"w": entry("F32", [1], 4, 8)}, 8), "take 4 bytes and 8"),
    "hole at the end": (packed({"w": WORD}, 5), "take 4 bytes and 5"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_by_name(case: str, tmp_path: Path) -> None:
    raw, message = HOSTILE[case]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(raw)
    with pytest.raises((CheckpointError, UnsupportedError), match=rf"(?s)hostile\.safetensors.*{message}") as raised:
        open_checkpoint(path)
    assert raised.value.hint


# Shards and configuration.


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    files: dict[str, str] = {}
    for number, part in enumerate((list(tensors().items())[::2], list(tensors().items())[1::2]), start=1):
        name = f"model-{number:05}-of-00002.safetensors"
        save_file(dict(part), tmp_path / name)
        files |= dict.fromkeys(dict(part), name)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.mark.parametrize("name", ["", "model-00002-of-00002.safetensors"])
def test_shards_open_as_one(sharded: Path, name: str) -> None:
    checkpoint = open_checkpoint(sharded / name)
    assert set(checkpoint.tensors) == set(tensors())
    assert checkpoint.path == sharded
    for key, tensor in tensors().items():
        if key.startswith("model."):
            assert torch.equal(checkpoint.read(key).unpack().reshape(tensor.shape), tensor.float())


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


ELSEWHERE = ["../model.safetensors", "/tmp/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "C:x.safetensors"]
ELSEWHERE += ["x\0.safetensors", "/etc/passwd", "config.json", "..", ""]


@pytest.mark.parametrize("name", [*ELSEWHERE, 3, None])
def test_an_index_may_name_files_of_its_folder_only(sharded: Path, name: Any) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({"model.norm": name}))
    with pytest.raises(CheckpointError, match=r"model\.norm.*not a file of this folder"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("value", [None, [], {}, "model"])
def test_an_index_without_a_map_is_refused(sharded: Path, value: Any) -> None:
    edit_index(sharded, lambda index: index.update(weight_map=value))
    with pytest.raises(CheckpointError, match="weight_map"):
        open_checkpoint(sharded)


def test_an_index_that_disagrees_with_its_shards_is_refused(sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({"ghost": "model-00001-of-00002.safetensors"}))
    with pytest.raises(CheckpointError, match=r"'ghost' is not in model-00001-of-00002\.safetensors"):
        open_checkpoint(sharded)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"model-00002-of-00002\.safetensors"):
        open_checkpoint(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = (sharded / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    second.write_bytes(first.read_bytes())
    edit_index(sharded, lambda index: index.update(weight_map={"model.F32": first.name, "model.BF16": second.name}))
    with pytest.raises(CheckpointError, match="is also in model-00001-of-00002"):
        open_checkpoint(sharded)


def test_a_shard_of_an_impossible_name(sharded: Path) -> None:
    edit_index(sharded, lambda index: index.update(weight_map={"model.F32": "x" * 5000 + ".safetensors"}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(sharded)


def test_shards_without_an_index_are_refused(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    with pytest.raises(CheckpointError, match=f"2 safetensors files and no {INDEX}"):
        open_checkpoint(sharded)


DAMAGED = {
    **{"list": (b"[]", "object"), "cut": (b"{", "JSON"), "empty": (b"", "empty"), "no UTF-8": (b"\xff", "JSON")},
    "twice": (b'{"a": 1, "a": 2}', "duplicate"),
    "deep": (b'{"a":' + b"[" * 100_000, "JSON"),
    "large": (b" " * (16 << 20) + b"{}", "16777216"),
    "long number": (b'{"a":' + b"1" * 9999 + b"}", "JSON"),
}


@pytest.mark.parametrize(("config", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_configuration_is_refused(folder: Path, config: bytes, message: str) -> None:
    (folder / "config.json").write_bytes(config)
    with pytest.raises(CheckpointError, match=rf"config\.json.*{message}"):
        open_checkpoint(folder)


def test_a_missing_configuration_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        open_checkpoint(folder)


def test_an_adapter_opens_with_its_own_configuration(tmp_path: Path) -> None:
    save_file({"a.lora_A.weight": torch.ones(2, 4)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 2}')
    adapter = open_safetensors(tmp_path / "adapter_model.safetensors", config="adapter_config.json")
    assert adapter.metadata == {"r": 2}
    assert adapter.read("a.lora_A.weight").parts["data"].view(np.float32).tolist() == [[1.0] * 4] * 2
