"""Repositories of the Hugging Face Hub, in the Hub's own cache, which other programs share.

Large files are fetched by our downloader to where the cache would put them (`blobs/<sha256>`), because that resumes
after a kill; `hf_hub_download` then finds them there. HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are obeyed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import httpx
from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import build_hf_headers, disable_progress_bars
from huggingface_hub.utils import httpx as hub_httpx

from chandra.errors import ChandraError, DownloadError, ModelNotFound, UnsupportedError, UsageError
from chandra.store.download import Downloader
from chandra.store.manifests import StoredModel
from chandra.store.parts import locked, storing
from chandra.store.sources import Job

DEFAULT_QUANT = "Q4_K_M"
_INSTEAD = ("Q4_K_S", "Q4_K", "Q4", "IQ4_NL", "IQ4_XS", "Q4_0", "Q4_1", "Q3_K_L", "Q3_K_M", "Q3_K_S")
_QUANT = re.compile(r"(?:^|[-._/])((?:UD-)?(?:I?Q[1-8]|TQ[12]|F16|BF16|F32|FP16|FP32|MXFP4)(?:_\w+)?)$", re.IGNORECASE)
_SHARD = re.compile(r"(?:-\d{5}-of-(\d{5}))?\.gguf$", re.IGNORECASE)
_FOLDER = (".safetensors", ".json", ".model", ".txt", ".jinja")
_MAX_PLAIN = 50_000_000_000  # bytes; the Hub serves larger files in its own way only


@dataclass(frozen=True)
class File:
    size: int
    sha256: str | None = None


def fetch(job: Job, repo: str, quant: str) -> StoredModel:
    """The GGUF file of a quantization ("": Q4_K_M, or else the next best), or the safetensors files of a repository.

    Raises ModelNotFound, UnsupportedError, UsageError, DownloadError, DigestMismatch, DiskFull or StoreError.
    """
    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    with _our_errors(repo):
        try:
            info = HfApi().model_info(repo, files_metadata=True, timeout=job.timeout)
        except (OfflineModeIsEnabled, hub_httpx.TransportError):
            snapshot = _newest_snapshot(cache)
            if snapshot is None:
                raise
            files = {str(p.relative_to(snapshot)): File(p.stat().st_size) for p in snapshot.rglob("*") if p.is_file()}
            names, label = choose_files(repo, files, quant)
            paths, terms = [snapshot / file for file in names], ""
        else:
            files = {s.rfilename: File(s.size or 0, s.lfs.sha256 if s.lfs else None) for s in info.siblings or []}
            names, label = choose_files(repo, files, quant)
            terms = str(info.card_data.get("license") or "") if info.card_data else ""
            paths = [_bring(job, repo, file, files[file], cache) for file in names]
    gguf = names[0].endswith(".gguf")
    only = files[names[0]] if len(names) == 1 else None
    note = f"no {DEFAULT_QUANT} there: {label} was taken" if gguf and not quant and label != DEFAULT_QUANT else ""
    if note:
        job.progress(f"{job.name}: {note}", 0, 0)
    return StoredModel(
        name=job.name,
        path=paths[0] if gguf else paths[0].parent,
        size=sum(files[file].size for file in names),
        source="hub",
        origin=f"{repo}: {names[0]}" if gguf else repo,
        digest=f"sha256-{only.sha256}" if only and only.sha256 else "",
        license=terms,
        note=note,
    )


def choose_files(repo: str, files: Mapping[str, File], quant: str) -> tuple[list[str], str]:
    """The files to take, the first of a GGUF's shards first, and the label of their quantization."""
    shards: dict[str, list[str]] = {}
    for file in sorted(files):
        name = PurePosixPath(file).name.lower()
        if name.endswith(".gguf") and not name.startswith(("mmproj", "imatrix")):
            shards.setdefault(_SHARD.sub("", file), []).append(file)
    ggufs: dict[str, list[str]] = {}
    for stem, names in shards.items():
        shard, found = _SHARD.search(names[0]), _QUANT.search(stem)
        if shard is None or shard[1] is None or len(names) == int(shard[1]):
            ggufs.setdefault(found[1].upper() if found else PurePosixPath(names[0]).name.upper(), names)
    if ggufs:
        by_size = sorted(ggufs, key=lambda label: sum(files[file].size for file in ggufs[label]))
        wanted = (quant.upper(),) if quant else (DEFAULT_QUANT, *_INSTEAD, *by_size)
        for label in wanted:
            if label in ggufs:
                return ggufs[label], label
        raise ModelNotFound(f"{repo} has no {quant}", f"it has {', '.join(sorted(ggufs))}")
    names = [file for file in sorted(files) if "/" not in file and file.endswith(_FOLDER)]
    if quant or "config.json" not in names or not any(file.endswith(".safetensors") for file in names):
        forms = "GGUF" if quant else "GGUF and no safetensors"
        raise UnsupportedError(f"{repo} has no {forms} model", "try another repository")
    return names, ""


def _bring(job: Job, repo: str, file: str, what: File, cache: Path) -> Path:
    """Path of a file in the snapshot of the cache."""
    if what.sha256 is not None and what.size <= _MAX_PLAIN:
        blob = cache / "blobs" / what.sha256
        phase = f"pulling {job.name} ({file})"
        with locked(job.lock(what.sha256), job.progress, phase):
            if not blob.exists():
                with httpx.Client(timeout=job.timeout, headers=build_hf_headers()) as client:
                    Downloader(client, job.progress).fetch(hf_hub_url(repo, file), blob, what.sha256, what.size, phase)
    disable_progress_bars("huggingface_hub")
    with storing(cache):
        return Path(hf_hub_download(repo, file))


def _newest_snapshot(cache: Path) -> Path | None:
    snapshots = [path for path in (cache / "snapshots").glob("*") if path.is_dir()]
    return max(snapshots, key=lambda path: path.stat().st_mtime, default=None)


# The kinds of the Hub's errors, the first that fits: what of ours it is, the message and the hint.
_LOG_IN = "set HF_TOKEN or run `hf auth login`"
_ERRORS: tuple[tuple[tuple[type[Exception], ...], type[ChandraError], str, str], ...] = (
    ((HFValidationError,), UsageError, "not a repository of the Hub", "write hf.co/org/repo"),
    ((GatedRepoError,), DownloadError, "has terms to accept on the Hub", f"accept them on its page, then {_LOG_IN}"),
    ((RepositoryNotFoundError,), ModelNotFound, "the Hub has no such repository", f"if it is private, {_LOG_IN}"),
    ((OfflineModeIsEnabled, LocalEntryNotFoundError), DownloadError, "not in the Hub's cache", "unset HF_HUB_OFFLINE"),
    ((EntryNotFoundError,), ModelNotFound, "the repository has no such file", "look at its list of files"),
    ((HfHubHTTPError, hub_httpx.TransportError), DownloadError, "cannot be read from the Hub", "check the network"),
)


@contextmanager
def _our_errors(repo: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        for kinds, ours, message, hint in _ERRORS:
            if isinstance(error, kinds):
                raise ours(f"{repo}: {message}: {str(error).partition(chr(10))[0]}", hint) from error
        raise
