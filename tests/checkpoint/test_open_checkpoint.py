"""Finding out what a path is."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from chandra.checkpoint import MappedFile, open_checkpoint
from chandra.errors import CheckpointError, ModelNotFound

GGUF = b"GGUF" + struct.pack("<IQQ", 3, 0, 0)
SAFETENSORS = struct.pack("<Q", 2) + b"{}"


def test_the_content_tells_not_the_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "sha256-0123").write_bytes(GGUF)
    (tmp_path / "weights.gguf").write_bytes(SAFETENSORS)
    assert open_checkpoint(tmp_path / "sha256-0123").kind == "gguf"
    assert open_checkpoint(str(tmp_path / "weights.gguf")).kind == "hf"


@pytest.mark.parametrize("name", ["missing.gguf", "missing/model.gguf", "file/model.gguf"])
def test_nothing_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(GGUF)
    with pytest.raises(ModelNotFound, match="no such file"):
        open_checkpoint(tmp_path / name)


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    for name in ("x" * 5000, "nul\0"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            open_checkpoint(tmp_path / name)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model: it is empty"):
        open_checkpoint(tmp_path)


def test_a_folder_of_other_things(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("hello")
    with pytest.raises(CheckpointError, match="no model"):
        open_checkpoint(tmp_path)


def test_a_folder_with_one_gguf(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(GGUF)
    assert open_checkpoint(tmp_path).path == tmp_path / "a.gguf"


def test_a_folder_with_several_ggufs(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(GGUF)
    with pytest.raises(CheckpointError, match=r"several models: a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)


NO_MODELS = {
    **{"empty": (b"", "empty"), "text": (b"hello world", "not a model file"), "short": (b"GGU", "not a model file")},
    **{"zeros": (b"\0" * 99, "not a model file"), "page": (b"<!DOCTYPE html>", "not a model file")},
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
}


@pytest.mark.parametrize(("content", "message"), NO_MODELS.values(), ids=NO_MODELS)
def test_files_that_are_no_models(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    for path in (tmp_path / "model.gguf", tmp_path):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(tmp_path / "model.gguf")


def test_a_link_loop(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").symlink_to(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(tmp_path / "model.gguf")


def test_torch_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(
        (lambda head: struct.pack("<Q", len(head)) + head + bytes(8))(
            json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
        )
    )
    (tmp_path / "config.json").write_text("{}")
    code = "import sys; from chandra.checkpoint import open_checkpoint as o; o(sys.argv[1]).read('w')"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0)
    for path in (tmp_path / "locked", tmp_path / "locked" / "model.gguf"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            open_checkpoint(path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_closed_file_takes_no_memory_even_while_views_of_it_are_alive(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 16384)

    def resident() -> int:
        maps = Path("/proc/self/smaps").read_text().split(str(path))[1:]
        return sum(int(part.partition("Rss:")[2].split()[0]) for part in maps) << 10

    file = MappedFile(path)
    view = file.array(0, file.size)
    assert int(view.sum()) == 16384 * sum(range(256))
    assert resident() == file.size
    file.close()
    assert resident() == 0
    assert view[-1] == 255
