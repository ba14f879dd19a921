"""`chandra pull | list | show | cp | rm`: what is in the store."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from chandra.checkpoint import open_checkpoint
from chandra.cli.progress import ProgressLine
from chandra.config import Settings
from chandra.errors import UsageError
from chandra.memory.device import format_size
from chandra.models import read_spec
from chandra.store import Store, StoredModel


def open_store() -> Store:
    return Store(Settings.from_env().home)


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Register the commands of this file on an argparse subparsers action."""
    pull = commands.add_parser("pull", parents=[common], help="fetch a model into the store")
    pull.add_argument("model", help="for example smollm2:135m, hf.co/org/repo:Q4_K_M")
    pull.add_argument("--accept-license", action="store_true", help="do not ask about the model's terms")
    pull.set_defaults(run=_pull)

    listing = commands.add_parser("list", aliases=["ls"], parents=[common], help="list the models in the store")
    listing.add_argument("--all", action="store_true", help="the catalog's models that can be pulled, too")
    listing.set_defaults(run=_list)

    show = commands.add_parser("show", parents=[common], help="show what a model is made of")
    show.add_argument("model", help="a name in the store, or a path to a file or folder")
    for part in ("license", "modelfile", "parameters", "template", "system"):
        show.add_argument(f"--{part}", dest="part", action="store_const", const=part, help=f"only the {part}")
    show.add_argument("-v", "--verbose", action="store_true", help="every tensor and metadata key")
    show.set_defaults(run=_show, part=None)

    copy = commands.add_parser("cp", parents=[common], help="give a model a second name")
    copy.add_argument("source")
    copy.add_argument("destination")
    copy.set_defaults(run=_copy)

    remove = commands.add_parser("rm", parents=[common], help="remove models from the store")
    remove.add_argument("model", nargs="+")
    remove.set_defaults(run=_remove)


def fetch(store: Store, name: str, accept_license: bool = False) -> StoredModel:
    """The model, pulled first if the store does not have it; asks about terms on a terminal."""
    entry = store.catalog_entry(name)
    if entry is not None and entry.terms and not accept_license and not store.has(name):
        print(entry.terms, file=sys.stderr)
        if not sys.stdin.isatty():
            raise UsageError(f"{name} has terms of use", "read them above, then repeat with --accept-license")
        if input("Accept? [y/N] ").strip().lower() not in {"y", "yes"}:
            raise UsageError("the terms were not accepted; nothing was downloaded")
    with ProgressLine() as progress:
        return store.pull(name, progress=progress, accept_license=True)
