"""`chandra pull | list | show | cp | rm`: what is in the store."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from chandra.checkpoint import open_checkpoint
from chandra.cli.progress import ProgressLine
from chandra.config import Settings
from chandra.errors import ChandraError, UsageError
from chandra.memory.device import format_size
from chandra.models import read_spec
from chandra.store import Store, StoredModel
from chandra.text import load_tokenizer
from chandra.text.template import ChatTemplate

_EPOCH = datetime.fromtimestamp(0, UTC)
PARTS = ("license", "modelfile", "parameters", "template", "system")


def open_store(settings: Settings | None = None) -> Store:
    settings = settings or Settings.from_env()
    return Store(settings.home, settings.registry)


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Register the commands of this file on an argparse subparsers action."""
    pull = commands.add_parser("pull", parents=[common], help="fetch a model into the store")
    pull.add_argument("model", help="for example smollm2:135m, hf.co/org/repo:Q4_K_M")
    pull.add_argument("--accept-license", action="store_true", help="do not ask about the model's terms")
    pull.set_defaults(run=_pull)

    listing = commands.add_parser("list", aliases=["ls"], parents=[common], help="list the models in the store")
    listing.add_argument("--all", action="store_true", help="the models of the catalog that can be pulled, too")
    listing.set_defaults(run=_list)

    show = commands.add_parser("show", parents=[common], help="show what a model is made of")
    show.add_argument("model", help="a name in the store, or the path of a file or folder")
    for part in PARTS:
        show.add_argument(f"--{part}", dest="part", action="store_const", const=part, help=f"only the {part}")
    show.add_argument("-v", "--verbose", action="store_true", help="every tensor and metadata key")
    show.set_defaults(run=_show, part="info")

    copy = commands.add_parser("cp", parents=[common], help="give a model a second name")
    copy.add_argument("source")
    copy.add_argument("destination")
    copy.set_defaults(run=_copy)

    remove = commands.add_parser("rm", parents=[common], help="remove models from the store")
    remove.add_argument("model", nargs="+")
    remove.set_defaults(run=_remove)


def fetch(store: Store, name: str, accept_license: bool = False) -> StoredModel:
    """The model, pulled first if the store does not have it. Terms are shown and, on a terminal, asked about."""
    if store.has(name):
        return store.resolve(name)
    return _pull_with_terms(store, name, accept_license)


def _pull_with_terms(store: Store, name: str, accept_license: bool) -> StoredModel:
    entry = store.catalog_entry(name)
    if entry is not None and entry.terms and not store.has(name):
        print(entry.terms, file=sys.stderr)
        if not accept_license:
            if not sys.stdin.isatty():
                raise UsageError(f"{entry.name} has terms of use", "read them above, then repeat with --accept-license")
            if input("Accept? [y/N] ").strip().lower() not in {"y", "yes"}:
                raise UsageError("the terms were not accepted; nothing was downloaded")
    with ProgressLine() as progress:
        return store.pull(name, progress=progress, accept_license=True)


def _pull(arguments: argparse.Namespace) -> int:
    stored = _pull_with_terms(open_store(), arguments.model, arguments.accept_license)
    print(f"{stored.name}  {format_size(stored.size)}  {stored.digest[:19] or stored.path}")
    if stored.note:
        print(f"note: {stored.note}", file=sys.stderr)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    store = open_store()
    print(listing(store, arguments.all))
    for problem in store.problems():
        print(f"chandra: {problem}", file=sys.stderr)
    return 0


def listing(store: Store, with_catalog: bool = False) -> str:
    """The models of the store as a table; with the catalog, those that could be pulled below."""
    models = sorted(store.list(), key=lambda model: model.modified or _EPOCH, reverse=True)
    rows = [("NAME", "ID", "SIZE", "MODIFIED")]
    rows += [(m.name, m.digest[7:19] or "-", format_size(m.size), _age(m.modified)) for m in models]
    if not models and not with_catalog:
        return "The store is empty. `chandra run` fetches a small model; `chandra list --all` shows more."
    if with_catalog:
        have = {model.name for model in models}
        others = [entry for name, entry in sorted(store.catalog.entries.items()) if name not in have]
        rows += [(e.name, "-", format_size(e.size) if e.size else "-", "in the catalog") for e in others]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _age(moment: datetime | None) -> str:
    if moment is None:
        return "-"
    seconds = max(0, int((datetime.now(UTC) - moment).total_seconds()))
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = seconds // length
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


def _show(arguments: argparse.Namespace) -> int:
    stored = open_store().resolve(arguments.model)
    print(describe(stored, arguments.part))
    if arguments.verbose:
        checkpoint = open_checkpoint(stored.path)
        print("\nMetadata")
        for key, value in checkpoint.metadata.items():
            print(f"  {key:<44} {_short(value)}")
        print("\nTensors")
        for info in checkpoint.tensors.values():
            print(
                f"  {info.name:<44} {info.format:<8} {' x '.join(map(str, info.shape)):<18} {format_size(info.nbytes)}"
            )
        checkpoint.close()
    return 0


def _short(value: Any) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "…")
    return f"[{len(value)} items]" if hasattr(value, "__len__") else str(value)


def describe(stored: StoredModel, part: str = "info") -> str:
    """What a model is, or one part of it, as text."""
    if part == "license":
        return stored.license or "No license is stated."
    if part == "system":
        return stored.system or "No system message."
    if part == "parameters":
        return _parameters(stored.params) or "No parameters are set."
    checkpoint = open_checkpoint(stored.path)
    try:
        spec = read_spec(checkpoint)
        if part in ("template", "modelfile"):
            source = stored.template or ChatTemplate.of(load_tokenizer(checkpoint), spec.arch).source
            return source if part == "template" else _modelfile(stored, source)
        formats: dict[str, int] = {}
        for info in checkpoint.tensors.values():
            formats[info.format] = formats.get(info.format, 0) + info.nbytes
        attention, mlp = spec.layers[0].attention, spec.layers[0].mlp
        windows = {layer.attention.window for layer in spec.layers if layer.attention.window}
        rows = {
            "model": stored.name,
            "path": stored.path,
            "size": format_size(stored.size),
            "architecture": spec.arch,
            "layers": spec.num_layers,
            "hidden size": spec.hidden_size,
            "heads": f"{attention.num_heads} ({attention.num_kv_heads} for keys and values) of {attention.head_dim}",
            "MLP": f"{mlp.intermediate_size}" + (f", {mlp.num_experts} experts" if mlp.num_experts else ""),
            "vocabulary": spec.vocab_size,
            "context": spec.max_position,
            "windows": ", ".join(map(str, sorted(windows))) or "none",
            "formats": ", ".join(
                f"{name} {format_size(n)}" for name, n in sorted(formats.items(), key=lambda x: -x[1])
            ),
            "license": stored.license or "not stated",
        }
        if stored.note:
            rows["note"] = stored.note
        return "\n".join(f"{name:<14} {value}" for name, value in rows.items())
    finally:
        checkpoint.close()


def _parameters(params: Mapping[str, Any]) -> str:
    return "\n".join(f"{name:<20} {value}" for name, value in params.items())


def _modelfile(stored: StoredModel, template: str) -> str:
    lines = [f"FROM {stored.path}", f'TEMPLATE """{template}"""']
    lines += [f'SYSTEM """{stored.system}"""'] if stored.system else []
    lines += [f"PARAMETER {name} {value}" for name, value in stored.params.items()]
    lines += [f"ADAPTER {path}" for path in stored.adapters]
    lines += [f"MESSAGE {message['role']} {message['content']}" for message in stored.messages]
    return "\n".join(lines)


def _copy(arguments: argparse.Namespace) -> int:
    open_store().copy(arguments.source, arguments.destination)
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    store, failed = open_store(), 0
    for name in arguments.model:
        try:
            removal = store.remove(name)
        except ChandraError as error:
            print(f"chandra: {error}", file=sys.stderr)
            failed = error.exit_code
            continue
        print(f"removed {name}, {format_size(removal.freed)} freed")
        if removal.loaded:
            print(f"{name} is still loaded somewhere; its disk space is freed when that ends", file=sys.stderr)
    return failed
