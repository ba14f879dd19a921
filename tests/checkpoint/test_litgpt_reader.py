"""Lit-GPT folders, and pickles that must not be loaded."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from chandra.checkpoint import open_checkpoint
from chandra.errors import ChandraError, CheckpointError, ModelNotFound, UnsupportedError

CONFIG = {"name": "tiny", "n_layer": 1, "n_embd": 8}


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shared = torch.randn(4, 8).bfloat16()
    return {
        "lm_head.weight": shared,
        "transformer.wte.weight": shared,
        "transformer.h.0.attn.qkv.weight": torch.randn(12, 8).half(),
        "transformer.ln_f.weight": torch.randn(8),
        "slice": torch.randn(6, 8)[2:4],
        "index": torch.arange(5),
    }


def write(folder: Path, content: Any, **options: Any) -> Path:
    torch.save(content, folder / "lit_model.pth", **options)
    (folder / "model_config.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


@pytest.mark.parametrize("name", ["", "lit_model.pth"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_tensors_are_what_torch_reads(tmp_path: Path, name: str, wrapped: bool) -> None:
    checkpoint = open_checkpoint(write(tmp_path, {"model": state()} if wrapped else state()) / name)
    assert (checkpoint.kind, checkpoint.path, checkpoint.metadata) == ("litgpt", tmp_path, CONFIG)
    assert list(checkpoint.tensors) == list(state())
    for key, tensor in state().items():
        assert checkpoint.tensors[key].shape == tuple(tensor.shape)
        if key == "index":
            with pytest.raises(UnsupportedError, match=r"'index'.*torch\.int64"):
                checkpoint.read(key)
        else:
            weight = checkpoint.read(key)
            assert torch.equal(weight.unpack(), tensor.float())
            assert not weight.parts["data"].flags.owndata


def test_parameters_are_tensors(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    assert torch.equal(open_checkpoint(write(tmp_path, {"w": weight})).read("w").unpack(), weight.detach())


def test_a_transposed_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="'w' is not contiguous"):
        open_checkpoint(write(tmp_path, {"w": torch.ones(2, 3).t()}))


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    write(tmp_path, {"w": torch.ones(2), "x": Attack(tmp_path / "owned")})
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [[torch.ones(1)], {"w": 3}, {3: torch.ones(1)}, torch.ones(1), {"w": {"v": 1}}])
def test_other_contents_are_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(CheckpointError, match=r"lit_model\.pth"):
        open_checkpoint(write(tmp_path, content))


def test_the_old_pickle_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not an archive"):
        open_checkpoint(write(tmp_path, state(), _use_new_zipfile_serialization=False))


def rewrite(path: Path, compression: int = zipfile.ZIP_STORED, **changes: bytes) -> None:
    """Write the archive again with records changed."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, changes.get(name.partition("/")[2].replace("/", "_"), content))


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    rewrite(write(tmp_path, state()) / "lit_model.pth", zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        open_checkpoint(tmp_path)


def test_a_record_that_is_too_short_is_refused(tmp_path: Path) -> None:
    rewrite(write(tmp_path, {"w": torch.ones(64)}) / "lit_model.pth", data_0=b"1234")
    with pytest.raises(CheckpointError, match="'w' takes 256 bytes"):
        open_checkpoint(tmp_path)


def test_a_big_endian_archive_is_refused(tmp_path: Path) -> None:
    rewrite(write(tmp_path, {"w": torch.ones(64)}) / "lit_model.pth", byteorder=b"big")
    with pytest.raises(UnsupportedError, match="big-endian"):
        open_checkpoint(tmp_path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, state()) / "lit_model.pth"
    raw = path.read_bytes()
    for length in range(0, len(raw), 101):
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path)


DAMAGED = {
    **{
        "list": ("[1, 2]", "mapping"),
        "cut": ("a: [", "YAML"),
        "deep": ("[" * 5000, "YAML"),
        "NUL": ("a: \x00", "YAML"),
    },
    **{"alias": ("a: &x [1]\nb: *x", "aliases"), "code": ("!!python/object:os.system {}", "YAML")},
    **{"date": ("a: 2001-99-99", "YAML"), "large": ("#" * 65_537, "65536")},
}


@pytest.mark.parametrize(("config", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_configuration_is_refused(tmp_path: Path, config: str, message: str) -> None:
    write(tmp_path, state())
    (tmp_path / "model_config.yaml").write_text(config)
    with pytest.raises(CheckpointError, match=rf"(?s)model_config\.yaml.*{message}"):
        open_checkpoint(tmp_path)


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    (write(tmp_path, state()) / "model_config.yaml").unlink()
    with pytest.raises(ModelNotFound, match=r"model_config\.yaml"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "blob"])
@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_other_pickles_are_refused(tmp_path: Path, name: str, form: str) -> None:
    if form == "zip":
        torch.save(state(), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps({"w": Attack(tmp_path / "owned")}))
    with pytest.raises(UnsupportedError, match=f"{name} is a pickle") as raised:
        open_checkpoint(tmp_path / name)
    assert "safetensors" in raised.value.hint
    with pytest.raises(ChandraError, match="has no model" if name == "blob" else "is a pickle"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "owned").exists()
