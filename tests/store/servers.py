"""Servers on loopback that speak the protocols of the sources, with faults on request."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Headers = dict[str, str]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Site:
    """What a server has, and how it misbehaves.

    `cut` ends so many of the next transfers after that many bytes; `pause` makes each 64 KiB take so long; `stall` is
    how many transfers stop in the middle without closing the connection.
    """

    files: dict[str, tuple[bytes, Headers]] = field(default_factory=dict)
    ranges: bool = True
    cut: list[int] = field(default_factory=list)
    pause: float = 0.0
    stall: int = 0
    errors: list[int] = field(default_factory=list)
    requests: list[tuple[str, str, Headers]] = field(default_factory=list)
    url: str = ""

    def add(self, path: str, data: bytes, **headers: str) -> None:
        self.files[path] = (data, {name.replace("_", "-"): value for name, value in headers.items()})

    def asked(self, path: str) -> list[Headers]:
        """Headers of the GET requests for a path."""
        return [headers for method, asked, headers in self.requests if method == "GET" and asked == path]


def _handler(site: Site, stop: threading.Event) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            site.requests.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
            if path not in site.files or (body and site.errors):
                self.send_response(site.errors.pop(0) if path in site.files else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data, headers = site.files[path]
            start = 0
            wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if_range = self.headers.get("If-Range")
            if wanted and site.ranges and if_range in (None, headers.get("ETag")):
                start = int(wanted[1])
                if start >= len(data):
                    self.send_response(416)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            else:
                self.send_response(int(headers.get("Status", "200")))
            self.send_header("Content-Length", str(len(data) - start))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.send(data[start:])

        def send(self, data: bytes) -> None:
            large = len(data) > 1 << 16
            limit = site.cut.pop(0) if site.cut and large else len(data)
            if site.stall and large:
                site.stall -= 1
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                stop.wait(30)
                self.close_connection = True
                return
            for i in range(0, limit, 1 << 16):
                self.wfile.write(data[i : min(i + (1 << 16), limit)])
                time.sleep(site.pause)
            if limit < len(data):
                self.close_connection = True

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is part of the tests."""


@contextmanager
def serve() -> Iterator[Site]:
    site, stop = Site(), threading.Event()
    server = _Server(("127.0.0.1", 0), _handler(site, stop))
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield site
    finally:
        stop.set()
        server.shutdown()
        server.server_close()
        thread.join()


def add_registry_model(site: Site, name: str, tag: str, weights: bytes, **texts: str) -> str:
    """Puts a model behind Ollama's protocol and returns the digest of its weights."""
    parts = [("model", weights), *((kind, text.encode()) for kind, text in texts.items())]
    layers = []
    for kind, data in parts:
        layers.append(
            {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{sha256(data)}", "size": len(data)}
        )
        site.add(f"/v2/library/{name}/blobs/sha256:{sha256(data)}", data, ETag=f'"{sha256(data)}"')
    manifest = {"schemaVersion": 2, "layers": layers}
    site.add(f"/v2/library/{name}/manifests/{tag}", json.dumps(manifest).encode())
    return sha256(weights)


def add_hub_repo(site: Site, repo: str, files: dict[str, bytes], license: str = "apache-2.0") -> None:
    """Puts a repository behind the Hub's protocol; GGUF and safetensors files are in LFS."""
    commit = sha256(repo.encode())[:40]
    siblings = []
    for file, data in files.items():
        large = file.endswith((".gguf", ".safetensors"))
        sibling: dict[str, Any] = {"rfilename": file, "size": len(data), "blobId": sha256(data)[:40]}
        if large:
            sibling["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
        siblings.append(sibling)
        etag = f'"{sha256(data) if large else sha256(data)[:40]}"'
        site.add(f"/{repo}/resolve/main/{file}", data, ETag=etag, X_Repo_Commit=commit)
    info = {
        "id": repo,
        "sha": commit,
        "siblings": siblings,
        "cardData": {"license": license},
        "tags": [],
        "private": False,
    }
    site.add(f"/api/models/{repo}", json.dumps(info).encode(), Content_Type="application/json")


Serve = Callable[[], Site]
