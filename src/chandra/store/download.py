"""Downloads that survive: resumed after a kill, checked by SHA-256, one at a time per file."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from filelock import FileLock, Timeout

from chandra.errors import DigestMismatch, DiskFull, DownloadError, ModelNotFound, StoreError
from chandra.memory.device import format_size

Progress = Callable[[str, int, int], None]  # phase, bytes done, bytes in all (0: unknown)

CHUNK = 1 << 20
MAX_PAGE = 8 << 20  # bytes of an index page, a manifest or a small layer
MARGIN = 16 << 20  # bytes of a disk that are left alone
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RETRIED = (408, 425, 429, 500, 502, 503, 504)


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turns the system's errors of a write below `path` into ours."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(
                f"no space left for {path.name}: {error.strerror}",
                f"free some space on the disk of {path.parent}; what is there is kept and the next try resumes",
            ) from error
        raise StoreError(
            f"cannot write {error.filename or path}: {error.strerror}",
            "check the permissions, or set CHANDRA_HOME to a folder that can be written",
        ) from error


@contextmanager
def locked(lock: Path, progress: Progress, phase: str) -> Iterator[None]:
    """Holds a lock between processes; says so while another one has it."""
    with storing(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock)
        while True:
            try:
                held.acquire(timeout=0.2)
                break
            except Timeout:
                progress(f"{phase}: waiting for another process", 0, 0)
    try:
        yield
    finally:
        held.release()


class PartFile:
    """A file that grows as `path.part`, hashed on the way, and gets its name when it is whole."""

    def __init__(self, path: Path, progress: Progress, phase: str) -> None:
        self.path = path
        self.part = path.with_name(f"{path.name}.part")
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.part.open("r+b" if self.part.exists() else "w+b", buffering=0)
        self.hash = hashlib.sha256()
        self.size = 0
        total = os.fstat(self.file.fileno()).st_size
        while chunk := self.file.read(CHUNK):
            self.hash.update(chunk)
            self.size += len(chunk)
            progress(f"{phase}: checking what is here", self.size, total)

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def reserve(self, more: int) -> None:
        """Raises DiskFull if the disk has no room for so many more bytes."""
        free = shutil.disk_usage(self.path.parent).free
        if more + MARGIN > free:
            raise DiskFull(
                f"no space for {self.path.name}: {format_size(more)} more are needed, {format_size(free)} are free",
                f"free {format_size(more + MARGIN - free)} on the disk of {self.path.parent}, or set CHANDRA_HOME; "
                f"{format_size(self.size)} are kept",
            )

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        with storing(self.path):
            while view:
                written = self.file.write(view)
                self.hash.update(view[:written])
                self.size += written
                view = view[written:]

    def restart(self) -> None:
        """Forgets what is there."""
        self.file.seek(0)
        self.file.truncate()
        self.hash, self.size = hashlib.sha256(), 0

    def commit(self, sha256: str | None) -> None:
        """Names the file. Raises DigestMismatch, and drops it, if its SHA-256 is not as promised."""
        if sha256 is not None and self.hash.hexdigest() != sha256:
            self.part.unlink()
            raise DigestMismatch(
                f"{self.path.name}: the SHA-256 is {self.hash.hexdigest()}, not {sha256}",
                "the file was dropped; try again, and if it happens again, the source or a proxy alters it",
            )
        with storing(self.path):
            os.fsync(self.file.fileno())
            self.file.close()
            self.part.replace(self.path)


class Downloader:
    """Fetches files over HTTP. `timeout` is how many seconds a transfer may stand still; `tries` how often a transfer
    that brings nothing is repeated, after `wait`, 2·`wait`, 4·`wait` … seconds."""

    def __init__(self, client: httpx.Client, progress: Progress, tries: int = 6, wait: float = 0.5) -> None:
        self.client = client
        self.progress = progress
        self.tries = tries
        self.wait = wait

    def fetch(self, url: str, path: Path, sha256: str | None, size: int | None, phase: str) -> None:
        """Brings `url` to `path`, from where an earlier try ended.

        Raises ModelNotFound, DownloadError, DigestMismatch, DiskFull or StoreError.
        """
        with PartFile(path, self.progress, phase) as part:
            resumed = part.size > 0
            self._complete(url, part, size, phase)
            if resumed and sha256 is not None and part.hash.hexdigest() != sha256:
                part.restart()  # what an earlier try left may be of another version or damaged
                self._complete(url, part, size, phase)
            part.commit(sha256)

    def _complete(self, url: str, part: PartFile, size: int | None, phase: str) -> None:
        etag, failures = "", 0
        if size is not None and part.size > size:
            part.restart()
        while size is None or part.size < size:
            before = part.size
            try:
                etag = self._transfer(url, part, size, etag, phase)
                if size is None or part.size >= size:
                    return
                reason = "the transfer ended early"
            except (httpx.TransportError, _RetryError) as error:
                reason = str(error) or type(error).__name__
            failures = 1 if part.size > before else failures + 1
            if failures >= self.tries:
                host = httpx.URL(url).host
                raise DownloadError(
                    f"{phase}: {host}: {reason}",
                    f"check the network; {format_size(part.size)} are kept and the next try resumes",
                )
            self.progress(f"{phase}: trying again ({reason})", part.size, size or 0)
            time.sleep(min(self.wait * 2 ** (failures - 1), 30))

    def _transfer(self, url: str, part: PartFile, size: int | None, etag: str, phase: str) -> str:
        """One request; appends what it brings and returns the entity tag."""
        headers = {"Accept-Encoding": "identity"}
        if part.size:
            headers["Range"] = f"bytes={part.size}-"
            if etag:
                headers["If-Range"] = etag
        with self.client.stream("GET", url, headers=headers, follow_redirects=True) as response:
            check_response(response, url)
            if response.status_code == 416:
                part.restart()
                raise _RetryError("the server refused to resume")
            if part.size and not (response.status_code == 206 and _starts_at(response.headers, part.size)):
                part.restart()
            length = response.headers.get("Content-Length", "")
            total = size or (part.size + int(length) if length.isdigit() else 0)
            part.reserve(max(total - part.size, 0))
            self.progress(phase, part.size, total)
            for chunk in response.iter_raw(CHUNK):
                part.write(chunk)
                if size is not None and part.size > size:
                    part.restart()
                    raise DownloadError(f"{phase}: more than the {size} bytes that were promised", "try another source")
                self.progress(phase, part.size, total)
            found = str(response.headers.get("ETag", ""))
            return "" if found.startswith("W/") else found


class _RetryError(Exception):
    """A failure that may pass."""


@dataclass(frozen=True)
class Page:
    """A small answer: where it came from after redirects, its media type and its bytes."""

    url: str
    kind: str
    data: bytes


def read_page(client: httpx.Client, url: str, accept: str) -> Page:
    """Reads a small document whole. Raises ModelNotFound or DownloadError."""
    host = httpx.URL(url).host
    data = bytearray()
    try:
        with client.stream("GET", url, headers={"Accept": accept}, follow_redirects=True) as response:
            check_response(response, url)
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > MAX_PAGE:
                    raise DownloadError(f"{host} sends more than {format_size(MAX_PAGE)} for {url}", "check the name")
            return Page(str(response.url), response.headers.get("Content-Type", ""), bytes(data))
    except (httpx.TransportError, _RetryError) as error:
        raise DownloadError(f"cannot read from {host}: {error or type(error).__name__}", "check the network") from error


def check_response(response: httpx.Response, url: str) -> None:
    """Raises ModelNotFound or DownloadError for an answer that is no success; a passing failure is to be retried."""
    host, status = response.url.host, response.status_code
    if url.startswith("https:") and response.url.scheme != "https":
        raise DownloadError(f"{url} leads to {host} without encryption", "use another source")
    if status in (200, 206, 416):
        return
    if status in (404, 410):
        raise ModelNotFound(f"{host} has no {response.url.path}", "check the name and the tag")
    if status in (401, 403):
        raise DownloadError(
            f"{host} refuses access to {response.url.path} ({status})", "check the name and your rights"
        )
    if status in _RETRIED:
        raise _RetryError(f"the server answers {status}")
    raise DownloadError(f"{host} answers {status} for {response.url.path}", "check the name and the source")


def _starts_at(headers: Mapping[str, str], start: int) -> bool:
    match = re.match(r"bytes (\d+)-", headers.get("Content-Range", ""))
    return match is not None and int(match[1]) == start
