"""Transfers under faults: cuts, stalls, ignored ranges, wrong bytes, full disks, kills."""

from __future__ import annotations

import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from servers import Site, serve, sha256

from chandra.errors import DigestMismatch, DiskFull, DownloadError, ModelNotFound, StoreError
from chandra.store.download import Downloader
from chandra.store.parts import MARGIN, PartFile, locked

DATA = random.Random(7).randbytes(3 << 20)


@pytest.fixture
def site() -> Iterator[Site]:
    with serve() as site:
        site.add("/file", DATA, ETag='"one"')
        yield site


def quiet(*_: object) -> None:
    pass


def fetch(
    site: Site, path: Path, sha: str | None = None, size: int | None = len(DATA), timeout: float = 5.0
) -> list[str]:
    phases = []
    with httpx.Client(timeout=timeout) as client:
        downloader = Downloader(client, lambda *event: phases.append(event[0]), tries=3, wait=0.01)
        downloader.fetch(f"{site.url}/file", path, sha or sha256(DATA), size, "pulling")
    return phases


def test_whole_file_and_progress(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "blobs" / "x"
    seen: list[tuple[str, int, int]] = []
    with httpx.Client() as client:
        downloader = Downloader(client, lambda *event: seen.append(event))
        downloader.fetch(f"{site.url}/file", path, sha256(DATA), None, "pulling")
    assert path.read_bytes() == DATA
    assert list(path.parent.iterdir()) == [path]
    assert seen[0] == ("pulling", 0, len(DATA))
    assert seen[-1] == ("pulling", len(DATA), len(DATA))


def test_cut_transfers_are_continued(site: Site, tmp_path: Path) -> None:
    site.cut = [1_000_000, 70_000, 5]
    fetch(site, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == DATA
    ranges = [headers.get("range") for headers in site.asked("/file")]
    assert ranges == [None, "bytes=1000000-", "bytes=1070000-", "bytes=1070005-"]
    assert {headers.get("if-range") for headers in site.asked("/file")[1:]} == {'"one"'}


def test_another_version_in_the_middle_starts_afresh(site: Site, tmp_path: Path) -> None:
    changed = DATA[::-1]

    def change(phase: str, *_: int) -> None:
        if "trying again" in phase:
            site.add("/file", changed, ETag='"two"')

    site.cut = [500_000]
    with httpx.Client() as client:
        Downloader(client, change, wait=0.01).fetch(f"{site.url}/file", tmp_path / "x", sha256(changed), len(DATA), "p")
    assert (tmp_path / "x").read_bytes() == changed


def test_server_that_ignores_ranges(site: Site, tmp_path: Path) -> None:
    site.ranges = False
    site.cut = [1_000_000]
    fetch(site, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == DATA


def test_stalled_transfer_is_continued(site: Site, tmp_path: Path) -> None:
    site.stall = 1
    phases = fetch(site, tmp_path / "x", timeout=0.3)
    assert (tmp_path / "x").read_bytes() == DATA
    assert any("trying again" in phase for phase in phases)


def test_passing_server_errors_are_waited_out(site: Site, tmp_path: Path) -> None:
    site.errors = [503, 429]
    fetch(site, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == DATA


def test_giving_up_keeps_what_arrived(site: Site, tmp_path: Path) -> None:
    site.cut = [1_000_000]
    site.errors = []
    with httpx.Client() as client:
        downloader = Downloader(client, lambda phase, *_: site.errors.extend([503] * ("again" in phase)), 3, 0.01)
        with pytest.raises(DownloadError, match="503") as caught:
            downloader.fetch(f"{site.url}/file", tmp_path / "x", sha256(DATA), len(DATA), "pulling")
    assert "resumes" in caught.value.hint
    assert (tmp_path / "x.part").stat().st_size == 1_000_000
    site.errors = []
    fetch(site, tmp_path / "x")
    assert site.asked("/file")[-1]["range"] == "bytes=1000000-"


def test_wrong_bytes_are_dropped(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DigestMismatch):
        fetch(site, tmp_path / "x", sha=sha256(b"other"))
    assert list(tmp_path.iterdir()) == []


def test_damaged_leftover_is_replaced(site: Site, tmp_path: Path) -> None:
    (tmp_path / "x.part").write_bytes(b"\0" * 1_500_000)
    fetch(site, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == DATA


@pytest.mark.parametrize("extra", [0, 1000])
def test_leftover_that_is_whole_or_too_long(site: Site, tmp_path: Path, extra: int) -> None:
    (tmp_path / "x.part").write_bytes(DATA + bytes(extra))
    fetch(site, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == DATA
    assert len(site.asked("/file")) == (1 if extra else 0)


def test_leftover_of_unknown_total(site: Site, tmp_path: Path) -> None:
    (tmp_path / "x.part").write_bytes(DATA)  # the server answers 416
    fetch(site, tmp_path / "x", size=None)
    assert (tmp_path / "x").read_bytes() == DATA


def test_more_than_promised_is_refused(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="promised"):
        fetch(site, tmp_path / "x", size=1_000_000)


def test_missing_and_forbidden(site: Site, tmp_path: Path) -> None:
    site.errors = [403]
    with pytest.raises(DownloadError, match="403"):
        fetch(site, tmp_path / "x")
    del site.files["/file"]
    with pytest.raises(ModelNotFound):
        fetch(site, tmp_path / "x")


def test_nobody_listens(tmp_path: Path) -> None:
    with serve() as gone:
        pass
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1"):
        fetch(gone, tmp_path / "x")


def test_no_room_is_told_before_the_transfer(tmp_path: Path) -> None:
    with PartFile(tmp_path / "x", quiet, "pulling") as part, pytest.raises(DiskFull) as caught:
        part.reserve(1 << 60)
    assert "1073741824.00 GiB" in caught.value.message
    assert "free" in caught.value.hint
    assert MARGIN > 0


def test_disk_that_fills_up_and_then_has_room(site: Site, tmp_path: Path) -> None:
    """The limit on file sizes stands for the full disk: the system refuses the write in the same way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_200_000, hard))
        with pytest.raises(DiskFull) as caught:
            fetch(site, tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "resumes" in caught.value.hint
    assert (tmp_path / "x.part").stat().st_size == 1_200_000
    fetch(site, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == DATA
    assert site.asked("/file")[-1]["range"] == "bytes=1200000-"


def test_folder_that_cannot_be_written(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError):
        fetch(site, tmp_path / "file" / "x")


_FETCH = """
import sys, httpx
from pathlib import Path
from chandra.store.download import Downloader
with httpx.Client() as client:
    Downloader(client, lambda *_: None).fetch(sys.argv[1], Path(sys.argv[2]), sys.argv[3], None, "pulling")
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_resumed(site: Site, tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "x"
    part = tmp_path / "x.part"
    site.pause = 0.02
    process = subprocess.Popen([sys.executable, "-c", _FETCH, f"{site.url}/file", str(path), sha256(DATA)])
    while not part.exists() or part.stat().st_size < 1 << 20:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    assert process.wait(20) == -number
    kept = part.stat().st_size
    assert not path.exists()
    site.pause = 0
    fetch(site, path)
    assert path.read_bytes() == DATA
    assert site.asked("/file")[-1]["range"] == f"bytes={kept}-"


def test_second_process_waits_for_the_first(tmp_path: Path) -> None:
    lock = tmp_path / "locks" / "x.lock"
    code = (
        "import sys\nfrom pathlib import Path\nfrom chandra.store.parts import locked\n"
        "with locked(Path(sys.argv[1]), lambda *_: None, ''):\n  print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        told: list[str] = []

        def tell(phase: str, *_: int) -> None:
            told.append(phase)
            assert other.stdin is not None
            other.stdin.close()

        with locked(lock, tell, "pulling x"):
            assert other.wait(20) == 0
    assert told[0] == "pulling x: waiting for another process"
