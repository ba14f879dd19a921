"""Transfers over HTTP that survive: resumed after a kill or a failure, checked by SHA-256."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

from chandra.errors import DownloadError, ModelNotFound
from chandra.memory.device import format_size
from chandra.store.parts import PartFile, Progress

MAX_PAGE = 8 << 20  # bytes of an index page, a manifest or a small layer
_RETRIED = (408, 425, 429, 500, 502, 503, 504)


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
        failures = 0
        if size is not None and part.size > size:
            part.restart()
        while size is None or part.size < size:
            before = part.size
            try:
                self._transfer(url, part, size, phase)
                if size is None or part.size >= size:
                    return
                reason = "the transfer ended early"
            except (httpx.RequestError, _RetryError) as error:
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

    def _transfer(self, url: str, part: PartFile, size: int | None, phase: str) -> None:
        """One request; appends what it brings."""
        headers = {"Accept-Encoding": "identity"}
        if part.size:
            headers["Range"] = f"bytes={part.size}-"
            if part.etag:
                headers["If-Range"] = part.etag
        with self.client.stream("GET", url, headers=headers, follow_redirects=True) as response:
            check_response(response, url)
            if response.status_code == 416:
                part.restart()
                raise _RetryError("the server refused to resume")
            if part.size and not (response.status_code == 206 and _starts_at(response.headers, part.size)):
                part.restart()
            etag = str(response.headers.get("ETag", ""))
            part.etag = "" if etag.startswith("W/") else etag
            length = response.headers.get("Content-Length", "")
            total = size or (part.size + int(length) if length.isdigit() else 0)
            part.reserve(max(total - part.size, 0))
            self.progress(phase, part.size, total)
            for chunk in response.iter_raw():
                part.write(chunk)
                if size is not None and part.size > size:
                    part.restart()
                    raise DownloadError(f"{phase}: more than the {size} bytes that were promised", "try another source")
                self.progress(phase, part.size, total)


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
    host = url.split("/")[2]
    data = bytearray()
    try:
        with client.stream("GET", url, headers={"Accept": accept}, follow_redirects=True) as response:
            check_response(response, url)
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > MAX_PAGE:
                    raise DownloadError(f"{host} sends more than {format_size(MAX_PAGE)} for {url}", "check the name")
            return Page(str(response.url), response.headers.get("Content-Type", ""), bytes(data))
    except (httpx.RequestError, httpx.InvalidURL, UnicodeError, _RetryError) as error:
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
        raise DownloadError(f"{host} refuses access to {response.url.path} ({status})", "check the name")
    if status in _RETRIED:
        raise _RetryError(f"the server answers {status}")
    raise DownloadError(f"{host} answers {status} for {response.url.path}", "check the name and the source")


def _starts_at(headers: Mapping[str, str], start: int) -> bool:
    match = re.match(r"bytes (\d+)-", headers.get("Content-Range", ""))
    return match is not None and int(match[1]) == start
