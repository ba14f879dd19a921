"""Names of models: `name[:tag]`, `host/[namespace/]name[:tag]`, `hf.co/org/repo[:quant]` and paths."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chandra.errors import UsageError

DEFAULT_TAG = "latest"
MAX_NAME, MAX_PATH = 400, 4096  # characters

Kind = Literal["catalog", "hub", "registry", "file"]

_HUB_HOSTS = ("hf.co", "huggingface.co")
_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,200}[A-Za-z0-9])?(?::[0-9]{1,5})?")
_DIGEST = re.compile(r"sha256[:-][0-9a-f]{64}")
_FORMS = "write name:tag, host/name:tag, hf.co/org/repo:quant or the path of a file or folder (./model.gguf)"


@dataclass(frozen=True)
class Name:
    """A checked name. `host` is empty for the catalog and for files; `path` has no `..`, no empty part, no NUL.

    The tag of a Hub repository is the quantization of a GGUF file in upper case; empty: Chandra chooses.
    """

    kind: Kind
    host: str
    path: str
    tag: str

    def __str__(self) -> str:
        """The canonical text: parsing it gives the same name."""
        where = f"{self.host}/{self.path}" if self.host else self.path
        return f"{where}:{self.tag}" if self.tag else where

    @property
    def manifest(self) -> Path:
        """Where its manifest lies below `manifests/`."""
        host = self.host.replace(":", "+") or "catalog"
        return Path(host, *self.path.split("/"), f"{self.tag or DEFAULT_TAG}.json")


def parse_name(text: str) -> Name:
    """Checks a name a user wrote; nothing on disk is looked at. Raises UsageError."""
    is_path = (
        text.startswith((".", "/", "~", "\\")) or re.match(r"[A-Za-z]:[\\/]", text) or text.endswith(_FILE_ENDINGS)
    )
    if not text or len(text) > (MAX_PATH if is_path else MAX_NAME) or "\0" in text or not text.isprintable():
        raise UsageError(f"not a model name: {text[:60]!r}", _FORMS)
    if is_path:
        return Name("file", "", str(_expanded(text).absolute()), "")
    text = re.sub(r"^https?://(?=(hf\.co|huggingface\.co)/)", "", text)
    where, tag = text, ""
    if ":" in text.rpartition("/")[2]:
        where, _, tag = text.rpartition(":")
        _check(tag, text)
    host, _, path = where.rpartition("/")[0].partition("/")[0], "", where
    if "." not in host and ":" not in host and host != "localhost":
        host = ""
    if host:
        path = where[len(host) + 1 :]
    parts = path.split("/")
    for part in parts:
        _check(part, text)
    if host in _HUB_HOSTS:
        if len(parts) != 2:
            raise UsageError(f"not a repository of the Hub: {text!r}", "write hf.co/org/repo or hf.co/org/repo:Q4_K_M")
        return Name("hub", _HUB_HOSTS[0], path, tag.upper())
    if len(parts) > 3 or not (_HOST.fullmatch(host) or not host) or ".." in host:
        raise UsageError(f"not a model name: {text!r}", _FORMS)
    if not host and len(parts) == 1:
        return Name("catalog", "", path.lower(), tag.lower() or DEFAULT_TAG)
    return Name("registry", host, path, tag or DEFAULT_TAG)


def parse_digest(text: object) -> str:
    """The 64 hexadecimal digits of `sha256:…`. Raises UsageError for anything else, so that no digest is a path."""
    if not isinstance(text, str) or not _DIGEST.fullmatch(text):
        raise UsageError(f"not a SHA-256 digest: {str(text)[:80]!r}")
    return text[7:]


def _expanded(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UsageError(f"no home folder is known for {text!r}", "write the whole path") from error


_FILE_ENDINGS = (".gguf", ".safetensors")


def _check(part: str, text: str) -> None:
    if not _PART.fullmatch(part) or ".." in part:
        raise UsageError(f"not a model name: {text!r}: {part!r} is not allowed in it", _FORMS)
