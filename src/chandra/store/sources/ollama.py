"""Registries that speak Ollama's form of the OCI distribution protocol.

A manifest (application/vnd.docker.distribution.manifest.v2+json) lists layers by media type. The weights and adapters
become blobs; the small layers (template, system, params, license) are kept in our manifest.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from typing import Any

import httpx

from chandra.errors import DigestMismatch, DownloadError, UnsupportedError, UsageError
from chandra.store.download import Downloader, read_page
from chandra.store.manifests import StoredModel
from chandra.store.names import Name, parse_digest
from chandra.store.sources import Delivery, Job

_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
_LAYER = "application/vnd.ollama.image."
_TEXTS = ("template", "system", "params", "license")
_MAX_LAYERS = 64
_LOOPBACK = ("localhost", "127.0.0.1")


def deliver(job: Job, host: str, name: Name) -> Delivery:
    """Reads a manifest and its small layers from a registry, given as a host (TLS, but on loopback) or a URL.

    Raises ModelNotFound, DownloadError, DigestMismatch or UnsupportedError.
    """
    scheme = "http" if host.partition(":")[0] in _LOOPBACK else "https"
    address = host.rstrip("/") if "://" in host else f"{scheme}://{host}"
    repository = name.path if "/" in name.path else f"library/{name.path}"
    base = f"{address}/v2/{repository}"
    with httpx.Client(timeout=job.timeout) as client:
        page = read_page(client, f"{base}/manifests/{name.tag}", _MANIFEST)
        layers = _layers(page.data, host)
        texts = {kind: _text(client, base, layers[kind][0][0]) for kind in _TEXTS if kind in layers}
    weights = layers.get("model", [])
    if len(weights) != 1:
        raise UnsupportedError(
            f"{name} has {len(weights)} weight layers", "Chandra reads models that are one GGUF file"
        )
    fetches = {
        job.blob(digest): partial(_fetch, job, f"{base}/blobs/sha256:{digest}", digest, size)
        for digest, size in [*weights, *layers.get("adapter", [])]
    }
    digest, size = weights[0]
    try:
        params = json.loads(texts.get("params", "{}"))
    except ValueError as error:
        raise DownloadError(f"{host}: the parameters of {name} are not JSON", "try another tag") from error
    model = StoredModel(
        name=str(name),
        path=job.blob(digest),
        size=size,
        source="registry",
        origin=f"{host}/{repository}:{name.tag}",
        digest=f"sha256-{digest}",
        license=texts.get("license", ""),
        note="its image projector is left out" if "projector" in layers else "",
        template=texts.get("template"),
        system=texts.get("system"),
        params=params if isinstance(params, dict) else {},
        adapters=tuple(job.blob(digest) for digest, _ in layers.get("adapter", [])),
    )
    return Delivery(model, fetches)


def _layers(data: bytes, host: str) -> dict[str, list[tuple[str, int]]]:
    """Digest and bytes of the layers by kind."""
    found: dict[str, list[tuple[str, int]]] = {}
    try:
        layers: list[Any] = json.loads(data)["layers"]
        if len(layers) > _MAX_LAYERS:
            raise ValueError(f"{len(layers)} layers")
        for layer in layers:
            kind, size = str(layer["mediaType"]).removeprefix(_LAYER), layer["size"]
            if not isinstance(size, int) or size < 0:
                raise ValueError(f"a layer of {size!r} bytes")
            found.setdefault(kind, []).append((parse_digest(layer["digest"]), size))
    except (ValueError, KeyError, TypeError, RecursionError, UsageError) as error:
        raise DownloadError(f"{host} sent a manifest that cannot be read: {error}", "check the host's name") from error
    return found


def _text(client: httpx.Client, base: str, digest: str) -> str:
    data = read_page(client, f"{base}/blobs/sha256:{digest}", "*/*").data
    if hashlib.sha256(data).hexdigest() != digest:
        raise DigestMismatch(f"a layer of {base} does not have the digest {digest}", "try again, or use another source")
    return data.decode("utf-8", "replace")


def _fetch(job: Job, url: str, digest: str, size: int) -> None:
    with httpx.Client(timeout=job.timeout) as client:
        Downloader(client, job.progress).fetch(url, job.blob(digest), digest, size, f"pulling {digest[:12]}")
