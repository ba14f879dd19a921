"""The Hub source, in processes of its own whose HF_ENDPOINT is a server on loopback that speaks the Hub's protocol."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Site, add_hub_repo, serve, sha256

from chandra.errors import ModelNotFound, UnsupportedError
from chandra.store import Store
from chandra.store.sources.hub import File, choose_files

WEIGHTS = random.Random(3).randbytes(1 << 20)

_PULL = """
import json, sys
from pathlib import Path
from chandra.errors import ChandraError
from chandra.store import Store
store = Store(Path(sys.argv[1]), timeout=5)
for name in sys.argv[2:]:
    try:
        model = store.pull(name, accept_license=True)
        assert store.resolve(name) == model
        facts = [model.name, str(model.path), model.size, model.license, model.note, model.digest]
        print(json.dumps(facts), flush=True)
    except ChandraError as error:
        print(json.dumps([type(error).__name__, error.message, error.hint]), flush=True)
"""


@pytest.fixture
def site() -> Iterator[Site]:
    with serve() as site:
        yield site


def start(site: Site, folder: Path, *names: str, **environ: str) -> subprocess.Popen[str]:
    settings = {"HF_ENDPOINT": site.url, "HF_HOME": str(folder / "hf"), "HF_TOKEN": "hf_secret", **environ}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    command = [sys.executable, "-c", _PULL, str(folder / "home"), *names]
    return subprocess.Popen(command, env=kept | settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def pull(site: Site, folder: Path, *names: str, **environ: str) -> list[list[str]]:
    with start(site, folder, *names, **environ) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "it/s" not in err  # no progress bar but ours
    return [json.loads(line) for line in out.splitlines()]


def test_repositories(site: Site, tmp_path: Path) -> None:
    quants = {f"tiny-{quant}.gguf": WEIGHTS + quant.encode() for quant in ("Q4_K_M", "Q8_0", "f16")}
    add_hub_repo(site, "org/gguf", {**quants, "README.md": b"hello", "mmproj-Q4_K_M.gguf": b"eyes"})
    add_hub_repo(site, "org/q8", {"tiny.Q8_0.gguf": WEIGHTS, "tiny.f16.gguf": WEIGHTS * 2})
    shards = {f"Q4_K_M/big-Q4_K_M-0000{n}-of-00003.gguf": WEIGHTS[:n] for n in (1, 2, 3)}
    add_hub_repo(site, "org/shards", shards)
    folder = {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "model.safetensors": WEIGHTS,
        "x/y.json": b"",
        "a.bin": b"x",
    }
    add_hub_repo(site, "org/folder", folder)
    add_hub_repo(site, "org/pickle", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    site.add("/api/models/org/gated", b"{}", Status="403", X_Error_Code="GatedRepo")
    site.add("/api/models/org/private", b"{}", Status="401", X_Error_Code="RepoNotFound")
    site.add("/api/models/org/broken", b"{}", Status="418")

    names = ["gguf", "gguf:q8_0", "gguf:Q5_0", "q8", "shards", "folder", "pickle", "gated", "private", "broken"]
    results = pull(site, tmp_path, *(f"hf.co/org/{name}" for name in names))
    plain, q8, missing, only_q8, sharded, safetensors, pickle, gated, private, broken = results
    assert Path(plain[1]).read_bytes() == quants["tiny-Q4_K_M.gguf"]
    assert Path(plain[1]).is_relative_to(tmp_path / "hf" / "hub" / "models--org--gguf" / "snapshots")
    assert plain[2:] == [len(WEIGHTS) + 6, "apache-2.0", "", f"sha256-{sha256(quants['tiny-Q4_K_M.gguf'])}"]
    assert (q8[0], Path(q8[1]).name) == ("hf.co/org/gguf:Q8_0", "tiny-Q8_0.gguf")
    assert missing[0] == "ModelNotFound"
    assert missing[2] == "it has F16, Q4_K_M, Q8_0"
    assert (Path(only_q8[1]).name, only_q8[4]) == ("tiny.Q8_0.gguf", "no Q4_K_M there: Q8_0 was taken")
    assert Path(sharded[1]).name == "big-Q4_K_M-00001-of-00003.gguf"
    assert sharded[2] == 6
    assert sorted(path.name for path in Path(sharded[1]).parent.iterdir()) == [Path(name).name for name in shards]
    assert sorted(path.name for path in Path(safetensors[1]).iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert [pickle[0], gated[0], private[0], broken[0]] == [
        "UnsupportedError",
        "DownloadError",
        "ModelNotFound",
        "DownloadError",
    ]
    assert "HF_TOKEN" in gated[2]
    assert list((tmp_path / "home" / "blobs").glob("*")) == []  # one copy, in the Hub's cache

    # The token goes to the Hub only; what is in the cache is not fetched again, and found without a network.
    assert site.asked("/org/gguf/resolve/main/tiny-Q4_K_M.gguf")[0]["authorization"] == "Bearer hf_secret"
    asked = len(site.asked("/org/gguf/resolve/main/tiny-Q4_K_M.gguf"))
    again, offline, nothing = (
        pull(site, tmp_path, "hf.co/org/gguf")[0],
        *pull(site, tmp_path, "hf.co/org/gguf", "hf.co/org/never", HF_HUB_OFFLINE="1"),
    )
    assert again == plain
    assert offline[1:3] == plain[1:3]
    assert nothing[0] == "DownloadError"
    assert "HF_HUB_OFFLINE" in nothing[2]
    assert len(site.asked("/org/gguf/resolve/main/tiny-Q4_K_M.gguf")) == asked == 1

    store = Store(tmp_path / "home")
    assert len(store.list()) == 5
    Path(plain[1]).unlink()
    with pytest.raises(ModelNotFound):
        store.resolve("hf.co/org/gguf")


def test_pull_killed_and_resumed(site: Site, tmp_path: Path) -> None:
    add_hub_repo(site, "org/gguf", {"tiny-Q4_K_M.gguf": WEIGHTS})
    part = tmp_path / "hf" / "hub" / "models--org--gguf" / "blobs" / f"{sha256(WEIGHTS)}.part"
    site.pause = 0.02
    with start(site, tmp_path, "hf.co/org/gguf") as process:
        while not part.exists() or part.stat().st_size < 300_000:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    kept = part.stat().st_size
    (result,) = pull(site, tmp_path, "hf.co/org/gguf")
    assert Path(result[1]).read_bytes() == WEIGHTS
    assert site.asked("/org/gguf/resolve/main/tiny-Q4_K_M.gguf")[-1]["range"] == f"bytes={kept}-"


@pytest.mark.parametrize(
    ("names", "quant", "chosen", "label"),
    [
        ("a-Q4_K_M.gguf a-Q4_0.gguf", "", "a-Q4_K_M.gguf", "Q4_K_M"),
        (
            "qwen2.5-0.5b-instruct-q4_k_m.gguf qwen2.5-0.5b-instruct-q8_0.gguf",
            "Q8_0",
            "qwen2.5-0.5b-instruct-q8_0.gguf",
            "Q8_0",
        ),
        ("a.Q3_K_M.gguf a.Q4_0.gguf a.Q8_0.gguf", "", "a.Q4_0.gguf", "Q4_0"),
        ("a-Q8_0.gguf a-f16.gguf", "", "a-f16.gguf", "F16"),  # the smallest: sizes grow with the place
        ("phi-3-mini-4k-instruct-q4.gguf phi-3-fp16.gguf", "", "phi-3-mini-4k-instruct-q4.gguf", "Q4"),
        ("a-UD-Q4_K_XL.gguf a-Q8_0.gguf", "UD-Q4_K_XL", "a-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("odd-name.gguf", "", "odd-name.gguf", "ODD-NAME.GGUF"),
        ("a-Q4_K_M-00001-of-00002.gguf a-Q4_0.gguf", "", "a-Q4_0.gguf", "Q4_0"),  # a shard is missing
    ],
)
def test_choice_of_files(names: str, quant: str, chosen: str, label: str) -> None:
    files = {name: File(100 - place) for place, name in enumerate(names.split())}
    assert choose_files("org/repo", files, quant) == ([chosen], label)


def test_no_file_to_choose() -> None:
    with pytest.raises(UnsupportedError):
        choose_files("org/repo", {}, "")
    with pytest.raises(UnsupportedError):
        choose_files("org/repo", {"config.json": File(1), "model.safetensors": File(9)}, "Q4_K_M")
    with pytest.raises(ModelNotFound, match="Q2_K"):
        choose_files("org/repo", {"a-Q4_0.gguf": File(1)}, "Q2_K")
